"""``verify_every``, ``verify_repair`` and ``poison`` on a CPU."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch
from support.internals import buffers_of, check_all, inventory_of, watched_buffers

import safealloc
from safealloc import PaddingCorruptionError, PoolClosedError, ScalePool, SfLayout, nvfp4_quantize
from safealloc.kernels import reference
from safealloc.ops import backends

ONE = torch.ones(1)


@pytest.fixture
def guarded():
    """Makes pools; closes them."""
    pools: list[ScalePool] = []

    def make(every: int = 0, **options) -> ScalePool:
        pools.append(ScalePool("cpu", verify_every=every, **options))
        return pools[-1]

    yield make
    for pool in pools:
        pool.close()


def dirty(scales: torch.Tensor, layout: SfLayout, row: int, column: int, byte: int = 0x38) -> None:
    """Write one byte of a buffer."""
    rows, cols = scales.shape
    scales.view(-1)[layout.offsets(rows, 16 * cols)[row, column]] = byte


def a_bad_producer(pool: ScalePool) -> torch.Tensor:
    scales = pool.acquire(5, 80, SfLayout.layout_128x4)
    dirty(scales, SfLayout.layout_128x4, 4, 6)
    return scales


def test_a_pool_that_is_watched_has_no_hit_path(guarded):
    for pool, hits in ((guarded(0), 1), (guarded(1), 0)):
        pool.acquire(5, 80, SfLayout.layout_8x4)
        assert len(inventory_of(pool).ready) == hits


@pytest.mark.parametrize("every", [-1, 1 << 31])
def test_verify_every_out_of_range(every):
    with pytest.raises(ValueError, match="verify_every must be at least 0 and below"):
        ScalePool("cpu", verify_every=every)


@pytest.mark.parametrize("every", [True, 1.0, "2"])
def test_verify_every_of_another_type(every):
    with pytest.raises(TypeError, match="verify_every must be an integer"):
        ScalePool("cpu", verify_every=every)


class TestVerify:
    def test_it_is_found_at_the_nth_handout_and_raised_at_the_next_call(self, guarded):
        pool = guarded(3)
        a_bad_producer(pool)
        pool.acquire(5, 80, SfLayout.layout_128x4)  # the second
        pool.acquire(5, 80, SfLayout.layout_128x4)  # the third: checked, asynchronously
        with pytest.raises(PaddingCorruptionError) as raised:
            pool.acquire(1, 16, SfLayout.layout_8x4)
        (found,) = raised.value.corruptions
        assert (found.spec.rows, found.spec.k, found.spec.layout) == (5, 80, SfLayout.layout_128x4)
        assert (found.row, found.column, found.value, found.count) == (4, 6, 0x38, 1)
        assert pool.acquire(1, 16, SfLayout.layout_8x4).shape == (8, 4)  # raised once; the pool goes on
        pool.verify(repair=True)

    def test_who_was_handed_it_before_the_check_is_named(self, guarded):
        pool = guarded(2)
        a_bad_producer(pool)
        nvfp4_quantize(torch.ones(5, 80, dtype=torch.bfloat16), ONE, pool=pool)
        with pytest.raises(PaddingCorruptionError, match=r"last handed to \S*test_guard.py:\d+ \(a_bad_producer\)$"):
            pool.safe_point()
        pool.verify(repair=True)

    def test_a_function_of_ours_is_named_with_its_caller(self, guarded, monkeypatch):
        pool = guarded(2)

        def writes_padding(x, global_scale, x_fp4, scales, layout, *further):
            dirty(scales, layout, 7, 0)

        row = replace(backends.QUANTIZERS["reference"], run=writes_padding)
        monkeypatch.setitem(backends.QUANTIZERS, "reference", row)
        for _ in range(2):
            nvfp4_quantize(
                torch.ones(5, 80, dtype=torch.bfloat16), ONE, layout=SfLayout.layout_8x4, pool=pool, backend="reference"
            )
        with pytest.raises(PaddingCorruptionError) as raised:
            pool.safe_point()
        (found,) = raised.value.corruptions
        assert found.handed_to.startswith("nvfp4_quantize at ")
        assert "test_guard.py:" in found.handed_to
        pool.verify(repair=True)

    def test_verify_names_it_too(self, guarded):
        pool = guarded(100)
        a_bad_producer(pool)
        with pytest.raises(PaddingCorruptionError, match=r"\(a_bad_producer\)"):
            pool.verify()
        pool.verify(repair=True)

    def test_repair_zeroes_and_logs(self, guarded, caplog):
        pool = guarded(1, verify_repair=True)
        a_bad_producer(pool)
        with caplog.at_level(logging.WARNING, "safealloc"):
            pool.acquire(5, 80, SfLayout.layout_128x4)
            assert not caplog.records
            scales = pool.acquire(5, 80, SfLayout.layout_128x4)
        (record,) = caplog.records
        assert "row 4, column 6" in record.message
        assert "a_bad_producer" in record.message
        assert not scales.view(-1)[SfLayout.layout_128x4.padding_mask(5, 80)].any()
        assert pool.verify() == 1

    @pytest.mark.parametrize(
        ("rows", "k", "layout", "padded_k", "row", "column"),
        [
            (5, 80, SfLayout.layout_128x4, None, 127, 7),
            (5, 80, SfLayout.layout_8x4, None, 0, 5),
            (1, 48, SfLayout.layout_128x4, 128, 0, 3),
            (3, 48, SfLayout.layout_linear, 64, 2, 3),
        ],
    )
    def test_each_layout_and_both_kinds_of_padding(self, guarded, rows, k, layout, padded_k, row, column):
        pool = guarded(1)
        dirty(pool.acquire(rows, k, layout, padded_k=padded_k), layout, row, column)
        pool.acquire(rows, k, layout, padded_k=padded_k)
        with pytest.raises(PaddingCorruptionError, match=f"scale row {row}, column {column}"):
            pool.safe_point()
        pool.verify(repair=True)

    def test_valid_bytes_are_no_padding(self, guarded):
        pool = guarded(1)
        for _ in range(5):
            scales = pool.acquire(5, 80, SfLayout.layout_8x4)
            scales.view(-1)[SfLayout.layout_8x4.offsets(5, 80)] = 0xFF
        pool.safe_point()

    def test_what_was_dirty_and_is_clean_is_a_warning(self, guarded, caplog):
        pool = guarded(1)
        scales = a_bad_producer(pool)
        check_all(pool)
        dirty(scales, SfLayout.layout_128x4, 4, 6, 0)
        with caplog.at_level(logging.WARNING, "safealloc"):
            pool.safe_point()
        assert "is zero now" in caplog.text

    def test_grouped_scales(self, guarded):
        pool = guarded(1)
        offsets, tiles = torch.tensor([0, 2, 5], dtype=torch.int32), torch.tensor([0, 128, 256], dtype=torch.int32)
        x = torch.randn(5, 80, dtype=torch.bfloat16)
        for _ in range(3):
            _, scales = safealloc.nvfp4_quantize_grouped(x, torch.ones(2), offsets, tiles, pool=pool)
        dirty(scales, SfLayout.layout_128x4, 2, 0)  # behind the first expert's rows
        del scales
        pool.acquire_grouped(5, 80, 2)
        with pytest.raises(PaddingCorruptionError, match="scale row 2, column 0"):
            pool.acquire_grouped(5, 80, 2)

    def test_debug_verifies_before_the_guard(self, guarded):
        pool = guarded(1, debug=True)
        a_bad_producer(pool)
        with pytest.raises(PaddingCorruptionError):
            pool.acquire(5, 80, SfLayout.layout_128x4)
        pool.verify(repair=True)

    def test_evicted_buffers_are_forgotten(self, guarded):
        pool = guarded(1, cache_bytes=4096)
        for rows in range(1, 200):
            pool.acquire(rows, 16, SfLayout.layout_8x4)
        assert watched_buffers(pool) == len(buffers_of(pool)) < 20

    def test_a_closed_pool(self, guarded):
        pool = guarded(1)
        a_bad_producer(pool)
        pool.close()
        pool.safe_point()
        with pytest.raises(PoolClosedError):
            pool.acquire(5, 80, SfLayout.layout_128x4)


class TestPoison:
    @pytest.mark.parametrize("layout", SfLayout)
    @pytest.mark.parametrize("cache_bytes", [0, 1 << 20])
    def test_valid_bytes_of_a_new_buffer_are_nan_and_padding_is_zero(self, guarded, layout, cache_bytes):
        pool = guarded(poison=True, cache_bytes=cache_bytes)
        scales = pool.acquire(5, 80, layout).view(-1)
        padding = layout.padding_mask(5, 80)
        assert not scales[padding].any()
        assert scales[~padding].view(torch.float8_e4m3fn).isnan().all()

    def test_a_producer_that_forgets_a_row_is_seen(self, guarded):
        pool = guarded(poison=True)
        pool.reserve(5, 64)
        x, w = torch.randn(5, 64, dtype=torch.bfloat16), torch.randn(8, 64, dtype=torch.bfloat16)
        w_fp4, w_scales = nvfp4_quantize(w, ONE)
        x_fp4, _ = nvfp4_quantize(x, ONE)
        scales = pool.acquire(5, 64, SfLayout.layout_128x4)
        _, linear = reference.encode(x, ONE.reshape(()))
        scales.view(-1)[SfLayout.layout_128x4.offsets(5, 64)[:4]] = linear[:4]
        y = safealloc.mm_fp4(x_fp4, w_fp4.T, scales, w_scales.T, ONE, backend="reference")
        assert y.isnan().all(1).tolist() == [False] * 4 + [True]

    def test_a_reused_buffer_is_not_poisoned_again(self, guarded):
        pool = guarded(poison=True)
        pool.acquire(5, 80, SfLayout.layout_8x4).view(-1)[SfLayout.layout_8x4.offsets(5, 80)] = 1
        assert (pool.acquire(5, 80, SfLayout.layout_8x4).view(-1)[SfLayout.layout_8x4.offsets(5, 80)] == 1).all()

    def test_grouped_scales_are_zero_at_first(self, guarded):
        assert not guarded(poison=True).acquire_grouped(5, 80, 2).any()

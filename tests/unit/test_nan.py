"""The first NaN that enters a quantizer: which call, row, column and step."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

import pytest
import torch
from support.interpreted import printed_lines
from torch import Tensor

import safealloc
from safealloc import NanError, ScalePool

G = torch.ones(1)


@pytest.fixture
def nan_pool(monkeypatch: pytest.MonkeyPatch) -> ScalePool:
    monkeypatch.setenv("SAFEALLOC_STRICT", "1")
    return ScalePool("cpu", nan=True)


def planted(*places: tuple[int, int], value: float = math.nan, rows: int = 8, k: int = 64) -> Tensor:
    x = torch.ones(rows, k, dtype=torch.bfloat16)
    for row, column in places:
        x[row, column] = value
    return x


def quantizers(pool: ScalePool) -> dict[str, Callable[[Tensor], object]]:
    offsets = torch.tensor([0, 4, 6], dtype=torch.int32), torch.tensor([0, 128, 256], dtype=torch.int32)
    return {
        "dense": lambda x: safealloc.nvfp4_quantize(x, G, pool=pool),
        "silu": lambda x: safealloc.silu_and_mul_nvfp4_quantize(x, G, pool=pool),
        "mxfp8": lambda x: safealloc.mxfp8_quantize(x, pool=pool),
        "mxfp4": lambda x: safealloc.mxfp4_quantize(x, pool=pool),
        "grouped": lambda x: safealloc.nvfp4_quantize_grouped(x, G.repeat(2), *offsets, pool=pool),
    }


def first_of(pool: ScalePool) -> safealloc.errors.NotFinite:
    with pytest.raises(NanError) as raised:
        pool.safe_point()
    return raised.value.first


@pytest.mark.parametrize("name", ["dense", "silu", "mxfp8", "mxfp4", "grouped"])
def test_one_nan_is_named_and_only_once(nan_pool: ScalePool, name: str) -> None:
    quantize = quantizers(nan_pool)[name]
    assert nan_pool.nan is not None
    for _ in range(5):
        nan_pool.nan.begin_step()
        quantize(planted())
    nan_pool.safe_point()
    quantize(planted((3, 17), (3, 40), (5, 2)))
    nan_pool.nan.begin_step()
    quantize(planted((0, 0)))  # later
    first = first_of(nan_pool)
    assert (first.row, first.rows, first.column, first.step, first.count) == (3, 8, 17, 5, 4)
    assert "test_nan.py:" in first.layer
    nan_pool.safe_point()
    quantize(planted())
    nan_pool.safe_point()


def test_of_two_at_once_the_earlier_layer_is_named(nan_pool: ScalePool) -> None:
    assert nan_pool.nan is not None
    scales = [torch.ones(1) for _ in range(3)]
    nan_pool.nan.name_layers({scale.data_ptr(): f"layers.{number}" for number, scale in enumerate(scales)})
    for bad in ((), (1, 2), (2,)):
        nan_pool.nan.begin_step()
        for number, scale in enumerate(scales):
            safealloc.nvfp4_quantize(planted(*[(2, 5)] * (number in bad)), scale, pool=nan_pool)
    first = first_of(nan_pool)
    assert (first.layer, first.step) == ("layers.1", 2)


def test_dead_rows_do_not_count(nan_pool: ScalePool) -> None:
    valid = torch.tensor([3], dtype=torch.int32)
    for quantize in (safealloc.nvfp4_quantize, safealloc.silu_and_mul_nvfp4_quantize):
        quantize(planted((3, 0), (7, 63)), G, valid_rows=valid, pool=nan_pool)
    safealloc.mxfp8_quantize(planted((3, 0)), valid_rows=valid, pool=nan_pool)
    quantizers(nan_pool)["grouped"](planted((6, 0)))  # beyond the last group
    nan_pool.safe_point()
    safealloc.nvfp4_quantize(planted((2, 0)), G, valid_rows=valid, pool=nan_pool)
    assert first_of(nan_pool).row == 2


def test_live_rows_of_a_step(nan_pool: ScalePool) -> None:
    nan = nan_pool.nan
    assert nan is not None
    nan.begin_step(3)
    for batch in (8, 4):  # 4: other rows than those of the batch, as of experts
        x = planted((3, 1))
        site = nan.site(x, None, batch=batch)
        assert site is not None
        nan.note(x, site)
        assert nan.alarmed == (batch == 4)
    first = first_of(nan_pool)
    assert (first.row, first.batch) == (3, 4)
    site = nan.site(planted(), None, batch=8, by_expert=True)  # as many as the batch, in another order
    assert site is not None
    nan.note(planted((3, 1)), site)
    assert first_of(nan_pool).row == 3


def test_batches_between_steps_are_dummies(nan_pool: ScalePool) -> None:
    nan = nan_pool.nan
    assert nan is not None
    nan.begin_step()
    nan.end_step()
    site = nan.site(planted(), None, batch=8)
    assert site is not None
    nan.note(planted((0, 0)), site)
    assert not nan.alarmed
    nan.begin_step(1)
    nan.note(planted((0, 0)), site)
    assert first_of(nan_pool).row == 0


def test_looks_that_tell_nothing_new_become_rare(nan_pool: ScalePool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Infinity at every step would synchronize at every step."""
    looks = []
    nan = nan_pool.nan
    assert nan is not None
    monkeypatch.setattr(nan, "_take", lambda take=nan._take: looks.append(1) or list(take()))
    for _ in range(100):
        safealloc.nvfp4_quantize(planted((1, 2), value=math.inf), G, pool=nan_pool)
        nan_pool.safe_point()
    assert len(looks) == 7
    safealloc.nvfp4_quantize(planted((1, 2)), G, pool=nan_pool)
    with pytest.raises(NanError):  # SAFEALLOC_STRICT=1 waits for nothing
        nan_pool.safe_point()


def test_what_a_warm_up_left_is_forgotten(nan_pool: ScalePool) -> None:
    safealloc.nvfp4_quantize(planted((1, 2)), G, pool=nan_pool)
    assert nan_pool.nan is not None
    nan_pool.nan.forget()
    nan_pool.safe_point()


def test_a_pool_made_in_inference_mode_counts_outside_of_it() -> None:
    with torch.inference_mode():
        pool = ScalePool("cpu", nan=True)
    assert pool.nan is not None
    pool.nan.begin_step(2)
    with torch.inference_mode():
        pool.nan.begin_step(2)
    safealloc.nvfp4_quantize(planted((1, 2)), G, pool=pool)
    assert pool.nan.alarmed


def test_infinity_is_told_apart_and_never_raised(nan_pool: ScalePool, caplog: pytest.LogCaptureFixture) -> None:
    safealloc.nvfp4_quantize(planted((1, 2), value=-math.inf), G, pool=nan_pool)
    nan_pool.safe_point()
    (record,) = caplog.records
    assert record.getMessage().startswith("first infinity in nvfp4_quantize at ")
    assert "row 1 of 8, column 2, step 0" in record.getMessage()


def test_without_strict_a_layer_is_logged_once(
    nan_pool: ScalePool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("SAFEALLOC_STRICT")
    for _ in range(3):
        safealloc.nvfp4_quantize(planted((1, 2)), G, pool=nan_pool)
        nan_pool.safe_point()
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


def test_what_cannot_be_watched_is_left_alone(nan_pool: ScalePool, caplog: pytest.LogCaptureFixture) -> None:
    assert nan_pool.nan is not None
    for x in (torch.ones(4), torch.ones(4, 32), planted()[:, ::2], planted(k=8)):
        assert nan_pool.nan.site(x, None) is None
    (record,) = caplog.records
    assert "a quantizer's input is not watched (logged once): torch.float32 [4]" in record.getMessage()


def test_a_pool_without_it_watches_nothing() -> None:
    pool = ScalePool("cpu")
    assert pool.nan is None
    safealloc.nvfp4_quantize(planted((1, 2)), G, pool=pool)
    pool.safe_point()


def test_a_full_table_is_logged(nan_pool: ScalePool, caplog: pytest.LogCaptureFixture) -> None:
    from safealloc.pool import nan

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nan, "MAX_SITES", 1)
        for rows in (1, 2, 3, 1):
            safealloc.nvfp4_quantize(planted(rows=rows), G, pool=nan_pool)
    assert [
        record.getMessage().startswith("nan: what follows the first 1 quantizers") for record in caplog.records
    ] == [True]  # once


INTERPRETED = """
import os, math, sys, torch
import safealloc
from safealloc import ScalePool, NanError
from safealloc.kernels import triton_nan
os.environ["SAFEALLOC_STRICT"] = "1"

offsets = torch.tensor([0, 3, 5], dtype=torch.int32), torch.tensor([0, 128, 256], dtype=torch.int32)
valid = torch.tensor([5], dtype=torch.int32)
g = torch.ones(1)
for dtype in DTYPES:
    pool, plain = ScalePool("cpu", nan=True), ScalePool("cpu")
    calls = {
        "dense": lambda x, pool: safealloc.nvfp4_quantize(x, g, pool=pool, backend="triton", valid_rows=valid),
        "vllm": lambda x, pool: safealloc.nvfp4_quantize(
            x, g, pool=pool, backend="triton", valid_rows=valid, arithmetic="vllm"
        ),
        "silu": lambda x, pool: safealloc.silu_and_mul_nvfp4_quantize(x, g, pool=pool, backend="triton", valid_rows=valid),
        "mx": lambda x, pool: safealloc.mxfp8_quantize(x, pool=pool, backend="triton", valid_rows=valid),
        "grouped": lambda x, pool: safealloc.nvfp4_quantize_grouped(x, g.repeat(2), *offsets, pool=pool, backend="triton"),
        "silu grouped": lambda x, pool: safealloc.silu_and_mul_nvfp4_quantize_grouped(
            x, g.repeat(2), *offsets, pool=pool, backend="triton"
        ),
    }
    def node(x, pool):
        if pool.nan is not None:
            site = pool.nan.site(x, None)
            triton_nan.note(x, site, valid)
    calls["node"] = node
    k = 544  # halves are whole blocks, and MX blocks too
    for name, call in calls.items():
        if name not in CALLS:
            continue
        for kind, places, expected in (
            ("dead", [(5, 0), (6, k - 1)], None), ("some", [(2, 520), (2, 130), (3, 5), (6, 0)], (2, 130, 3)),
        ):
            x = torch.randn(7, k, dtype=dtype)
            x[1, 3], x[0, 0] = 3e38 if dtype is torch.bfloat16 else 65504, -0.0
            for place in places:
                x[place] = math.nan
            got = call(x, pool)
            if got is not None and pool is not None:
                ours, theirs = (one.view(torch.uint8) for one in got), (one.view(torch.uint8) for one in call(x, plain))
                assert all(map(torch.equal, ours, theirs)), name
            try:
                pool.safe_point()
                found = None
            except NanError as error:
                found = error.first.row, error.first.column, error.first.count
            assert found == expected, (name, dtype, kind, found)
        print(name)
"""


def test_kernels_name_the_same_with_the_bits_of_the_quantizer_unchanged() -> None:
    given = "CALLS, DTYPES = ('dense', 'node'), [torch.bfloat16]\noffsets ="
    assert printed_lines(INTERPRETED.replace("offsets =", given, 1)) == ["dense", "node"]


@pytest.mark.slow
def test_all_kernels_name_the_same_in_both_dtypes() -> None:
    calls = ("dense", "vllm", "silu", "mx", "grouped", "silu grouped", "node")
    given = f"CALLS, DTYPES = {calls}, [torch.bfloat16, torch.float16]\noffsets ="
    assert len(printed_lines(INTERPRETED.replace("offsets =", given, 1))) == 14

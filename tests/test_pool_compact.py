"""``ScalePool(compact=True)`` on a CPU: one buffer for all row counts of a padded shape, with nothing left of larger ones."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from safealloc import (
    CaptureGrowthWarning,
    LayoutMismatchError,
    PaddingCorruptionError,
    PoolClosedError,
    PoolExhaustedError,
    SafeAllocError,
    ScalePool,
    ScaleSpec,
    SfLayout,
    backends,
    buffers,
    mm_fp4,
    nvfp4_linear,
    nvfp4_quantize,
    use_pool,
)
from safealloc.buffers import record_of
from safealloc.kernels import reference

W, N, L = SfLayout.layout_128x4, SfLayout.layout_8x4, SfLayout.layout_linear
ONE = torch.ones(1)
tiled = pytest.mark.parametrize("layout", [W, N], ids=lambda layout: layout.name)


@pytest.fixture
def pool() -> Iterator[ScalePool]:
    with ScalePool("cpu", compact=True) as pool:
        yield pool


def activation(rows: int, k: int, seed: int = 0) -> Tensor:
    """No block is zero, so that no scale is."""
    return torch.randn(rows, k, generator=torch.Generator().manual_seed(seed)).bfloat16() + 4


def expected(x: Tensor, layout: SfLayout, valid_rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The reference's, in zeroed memory of its own."""
    x_fp4 = torch.empty(x.shape[0], x.shape[1] // 2, dtype=torch.uint8)
    scales = torch.zeros(layout.padded_shape(*x.shape), dtype=torch.uint8)
    reference.quantize(x, ONE, x_fp4, scales, layout, valid_rows)
    return x_fp4, scales


def check(pool: ScalePool, rows: int, k: int, layout: SfLayout, valid: int | None = None, seed: int = 0) -> Tensor:
    """Quantise, and compare every byte with the reference's; returns the scales."""
    x = activation(rows, k, seed)
    valid_rows = None if valid is None else torch.tensor([valid], dtype=torch.int32)
    x_fp4, scales = nvfp4_quantize(x, ONE, layout=layout, pool=pool, valid_rows=valid_rows)
    expected_fp4, expected_scales = expected(x, layout, valid_rows)
    assert torch.equal(x_fp4, expected_fp4)
    assert torch.equal(scales, expected_scales)
    return scales


def counts(pool: ScalePool, scales: Tensor) -> list[int]:
    spec = pool.spec(scales)
    assert spec is not None
    found = record_of(spec, scales)
    assert found is not None
    return found.tolist()


class TestSpec:
    @pytest.mark.parametrize(
        ("rows", "layout", "padded"), [(1, W, 128), (128, W, 128), (129, W, 256), (1, N, 8), (8, N, 8), (9, N, 16)]
    )
    def test_all_rows_of_a_padded_shape_have_one(self, rows: int, layout: SfLayout, padded: int) -> None:
        spec = ScaleSpec.checked(rows, 1040, layout, compact=True)
        assert spec == ScaleSpec(padded, 1040, layout, compact=True)
        assert spec.padded_shape == layout.padded_shape(rows, 1040)
        assert spec.record == 3  # of 65 columns
        assert spec.scale_bytes == layout.nbytes(rows, 1040)
        assert spec.nbytes == spec.scale_bytes + 4 * 3
        assert "compact" in str(spec)
        assert [spec.holds_rows(r) for r in (rows, padded, padded + 1)] == [True, True, False]

    def test_a_linear_layout_pads_no_rows(self) -> None:
        spec = ScaleSpec.checked(5, 48, L, compact=True)
        assert spec == ScaleSpec(5, 48, L)
        assert (spec.record, spec.nbytes) == (0, 15)

    def test_there_is_no_padded_k(self, pool: ScalePool) -> None:
        with pytest.raises(ValueError, match="no padded_k"):
            pool.reserve(8, 64, W, padded_k=128)
        pool.reserve(8, 64, W, padded_k=64)
        assert pool.stats().buffers == 1


@st.composite
def steps(draw: st.DrawFn) -> tuple[int, int, SfLayout, int | None]:
    layout = draw(st.sampled_from(list(SfLayout)))
    rows = draw(st.integers(1, 140 if layout is W else 17))
    valid = draw(st.none() | st.integers(-1, rows + 1))
    return rows, draw(st.sampled_from([16, 512, 560, 1040])), layout, valid


@settings(deadline=None, max_examples=60)
@given(sequence=st.lists(st.tuples(steps(), st.booleans()), min_size=1, max_size=12), reserved=st.booleans())
def test_any_sequence_leaves_what_the_reference_writes_and_zeros(
    sequence: list[tuple[tuple[int, int, SfLayout, int | None], bool]], reserved: bool
) -> None:
    shapes = set()
    with ScalePool("cpu", compact=True) as pool:
        if reserved:
            for (rows, k, layout, _), _ in sequence:
                pool.reserve(rows, k, layout)
        kept = []  # what somebody holds is somebody's, and what comes back is used again
        for seed, (step, keep) in enumerate(sequence):
            rows, k, layout, _ = step
            scales = check(pool, *step, seed=seed)
            if layout is not L:
                assert counts(pool, scales) == [rows] * -(-k // 512)
            shapes.add((*scales.shape, k, layout))
            if keep:
                kept.append((scales, scales.clone()))
            del scales
        for scales, then in kept:
            assert torch.equal(scales, then)
        assert pool.verify() == pool.stats().buffers
        if not kept:
            assert pool.stats().buffers == len(shapes)


@tiled
def test_what_a_larger_batch_left_is_cleared(pool: ScalePool, layout: SfLayout) -> None:
    """In the same buffer, where those rows held scales."""
    first = check(pool, 8, 1040, layout)
    assert (layout.logical(first, 8, 1040)[:8, :65] != 0).all()
    address = first.data_ptr()
    del first
    second = check(pool, 3, 1040, layout)
    assert second.data_ptr() == address
    assert not layout.logical(second, 8, 1040)[3:].any()
    assert pool.stats().buffers == 1


def test_a_quantiser_that_does_not_clear_is_found_out(pool: ScalePool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the tests here look for is not zero by chance, nor because the pool had cleared it."""
    row = backends.QUANTIZERS["reference"]
    careless = dataclasses.replace(row, run=lambda *given: row.run(*given[:6]))
    monkeypatch.setitem(backends.QUANTIZERS, "reference", careless)
    check(pool, 8, 1040, N)
    with pytest.raises(AssertionError):
        check(pool, 3, 1040, N)
    with pytest.raises(PaddingCorruptionError):
        pool.verify()


@tiled
def test_reference_takes_counts_that_differ_group_by_group(layout: SfLayout) -> None:
    """Only what a count says is cleared: the rest is not this quantiser's."""
    rows, k, columns = 2, 1040, [slice(0, 32), slice(32, 64), slice(64, 65)]
    logical = torch.zeros(layout.round_up(rows, 1)[0], k // 16, dtype=torch.uint8)
    kept = [7, 2, 4]
    for count, group in zip(kept, columns, strict=True):
        logical[: count + 1, group] = 9  # a row more than the count
    scales, recorded = layout.swizzle(logical), torch.tensor(kept, dtype=torch.int32)
    x = activation(rows, k)
    reference.quantize(x, ONE, torch.empty(rows, k // 2, dtype=torch.uint8), scales, layout, counts=recorded)
    found = layout.logical(scales, 8, k)
    assert torch.equal(found[:rows, :65], layout.unswizzle(expected(x, layout)[1], rows, k))
    for count, group in zip(kept, columns, strict=True):
        assert not found[rows:count, group].any()
        assert (found[count, group] == 9).all()
    assert recorded.tolist() == [rows] * 3


# --- the pool ---------------------------------------------------------------------------------------------------------


def test_one_buffer_a_padded_shape(pool: ScalePool) -> None:
    pool.reserve(range(1, 65), 1040, W)
    assert (pool.stats().buffers, pool.stats().bytes) == (1, 128 * 68 + 3 * 4)
    pool.reserve(range(1, 65), 1040, N)
    assert pool.stats().buffers == 1 + 8
    pool.reserve((5, 9), 1040, L)
    assert pool.stats().buffers == 1 + 8 + 2
    pool.reserve(range(1, 65), 1040, W, copies=2)
    assert pool.stats().buffers == 1 + 8 + 2 + 1
    pool.reserve(64, 1040, W, copies=2)
    held = [check(pool, rows, 1040, W) for rows in (1, 64)]
    assert pool.stats().buffers == 12
    assert pool.misses == 0
    assert held[0].data_ptr() != held[1].data_ptr()


def test_held_counts_the_padded_shape(pool: ScalePool) -> None:
    scales = check(pool, 5, 64, W)
    assert pool.held(5, 64, W) == pool.held(128, 64, W) == 1
    assert pool.held(129, 64, W) == 0
    del scales
    assert pool.held(5, 64, W) == 0


def test_an_alias_of_the_storage_holds_the_buffer(pool: ScalePool) -> None:
    """Scales and counts are one piece of memory, with one use count."""
    scales = check(pool, 5, 64, W)
    recorded = record_of(ScaleSpec(128, 64, W, compact=True), scales)
    address = scales.data_ptr()
    assert recorded.data_ptr() == address + 512
    assert recorded.data_ptr() % 4 == address % 512 == 0
    del scales
    assert check(pool, 7, 64, W).data_ptr() != address
    del recorded
    assert address in [check(pool, 7, 64, W, seed=seed).data_ptr() for seed in range(2)]


def test_counts_count_towards_max_bytes() -> None:
    size = W.nbytes(1, 1040) + 3 * 4
    with ScalePool("cpu", compact=True, max_bytes=size - 1) as pool:
        for attempt in (lambda: pool.reserve(1, 1040), lambda: check(pool, 1, 1040, W)):
            with pytest.raises(PoolExhaustedError):
                attempt()
        assert pool.stats().bytes == 0
    with ScalePool("cpu", compact=True, max_bytes=size) as pool:
        scales = check(pool, 1, 1040, W)
        assert pool.stats().bytes == size
        with pytest.raises(PoolExhaustedError):
            check(pool, 2, 1040, W)
        del scales
        check(pool, 128, 1040, W)
        assert pool.trim() == size


def test_buffers_made_for_one_call() -> None:
    size = N.nbytes(1, 1040) + 3 * 4
    with ScalePool("cpu", compact=True, cache_bytes=size - 1, max_bytes=2 * size) as pool:
        first, second = check(pool, 8, 1040, N), check(pool, 3, 1040, N)
        assert pool.stats().buffers == 0
        assert (counts(pool, first), counts(pool, second)) == ([8] * 3, [3] * 3)
        with pytest.raises(PoolExhaustedError):
            check(pool, 3, 1040, N)
        assert pool.verify() == 2
        second[7, 67] = 1  # past the last row and column
        with pytest.raises(PaddingCorruptionError):
            pool.verify()


class TestCapture:
    """A capture that is played: what it hands out, and to whom; replays are tests/gpu/test_compact.py's."""

    @staticmethod
    def play(pool: ScalePool, monkeypatch: pytest.MonkeyPatch, handle: str, number: int = 1) -> SimpleNamespace:
        graph = SimpleNamespace(id=number, handle=handle, alive=True, kept=[])
        graph.keep = graph.kept.append
        monkeypatch.setattr(pool, "_raw_stream", lambda index: 7)
        monkeypatch.setattr(pool, "_capturing", lambda stream: True)
        monkeypatch.setattr(pool, "_capture", lambda: graph)
        return graph

    def test_graphs_of_one_handle_share_a_buffer_whatever_their_rows(
        self, pool: ScalePool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pool.reserve((8, 64), 1040)
        addresses = set()
        for number, rows in enumerate((64, 8, 17)):
            with monkeypatch.context() as patch:
                graph = self.play(pool, patch, "handle", number)
                addresses.add(check(pool, rows, 1040, W).data_ptr())
                assert len(graph.kept) == 1
        assert len(addresses) == 1
        assert pool.stats().captured == 1
        assert pool.misses == 0
        assert pool.verify() == 1
        assert check(pool, 8, 1040, W).data_ptr() not in addresses

    def test_growth_has_counts(self, pool: ScalePool, monkeypatch: pytest.MonkeyPatch) -> None:
        with monkeypatch.context() as patch:
            self.play(pool, patch, "handle")
            with pytest.warns(CaptureGrowthWarning, match="reserve"):
                scales = check(pool, 5, 1040, W)
            assert counts(pool, scales) == [5] * 3
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # said once a padded shape
                check(pool, 6, 1040, W)
        assert pool.stats().capture_fallbacks == 2
        assert pool.spec(scales) == ScaleSpec(128, 1040, W, compact=True)


# --- who may not ------------------------------------------------------------------------------------------------------

FOREIGN: dict[str, tuple[type[Exception], str, Callable[[ScalePool], object]]] = {
    "acquire": (SafeAllocError, "nvfp4_quantize", lambda pool: pool.acquire(5, 64, W)),
    "acquire, linear": (SafeAllocError, "nvfp4_linear", lambda pool: pool.acquire(5, 64, L, padded_k=None)),
    "op": (SafeAllocError, "without compact", lambda pool: torch.ops.safealloc.acquire(5, 64, 0, pool.device)),
    "op, padded": (SafeAllocError, "compact", lambda pool: torch.ops.safealloc.acquire(5, 64, 0, pool.device, 128)),
} | {
    f"backend {name}": (
        ValueError,
        f"{name} does not clear what a larger batch left",
        lambda pool, name=name: nvfp4_quantize(activation(5, 64), ONE, pool=pool, backend=name),
    )
    for name in ("flashinfer", "vllm")
}


@pytest.mark.parametrize("who", FOREIGN)
def test_foreign_writers_are_refused_and_leave_no_trace(pool: ScalePool, who: str) -> None:
    error, says, attempt = FOREIGN[who]
    check(pool, 8, 64, W)
    before, buffer = pool.stats(), check(pool, 8, 64, W).clone()
    with use_pool(pool), pytest.raises(error, match=says):
        attempt(pool)
    after = pool.stats()
    assert dataclasses.replace(before, hits=before.hits + 1) == after
    assert torch.equal(check(pool, 8, 64, W), buffer)


@pytest.mark.parametrize("who", [who for who in FOREIGN if not who.startswith("backend")])
def test_they_may_use_a_pool_that_is_not(who: str) -> None:
    with ScalePool("cpu") as plain, use_pool(plain):
        FOREIGN[who][2](plain)
        assert not plain.compact


def test_the_fused_path_of_compiled_code_is_refused_when_it_runs(pool: ScalePool) -> None:
    @torch.compile
    def produce(x: Tensor) -> Tensor:
        return torch.ops.safealloc.acquire(x.shape[0], 64, 0, x.device)

    with use_pool(pool), pytest.raises(SafeAllocError, match="compact"):
        produce(torch.ones(5, 64))


def test_a_closed_compact_pool(pool: ScalePool) -> None:
    pool.close()
    for use in (lambda: pool.acquire(8, 64, W), lambda: check(pool, 8, 64, W)):
        with pytest.raises(PoolClosedError):
            use()


# --- verify -----------------------------------------------------------------------------------------------------------


@tiled
def test_verify_names_what_lies_beyond_the_last_rows_and_columns(pool: ScalePool, layout: SfLayout) -> None:
    scales = check(pool, 7, 1040, layout)
    del scales
    scales = check(pool, 5, 1040, layout)  # row 6 held scales before
    clean = scales.clone()
    at = SfLayout.offsets(layout, scales.shape[0], 1040 + 48)
    real = scales.view(-1)[at[4, 64]].item()
    assert real
    for row, column, value in ((6, 40, 0x7F), (2, 66, 1), (7, 64, 2)):
        scales.view(-1)[at[row, column]] = value
    with pytest.raises(PaddingCorruptionError, match="0x01 at scale row 2, column 66") as error:
        pool.verify()
    (corruption,) = error.value.corruptions
    assert corruption.spec == ScaleSpec(scales.shape[0], 1040, layout, compact=True)
    assert (corruption.row, corruption.column, corruption.value, corruption.count) == (2, 66, 1, 3)
    assert pool.verify(repair=True) == 1
    assert torch.equal(scales, clean)
    assert counts(pool, scales) == [5] * 3
    assert pool.verify() == 1


def test_verify_leaves_real_rows_alone(pool: ScalePool) -> None:
    scales = check(pool, 5, 48, N)
    scales.view(-1)[N.offsets(5, 48).view(-1)] = 0xFF
    then = scales.clone()
    assert pool.verify() == pool.verify(repair=True) == 1
    assert torch.equal(scales, then)


def test_a_new_buffer_is_zero_whatever_was_there(pool: ScalePool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buffers, "_aligned", lambda nbytes, device: torch.full((nbytes,), 0xFF, dtype=torch.uint8))
    pool.reserve(5, 1040, N)
    (buffer,) = pool._inventory.by_address.values()
    assert not buffer.base.any()
    assert buffer.record.tolist() == [0, 0, 0]
    check(pool, 3, 1040, N)
    assert pool.verify() == 1


def test_a_new_buffer_has_no_real_row(pool: ScalePool) -> None:
    pool.reserve(8, 64, N)
    (buffer,) = pool._inventory.by_address.values()
    assert pool.verify() == 1
    buffer.base[0, 0] = 1
    with pytest.raises(PaddingCorruptionError, match="row 0, column 0"):
        pool.verify()


@pytest.mark.parametrize("layout", list(SfLayout), ids=lambda layout: layout.name)
def test_debug_verifies_before_each_quantisation(layout: SfLayout) -> None:
    with ScalePool("cpu", compact=True, debug=True) as pool:
        scales = check(pool, 5, 80, W)
        check(pool, 5, 80, layout)
        scales[127, 0] = 1
        then, before = scales.clone(), pool.stats()
        with pytest.raises(PaddingCorruptionError):
            check(pool, 3, 80, layout)
        assert pool.stats() == before
        assert torch.equal(scales, then)
        pool.verify(repair=True)
        check(pool, 3, 80, layout)
        with pytest.raises(SafeAllocError, match="compact"):
            pool.acquire(5, 80, layout)


# --- who reads --------------------------------------------------------------------------------------------------------


def weight(n: int, k: int) -> tuple[Tensor, Tensor]:
    with ScalePool("cpu") as pool:
        fp4, scales = nvfp4_quantize(activation(n, k, 99) - 4, ONE, pool=pool)
        return fp4, scales.clone()


@tiled
def test_mm_reads_the_rows_it_is_given(pool: ScalePool, layout: SfLayout) -> None:
    fp4, w_scales = weight(48, 80)
    for rows in (8, 3, 8, 1):
        x_fp4, scales = nvfp4_quantize(activation(rows, 80, rows), ONE, layout=layout, pool=pool)
        y = mm_fp4(x_fp4, fp4.T, scales, w_scales.T, backend="reference")
        plain_fp4, plain = expected(activation(rows, 80, rows), layout)
        out = torch.empty(rows, 48, dtype=torch.bfloat16)
        reference.mm(plain_fp4, fp4, plain, w_scales, None, out, layout)
        assert torch.equal(y, out)
        del scales
    assert pool.stats().buffers == 1


def test_mm_refuses_rows_of_another_padded_shape_and_another_layout(pool: ScalePool) -> None:
    fp4, w_scales = weight(48, 80)
    _, scales = nvfp4_quantize(activation(5, 80), ONE, layout=N, pool=pool)
    for rows in (9, 16, 128):
        with pytest.raises(LayoutMismatchError, match=f"a row count that pads to 8 rows, a has {rows}"):
            mm_fp4(torch.zeros(rows, 40, dtype=torch.uint8), fp4.T, scales, w_scales.T, backend="reference")
    with pytest.raises(LayoutMismatchError, match="layout_8x4"):
        mm_fp4(torch.zeros(5, 40, dtype=torch.uint8), fp4.T, scales, w_scales.T, use_8x4_sf_layout=False)
    with pytest.raises(ValueError, match="whole buffer"):
        mm_fp4(torch.zeros(5, 40, dtype=torch.uint8), fp4.T, scales[:4], w_scales.T, backend="reference")
    with ScalePool("cpu") as plain:  # where the rows are exact, as ever
        _, exact = nvfp4_quantize(activation(5, 80), ONE, layout=N, pool=plain)
        with pytest.raises(LayoutMismatchError, match="written for 5 rows, a has 4"):
            mm_fp4(torch.zeros(4, 40, dtype=torch.uint8), fp4.T, exact, w_scales.T, backend="reference")


def test_linear_and_the_op_on_a_compact_default_pool(pool: ScalePool) -> None:
    fp4, w_scales = weight(48, 80)

    def through(chosen: ScalePool, rows: int, compiled: bool) -> tuple[Tensor, ...]:
        def layer(x: Tensor) -> tuple[Tensor, ...]:
            return nvfp4_linear(x, fp4, w_scales, ONE, None), *nvfp4_quantize(x * 2, ONE, layout=W)

        with use_pool(chosen):
            results = (torch.compile(layer, dynamic=False) if compiled else layer)(activation(rows, 80, rows))
            return tuple(result.clone() for result in results)

    with ScalePool("cpu") as plain:
        for rows in (33, 8, 100, 8):
            for compiled in (False, True):
                for one, other in zip(through(pool, rows, compiled), through(plain, rows, compiled=False), strict=True):
                    assert torch.equal(one, other)
    torch._dynamo.reset()
    assert pool.verify() == pool.stats().buffers
    assert {buffer.spec.rows for buffer in pool._inventory.by_address.values()} <= {8, 128}

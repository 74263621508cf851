"""Rows routed to experts on a CPU: buffers that are sized right, and in which nothing of an earlier routing is left."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import safealloc
from safealloc import (
    LayoutMismatchError,
    PaddingCorruptionError,
    PoolClosedError,
    PoolExhaustedError,
    SafeAllocError,
    ScalePool,
    ScaleSpec,
    SfLayout,
    clean_grouped_scales,
    mm_fp4,
    nvfp4_quantize_grouped,
    silu_and_mul_nvfp4_quantize_grouped,
    use_pool,
)
from safealloc.kernels import reference, reference_grouped
from safealloc.ops import backends
from safealloc.pool import buffer

K = 80  # 5 scale columns, of which tiles make 8
layouts = pytest.mark.parametrize("layout", list(SfLayout), ids=lambda layout: layout.name)


@pytest.fixture
def pool() -> Iterator[ScalePool]:
    with ScalePool("cpu") as pool:
        yield pool


def offsets(counts: list[int], layout: SfLayout) -> tuple[Tensor, Tensor]:
    """Of groups of so many rows, as vLLM's ``get_cutlass_moe_mm_data`` computes them."""
    expert, scale = [0], [0]
    for count in counts:
        expert.append(expert[-1] + count)
        scale.append(scale[-1] + layout.round_up(count, 1)[0])
    return torch.tensor(expert, dtype=torch.int32), torch.tensor(scale, dtype=torch.int32)


def activation(rows: int, k: int = K, seed: int = 0) -> Tensor:
    """No block is zero, so that no scale is."""
    return torch.randn(rows, k, generator=torch.Generator().manual_seed(seed)).bfloat16() + 4


def expected(
    x: Tensor,
    global_scales: Tensor,
    counts: list[int],
    layout: SfLayout,
    dead: Callable[[int], bool] = lambda row: False,
) -> tuple[Tensor, Tensor]:
    """Data, and scales in matrix order for the worst routing, from one call of the dense reference for each expert."""
    rows, k = x.shape
    data = torch.zeros(rows, k // 2, dtype=torch.uint8)
    logical = torch.zeros(layout.padded_shape(layout.grouped_rows(rows, len(counts)), k), dtype=torch.uint8)
    expert_offsets, scale_offsets = (values.tolist() for values in offsets(counts, layout))
    for expert, count in enumerate(counts):
        if not count:
            continue
        first, scale_row = expert_offsets[expert], scale_offsets[expert]
        own = x[first : first + count]
        linear = torch.empty(count, k // 16, dtype=torch.uint8)
        packed = torch.empty(count, k // 2, dtype=torch.uint8)
        reference.quantize(own, global_scales[expert : expert + 1], packed, linear, SfLayout.layout_linear)
        for row in range(count):
            if not dead(first + row):
                data[first + row] = packed[row]
                logical[scale_row + row, : k // 16] = linear[row]
    return data, logical


def logical(pool: ScalePool, scales: Tensor, layout: SfLayout, k: int = K) -> Tensor:
    """All of the buffer in matrix order, beyond what ``scales`` shows too."""
    base = pool._inventory.by_address[scales.data_ptr()].base
    return layout.logical(base, base.shape[0], k)


def check(pool: ScalePool, counts: list[int], layout: SfLayout, *, nowhere: int = 0, seed: int = 0) -> Tensor:
    """Quantize, and compare every byte of the buffer."""
    rows = sum(counts) + nowhere
    x = activation(rows, seed=seed)
    global_scales = torch.arange(1, len(counts) + 1, dtype=torch.float32)
    data, scales = nvfp4_quantize_grouped(x, global_scales, *offsets(counts, layout), layout=layout, pool=pool)
    wanted_data, wanted = expected(x, global_scales, counts, layout)
    assert torch.equal(data, wanted_data)
    assert scales.shape == wanted.shape
    found = logical(pool, scales, layout)
    assert torch.equal(found[: len(wanted)], wanted)
    assert not found[len(wanted) :].any()
    return scales


# --- how many rows ----------------------------------------------------------------------------------------------------


@given(
    layout=st.sampled_from(list(SfLayout)),
    counts=st.lists(st.integers(0, 300), min_size=1, max_size=12).filter(any),
)
def test_no_routing_needs_more_rows(layout: SfLayout, counts: list[int]) -> None:
    needed = sum(layout.round_up(count, 1)[0] for count in counts)
    assert needed <= layout.grouped_rows(sum(counts), len(counts))


@given(layout=st.sampled_from(list(SfLayout)), rows=st.integers(1, 2000), experts=st.integers(1, 300))
def test_a_routing_needs_that_many(layout: SfLayout, rows: int, experts: int) -> None:
    """One row for as many experts as there can be, the rest for the last of them."""
    groups = min(rows, experts)
    counts = [1] * (groups - 1) + [rows - groups + 1]
    assert sum(layout.round_up(count, 1)[0] for count in counts) == layout.grouped_rows(rows, experts)


def test_what_vllm_would_allocate_for_deepseek_r1() -> None:
    """8 experts a token of 256: 587 MB a call at k 7168, in every batch."""
    spec = ScaleSpec.grouped(512 * 8, 7168, SfLayout.layout_128x4, 256)
    assert 163840 * 8 * 448 == 587_202_560
    assert spec.padded_shape == (36608, 448)
    assert spec.scale_bytes == (512 * 8 + 127 * 256) * 448
    assert spec.nbytes == spec.scale_bytes + 4 * 512 * 8
    assert SfLayout.layout_128x4.grouped_rows(8, 256) == 8 * 128


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ((0, 64, SfLayout.layout_128x4, 2), "rows must be at least 1"),
        ((4, 60, SfLayout.layout_128x4, 2), "k must be a positive multiple of 16"),
        ((4, 64, 3, 2), "layout must be one of"),
        ((4, 64, SfLayout.layout_128x4, 0), "experts must be at least 1"),
        ((4, 64, SfLayout.layout_128x4, 2.0), "experts must be an integer"),
        ((4, 64, SfLayout.layout_128x4, True), "experts must be an integer"),
    ],
)
def test_wrong_numbers(pool: ScalePool, arguments: tuple[Any, ...], error: str) -> None:
    rows, k, layout, experts = arguments
    with pytest.raises((ValueError, TypeError), match=error):
        pool.acquire_grouped(rows, k, experts, layout)
    with pytest.raises((ValueError, TypeError), match=error):
        pool.reserve(rows, k, layout, experts=experts)
    assert pool.stats().buffers == 0


# --- every byte -------------------------------------------------------------------------------------------------------

routings = st.tuples(
    st.sampled_from(list(SfLayout)),
    st.lists(st.integers(0, 9) | st.integers(0, 140), min_size=3, max_size=3),
    st.integers(0, 5),
    st.booleans(),
).filter(lambda drawn: sum(drawn[1]) + drawn[2])


@settings(deadline=None, max_examples=60)
@given(sequence=st.lists(routings, min_size=1, max_size=10), reserved=st.booleans(), compact=st.booleans())
def test_any_sequence_of_routings_leaves_what_the_last_wrote_and_zeros(
    sequence: list[tuple[SfLayout, list[int], int, bool]], reserved: bool, compact: bool
) -> None:
    with ScalePool("cpu", compact=compact) as pool:
        if reserved:
            for layout in SfLayout:
                pool.reserve(3 * 140 + 5, K, layout, experts=3)
        kept = []
        for seed, (layout, counts, nowhere, keep) in enumerate(sequence):
            scales = check(pool, counts, layout, nowhere=nowhere, seed=seed)
            if keep:
                kept.append((scales, scales.clone()))
            del scales
        for scales, then in kept:
            assert torch.equal(scales, then)
        assert pool.verify() == pool.stats().buffers
        if reserved and not kept:
            assert pool.stats().buffers == 3


def test_a_quantizer_that_does_not_clean_is_found_out(pool: ScalePool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the tests here look for is not zero by chance."""
    row = backends.GROUPED_QUANTIZERS["reference"]
    careless = dataclasses.replace(row, run=lambda *given: row.run(*given[:5], None, *given[6:]))
    monkeypatch.setitem(backends.GROUPED_QUANTIZERS, "reference", careless)
    check(pool, [3, 9], SfLayout.layout_8x4)
    with pytest.raises(AssertionError):
        check(pool, [9, 3], SfLayout.layout_8x4)
    with pytest.raises(PaddingCorruptionError, match="experts=2"):
        pool.verify()
    assert pool.verify(repair=True) == 1
    assert pool.verify() == 1


@layouts
def test_silu_and_mul(pool: ScalePool, layout: SfLayout) -> None:
    counts = [2, 0, 9]
    x, global_scales = activation(11, 2 * K), torch.tensor([1.0, 2.0, 3.0])
    data, scales = silu_and_mul_nvfp4_quantize_grouped(
        x, global_scales, *offsets(counts, layout), layout=layout, pool=pool
    )
    gate, up = x.float().chunk(2, -1)
    product = (torch.nn.functional.silu(gate) * up).bfloat16()
    assert torch.equal(product, reference_grouped.multiply(x))  # no value here is near the middle of two
    wanted_data, wanted = expected(product, global_scales, counts, layout)
    assert torch.equal(data, wanted_data)
    assert torch.equal(logical(pool, scales, layout), wanted)


@pytest.mark.parametrize("silu", [False, True], ids=["quantize", "silu_and_mul"])
def test_dead_rows_reach_nobody(pool: ScalePool, silu: bool) -> None:
    """Tokens 3 and later are dead and hold NaN; their rows lie among the others'."""
    counts = [3, 5]
    row_tokens = torch.tensor([0, 4, 2, 3, 1, 0, 4, 2], dtype=torch.int32)
    x = activation(8, 2 * K if silu else K)
    clean = x.clone()
    x[row_tokens >= 3] = float("nan")
    function = silu_and_mul_nvfp4_quantize_grouped if silu else nvfp4_quantize_grouped
    one, given_offsets = torch.ones(2), offsets(counts, SfLayout.layout_8x4)
    valid_rows = torch.tensor([3], dtype=torch.int32)
    data, scales = function(
        x, one, *given_offsets, layout=SfLayout.layout_8x4, pool=pool, valid_rows=valid_rows, row_tokens=row_tokens
    )
    of = reference_grouped.multiply(clean) if silu else clean
    wanted_data, wanted = expected(of, one, counts, SfLayout.layout_8x4, dead=lambda row: int(row_tokens[row]) >= 3)
    assert torch.equal(data, wanted_data)
    assert torch.equal(logical(pool, scales, SfLayout.layout_8x4), wanted)
    # Without the tokens, a row is one.
    data, _ = function(
        x[:3].contiguous(),
        one,
        *offsets([3, 0], SfLayout.layout_8x4),
        layout=SfLayout.layout_8x4,
        pool=pool,
        valid_rows=valid_rows,
    )
    assert (data[1] == 0x77).all()  # NaN in the row, as it is valid


def test_rows_that_are_routed_nowhere(pool: ScalePool) -> None:
    """With experts on other ranks, the rest of the rows hold whatever was there."""
    x = activation(6)
    x[4:] = float("nan")
    data, scales = nvfp4_quantize_grouped(
        x, torch.ones(2), *offsets([0, 4], SfLayout.layout_8x4), layout=SfLayout.layout_8x4, pool=pool
    )
    assert not data[4:].any()
    assert data[:4].any()
    assert torch.equal(
        logical(pool, scales, SfLayout.layout_8x4), expected(x, torch.ones(2), [0, 4], SfLayout.layout_8x4)[1]
    )


# --- beside another producer ------------------------------------------------------------------------------------------


def produce(x: Tensor, scales: Tensor, counts: list[int], layout: SfLayout) -> None:
    """As vLLM's: the real scales, and nothing else."""
    data = torch.empty(x.shape[0], x.shape[1] // 2, dtype=torch.uint8)
    one = torch.ones(len(counts))
    reference_grouped.quantize(x, one, data, scales, layout, None, *offsets(counts, layout))


@layouts
@pytest.mark.parametrize("first", [False, True], ids=["cleaned after", "cleaned before"])
def test_cleaning(pool: ScalePool, layout: SfLayout, first: bool) -> None:
    pool.reserve(24, K, layout, experts=3)
    for seed, counts in enumerate(([3, 0, 9], [9, 3, 0], [0, 0, 1], [8, 8, 8], [1, 1, 1])):
        rows = sum(counts)
        x = activation(rows, seed=seed)
        scales = pool.acquire_grouped(rows, K, 3, layout)
        given_offsets = offsets(counts, layout)
        view = scales.view(torch.float8_e4m3fn) if seed % 2 else scales
        if first:
            clean_grouped_scales(view, *given_offsets, rows)
        produce(x, scales, counts, layout)
        if not first:
            clean_grouped_scales(view, *given_offsets)
        wanted = expected(x, torch.ones(3), counts, layout)[1]
        found = logical(pool, scales, layout)
        assert torch.equal(found[: len(wanted)], wanted)
        assert not found[len(wanted) :].any()
        assert pool.verify() == 1
        del scales, view  # else the next one is another


def test_without_cleaning_it_is_found_out(pool: ScalePool) -> None:
    for counts in ([3, 9], [9, 3]):
        produce(activation(12), pool.acquire_grouped(12, K, 2, SfLayout.layout_8x4), counts, SfLayout.layout_8x4)
    with pytest.raises(PaddingCorruptionError):
        pool.verify()


def test_what_a_producer_wrote_elsewhere_is_healed(pool: ScalePool) -> None:
    scales = check(pool, [3, 9], SfLayout.layout_8x4)
    before = logical(pool, scales, SfLayout.layout_8x4)
    dirty = scales.view(-1)
    at = SfLayout.layout_8x4.offsets(scales.shape[0], K)[3, 1]  # a row behind the first expert's
    dirty[at] = 0x7F
    dirty[SfLayout.layout_8x4.padding_mask(scales.shape[0], K).nonzero()[0]] = 0x7F  # a padding column of a real row
    with pytest.raises(PaddingCorruptionError, match="2 padding bytes are not zero"):
        pool.verify()
    pool.verify(repair=True)
    assert torch.equal(logical(pool, scales, SfLayout.layout_8x4), before)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"scales": torch.zeros(24, 8, dtype=torch.uint8)}, "no record to clean by"),
        ({"scales": torch.zeros(24, 8)}, "scales must be torch.uint8"),
        ({"rows": 0}, "rows must be 1 to 12"),
        ({"rows": 13}, "rows must be 1 to 12"),
        ({"rows": 2.0}, "rows must be an integer"),
        ({"expert_offsets": torch.zeros(2, dtype=torch.int32)}, "expert_offsets must have 3 elements, got 2"),
        ({"blockscale_offsets": torch.zeros(3)}, "blockscale_offsets must be torch.int32"),
        ({"backend": "vllm"}, "backend must be one of"),
    ],
)
def test_wrong_arguments_of_cleaning(pool: ScalePool, change: dict[str, Any], error: str) -> None:
    expert_offsets, blockscale_offsets = offsets([3, 9], SfLayout.layout_8x4)
    given = {
        "scales": check(pool, [3, 9], SfLayout.layout_8x4),
        "expert_offsets": expert_offsets,
        "blockscale_offsets": blockscale_offsets,
        "rows": 12,
    }
    before = given["scales"].clone()
    with pytest.raises((ValueError, TypeError), match=error):
        clean_grouped_scales(**(given | change))
    assert torch.equal(given["scales"], before)


def test_a_dense_buffer_has_no_record(pool: ScalePool) -> None:
    with pytest.raises(ValueError, match="no record to clean by"):
        clean_grouped_scales(pool.acquire(12, K, SfLayout.layout_8x4), *offsets([3, 9], SfLayout.layout_8x4))
    assert pool.record(pool.acquire(12, K, SfLayout.layout_8x4)) is None
    assert pool.record(torch.zeros(3)) is None


# --- the pool ---------------------------------------------------------------------------------------------------------


def test_one_buffer_serves_all_row_counts(pool: ScalePool) -> None:
    pool.reserve(range(1, 41), K, SfLayout.layout_8x4, experts=3)
    assert pool.stats().buffers == 1
    assert pool.stats().bytes == ScaleSpec.grouped(40, K, SfLayout.layout_8x4, 3).nbytes
    addresses = set()
    for rows in (40, 1, 17, 3):
        scales = pool.acquire_grouped(rows, K, 3, SfLayout.layout_8x4)
        assert scales.shape == (SfLayout.layout_8x4.grouped_rows(rows, 3), 8)
        assert scales.is_contiguous()
        assert scales.data_ptr() % 512 == 0
        assert pool.spec(scales) == ScaleSpec.grouped(40, K, SfLayout.layout_8x4, 3)
        addresses.add(scales.data_ptr())
        del scales
    assert len(addresses) == 1
    assert pool.misses == 0
    held = [pool.acquire_grouped(2, K, 3, SfLayout.layout_8x4) for _ in range(2)]
    assert len({scales.data_ptr() for scales in held}) == 2
    assert pool.misses == 1
    pool.reserve(40, K, SfLayout.layout_8x4, copies=2, experts=3)
    assert pool.stats().buffers == 4


def test_the_smallest_that_fits(pool: ScalePool) -> None:
    for rows in (40, 8, 24):
        pool.reserve(rows, K, SfLayout.layout_8x4, copies=1, experts=2)
    assert pool.stats().buffers == 1  # the first one does for the others
    with ScalePool("cpu") as ascending:
        for rows in (8, 24, 40):
            ascending.reserve(rows, K, SfLayout.layout_8x4, experts=2)
        assert ascending.stats().buffers == 3
        found = [ascending.spec(ascending.acquire_grouped(rows, K, 2, SfLayout.layout_8x4)) for rows in (7, 9, 25, 24)]
        assert [spec.rows for spec in found if spec] == [8, 24, 40, 24]


def test_buffers_differ_by_experts_k_and_layout(pool: ScalePool) -> None:
    for experts, k, layout in (
        (2, K, SfLayout.layout_8x4),
        (3, K, SfLayout.layout_8x4),
        (2, 96, SfLayout.layout_8x4),
        (2, K, SfLayout.layout_128x4),
    ):
        pool.reserve(12, k, layout, experts=experts)
    assert pool.stats().buffers == 4


def test_limits(pool: ScalePool) -> None:
    spec = ScaleSpec.grouped(12, K, SfLayout.layout_8x4, 2)
    with ScalePool("cpu", max_bytes=spec.nbytes) as small:
        held = small.acquire_grouped(12, K, 2, SfLayout.layout_8x4)
        with pytest.raises(PoolExhaustedError):
            small.acquire_grouped(12, K, 2, SfLayout.layout_8x4)
        del held
    with ScalePool("cpu", cache_bytes=0) as none:  # each is made for the one call
        for seed in range(2):
            x = activation(12, seed=seed)
            _, scales = nvfp4_quantize_grouped(
                x, torch.ones(2), *offsets([3, 9], SfLayout.layout_8x4), layout=SfLayout.layout_8x4, pool=none
            )
            assert torch.equal(
                SfLayout.layout_8x4.logical(scales, scales.shape[0], K),
                expected(x, torch.ones(2), [3, 9], SfLayout.layout_8x4)[1],
            )
            assert none.verify() == 1
        assert none.stats().buffers == 0
    with pytest.raises(PoolClosedError):
        small.acquire_grouped(12, K, 2, SfLayout.layout_8x4)
    with pytest.raises(ValueError, match="no padded_k"):
        pool.reserve(12, K, SfLayout.layout_8x4, padded_k=96, experts=2)


def test_debug_verifies_at_each_acquire() -> None:
    with ScalePool("cpu", debug=True) as pool:
        scales = check(pool, [3, 9], SfLayout.layout_8x4)
        scales[-1] = 0x7F
        with pytest.raises(PaddingCorruptionError):
            pool.acquire_grouped(12, K, 2, SfLayout.layout_8x4)


def test_a_dense_gemm_refuses(pool: ScalePool) -> None:
    x = activation(8)
    data, scales = nvfp4_quantize_grouped(x, torch.ones(1), *offsets([8], SfLayout.layout_128x4), pool=pool)
    b, b_scales = torch.zeros(16, K // 2, dtype=torch.uint8), torch.zeros(128, 8, dtype=torch.uint8)
    with pytest.raises(LayoutMismatchError, match="only a grouped GEMM reads"):
        mm_fp4(data, b.T, scales, b_scales.T, backend="reference")


def test_freshly_made_buffers_are_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the memory held: which bytes will be real is not known."""
    aligned = buffer._aligned
    monkeypatch.setattr(buffer, "_aligned", lambda *given: aligned(*given).fill_(0x7F))
    with ScalePool("cpu", cache_bytes=0) as pool:
        assert not pool.acquire_grouped(12, K, 2, SfLayout.layout_8x4).any()
        pool.reserve(12, K, SfLayout.layout_8x4, experts=2)
        scales = pool.acquire_grouped(12, K, 2, SfLayout.layout_8x4)
        assert not scales.any()
        record = pool.record(scales)
        assert record is not None
        assert record.tolist() == [0] * 12


# --- arguments --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"x": torch.zeros(12, K)}, "x must be torch.bfloat16 or torch.float16"),
        ({"x": torch.zeros(12, dtype=torch.bfloat16)}, "x must be \\[rows, k\\]"),
        ({"x": torch.zeros(0, K, dtype=torch.bfloat16)}, "at least 1 row"),
        ({"x": torch.zeros(12, 40, dtype=torch.bfloat16)}, "k a multiple of 16"),
        ({"x": torch.zeros(K, 12, dtype=torch.bfloat16).T}, "x must be contiguous"),
        ({"global_scales": torch.ones(1)}, "expert_offsets must have 2 elements, got 3"),
        ({"global_scales": torch.ones(0)}, "one element for each expert"),
        ({"global_scales": torch.ones(2, dtype=torch.float64)}, "global_scales must be torch.float32"),
        ({"global_scales": torch.ones(4)[::2]}, "global_scales must be contiguous"),
        ({"expert_offsets": torch.zeros(3, dtype=torch.int64)}, "expert_offsets must be torch.int32"),
        ({"blockscale_offsets": torch.zeros(4, dtype=torch.int32)}, "blockscale_offsets must have 3 elements"),
        ({"expert_offsets": [0, 3, 12]}, "expert_offsets must be a tensor"),
        ({"valid_rows": torch.ones(1)}, "valid_rows must be torch.int32"),
        ({"row_tokens": torch.zeros(12, dtype=torch.int32)}, "give valid_rows too"),
        (
            {"valid_rows": torch.ones(1, dtype=torch.int32), "row_tokens": torch.zeros(3, dtype=torch.int32)},
            "row_tokens must have 12 elements",
        ),
        ({"layout": 7}, "layout must be one of"),
        ({"backend": "flashinfer"}, "backend must be one of auto, triton, reference"),
        ({"pool": 3}, "expected a ScalePool"),
    ],
)
def test_wrong_arguments(pool: ScalePool, change: dict[str, Any], error: str) -> None:
    expert_offsets, blockscale_offsets = offsets([3, 9], SfLayout.layout_8x4)
    given = {
        "x": activation(12),
        "global_scales": torch.ones(2),
        "expert_offsets": expert_offsets,
        "blockscale_offsets": blockscale_offsets,
        "layout": SfLayout.layout_8x4,
        "pool": pool,
    }
    with pytest.raises((ValueError, TypeError), match=error):
        nvfp4_quantize_grouped(**(given | change))
    assert pool.stats().buffers == 0


def test_silu_and_mul_needs_two_halves(pool: ScalePool) -> None:
    with pytest.raises(ValueError, match="2 \\* k with k a multiple of 16"):
        silu_and_mul_nvfp4_quantize_grouped(
            activation(12), torch.ones(2), *offsets([3, 9], SfLayout.layout_8x4), layout=SfLayout.layout_8x4, pool=pool
        )
    assert pool.stats().buffers == 0


def test_the_public_names() -> None:
    for name in ("nvfp4_quantize_grouped", "silu_and_mul_nvfp4_quantize_grouped", "clean_grouped_scales"):
        assert name in safealloc.__all__


# --- compiled code ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("silu", [False, True], ids=["quantize", "silu_and_mul"])
def test_compiled(pool: ScalePool, silu: bool) -> None:
    """With rows that are not known at the tracing, into the default pool at the call."""
    function = silu_and_mul_nvfp4_quantize_grouped if silu else nvfp4_quantize_grouped

    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def compiled(x: Tensor, one: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        data, scales = function(x, one, first, second, layout=SfLayout.layout_8x4)
        return data, scales.to(torch.int32)

    with use_pool(pool):
        for counts in ([3, 9], [9, 8], [40, 1]):
            x = activation(sum(counts), 2 * K if silu else K)
            data, wide = compiled(x, torch.ones(2), *offsets(counts, SfLayout.layout_8x4))
            wanted_data, wanted = expected(
                reference_grouped.multiply(x) if silu else x, torch.ones(2), counts, SfLayout.layout_8x4
            )
            assert torch.equal(data, wanted_data)
            assert torch.equal(SfLayout.layout_8x4.logical(wide.to(torch.uint8), wide.shape[0], K), wanted)
    assert pool.stats().buffers >= 1


def test_the_op(pool: ScalePool) -> None:
    given = (
        activation(12),
        torch.ones(2),
        *offsets([3, 9], SfLayout.layout_8x4),
        int(SfLayout.layout_8x4),
        "auto",
        None,
        None,
        False,
    )
    with use_pool(pool):
        torch.library.opcheck(
            torch.ops.safealloc.nvfp4_quantize_grouped.default,
            given,
            test_utils=("test_schema", "test_faketensor"),
        )

    @torch.compile(backend="eager", fullgraph=True)
    def with_a_pool(x: Tensor) -> Tensor:
        return nvfp4_quantize_grouped(
            x, torch.ones(2), *offsets([3, 9], SfLayout.layout_8x4), layout=SfLayout.layout_8x4, pool=pool
        )[0]

    with pytest.raises(Exception, match="leave pool out"):
        with_a_pool(activation(12))


def test_errors_are_safeallocs(pool: ScalePool) -> None:
    pool.close()
    with pytest.raises(SafeAllocError):
        nvfp4_quantize_grouped(
            activation(12), torch.ones(2), *offsets([3, 9], SfLayout.layout_8x4), layout=SfLayout.layout_8x4, pool=pool
        )

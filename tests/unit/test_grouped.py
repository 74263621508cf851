"""Quantizing rows grouped by expert on a CPU: buffers keep no scales of an earlier step."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.grouped import K, activation, check_quantize, expected, logical, offsets
from torch import Tensor

from safealloc import (
    PaddingCorruptionError,
    SafeAllocError,
    ScaleFormat,
    ScalePool,
    ScaleSpec,
    SfLayout,
    clean_grouped_scales,
    nvfp4_quantize_grouped,
    silu_and_mul_nvfp4_quantize_grouped,
    use_pool,
)
from safealloc.kernels import reference, reference_grouped
from safealloc.ops import backends

layouts = pytest.mark.parametrize("layout", list(SfLayout), ids=lambda layout: layout.name)


@pytest.fixture
def pool() -> Iterator[ScalePool]:
    with ScalePool("cpu") as pool:
        yield pool


# --- number of scale rows ----------------------------------------------------------------------------------------------


@given(
    layout=st.sampled_from(list(SfLayout)),
    counts=st.lists(st.integers(0, 300), min_size=1, max_size=12).filter(any),
)
def test_grouped_rows_are_enough(layout: SfLayout, counts: list[int]) -> None:
    needed = sum(layout.round_up(count, 1)[0] for count in counts)
    assert needed <= layout.grouped_rows(sum(counts), len(counts))


@given(layout=st.sampled_from(list(SfLayout)), rows=st.integers(1, 2000), experts=st.integers(1, 300))
def test_grouped_rows_are_needed_in_the_worst_case(layout: SfLayout, rows: int, experts: int) -> None:
    """One row for as many experts as there can be, the rest for the last of them."""
    groups = min(rows, experts)
    counts = [1] * (groups - 1) + [rows - groups + 1]
    assert sum(layout.round_up(count, 1)[0] for count in counts) == layout.grouped_rows(rows, experts)


def test_deepseek_r1_needs_a_fraction_of_what_vllm_allocates() -> None:
    """8 of 256 experts per token: vLLM allocates 587 MB per call at k 7168, in every batch."""
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
def test_wrong_numbers_are_refused(pool: ScalePool, arguments: tuple[Any, ...], error: str) -> None:
    rows, k, layout, experts = arguments
    with pytest.raises((ValueError, TypeError), match=error):
        pool.acquire_grouped(rows, k, experts, layout)
    with pytest.raises((ValueError, TypeError), match=error):
        pool.reserve(rows, k, layout, experts=experts)
    assert pool.stats().buffers == 0


# --- every byte --------------------------------------------------------------------------------------------------------


steps = st.tuples(
    st.sampled_from(list(SfLayout)),
    st.lists(st.integers(0, 9) | st.integers(0, 140), min_size=3, max_size=3),
    st.integers(0, 5),
    st.booleans(),
).filter(lambda drawn: sum(drawn[1]) + drawn[2])


@settings(deadline=None, max_examples=60)
@given(sequence=st.lists(steps, min_size=1, max_size=10), reserved=st.booleans())
def test_after_any_sequence_of_steps_all_but_the_last_scales_is_zero(
    sequence: list[tuple[SfLayout, list[int], int, bool]], reserved: bool
) -> None:
    with ScalePool("cpu") as pool:
        if reserved:
            for layout in SfLayout:
                pool.reserve(3 * 140 + 5, K, layout, experts=3)
        kept = []
        for seed, (layout, counts, ungrouped, keep) in enumerate(sequence):
            scales = check_quantize(pool, counts, layout, ungrouped=ungrouped, seed=seed)
            if keep:
                kept.append((scales, scales.clone()))
            del scales
        for scales, then in kept:
            assert torch.equal(scales, then)
        assert pool.verify() == pool.stats().buffers
        if reserved and not kept:
            assert pool.stats().buffers == 3


def test_a_quantizer_that_does_not_clean_is_detected(pool: ScalePool, monkeypatch: pytest.MonkeyPatch) -> None:
    """So padding is not zero by chance in the other tests."""
    row = backends.GROUPED_QUANTIZERS["reference"]
    careless = dataclasses.replace(row, run=lambda *given: row.run(*given[:5], None, *given[6:]))
    monkeypatch.setitem(backends.GROUPED_QUANTIZERS, "reference", careless)
    check_quantize(pool, [3, 9], SfLayout.layout_8x4)
    with pytest.raises(AssertionError):
        check_quantize(pool, [9, 3], SfLayout.layout_8x4)
    with pytest.raises(PaddingCorruptionError, match="experts=2"):
        pool.verify()
    assert pool.verify(repair=True) == 1
    assert pool.verify() == 1


@layouts
def test_silu_and_mul_quantizes_the_product(pool: ScalePool, layout: SfLayout) -> None:
    counts = [2, 0, 9]
    x, global_scales = activation(11, 2 * K), torch.tensor([1.0, 2.0, 3.0])
    data, scales = silu_and_mul_nvfp4_quantize_grouped(
        x, global_scales, *offsets(counts, layout), layout=layout, pool=pool
    )
    gate, up = x.float().chunk(2, -1)
    product = (torch.nn.functional.silu(gate) * up).bfloat16()
    assert torch.equal(product, reference.multiply(x))  # no value here is near the middle of two
    wanted_data, wanted = expected(product, global_scales, counts, layout)
    assert torch.equal(data, wanted_data)
    assert torch.equal(logical(pool, scales, layout), wanted)


@pytest.mark.parametrize("silu", [False, True], ids=["quantize", "silu_and_mul"])
def test_rows_that_are_not_valid_are_zero(pool: ScalePool, silu: bool) -> None:
    """Tokens 3 and later are padding and hold NaN; their rows lie between the others."""
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
    of = reference.multiply(clean) if silu else clean
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


def test_rows_outside_of_every_group_are_zero(pool: ScalePool) -> None:
    """With experts on other ranks, the remaining rows hold anything."""
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


# --- beside another producer -------------------------------------------------------------------------------------------


def produce(x: Tensor, scales: Tensor, counts: list[int], layout: SfLayout) -> None:
    """Write the valid scales and nothing else, as vLLM's kernel does."""
    data = torch.empty(x.shape[0], x.shape[1] // 2, dtype=torch.uint8)
    one = torch.ones(len(counts))
    reference_grouped.quantize(x, one, data, scales, layout, None, *offsets(counts, layout))


@layouts
@pytest.mark.parametrize("first", [False, True], ids=["cleaned after", "cleaned before"])
def test_cleaning_before_or_after_the_producer(pool: ScalePool, layout: SfLayout, first: bool) -> None:
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
        del scales, view  # so that the next step gets the same buffer


@layouts
@pytest.mark.parametrize("format", [ScaleFormat.mxfp8, ScaleFormat.mxfp4], ids=lambda format: format.name)
def test_cleaning_scales_of_another_format(pool: ScalePool, layout: SfLayout, format: ScaleFormat) -> None:
    """90 columns of scales in 92, as gpt-oss has them; the producer writes valid scales only."""
    k, experts = 2880, 3
    pool.reserve(24, k, layout, experts=experts, format=format)
    for counts in ([3, 0, 9], [9, 3, 0], [0, 0, 1], [8, 8, 8], [1, 1, 1]):
        scales = pool.acquire_grouped(sum(counts), k, experts, layout, format=format)
        given_offsets = offsets(counts, layout)
        _, place = reference_grouped.places(sum(counts), *given_offsets, len(scales))
        padded_rows, padded_cols = scales.shape
        assert padded_cols == (90 if layout is SfLayout.layout_linear else 92)
        valid = torch.zeros(padded_rows, padded_cols, dtype=torch.bool)
        valid[place, : k // 32] = True
        scales.view(-1)[layout.offsets(padded_rows, k, format=format)[place]] = 0xFF
        clean_grouped_scales(scales.view(torch.float8_e8m0fnu), *given_offsets, sum(counts))
        assert torch.equal(layout.logical(scales, padded_rows, k, format=format) == 0xFF, valid)
        assert torch.equal(scales != 0, scales == 0xFF)
        assert pool.verify() == 1
        del scales  # so that the next step gets the same buffer
    assert pool.misses == 0


def test_a_step_without_cleaning_is_detected(pool: ScalePool) -> None:
    for counts in ([3, 9], [9, 3]):
        produce(activation(12), pool.acquire_grouped(12, K, 2, SfLayout.layout_8x4), counts, SfLayout.layout_8x4)
    with pytest.raises(PaddingCorruptionError):
        pool.verify()


def test_what_a_producer_wrote_elsewhere_is_repaired(pool: ScalePool) -> None:
    scales = check_quantize(pool, [3, 9], SfLayout.layout_8x4)
    before = logical(pool, scales, SfLayout.layout_8x4)
    dirty = scales.view(-1)
    at = SfLayout.layout_8x4.offsets(scales.shape[0], K)[3, 1]  # a row behind the first expert's
    dirty[at] = 0x7F
    dirty[SfLayout.layout_8x4.padding_mask(scales.shape[0], K).nonzero()[0]] = 0x7F  # a padding column of a valid row
    with pytest.raises(PaddingCorruptionError, match="2 padding bytes are not zero"):
        pool.verify()
    pool.verify(repair=True)
    assert torch.equal(logical(pool, scales, SfLayout.layout_8x4), before)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"scales": torch.zeros(24, 8, dtype=torch.uint8)}, "no record of the previous step"),
        ({"scales": torch.zeros(24, 8)}, "scales must be torch.uint8"),
        ({"rows": 0}, "rows must be 1 to 12"),
        ({"rows": 13}, "rows must be 1 to 12"),
        ({"rows": 2.0}, "rows must be an integer"),
        ({"expert_offsets": torch.zeros(2, dtype=torch.int32)}, "expert_offsets must have 3 elements, got 2"),
        ({"blockscale_offsets": torch.zeros(3)}, "blockscale_offsets must be torch.int32"),
        ({"backend": "vllm"}, "backend must be one of"),
    ],
)
def test_cleaning_refuses_wrong_arguments(pool: ScalePool, change: dict[str, Any], error: str) -> None:
    expert_offsets, blockscale_offsets = offsets([3, 9], SfLayout.layout_8x4)
    given = {
        "scales": check_quantize(pool, [3, 9], SfLayout.layout_8x4),
        "expert_offsets": expert_offsets,
        "blockscale_offsets": blockscale_offsets,
        "rows": 12,
    }
    before = given["scales"].clone()
    with pytest.raises((ValueError, TypeError), match=error):
        clean_grouped_scales(**(given | change))
    assert torch.equal(given["scales"], before)


def test_a_dense_buffer_has_no_record(pool: ScalePool) -> None:
    with pytest.raises(ValueError, match="no record of the previous step"):
        clean_grouped_scales(pool.acquire(12, K, SfLayout.layout_8x4), *offsets([3, 9], SfLayout.layout_8x4))


# --- compiled code -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("silu", [False, True], ids=["quantize", "silu_and_mul"])
def test_compiled_code_quantizes_any_number_of_rows(pool: ScalePool, silu: bool) -> None:
    """The number of rows is not known when it is traced; the default pool is looked up at the call."""
    function = silu_and_mul_nvfp4_quantize_grouped if silu else nvfp4_quantize_grouped

    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def compiled(x: Tensor, one: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        data, scales = function(x, one, first, second, layout=SfLayout.layout_8x4)
        return data, scales.to(torch.int32)

    with use_pool(pool):
        for counts in ([3, 9], [9, 8], [40, 1]):
            x = activation(sum(counts), 2 * K if silu else K)
            data, scales = compiled(x, torch.ones(2), *offsets(counts, SfLayout.layout_8x4))
            wanted_data, wanted = expected(
                reference.multiply(x) if silu else x, torch.ones(2), counts, SfLayout.layout_8x4
            )
            assert torch.equal(data, wanted_data)
            assert torch.equal(SfLayout.layout_8x4.logical(scales.to(torch.uint8), scales.shape[0], K), wanted)
    assert pool.stats().buffers >= 1


def test_the_op_matches_its_schema_and_fake(pool: ScalePool) -> None:
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
    def with_a_pool(x: Tensor, *grouped: Tensor) -> Tensor:
        return nvfp4_quantize_grouped(x, *grouped, layout=SfLayout.layout_8x4, pool=pool)[0]

    with pytest.raises(Exception, match="leave pool out"):
        with_a_pool(activation(12), *given[1:4])


def test_a_closed_pool_is_refused(pool: ScalePool) -> None:
    pool.close()
    with pytest.raises(SafeAllocError):
        nvfp4_quantize_grouped(
            activation(12), torch.ones(2), *offsets([3, 9], SfLayout.layout_8x4), layout=SfLayout.layout_8x4, pool=pool
        )

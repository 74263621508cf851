"""The audit over quantizers and GEMMs of MXFP8 and MXFP4: correct ones are silent, planted faults are named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from safealloc import ScaleFormat, ScalePool, SfLayout
from safealloc.audit import assert_consumer, assert_producer, audit_consumer, audit_producer, findings
from safealloc.audit.combinations import Audited, combine, pairs
from safealloc.audit.consumers import product
from safealloc.audit.findings import table_rows
from safealloc.audit.known import CONSUMERS, PRODUCERS
from safealloc.kernels import reference, reference_mx

formats = pytest.mark.parametrize("format", [ScaleFormat.mxfp8, ScaleFormat.mxfp4], ids=lambda format: format.name)
layouts = pytest.mark.parametrize("layout", list(SfLayout), ids=lambda layout: layout.name)
LAYOUT = SfLayout.layout_128x4
SHAPES = ((5, 2880), (130, 416))
Quantize = Callable[[Tensor, Tensor, Tensor, SfLayout], Any]


def valid_only(format: ScaleFormat) -> Quantize:
    return lambda x, data, scales, layout: reference_mx.quantize(x, data, scales, layout, format)


def zeroing(format: ScaleFormat) -> Quantize:
    def quantize(x: Tensor, data: Tensor, scales: Tensor, layout: SfLayout) -> None:
        scales.zero_()
        reference_mx.quantize(x, data, scales, layout, format)

    return quantize


def allocating(format: ScaleFormat) -> Quantize:
    def quantize(x: Tensor, data: Tensor, scales: Tensor, layout: SfLayout) -> tuple[Tensor, Tensor]:
        own, own_scales = torch.empty_like(data), torch.zeros_like(scales)
        reference_mx.quantize(x, own, own_scales, layout, format)
        return own, own_scales.view(torch.float8_e8m0fnu)

    return quantize


@formats
@layouts
def test_correct_quantizers_are_told_apart_by_what_they_do_to_padding(format: ScaleFormat, layout: SfLayout) -> None:
    zeroes = audit_producer(zeroing(format), layout=layout, format=format, device="cpu")
    assert {found.verdict for found in zeroes} <= {findings.ZEROES, findings.NO_PADDING}
    assert len(zeroes) == 6
    assert {found.format for found in zeroes} == {format}
    assert zeroes[0].as_dict()["format"] == format.name
    assert str(zeroes[0]).startswith(f"quantize, {layout.name.removeprefix('layout_')} {format.name}, 1 x 1024: ")
    assert_producer(allocating(format), layout=layout, shapes=SHAPES, format=format, device="cpu")
    assert_producer(valid_only(format), layout=layout, shapes=SHAPES, format=format, device="cpu", with_pool=True)
    left = audit_producer(valid_only(format), layout=layout, shapes=SHAPES, format=format, device="cpu")
    linear = layout is SfLayout.layout_linear
    assert {found.verdict for found in left} == {findings.NO_PADDING if linear else findings.LEAVES}


def ones_in_padding(x: Tensor, data: Tensor, scales: Tensor, layout: SfLayout, format: ScaleFormat) -> None:
    scales.fill_(127)  # 1.0
    reference_mx.quantize(x, data, scales, layout, format)


def linear_scales(x: Tensor, data: Tensor, scales: Tensor, layout: SfLayout, format: ScaleFormat) -> None:
    codes, linear = reference_mx.encode(x, format)
    data.copy_(codes)
    scales.zero_()
    scales.view(-1)[: linear.numel()] = linear.view(-1)


def rounded_down(x: Tensor, data: Tensor, scales: Tensor, layout: SfLayout, format: ScaleFormat) -> None:
    scales.zero_()
    reference_mx.quantize(x, data, scales, layout, format)
    scales.sub_((scales > 0).to(torch.uint8))


def one_value(x: Tensor, data: Tensor, scales: Tensor, layout: SfLayout, format: ScaleFormat) -> None:
    scales.zero_()
    reference_mx.quantize(x, data, scales, layout, format)
    data[0, 0] ^= 0x87 if format is ScaleFormat.mxfp4 else 0xFF


def behind_the_end(x: Tensor, data: Tensor, scales: Tensor, layout: SfLayout, format: ScaleFormat) -> None:
    scales.zero_()
    reference_mx.quantize(x, data, scales, layout, format)
    scales.as_strided((1,), (1,), scales.storage_offset() + scales.numel()).fill_(1)


def of_the_other_format(x: Tensor, data: Tensor, scales: Tensor, layout: SfLayout, format: ScaleFormat) -> None:
    """Scales for the largest value of the other one."""
    scales.zero_()
    reference_mx.quantize(x, data, scales, layout, format)
    other = OTHER[format]
    scales.view(-1)[layout.offsets(*x.shape, format=other)] = reference_mx.encode(x, other)[1]


OTHER = {ScaleFormat.mxfp8: ScaleFormat.mxfp4, ScaleFormat.mxfp4: ScaleFormat.mxfp8}
FAULTS = [
    (ones_in_padding, findings.DIRTIES, "first 0x7F at row"),
    (linear_scales, findings.WRONG_SCALES, "the scales are in linear {format}: "),
    (of_the_other_format, findings.WRONG_SCALES, "the scales are in 128x4 {other}: "),
    (rounded_down, findings.WRONG_SCALES, "scales are not the reference's"),
    (one_value, findings.WRONG_DATA, "more than a step off the reference"),
    (behind_the_end, findings.BEYOND, "1 bytes written outside"),
]


@formats
@pytest.mark.parametrize(("fault", "verdict", "words"), FAULTS, ids=[fault.__name__ for fault, *_ in FAULTS])
def test_planted_faults_are_named(format: ScaleFormat, fault: Callable[..., None], verdict: str, words: str) -> None:
    def quantize(x: Tensor, data: Tensor, scales: Tensor, layout: SfLayout) -> None:
        fault(x, data, scales, layout, format)

    found = audit_producer(quantize, layout=LAYOUT, shapes=SHAPES, format=format, device="cpu")
    assert {one.verdict for one in found} == {verdict}
    words = words.format(format=format.name, other=OTHER[format].name)
    assert all(words in one.details for one in found), found[0].details


@formats
def test_scales_for_half_of_the_columns_are_no_scales_of_the_format(format: ScaleFormat) -> None:
    """What an NVFP4 quantizer returns: as many scales as MX has for twice the k."""

    def quantize(x: Tensor, data: Tensor, scales: Tensor, layout: SfLayout) -> tuple[Tensor, Tensor]:
        _, linear = reference.encode(x, torch.ones(()))
        return data, layout.swizzle(linear)

    (found,) = audit_producer(quantize, layout=LAYOUT, shapes=[(5, 2880)], format=format, device="cpu")
    assert found.verdict == findings.WRONG_SCALES
    assert "the scales are in 128x4 nvfp4: " in found.details
    assert (found.writes, found.found_format) == ((LAYOUT,), ScaleFormat.nvfp4)
    assert "returned 23040 scale bytes" in found.details
    assert "where 128x4 has 11776" in found.details


def test_wrong_arguments_are_errors() -> None:
    fn = valid_only(ScaleFormat.mxfp8)
    with pytest.raises(ValueError, match="k must be a positive multiple of 32, got 48"):
        audit_producer(fn, shapes=[(1, 48)], format=ScaleFormat.mxfp8, device="cpu")
    with pytest.raises(TypeError, match="format must be a ScaleFormat"):
        audit_producer(fn, format="mxfp8", device="cpu")  # type: ignore[arg-type]


# --- Consumers ------------------------------------------------------------------------------------------------------


def pointer_at(scales: Tensor, layout: SfLayout, rows: int, k: int, format: ScaleFormat) -> Tensor:
    """The bytes from the first one on, as many as the scales would have in this layout and format."""
    shape = layout.padded_shape(rows, k, format=format)
    flat = scales.as_strided((shape[0] * shape[1],), (1,), scales.storage_offset())
    return flat.view(shape)


def reader(format: ScaleFormat, *, order: SfLayout | None = None, taken_for: ScaleFormat | None = None) -> Any:
    """A GEMM that multiplies padding columns as the hardware does, in the layout and format told or in others."""
    read = format if taken_for is None else taken_for

    def multiply(a: Tensor, b: Tensor, a_descale: Tensor, b_descale: Tensor, *alpha_and_layout: Any) -> Tensor:
        *alpha, layout = alpha_and_layout
        layout = layout if order is None else order
        rows, k = a.shape[0], a.shape[1] * format.values_per_byte
        weight = b_descale if format is ScaleFormat.mxfp8 else b_descale.T
        weight = pointer_at(weight, LAYOUT, b.shape[1], k, read)
        weight = weight if format is ScaleFormat.mxfp8 else weight.T
        scales = pointer_at(a_descale, layout, rows, k, read)
        return product(a, b, scales, weight, alpha[0] if alpha else None, layout, read).bfloat16()

    return multiply


def isolating(format: ScaleFormat) -> Any:
    def multiply(a: Tensor, b: Tensor, a_descale: Tensor, b_descale: Tensor, layout: SfLayout) -> Tensor:
        rows, k = a.shape[0], a.shape[1] * format.values_per_byte
        clean = layout.swizzle(layout.unswizzle(a_descale, rows, k, format=format))
        return product(a, b, clean, b_descale, None, layout, format).bfloat16()

    return multiply


GEMM_SHAPES = ((5, 960), (40, 416))


@formats
@layouts
def test_gemms_are_told_apart_by_what_they_do_with_padding(format: ScaleFormat, layout: SfLayout) -> None:
    assert_consumer(isolating(format), layout=layout, shapes=GEMM_SHAPES, format=format, device="cpu")
    found = audit_consumer(reader(format), layout=layout, shapes=GEMM_SHAPES, format=format, device="cpu")
    expected = findings.ISOLATES if layout is SfLayout.layout_linear else findings.READS
    assert {one.verdict for one in found} == {expected}, found[0].details
    assert {(one.reads, one.found_format) for one in found} == {((layout,), format)}
    if expected is findings.READS:
        assert "NaN in padding columns changes 5 of 5 rows" in found[0].details
        assert "1.0 in" not in found[0].details
        with pytest.raises(AssertionError, match=f"{format.name}, 5 x 960: reads padding"):
            assert_consumer(reader(format), layout=layout, shapes=GEMM_SHAPES, format=format, device="cpu")


@formats
@pytest.mark.parametrize(
    ("told", "order", "at"),
    [(SfLayout.layout_128x4, SfLayout.layout_8x4, (32, 512)), (SfLayout.layout_8x4, SfLayout.layout_128x4, (512, 32))],
    ids=["reads 128x4 as 8x4", "reads 8x4 as 128x4"],
)
def test_a_gemm_that_reads_another_layout_is_named_with_that_layout(
    format: ScaleFormat, told: SfLayout, order: SfLayout, at: tuple[int, int]
) -> None:
    fault = reader(format, order=order)
    found = audit_consumer(fault, layout=told, shapes=GEMM_SHAPES, format=format, device="cpu")
    assert {(one.verdict, one.reads, one.found_format) for one in found} == {(findings.WRONG_LAYOUT, (order,), format)}
    (read, asked), (took, right) = (one.name.removeprefix("layout_") for one in (order, told)), at
    why = f"reads {read}: it takes byte {took} for row 0, column 4; in {asked} that scale is byte {right}"
    assert all(why in one.details for one in found), found[0].details


@layouts
@pytest.mark.parametrize(("told", "read"), [("mxfp4", "nvfp4"), ("nvfp4", "mxfp4")])
def test_a_gemm_that_takes_scales_for_those_of_another_format_is_named_with_it(
    told: str, read: str, layout: SfLayout
) -> None:
    """As ``mm_fp4`` does without ``block_size=32``, where the caller has scales of MXFP4."""
    format, other = ScaleFormat[told], ScaleFormat[read]
    fault = reader(format, taken_for=other)
    found = audit_consumer(fault, layout=layout, shapes=GEMM_SHAPES, format=format, device="cpu")
    assert {(one.verdict, one.reads, one.found_format) for one in found} == {(findings.WRONG_FORMAT, (layout,), other)}
    name = layout.name.removeprefix("layout_")
    assert all(
        f"reads {name} as {read.upper()} scales of {other.block_size} columns each" in one.details for one in found
    )


def test_layouts_that_are_the_same_bytes_at_a_shape_are_both_named() -> None:
    """Four scale columns: 8x4 and linear differ in padding alone, and 8 rows have none."""
    shapes, format = [(8, 128)], ScaleFormat.mxfp8
    both = SfLayout.layout_8x4, SfLayout.layout_linear
    made = audit_producer(zeroing(format), layout=both[0], shapes=shapes, format=format, device="cpu")
    read = audit_consumer(reader(format), layout=both[0], shapes=shapes, format=format, device="cpu")
    assert (made[0].writes, read[0].reads) == (both, both)
    assert made[0].as_dict()["writes"] == read[0].as_dict()["reads"] == ["8x4", "linear"]
    for found in (made, read):
        ((cells, _),) = table_rows(found)
        assert cells[1:3] == ("8x4 mxfp8", "8x4 or linear mxfp8")
    telling = audit_producer(zeroing(format), layout=both[0], shapes=[(8, 128), (9, 1024)], format=format, device="cpu")
    assert {cells[2] for cells, _ in table_rows(telling)} >= {"8x4 mxfp8"}


# --- The command ----------------------------------------------------------------------------------------------------


def test_the_command_knows_producers_and_consumers_of_each_format() -> None:
    for table in (PRODUCERS, CONSUMERS):
        assert {known.format for known in table} == set(ScaleFormat)
    ours = [known for known in (*PRODUCERS, *CONSUMERS) if known.name.startswith("safealloc reference mxfp")]
    assert len(ours) == 4
    for known in ours:
        for found in known.audit(LAYOUT, [(5, 480)], torch.device("cpu")):
            assert (found.k, found.found_layouts, found.found_format) == (960, (LAYOUT,), known.format)


@formats
def test_pairs_of_a_format_run_through_a_pool(format: ScaleFormat) -> None:
    def audited(table: Any, name: str) -> Audited[Any]:
        known = next(known for known in table if known.name == name)
        return Audited(known, LAYOUT, known.audit(LAYOUT, [(5, 480), (40, 512)], torch.device("cpu")))

    made, read = (
        audited(PRODUCERS, f"safealloc reference {format.name}"),
        audited(CONSUMERS, f"safealloc reference {format.name}"),
    )
    other = audited(CONSUMERS, f"safealloc reference {OTHER[format].name}")
    assert list(pairs([made], [other, read])) == [(made, read)]
    alone = combine(made, read)
    assert alone.why == "the producer does not zero padding columns, which the consumer reads"
    with ScalePool("cpu") as pool:
        found = combine(made, read, pool)
        assert (found.why, found.tried, found.format) == ("", ((5, 960), (40, 1024)), format)
        assert pool.verify() > 0
    assert found.cells()[2] == f"128x4 {format.name}"

"""``audit_producer`` over quantizers to MXFP8 and MXFP4: correct ones are silent, planted faults are named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from safealloc import ScaleFormat, SfLayout
from safealloc.audit import assert_producer, audit_producer, findings
from safealloc.kernels import reference_mx

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


FAULTS = [
    (ones_in_padding, findings.DIRTIES, "first 0x7F at row"),
    (linear_scales, findings.WRONG_SCALES, "the scales are in linear"),
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
    assert all(words in one.details for one in found)


@formats
def test_scales_for_half_of_the_columns_are_no_scales_of_the_format(format: ScaleFormat) -> None:
    """What an NVFP4 quantizer returns: as many scales as MX has for twice the k."""

    def quantize(x: Tensor, data: Tensor, scales: Tensor, layout: SfLayout) -> tuple[Tensor, Tensor]:
        return data, torch.zeros(layout.padded_shape(*x.shape), dtype=torch.uint8)

    (found,) = audit_producer(quantize, layout=LAYOUT, shapes=[(5, 2880)], format=format, device="cpu")
    assert found.verdict == findings.WRONG_SCALES
    assert "returned 23040 scale bytes" in found.details
    assert "where 128x4 has 11776" in found.details


def test_wrong_arguments_are_errors() -> None:
    fn = valid_only(ScaleFormat.mxfp8)
    with pytest.raises(ValueError, match="k must be a positive multiple of 32, got 48"):
        audit_producer(fn, shapes=[(1, 48)], format=ScaleFormat.mxfp8, device="cpu")
    with pytest.raises(TypeError, match="format must be a ScaleFormat"):
        audit_producer(fn, format="mxfp8", device="cpu")  # type: ignore[arg-type]

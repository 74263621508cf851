"""Auditing kernels of your own in pytest: `pytest examples/test_own_kernels.py`.

`assert_producer` runs a quantizer over memory full of a sentinel and fails where padding is not zero afterwards.
`assert_consumer` runs a GEMM with poisoned padding and fails where that reaches a result. With `with_pool=True` they ask only
for what a pool buffer needs: a producer may leave padding as it found it, and a GEMM may read it. Runs on any device.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from safealloc import SfLayout, mm_fp4, nvfp4_quantize
from safealloc.audit import assert_consumer, assert_producer

SHAPES = [(5, 96), (130, 224)]  # rows and k: padding rows, padding columns, more than one tile


def quantize(x: Tensor, global_scale: Tensor, x_fp4: Tensor, scales: Tensor, layout: SfLayout) -> None:
    """Stands for your quantizer: it writes x_fp4 and the valid scales, and leaves padding as it is."""
    rows, k = x.shape
    data, quantized = nvfp4_quantize(x, global_scale, layout=layout)
    x_fp4.copy_(data)
    valid = layout.offsets(rows, k, x.device)
    scales.view(-1)[valid] = quantized.view(-1)[valid]


def quantize_and_zero(x: Tensor, global_scale: Tensor, x_fp4: Tensor, scales: Tensor, layout: SfLayout) -> None:
    """Stands for a quantizer that stores zeros in all padding."""
    scales.zero_()
    quantize(x, global_scale, x_fp4, scales, layout)


def multiply(a: Tensor, b: Tensor, a_descale: Tensor, b_descale: Tensor, alpha: Tensor, layout: SfLayout) -> Tensor:
    """Stands for your GEMM: safealloc's, which zeroes the padding of scales that no pool made."""
    return mm_fp4(a, b, a_descale, b_descale, alpha, use_8x4_sf_layout=layout is SfLayout.layout_8x4)


@pytest.mark.parametrize("layout", [SfLayout.layout_128x4, SfLayout.layout_8x4])
def test_quantizer_is_safe_in_pool_buffers(layout: SfLayout) -> None:
    assert_producer(quantize, layout=layout, shapes=SHAPES, with_pool=True)


def test_quantizer_is_not_safe_in_other_memory() -> None:
    with pytest.raises(AssertionError, match="leaves padding"):
        assert_producer(quantize, shapes=SHAPES)


def test_quantizer_that_stores_padding_is_safe_everywhere() -> None:
    assert_producer(quantize_and_zero, shapes=SHAPES)


def test_gemm_keeps_padding_out_of_its_results() -> None:
    assert_consumer(multiply, shapes=SHAPES)


def test_gemm_that_reads_another_layout_is_named() -> None:
    def multiply_as_8x4(
        a: Tensor, b: Tensor, a_descale: Tensor, b_descale: Tensor, alpha: Tensor, _: SfLayout
    ) -> Tensor:
        nbytes = SfLayout.layout_8x4.nbytes(len(a), 2 * a.shape[1])  # of the larger buffer that a_descale is
        first = a_descale.view(-1)[:nbytes].clone()
        return mm_fp4(a, b, first, b_descale, alpha, use_8x4_sf_layout=True)

    with pytest.raises(AssertionError, match="reads 8x4"):
        assert_consumer(multiply_as_8x4, layout=SfLayout.layout_128x4, shapes=SHAPES)


if __name__ == "__main__":
    torch.manual_seed(0)
    raise SystemExit(pytest.main([__file__, "-q"]))

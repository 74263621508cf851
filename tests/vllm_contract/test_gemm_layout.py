"""A GEMM cannot read a pool buffer in another layout than it was written in."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.vllm_cpu_ops import ALPHA, activation, kernel_and_layer, mm_calls, vllm_flashinfer
from support.vllm_cpu_ops import vllm_quantize as quantize
from torch import Tensor

from safealloc import LayoutMismatchError, ScalePool
from safealloc.integrations import vllm as integration

N, K = 24, 80


def weight() -> tuple[Tensor, Tensor]:
    _, layer = kernel_and_layer("trtllm", N, K)
    return layer.weight.data, layer.weight_scale.data


def scaled_mm(x_fp4: Tensor, scales: Tensor, backend: str, alpha: Tensor | None = ALPHA, **options: Any) -> Tensor:
    weight_fp4, weight_scale = weight()
    return vllm_flashinfer.flashinfer_scaled_fp4_mm(
        x_fp4, weight_fp4, scales, weight_scale, alpha, torch.bfloat16, backend, **options
    )


def mm_op(x_fp4: Tensor, scales: Tensor, use_8x4_sf_layout: bool, backend: str, **options: Any) -> Tensor:
    weight_fp4, weight_scale = weight()
    return torch.ops.vllm.flashinfer_mm_fp4(
        x_fp4, weight_fp4.T, scales, weight_scale.T, ALPHA, torch.bfloat16, use_8x4_sf_layout, backend, **options
    )


@pytest.mark.parametrize("alpha", [ALPHA, None], ids=["alpha", "no alpha"])
@pytest.mark.parametrize("rows", [5, 32])
def test_a_128x4_buffer_of_few_rows_is_read_as_128x4(pool: ScalePool, plugin: None, rows: int, alpha: Tensor) -> None:
    """Without the plugin vLLM looks at the number of rows alone: issue 37563."""
    x_fp4, scales = quantize(activation(rows, K))
    expected = scaled_mm(x_fp4, scales, "cutlass", alpha)
    assert torch.equal(scaled_mm(x_fp4, scales, "trtllm", alpha), expected)
    assert [(call.backend, call.use_8x4_sf_layout) for call in mm_calls] == [("cutlass", False), ("trtllm", False)]
    integration.unregister()
    wrong = scaled_mm(x_fp4, scales, "trtllm", alpha)
    assert mm_calls[-1].use_8x4_sf_layout
    assert not torch.equal(wrong, expected)


@pytest.mark.parametrize("backend", ["trtllm", "cutlass"])
def test_a_wrong_number_of_rows_is_refused(pool: ScalePool, plugin: None, backend: str) -> None:
    """Rows were sliced off after the quantization."""
    for rows, wrong in ((40, 33), (40, 5)):
        x_fp4, scales = quantize(activation(rows, K), backend=f"flashinfer-{backend}")
        with pytest.raises(LayoutMismatchError):
            scaled_mm(x_fp4[:wrong], scales, backend)
    assert mm_calls == []


def test_a_wrong_number_of_columns_is_refused(pool: ScalePool, plugin: None) -> None:
    _, scales = quantize(activation(40, 144))
    with pytest.raises(LayoutMismatchError, match="columns"):
        scaled_mm(quantize(activation(40, K))[0], scales, "cutlass")
    assert mm_calls == []


@pytest.mark.parametrize("rows", [5, 40])
def test_a_wrong_flag_is_refused_by_the_op(pool: ScalePool, plugin: None, rows: int) -> None:
    """The op is called without vLLM's wrapper, as in compiled code."""
    x_fp4, scales = quantize(activation(rows, K))
    mm_op(x_fp4, scales, False, "trtllm")
    for given in (scales, scales.view(torch.uint8)):
        with pytest.raises(LayoutMismatchError, match="written in layout_128x4"):
            mm_op(x_fp4, given, True, "trtllm")
    assert len(mm_calls) == 1


def test_scales_from_other_memory_are_not_checked(pool: ScalePool, plugin: None) -> None:
    """Nothing is known about them that a call could contradict."""
    x_fp4, scales = quantize(activation(5, K))
    scaled_mm(x_fp4, scales.clone(), "trtllm")
    assert (mm_calls[-1].use_8x4_sf_layout, mm_calls[-1].spec) == (True, None)
    mm_op(x_fp4[:4], scales.clone(), True, "cutlass")
    assert len(mm_calls) == 2


def test_mxfp4_is_not_checked(pool: ScalePool, plugin: None) -> None:
    """One of its scales covers 32 columns, so an NVFP4 buffer says nothing about the call."""
    x_fp4, scales = quantize(activation(40, K))
    scaled_mm(x_fp4[:5], scales, "trtllm", block_size=32, use_nvfp4=False)
    assert (mm_calls[-1].use_8x4_sf_layout, mm_calls[-1].block_size) == (True, 32)
    mm_op(x_fp4[:5], scales, True, "cutlass", block_size=32, use_nvfp4=False)
    assert len(mm_calls) == 2

"""Calls into FlashInfer and vLLM, with the arguments they expect."""

from __future__ import annotations

import torch
from torch import Tensor

from safealloc._optional import require
from safealloc.formats.format import ScaleFormat
from safealloc.formats.layout import SfLayout
from safealloc.formats.spec import ScaleSpec


def flashinfer_quantize(
    x: Tensor, global_scale: Tensor, x_fp4: Tensor, scales: Tensor, layout: SfLayout, *without: object
) -> None:
    """``flashinfer.nvfp4_quantize``, which allocates its results: they are copied into ours."""
    flashinfer = require("flashinfer")
    data, their_scales = flashinfer.nvfp4_quantize(
        x, global_scale, sfLayout=flashinfer.SfLayout(layout.value), do_shuffle=False
    )
    x_fp4.copy_(data.view(torch.uint8))
    scales.view(-1).copy_(their_scales.view(torch.uint8).reshape(-1))
    ScaleSpec(x.shape[0], x.shape[1], layout).zero_padding(scales)


def vllm_quantize(
    x: Tensor,
    global_scale: Tensor,
    x_fp4: Tensor,
    scales: Tensor,
    layout: SfLayout,
    valid_rows: Tensor | None = None,
    silu_and_mul: bool = False,
    arithmetic: str = "vllm",
) -> None:
    """``_C::scaled_fp4_quant`` of vLLM, in 128x4 or linear, or its ``silu_and_mul_nvfp4_quant``, into our buffers."""
    require("vllm._custom_ops")
    if silu_and_mul:
        torch.ops._C.silu_and_mul_nvfp4_quant(x_fp4, scales.view(torch.float8_e4m3fn), x, global_scale)
        return
    swizzled = layout is SfLayout.layout_128x4
    output_scale = scales.view(torch.int32) if swizzled else scales
    torch.ops._C.scaled_fp4_quant.out(x, global_scale, swizzled, output=x_fp4, output_scale=output_scale)


def flashinfer_mm(
    a: Tensor,
    b: Tensor,
    a_scales: Tensor,
    b_scales: Tensor,
    alpha: Tensor | None,
    out: Tensor,
    layout: SfLayout,
    *,
    backend: str,
    enable_pdl: bool = True,
    skip_check: bool = False,
    format: ScaleFormat = ScaleFormat.nvfp4,
) -> None:
    """:func:`safealloc.kernels.reference.mm` by ``flashinfer.mm_fp4``, which takes the weight and its scales transposed.

    Args:
        a, b, a_scales, b_scales, alpha, out: in the dtypes that FlashInfer is to see; for trtllm, ``b`` and ``b_scales`` as
            :func:`shuffle_for_trtllm` returns them.
        layout: 128x4 or 8x4.
        backend, enable_pdl, skip_check: FlashInfer's.
        format: NVFP4 or MXFP4.
    """
    mxfp4 = {} if format is ScaleFormat.nvfp4 else {"block_size": format.block_size, "use_nvfp4": False}
    require("flashinfer").mm_fp4(
        a,
        b.T,
        a_scales,
        b_scales.T,
        alpha,
        out.dtype,
        out,
        use_8x4_sf_layout=layout is SfLayout.layout_8x4,
        backend=backend,
        enable_pdl=enable_pdl,
        skip_check=skip_check,
        **mxfp4,
    )


def flashinfer_mm_mxfp8(
    a: Tensor,
    b: Tensor,
    a_scales: Tensor,
    b_scales: Tensor,
    alpha: None,
    out: Tensor,
    layout: SfLayout,
    *,
    backend: str,
    enable_pdl: bool = True,
    skip_check: bool = False,
    format: ScaleFormat = ScaleFormat.mxfp8,
) -> None:
    """:func:`safealloc.kernels.reference.mm` of MXFP8 by ``flashinfer.mm_mxfp8``, which takes flat scales.

    Args:
        a, b, a_scales, b_scales, out: data float8_e4m3fn; for trtllm, ``b`` and ``b_scales`` shuffled.
        alpha, enable_pdl, format: without meaning here.
        layout: 128x4 or 8x4.
        backend, skip_check: FlashInfer's.
    """
    require("flashinfer").mm_mxfp8(
        a,
        b.T,
        a_scales.view(torch.uint8).view(-1),  # two dimensions are linear to FlashInfer
        b_scales.view(torch.uint8).view(-1),
        out,
        out.dtype,
        use_8x4_sf_layout=layout is SfLayout.layout_8x4,
        backend=backend,
        skip_check=skip_check,
    )


TRTLLM_TILE_ROWS = 128
"""Rows of a weight that trtllm's kernels want shuffled together: one tile of their epilogue."""


def shuffle_for_trtllm(
    weight: Tensor, scales: Tensor, format: ScaleFormat = ScaleFormat.nvfp4
) -> tuple[Tensor, Tensor]:
    """A weight as FlashInfer's trtllm GEMM takes it, which is how vLLM prepares it.

    Args:
        weight: uint8 ``[n, k // 2]``, n a multiple of 128; of MXFP8 float8_e4m3fn ``[n, k]``.
        scales: uint8 in layout_128x4 for ``[n, k]``.
        format: NVFP4 or MXFP8.

    Returns:
        Both with their rows shuffled, shapes unchanged.
    """
    flashinfer = require("flashinfer")
    n, k = weight.shape[0], weight.shape[1] * format.values_per_byte
    linear = SfLayout.layout_128x4.unswizzle(scales, n, k, format=format)
    block = {} if format is ScaleFormat.nvfp4 else {"num_elts_per_sf": format.block_size}
    shuffled = flashinfer.shuffle_matrix_sf_a(linear, TRTLLM_TILE_ROWS, **block).view(torch.uint8)
    rows = flashinfer.shuffle_matrix_a(weight.view(torch.uint8), TRTLLM_TILE_ROWS)
    return rows.view(weight.dtype), shuffled.reshape(scales.shape)

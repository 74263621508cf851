"""``nvfp4_linear``: quantize and multiply as one opaque op."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from safealloc.formats.layout import MAX_ROWS_8X4, SfLayout, checked_layout
from safealloc.ops.backends import GEMMS, QUANTIZERS, call_for
from safealloc.ops.gemm import call_of, check_result, check_weight
from safealloc.ops.library import register
from safealloc.ops.quantize import check_input, quantize_into
from safealloc.pool.default import default_pool


def nvfp4_linear(
    x: Tensor,
    weight_fp4: Tensor,
    weight_scale: Tensor,
    input_global_scale: Tensor,
    alpha: Tensor | None,
    *,
    layout: SfLayout | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    backend: str = "auto",
) -> Tensor:
    """``alpha * (nvfp4(x) @ weight.T)``: what a compiled model calls, since the scales never leave the op.

    Args:
        x: bfloat16 or float16 ``[..., k]``, contiguous.
        weight_fp4: uint8 ``[n, k // 2]``, as the backend of :func:`safealloc.mm_fp4` takes it before the transposition.
        weight_scale: its scales in layout_128x4, uint8 or float8_e4m3fn ``[padded_n, padded_cols]``, likewise.
        input_global_scale: float32, one element: the global scale of ``x``.
        alpha: float32, 1 / (input_global_scale * the weight's global scale); ``None`` is 1.
        layout: of the activation's scales; ``None`` is 8x4 for at most 32 rows where the backend reads it, else 128x4.
        out_dtype: of the result.
        backend: of the GEMM, as in :func:`safealloc.mm_fp4`; "reference" quantizes with the reference too.

    Returns:
        ``[..., n]``.

    Raises:
        TypeError, ValueError, SafeAllocError: as :func:`safealloc.nvfp4_quantize` and :func:`safealloc.mm_fp4`.
    """
    if torch.compiler.is_compiling():
        order = None if layout is None else int(layout)
        result: Tensor = torch.ops.safealloc.nvfp4_linear(
            x, weight_fp4, weight_scale, input_global_scale, alpha, order, out_dtype, backend
        )
        return result
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor, got {type(x).__name__}")
    if not x.is_contiguous() or x.ndim < 1:
        raise ValueError(f"x must be [..., k] and contiguous, got shape {tuple(x.shape)} with strides {x.stride()}")
    x_rows = x.view(math.prod(x.shape[:-1]), x.shape[-1])
    rows, x_k = check_input(x_rows, input_global_scale)
    n, k = check_weight(weight_fp4, weight_scale, x.device)
    if x_k != k:
        raise ValueError(
            f"x is [..., k] = {tuple(x.shape)}, so weight_fp4 must be [n, {x_k // 2}], got {tuple(weight_fp4.shape)}"
        )
    check_result(rows, n, alpha, out_dtype, None, x.device)
    layout = _layout_for(rows, alpha, out_dtype, backend, x.device) if layout is None else checked_layout(layout)
    gemm = GEMMS.choose(backend, call_of(layout, alpha, out_dtype, x.device))
    quantizer = QUANTIZERS.choose("reference" if backend == "reference" else "auto", call_for(x.device, layout))
    x_fp4, scales = quantize_into(default_pool(x.device), quantizer, x_rows, input_global_scale, layout)
    y = torch.empty((rows, n), dtype=out_dtype, device=x.device)
    gemm.run(x_fp4, weight_fp4, scales, weight_scale, alpha, y, layout)
    return y.view(*x.shape[:-1], n)


def _layout_for(
    rows: int, alpha: Tensor | None, out_dtype: torch.dtype, backend: str, device: torch.device
) -> SfLayout:
    if rows > MAX_ROWS_8X4:
        return SfLayout.layout_128x4
    gemm = GEMMS.choose(backend, call_of(SfLayout.layout_128x4, alpha, out_dtype, device))
    refusal = gemm.refusal(call_of(SfLayout.layout_8x4, alpha, out_dtype, device))
    return SfLayout.layout_128x4 if refusal else SfLayout.layout_8x4


register(
    "nvfp4_linear(Tensor x, Tensor weight_fp4, Tensor weight_scale, Tensor input_global_scale, Tensor? alpha, "
    "int? layout, ScalarType out_dtype, str backend) -> Tensor",
    # contiguous(): a compiler may choose another memory order for what the eager code saw as contiguous.
    lambda x, weight, weight_scale, global_scale, alpha, layout, out_dtype, backend: nvfp4_linear(
        x.contiguous(), weight, weight_scale, global_scale, alpha, layout=layout, out_dtype=out_dtype, backend=backend
    ),
    lambda x, weight, weight_scale, global_scale, alpha, layout, out_dtype, backend: x.new_empty(
        (*x.shape[:-1], weight.shape[0]), dtype=out_dtype
    ),
)

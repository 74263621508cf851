"""``nvfp4_linear``: quantise and multiply as one opaque op."""

from __future__ import annotations

import torch
from torch import Tensor

from safealloc.backends import GEMMS, Call, choose
from safealloc.default_pool import library
from safealloc.gemm import mm_fp4
from safealloc.layout import SfLayout, checked_layout
from safealloc.quantize import nvfp4_quantize

MAX_ROWS_8X4 = 32
"""Up to here vLLM and TensorRT-LLM take 8x4 for their low-latency GEMMs (vLLM, ``scaled_fp4_quant``)."""


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
        backend: of the GEMM, as in :func:`safealloc.mm_fp4`; "reference" quantises with the reference too.

    Returns:
        ``[..., n]``.

    Raises:
        TypeError, ValueError, SafeAllocError: as :func:`safealloc.nvfp4_quantize` and :func:`safealloc.mm_fp4`.
    """
    if torch.compiler.is_compiling():
        result: Tensor = torch.ops.safealloc.nvfp4_linear(
            x,
            weight_fp4,
            weight_scale,
            input_global_scale,
            alpha,
            None if layout is None else int(layout),
            out_dtype,
            backend,
        )
        return result
    for name, tensor in (("x", x), ("weight_fp4", weight_fp4), ("weight_scale", weight_scale)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if not x.is_contiguous() or x.ndim < 1:
        raise ValueError(f"x must be [..., k] and contiguous, got shape {tuple(x.shape)} with strides {x.stride()}")
    if weight_fp4.ndim != 2 or x.shape[-1] != 2 * weight_fp4.shape[1]:
        raise ValueError(
            f"x is [..., k] = {tuple(x.shape)}, so weight_fp4 must be [n, {x.shape[-1] // 2}], got {tuple(weight_fp4.shape)}"
        )
    rows = x.reshape(-1, x.shape[-1])
    layout = _layout_for(rows, out_dtype, backend) if layout is None else checked_layout(layout)
    choose(GEMMS, backend, Call(x.device, layout, out_dtype))
    quantizer = "reference" if backend == "reference" else "auto"
    x_fp4, scales = nvfp4_quantize(rows, input_global_scale, layout=layout, backend=quantizer)
    y = mm_fp4(x_fp4, weight_fp4.T, scales, weight_scale.T, alpha, out_dtype, backend=backend)
    return y.view(*x.shape[:-1], weight_fp4.shape[0])


def _layout_for(rows: Tensor, out_dtype: torch.dtype, backend: str) -> SfLayout:
    if rows.shape[0] > MAX_ROWS_8X4:
        return SfLayout.layout_128x4
    wide = choose(GEMMS, backend, Call(rows.device, SfLayout.layout_128x4, out_dtype))
    narrow_refused = wide.refusal(Call(rows.device, SfLayout.layout_8x4, out_dtype))
    return SfLayout.layout_128x4 if narrow_refused else SfLayout.layout_8x4


library.define(
    "nvfp4_linear(Tensor x, Tensor weight_fp4, Tensor weight_scale, Tensor input_global_scale, Tensor? alpha, "
    "int? layout, ScalarType out_dtype, str backend) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _op(
    x: Tensor,
    weight_fp4: Tensor,
    weight_scale: Tensor,
    input_global_scale: Tensor,
    alpha: Tensor | None,
    layout: int | None,
    out_dtype: torch.dtype,
    backend: str,
) -> Tensor:
    sf_layout = None if layout is None else SfLayout(layout)
    x = x.contiguous()  # a compiler may choose another memory order for what the eager code saw as contiguous
    return nvfp4_linear(
        x, weight_fp4, weight_scale, input_global_scale, alpha, layout=sf_layout, out_dtype=out_dtype, backend=backend
    )


def _fake(
    x: Tensor,
    weight_fp4: Tensor,
    weight_scale: Tensor,
    input_global_scale: Tensor,
    alpha: Tensor | None,
    layout: int | None,
    out_dtype: torch.dtype,
    backend: str,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight_fp4.shape[0]), dtype=out_dtype)


library.impl("nvfp4_linear", _op, "CompositeExplicitAutograd")
torch.library.register_fake("safealloc::nvfp4_linear", _fake, lib=library)

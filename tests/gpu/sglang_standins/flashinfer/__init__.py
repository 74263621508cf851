"""FlashInfer's NVFP4 calls below Blackwell, for SGLang's engine: its signatures and allocations, our kernels' arithmetic.

Eager calls zero padding, as FlashInfer's kernel does. Captured ones do too, unless ``STANDIN_PADDING=left``: then they write
valid scales only, as a fused producer does, into memory that ``torch.empty`` has filled with NaN.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from flashinfer import missing, norm
from safealloc import SfLayout
from safealloc.kernels import triton_gemm, triton_padding, triton_quantize

__version__ = "0.6.14"
__getattr__ = missing.attribute
rmsnorm, fused_add_rmsnorm = norm.rmsnorm, norm.fused_add_rmsnorm


def fp4_quantize(
    input: Tensor,
    global_scale: Tensor | None = None,
    sf_vec_size: int = 16,
    sf_use_ue8m0: bool = False,
    is_sf_swizzled_layout: bool = True,
    is_sf_8x4_layout: bool = False,
    enable_pdl: bool | None = None,
    backend: str = "cuda",
) -> tuple[Tensor, Tensor]:
    assert is_sf_swizzled_layout
    assert not is_sf_8x4_layout
    assert global_scale is not None
    layout, (rows, k) = SfLayout.layout_128x4, input.shape
    left = os.environ.get("STANDIN_PADDING") == "left" and torch.cuda.is_current_stream_capturing()
    torch.use_deterministic_algorithms(left)  # torch.empty then fills
    try:
        data = torch.empty((rows, k // 2), dtype=torch.uint8, device=input.device)
        scales = torch.empty(layout.padded_shape(rows, k), dtype=torch.uint8, device=input.device)
    finally:
        torch.use_deterministic_algorithms(False)
    if rows:
        triton_quantize.quantize(input.contiguous(), global_scale.reshape(-1).float(), data, scales, layout, None)
        if not left:
            triton_padding.zero_padding(scales, layout, rows, k)
    return data, scales


def mm_fp4(
    a: Tensor,
    b: Tensor,
    a_descale: Tensor,
    b_descale: Tensor,
    alpha: Tensor,
    out_dtype: torch.dtype = torch.bfloat16,
    out: Tensor | None = None,
    block_size: int = 16,
    use_8x4_sf_layout: bool = False,
    backend: str = "auto",
    use_nvfp4: bool = True,
    enable_pdl: bool = True,
) -> Tensor:
    """Reads whole tiles, padding columns included."""
    out = torch.empty((a.shape[0], b.shape[1]), dtype=out_dtype, device=a.device) if out is None else out
    if len(a):
        scales = a_descale.view(torch.uint8), b_descale.T.view(torch.uint8)
        triton_gemm.mm(a, b.T, *scales, alpha.reshape(-1), out, SfLayout.layout_128x4)
    return out

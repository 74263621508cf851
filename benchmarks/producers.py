# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""RMSNorm, the kernel before most quantizations of a decode step, so that the benchmark has it there too."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from safealloc.kernels.triton_layout import device_of

EPSILON = 1e-6


@triton.jit
def _rms_norm(x, residual, weight, out, total, cols, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)
    inside = col < cols
    at = row * cols + col
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if residual is not None:
        value += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(total + at, value.to(total.dtype.element_ty), mask=inside)
    factor = 1 / tl.sqrt(tl.sum(value * value, 0) / cols + eps)
    scale = tl.load(weight + col, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, (value * factor * scale).to(out.dtype.element_ty), mask=inside)


def rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, out: Tensor, total: Tensor | None) -> None:
    """RMSNorm of ``x``, or of ``x + residual``, in one launch; one program per row.

    Args:
        x, residual: bfloat16 ``[rows, k]``, contiguous; ``None`` adds nothing.
        weight: bfloat16 ``[k]``.
        out: as ``x``, written.
        total: as ``x``, where ``x + residual`` is written; ``None`` without a residual.
    """
    rows, k = x.shape
    with device_of(x):
        _rms_norm[(rows,)](x, residual, weight, out, total, k, EPSILON, BLOCK=triton.next_power_of_2(k), num_warps=8)

"""The arithmetic of vLLM's and FlashInfer's quantizers in plain torch, written after their sources and not after our kernels.

Approximate instructions are arguments: a GPU's own, or on a CPU the same rounded to nearest, which is what most of them give.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from safealloc.kernels import reference

_LEAST = 2.0**-126


def rounded_reciprocal(x: Tensor) -> Tensor:
    """``rcp.approx.ftz.f32``, rounded to nearest."""
    return flushed(1 / flushed(x))


def rounded_silu(v: Tensor, arithmetic: str) -> Tensor:
    """``v / (1 + ex2.approx(-v * log2 e))``, rounded to nearest, by numpy, as Triton's interpreter has it."""
    with np.errstate(over="ignore"):
        power = np.exp2(times(v, torch.tensor(-1.4426950408889634), arithmetic).numpy())
    return v / (1 + torch.from_numpy(power))


def flushed(x: Tensor) -> Tensor:
    """Subnormals become zeros of their sign."""
    return torch.where(x.abs() < _LEAST, x * 0, x)


def times(a: Tensor, b: Tensor, arithmetic: str) -> Tensor:
    """``a * b`` in float32, as the vendor's compiler options make it."""
    return flushed(flushed(a) * flushed(b)) if arithmetic == "flashinfer" else a * b


def silu_and_mul(x: Tensor, arithmetic: str, silu: Callable[[Tensor, str], Tensor] = rounded_silu) -> Tensor:
    """``[rows, 2 * k]``, gate and up, as ``[rows, k]`` of the same dtype."""
    gate, up = x.float().chunk(2, 1)
    return times(silu(gate, arithmetic), up, arithmetic).to(x.dtype)


def encode(
    x: Tensor,
    g: Tensor,
    arithmetic: str,
    reciprocal: Callable[[Tensor], Tensor] = rounded_reciprocal,
    step: int = 0,
) -> tuple[Tensor, Tensor]:
    """Data, uint8 ``[rows, k // 2]``, and scales in matrix order, uint8 ``[rows, k // 16]``.

    Args:
        x: bfloat16 or float16 ``[rows, k]``.
        g: float32 ``[1]`` or ``[rows, 1]``.
        arithmetic: "vllm" or "flashinfer".
        reciprocal: of float32.
        step: the factor of each block is moved by so many of its last bits.
    """
    rows, k = x.shape
    values = x.float().view(rows, -1, 16)
    amax = values.abs().nan_to_num(nan=-1.0, posinf=float("inf")).amax(-1)
    amax = torch.where(amax < 0, float("nan"), amax)  # nothing but NaN
    sixth = reciprocal(torch.full_like(g, 6.0))
    scaled = times(g, times(amax, sixth, arithmetic), arithmetic)
    scale = scaled.clamp(-448, 448).to(torch.float8_e4m3fn)
    factor = reciprocal(times(scale.float(), reciprocal(g), arithmetic))
    none = flushed(amax) == 0 if arithmetic == "flashinfer" else scale.float() == 0
    factor = torch.where(none, 0.0, factor)
    if step:
        finite = factor.isfinite() & (factor != 0)
        factor = torch.where(finite, (factor.view(torch.int32) + step).view(torch.float32), factor)
    products = times(values, factor[..., None], arithmetic).view(rows, k)
    codes = reference.encode_e2m1(products) & 7 | (products.signbit() & ~products.isnan()).to(torch.uint8) << 3
    linear = torch.where(scaled.isnan(), 0x7F, scale.view(torch.uint8))
    return codes[:, 0::2] | codes[:, 1::2] << 4, linear

"""The pool, and the baselines: every way in which padding is kept zero today, as one call each.

All use our Triton quantizer. Those that are named stand-ins take the place of vendors' kernels, which have no code below
compute capability 10.0; :mod:`benchmarks.vendor_kernels` has the vendors' own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks import in_kernel, moe
from safealloc.formats.layout import SfLayout
from safealloc.kernels import triton_padding, triton_quantize
from safealloc.pool.pool import ScalePool


@dataclass(frozen=True, slots=True)
class Baseline:
    """One way to quantize; the pool counts as one.

    Attributes:
        name: in tables, JSON and pictures.
        about: one sentence.
        quantize: called with x ``[rows, k]``, the global scale and a layout; returns data and scales. It runs on the
            current stream and is legal in a capture. With ``silu_and_mul=True``, x is gate and up, ``[rows, 2 * k]``.
        experts: quantizes rows grouped by expert, without stale scales where padding is kept zero; returns data and scales.
        layout: the layout it always writes; ``None`` where it writes the requested one.
    """

    name: str
    about: str
    quantize: Callable[..., tuple[Tensor, Tensor]]
    experts: moe.Call
    layout: SfLayout | None = None


_Result = tuple[Tensor, Tensor]

POOL, EMPTY, ZEROS, IN_KERNEL, WIDE_STORES, RETURNED, LINEAR = (
    "pool",
    "empty",
    "zeros (stand-in)",
    "padding in the kernel (stand-in)",
    "padding in the kernel, wide stores (stand-in)",
    "zeroing the returned buffer (stand-in)",
    "linear",
)


def baselines(pool: ScalePool) -> dict[str, Baseline]:
    """All of them by name, the pool first."""

    def from_pool(x: Tensor, global_scale: Tensor, layout: SfLayout, silu_and_mul: bool = False) -> _Result:
        return _quantize(x, global_scale, layout, pool.acquire(*_matrix(x, silu_and_mul), layout), silu_and_mul)

    def empty(x: Tensor, global_scale: Tensor, layout: SfLayout, silu_and_mul: bool = False) -> _Result:
        return _quantize(x, global_scale, layout, _empty(x, layout, silu_and_mul), silu_and_mul)

    def zeros(x: Tensor, global_scale: Tensor, layout: SfLayout, silu_and_mul: bool = False) -> _Result:
        shape = layout.padded_shape(*_matrix(x, silu_and_mul))
        scales = torch.zeros(shape, dtype=torch.uint8, device=x.device)
        return _quantize(x, global_scale, layout, scales, silu_and_mul)

    def row_by_row(x: Tensor, global_scale: Tensor, layout: SfLayout, silu_and_mul: bool = False) -> _Result:
        scales = _empty(x, layout, silu_and_mul)
        return _quantize(x, global_scale, layout, scales, silu_and_mul, in_kernel.row_by_row)

    def wide_stores(x: Tensor, global_scale: Tensor, layout: SfLayout, silu_and_mul: bool = False) -> _Result:
        scales = _empty(x, layout, silu_and_mul)
        return _quantize(x, global_scale, layout, scales, silu_and_mul, in_kernel.wide_stores)

    def returned(x: Tensor, global_scale: Tensor, layout: SfLayout, silu_and_mul: bool = False) -> _Result:
        x_fp4, scales = empty(x, global_scale, layout, silu_and_mul)
        triton_padding.zero_padding(scales, layout, *_matrix(x, silu_and_mul))
        return x_fp4, scales

    of_experts: dict[tuple[int, int, int], dict[str, moe.Call]] = {}

    def experts(way: str) -> moe.Call:
        def quantize(step: moe.Step) -> _Result:
            key = len(step.global_scales), step.x.shape[0], step.k
            if key not in of_experts:
                of_experts[key] = moe.baselines(pool, *key)
            return of_experts[key][way](step)

        return quantize

    # No expert quantizer stores padding itself or has it zeroed afterwards: a fill at each call keeps it zero there.
    filled = experts(moe.RIGHT_SIZED)
    every = (
        Baseline(POOL, "a pool buffer, padding zeroed when it was made", from_pool, experts(moe.POOL)),
        Baseline(EMPTY, "torch.empty: unsafe, the floor for an allocation", empty, experts(moe.ALONE)),
        Baseline(ZEROS, "torch.zeros at each call: vLLM 0.20, 0.21 and 0.25 to 0.29", zeros, filled),
        Baseline(
            IN_KERNEL,
            "torch.empty, and a quantizer that stores padding, row by row: vLLM from 0.30 on",
            row_by_row,
            filled,
        ),
        Baseline(
            WIDE_STORES,
            "torch.empty, and a quantizer that stores padding with the widest stores",
            wide_stores,
            filled,
        ),
        Baseline(
            RETURNED, "torch.empty, and a kernel that zeroes the padding afterwards: vLLM PR 47587", returned, filled
        ),
        Baseline(
            LINEAR,
            "torch.empty in the linear layout, which has no padding: the floor for the arithmetic",
            empty,
            experts(moe.ALONE),
            SfLayout.layout_linear,
        ),
    )
    return {baseline.name: baseline for baseline in every}


def _matrix(x: Tensor, silu_and_mul: bool) -> tuple[int, int]:
    """Rows and columns of what is quantized."""
    rows, width = x.shape
    return rows, width // 2 if silu_and_mul else width


def _empty(x: Tensor, layout: SfLayout, silu_and_mul: bool) -> Tensor:
    return torch.empty(layout.padded_shape(*_matrix(x, silu_and_mul)), dtype=torch.uint8, device=x.device)


def _quantize(
    x: Tensor,
    global_scale: Tensor,
    layout: SfLayout,
    scales: Tensor,
    silu_and_mul: bool,
    kernel: Callable[..., None] = triton_quantize.quantize,
) -> _Result:
    rows, k = _matrix(x, silu_and_mul)
    x_fp4 = torch.empty((rows, k // 2), dtype=torch.uint8, device=x.device)
    kernel(x, global_scale, x_fp4, scales, layout, silu_and_mul=silu_and_mul)
    return x_fp4, scales

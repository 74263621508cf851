"""The pool, and the baselines: every way in which padding is kept zero today, as one call each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks import in_kernel
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
            current stream and is legal in a capture.
        layout: the layout it always writes; ``None`` where it writes the requested one.
    """

    name: str
    about: str
    quantize: Callable[[Tensor, Tensor, SfLayout], tuple[Tensor, Tensor]]
    layout: SfLayout | None = None


POOL, EMPTY, ZEROS, IN_KERNEL, WIDE_STORES, RETURNED, LINEAR = (
    "pool",
    "empty",
    "zeros",
    "padding in the kernel",
    "padding in the kernel, wide stores",
    "zeroing the returned buffer",
    "linear",
)


def baselines(pool: ScalePool) -> dict[str, Baseline]:
    """All of them by name, the pool first; all use our Triton quantizer."""

    def from_pool(x: Tensor, global_scale: Tensor, layout: SfLayout) -> tuple[Tensor, Tensor]:
        rows, k = x.shape
        return _quantize(x, global_scale, layout, pool.acquire(rows, k, layout))

    def empty(x: Tensor, global_scale: Tensor, layout: SfLayout) -> tuple[Tensor, Tensor]:
        return _quantize(x, global_scale, layout, _empty(x, layout))

    def zeros(x: Tensor, global_scale: Tensor, layout: SfLayout) -> tuple[Tensor, Tensor]:
        scales = torch.zeros(layout.padded_shape(*x.shape), dtype=torch.uint8, device=x.device)
        return _quantize(x, global_scale, layout, scales)

    def row_by_row(x: Tensor, global_scale: Tensor, layout: SfLayout) -> tuple[Tensor, Tensor]:
        return _quantize(x, global_scale, layout, _empty(x, layout), in_kernel.row_by_row)

    def wide_stores(x: Tensor, global_scale: Tensor, layout: SfLayout) -> tuple[Tensor, Tensor]:
        return _quantize(x, global_scale, layout, _empty(x, layout), in_kernel.wide_stores)

    def returned(x: Tensor, global_scale: Tensor, layout: SfLayout) -> tuple[Tensor, Tensor]:
        x_fp4, scales = _quantize(x, global_scale, layout, _empty(x, layout))
        triton_padding.zero_padding(scales, layout, *x.shape)
        return x_fp4, scales

    every = (
        Baseline(POOL, "a pool buffer, padding zeroed when it was made", from_pool),
        Baseline(EMPTY, "torch.empty: unsafe, the floor for an allocation", empty),
        Baseline(ZEROS, "torch.zeros at each call: vLLM 0.20, 0.21 and 0.25 to 0.29", zeros),
        Baseline(
            IN_KERNEL, "torch.empty, and a quantizer that stores padding, row by row: vLLM from 0.30 on", row_by_row
        ),
        Baseline(WIDE_STORES, "torch.empty, and a quantizer that stores padding with the widest stores", wide_stores),
        Baseline(RETURNED, "torch.empty, and a kernel that zeroes the padding afterwards: vLLM PR 47587", returned),
        Baseline(
            LINEAR,
            "torch.empty in the linear layout, which has no padding: the floor for the arithmetic",
            empty,
            SfLayout.layout_linear,
        ),
    )
    return {baseline.name: baseline for baseline in every}


def _empty(x: Tensor, layout: SfLayout) -> Tensor:
    return torch.empty(layout.padded_shape(*x.shape), dtype=torch.uint8, device=x.device)


def _quantize(
    x: Tensor,
    global_scale: Tensor,
    layout: SfLayout,
    scales: Tensor,
    kernel: Callable[[Tensor, Tensor, Tensor, Tensor, SfLayout], None] = triton_quantize.quantize,
) -> tuple[Tensor, Tensor]:
    x_fp4 = torch.empty((x.shape[0], x.shape[1] // 2), dtype=torch.uint8, device=x.device)
    kernel(x, global_scale, x_fp4, scales, layout)
    return x_fp4, scales

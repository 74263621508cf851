"""Every way in which padding is kept clean today, as one call each: the pool, and what it is measured against."""

from __future__ import annotations

import functools
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
    """One way to quantize.

    Attributes:
        name: in tables, JSON and pictures.
        about: one sentence.
        quantize: of x ``[rows, k]``, the global scale and a layout; returns data and scales, all on the current stream,
            legal in a capture.
        layout: the layout it always writes; ``None``: the one it is asked for.
    """

    name: str
    about: str
    quantize: Callable[[Tensor, Tensor, SfLayout], tuple[Tensor, Tensor]]
    layout: SfLayout | None = None


POOL, COMPACT, EMPTY, ZEROS, IN_KERNEL, WIDE_STORES, RETURNED, LINEAR = (
    "pool",
    "pool, compact",
    "empty",
    "zeros",
    "padding in the kernel",
    "padding in the kernel, wide stores",
    "zeroing the returned buffer",
    "linear",
)


def baselines(pool: ScalePool, compact: ScalePool | None = None) -> dict[str, Baseline]:
    """All baselines by name, the pool first; all write with our Triton quantizer.

    Args:
        pool: not compact.
        compact: a compact one, if that is a baseline.
    """

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

    def from_compact(x: Tensor, global_scale: Tensor, layout: SfLayout) -> tuple[Tensor, Tensor]:
        rows, k = x.shape
        assert compact is not None
        scales, counts = compact.acquire_compact(rows, k, layout)
        return _quantize(x, global_scale, layout, scales, functools.partial(triton_quantize.quantize, counts=counts))

    every = (
        Baseline(POOL, "a pool buffer, padding zeroed when it was made", from_pool),
        Baseline(COMPACT, "a buffer of a compact pool, which the quantizer keeps clear", from_compact),
        Baseline(EMPTY, "torch.empty: unsafe, the floor for an allocation", empty),
        Baseline(ZEROS, "torch.zeros at each call: vLLM 0.20, 0.21 and 0.25 to 0.29", zeros),
        Baseline(IN_KERNEL, "torch.empty, and a quantizer that stores padding, row by row: vLLM from 0.30 on", row_by_row),
        Baseline(WIDE_STORES, "the same with the widest stores that we could make of them", wide_stores),
        Baseline(RETURNED, "torch.empty, and a kernel that zeroes the padding afterwards: vLLM PR 47587", returned),
        Baseline(
            LINEAR,
            "torch.empty, no tiles and so no padding: the floor for the arithmetic",
            empty,
            SfLayout.layout_linear,
        ),
    )
    return {baseline.name: baseline for baseline in every if baseline.name != COMPACT or compact is not None}


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

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""What the Triton kernels share: how they launch, and where a scale byte lies; :mod:`safealloc.formats.layout` says why."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

__all__ = ["dependent_launch", "device_of", "gdc_launch_dependents", "gdc_wait", "scale_offset"]


@triton.jit
def scale_offset(row, col, col_tiles, LAYOUT: tl.constexpr):
    """Byte offset of the scale of (row, col), int64; the arguments broadcast.

    ``row`` and ``col`` are integer tensors and not negative, ``col_tiles`` counts the tiles of 4 columns in a row of
    tiles (linear: the columns), ``LAYOUT`` is the value of an ``SfLayout``.
    """
    row = row.to(tl.uint32)  # unsigned, so that the divisions are shifts
    col = col.to(tl.uint32)
    # Everything within a tile stays in 32 bits; only where the tile lies may need more.
    if LAYOUT == 0:
        tile = (row // 128).to(tl.int64) * col_tiles + col // 4
        offset = tile * 512 + (row % 32 * 16 + row % 128 // 32 * 4 + col % 4)
    elif LAYOUT == 1:
        tile = (row // 8).to(tl.int64) * col_tiles + col // 4
        offset = tile * 32 + (row % 8 * 4 + col % 4)
    else:
        tl.static_assert(LAYOUT == 2)
        offset = row.to(tl.int64) * col_tiles + col
    return offset


def device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    """Makes the tensor's device the current one, where Triton launches; free where it is already."""
    if not tensor.is_cuda or tensor.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(tensor.device)


@functools.cache
def dependent_launch(device: torch.device) -> dict[str, bool]:
    """Triton's option for a programmatic dependent launch, where the device has it (compute capability 9.0 or more).

    Such a kernel is launched while its predecessor still runs, and has to call ``gdc_wait`` before it touches memory: that
    returns when all that came before is done and visible (CUDA Programming Guide, "Programmatic Dependent Launch").
    """
    if _GDC_WAIT_COMPILES and device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0):
        return {"launch_pdl": True}
    return {}


_GDC_WAIT_COMPILES = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 5)  # not with Triton 3.4

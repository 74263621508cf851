# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""What the Triton kernels share: where a scale byte lies, and on which device they launch.

The byte of (row, col) is::

    128x4   (row // 128 * col_tiles + col // 4) * 512 + row % 32 * 16 + row % 128 // 32 * 4 + col % 4
    8x4     (row // 8 * col_tiles + col // 4) * 32 + row % 8 * 4 + col % 4
    linear  row * col_tiles + col

:mod:`safealloc.layout` states the same for Python and names the sources.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


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

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Zeroes the padding of a scale buffer in one launch, as :meth:`safealloc.formats.spec.ScaleSpec.zero_padding`.

A word is what a tile holds of one row: 4 bytes, in linear 1. The padding is two sets of words::

    rows below the matrix      (padded_rows - rows) * col_tiles           whole words
    columns beside the matrix  rows * (col_tiles - cols // tile_cols)     in the first of these tiles only columns >= cols

Each program takes a piece of one set, so that the cost follows the padding whatever the size of the buffer.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor, uint8

from safealloc.formats.format import ScaleFormat
from safealloc.formats.layout import SfLayout
from safealloc.formats.spec import ScaleSpec
from safealloc.kernels.triton_layout import device_of, scale_offset

_WORDS = 512
"""Words a program. One row of 128x4 scales at k = 28672 leaves 56896 padding words: 112 programs, about one per SM."""


# One binary for all shapes: a new batch size must not compile, least of all during a graph capture.
@triton.jit(do_not_specialize=["rows", "cols", "col_tiles", "padding_rows", "row_programs"])
def _zero_padding(
    scales,  # uint8 [padded_rows, 4 * col_tiles] in LAYOUT (linear: [rows, col_tiles])
    rows, cols, col_tiles,
    padding_rows,  # padded_rows - rows
    row_programs,  # programs that take rows below the matrix; the rest take columns
    LAYOUT: tl.constexpr, TILE_COLS: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    column = tl.arange(0, TILE_COLS)[None, :]
    # Two stores rather than one with both conditions: a mask that is the same for a whole word lets it go out as one.
    if program < row_programs:
        word = program * WORDS + tl.arange(0, WORDS)
        row = rows + word % padding_rows
        col = (word // padding_rows * TILE_COLS)[:, None] + column
        offset = scale_offset(row[:, None], col, col_tiles, LAYOUT)
        tl.store(scales + offset, tl.zeros_like(col).to(tl.uint8), mask=(word < padding_rows * col_tiles)[:, None])
    else:
        word = (program - row_programs) * WORDS + tl.arange(0, WORDS)
        row = word % rows
        first_tile = cols // TILE_COLS
        col = ((first_tile + word // rows) * TILE_COLS)[:, None] + column
        offset = scale_offset(row[:, None], col, col_tiles, LAYOUT)
        inside = (word < rows * (col_tiles - first_tile))[:, None]
        tl.store(scales + offset, tl.zeros_like(col).to(tl.uint8), mask=inside & (col >= cols))


def zero_padding(
    scales: Tensor,
    layout: SfLayout,
    rows: int,
    k: int,
    padded_k: int | None = None,
    *,
    format: ScaleFormat = ScaleFormat.nvfp4,
) -> None:
    """Zero the padding of a buffer in place; valid scales, and bytes beyond the layout, are not touched.

    Without padding nothing is launched. Nothing is allocated and nothing synchronizes.

    Args:
        scales: contiguous buffer of at least the bytes of the matrix (:meth:`SfLayout.nbytes`), of any dtype.
        layout: order of its bytes.
        rows, k, padded_k, format: the matrix, as in :meth:`SfLayout.padded_shape`.
    """
    padded_rows, padded_cols = layout.padded_shape(rows, k, padded_k=padded_k, format=format)
    tile_cols = layout.tile.cols
    cols, col_tiles, padding_rows = k // format.block_size, padded_cols // tile_cols, padded_rows - rows
    row_programs = -(-padding_rows * col_tiles // _WORDS)
    col_programs = -(-rows * (col_tiles - cols // tile_cols) // _WORDS)
    if not row_programs + col_programs:
        return
    if (row_programs + col_programs) * _WORDS >= 1 << 31:  # what the kernel counts in 32 bits
        spec = ScaleSpec(rows, k, layout, padded_k, format)
        spec.zero_padding(scales.view(-1).view(uint8)[: padded_rows * padded_cols])
        return
    if scales.dtype is not uint8:
        scales = scales.view(-1).view(uint8)
    with device_of(scales):
        _zero_padding[(row_programs + col_programs,)](
            scales,
            rows,
            cols,
            col_tiles,
            padding_rows,
            row_programs,
            LAYOUT=int(layout),
            TILE_COLS=tile_cols,
            WORDS=_WORDS,
            enable_fp_fusion=False,  # nothing here could fuse; Triton 3.9 warns where it is left open
        )

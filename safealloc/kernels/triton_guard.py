# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Checks that padding is zero, and reports to the host by a word of its memory: checks are asynchronous.

A program checks a piece of a buffer, 128 rows of 64 columns, in matrix order. What is padding follows from the shape, or
from the buffer's record (:class:`safealloc.formats.spec.ScaleSpec`).
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from safealloc.formats.spec import ScaleSpec
from safealloc.kernels.triton_layout import device_of, scale_offset

_ROWS, _COLS = tl.constexpr(128), tl.constexpr(64)  # of a piece
_STEP = tl.constexpr(16)  # columns that a program holds at once

WORDS = 11
"""int64 of a piece in a table: the fields of :class:`Piece`, and a word that says where its flag is."""


class Piece(NamedTuple):
    """A part of a buffer that has padding, all integers: two addresses, sizes in scales, and where the part begins."""

    scales: int
    record: int
    length: int
    rows: int
    cols: int
    padded_rows: int
    col_tiles: int
    layout: int
    first_row: int
    first_col: int


@triton.jit
def _is_dirty(scales, record, length, rows, cols, padded_rows, col_tiles, layout, first_row, first_col):
    """Whether a byte of a piece is padding and not zero."""
    row = first_row + tl.arange(0, _ROWS)
    tile_cols = tl.where(layout == 2, 1, 4)
    end = tl.minimum(first_col + _COLS, col_tiles * tile_cols)
    valid_row = row < rows
    if length > 0:  # the record names the valid rows
        named = tl.zeros((_ROWS,), tl.int32)
        for start in range(0, length, _ROWS):
            at = start + tl.arange(0, _ROWS)
            place = tl.load(record + at, mask=at < length, other=0)
            named += tl.sum((place[None, :] == row[:, None] + 1).to(tl.int32), 1)
        valid_row = named > 0
    dirty = tl.zeros((_ROWS, _STEP), tl.int32)
    for start in range(first_col, end, _STEP):
        col = start + tl.arange(0, _STEP)
        valid = valid_row[:, None] & (col < cols)[None, :]
        row_2d, col_2d = row[:, None], col[None, :]
        in_128x4 = scale_offset(row_2d, col_2d, col_tiles, 0)
        in_8x4 = scale_offset(row_2d, col_2d, col_tiles, 1)
        linear = scale_offset(row_2d, col_2d, col_tiles, 2)
        offset = tl.where(layout == 0, in_128x4, tl.where(layout == 1, in_8x4, linear))
        padding = (row_2d < padded_rows) & (col_2d < end) & (valid == 0)
        byte = tl.load(scales + offset, mask=padding, other=0)
        dirty |= (byte != 0).to(tl.int32)
    return tl.max(tl.max(dirty, 1), 0) != 0


# One binary for all shapes: a new one must not compile, least of all during a graph capture.
@triton.jit(do_not_specialize=["length", "rows", "cols", "padded_rows", "col_tiles", "layout", "slot"])
def _check(scales, record, flags, length, rows, cols, padded_rows, col_tiles, layout, slot):
    """``scales``: uint8; ``record``: int32, anything where length is 0; ``flags``: int32, of the host."""
    first_row, first_col = tl.program_id(0) * _ROWS, tl.program_id(1) * _COLS
    if _is_dirty(scales, record, length, rows, cols, padded_rows, col_tiles, layout, first_row, first_col):
        tl.store(flags + slot, 1)
        tl.store(flags, 1)


@triton.jit
def _number(word):
    return tl.load(word).to(tl.int32)


@triton.jit(do_not_specialize=["every"])
def _check_table(
    table,  # int64 [1 + pieces, WORDS], of the host; the first word is how many pieces there are
    flags,  # int32, of the host
    counters,  # int32, one a program
    every,
    WORDS: tl.constexpr,
):
    program = tl.program_id(0)
    seen = tl.load(counters + program) + 1
    tl.store(counters + program, tl.where(seen >= every, 0, seen))
    if seen >= every:
        for piece in range(program, _number(table), tl.num_programs(0)):
            at = table + (piece + 1) * WORDS
            scales, record = tl.load(at).to(tl.pointer_type(tl.uint8)), tl.load(at + 1).to(tl.pointer_type(tl.int32))
            length, rows, cols, padded_rows = _number(at + 2), _number(at + 3), _number(at + 4), _number(at + 5)
            col_tiles, layout, first_row, first_col = _number(at + 6), _number(at + 7), _number(at + 8), _number(at + 9)
            if _is_dirty(scales, record, length, rows, cols, padded_rows, col_tiles, layout, first_row, first_col):
                tl.store(flags + tl.load(at + 10), 1)
                tl.store(flags, 1)


def pieces_of(spec: ScaleSpec, base: Tensor) -> list[Piece]:
    """The pieces of a buffer that have padding, for a table.

    Args:
        spec: of the buffer.
        base: all its scales, uint8 ``[padded_rows, padded_cols]``.
    """
    whole = _whole(spec, base)
    padded_rows, padded_cols = spec.padded_shape
    corners = itertools.product(range(0, padded_rows, _ROWS.value), range(0, padded_cols, _COLS.value))
    return [
        whole._replace(first_row=row, first_col=col)
        for row, col in corners
        if whole.length or row + _ROWS.value > whole.rows or min(col + _COLS.value, padded_cols) > whole.cols
    ]


def check(spec: ScaleSpec, base: Tensor, flags: Tensor, slot: int) -> None:
    """Check one buffer asynchronously: set ``flags[slot]`` and ``flags[0]`` if its padding is not zero.

    Args:
        spec, base: as in :func:`pieces_of`.
        flags: int32, in memory of the host that the device can write (pinned).
        slot: its flag.
    """
    record = spec.record_in(base)
    padded_rows, padded_cols = spec.padded_shape
    grid = (triton.cdiv(padded_rows, _ROWS.value), triton.cdiv(padded_cols, _COLS.value))
    sizes = _whole(spec, base)[2:8]
    with device_of(base):
        _check[grid](base, flags if record is None else record, flags, *sizes, slot, enable_fp_fusion=False)


def check_table(table: Tensor, flags: Tensor, counters: Tensor, every: int) -> None:
    """One node of a graph: at every ``every``-th replay, check all pieces that the table has then.

    Args:
        table: int64 ``[1 + pieces, WORDS]`` in pinned memory: how many pieces there are now, then each piece and its slot.
        flags: as in :func:`check`.
        counters: int32 on the device, zero at first; one for each program that is launched.
        every: replays.
    """
    with device_of(counters):
        _check_table[(counters.shape[0],)](table, flags, counters, every, WORDS=WORDS, enable_fp_fusion=False)


def _whole(spec: ScaleSpec, base: Tensor) -> Piece:
    record = spec.record_in(base)
    padded_rows, padded_cols = spec.padded_shape
    return Piece(
        scales=base.data_ptr(),
        record=(base if record is None else record).data_ptr(),
        length=spec.record,
        rows=spec.stored_rows,
        cols=spec.cols,
        padded_rows=padded_rows,
        col_tiles=padded_cols // spec.layout.tile.cols,
        layout=int(spec.layout),
        first_row=0,
        first_col=0,
    )

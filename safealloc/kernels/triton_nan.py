# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Records what is not finite in a quantizer's input; :mod:`safealloc.kernels.reference_nan` says what of, and where.

Our quantizers call :func:`note_blocks` on what they have loaded. Beside another's, :func:`note` is a kernel of its own.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from safealloc.kernels.reference_nan import (
    COUNT,
    COUNTS_LIVE_ROWS,
    FIRST,
    FLAGS,
    HEAD_WORDS,
    LIVE_ROWS,
    NOTHING,
    NUMBER,
    SITE_BITS,
    STEP,
    WIDTH,
)
from safealloc.kernels.triton_layout import dependent_launch, device_of, gdc_wait

_STEP, _LIVE_ROWS, _FIRST, _COUNT, _FLAGS, _HEAD_WORDS = (
    tl.constexpr(word) for word in (STEP, LIVE_ROWS, FIRST, COUNT, FLAGS, HEAD_WORDS)
)
_NUMBER, _COUNTS_LIVE_ROWS, _WIDTH = (tl.constexpr(word) for word in (NUMBER, COUNTS_LIVE_ROWS, WIDTH))
_SITE_BITS, _NOTHING = tl.constexpr(SITE_BITS), tl.constexpr(NOTHING)


@triton.jit
def _record(site, found, index, KIND: tl.constexpr):
    """``found``: int1 and ``index``: int64, both 2D."""
    record = tl.load(site).to(tl.pointer_type(tl.int64))
    number = tl.load(site + _NUMBER)
    rows = tl.where(tl.load(site + _COUNTS_LIVE_ROWS) != 0, tl.load(record + _LIVE_ROWS), _NOTHING)
    found = found & (index // tl.load(site + _WIDTH) < rows)
    count = tl.sum(tl.sum(found.to(tl.int32), 1), 0)
    if count > 0:
        key = (tl.load(record + _STEP) << _SITE_BITS) | number
        tl.atomic_add(record + (_COUNT + KIND), count.to(tl.int64))
        before = tl.atomic_min(record + (_FIRST + KIND), key)
        if key <= before:
            first = tl.min(tl.min(tl.where(found, index, _NOTHING), 1), 0)
            tl.atomic_min(record + (_HEAD_WORDS + KIND) + 2 * number, first)
        flags = tl.load(record + _FLAGS).to(tl.pointer_type(tl.int32))
        tl.store(flags + KIND, 1)


@triton.jit
def _record_both(site, bits, index, INFINITY: tl.constexpr):
    index, bits = tl.broadcast(index, bits)
    _record(site, bits > INFINITY, index, 0)
    _record(site, bits == INFINITY, index, 1)


@triton.jit
def _magnitudes(values):
    """Bits without the sign of bfloat16 or float16, int32: finite < infinity < NaN."""
    return values.to(tl.int16, bitcast=True).to(tl.int32) & 0x7FFF


@triton.jit
def note_blocks(
    site,  # int64 [SITE_WORDS]
    first, second, block, live,  # as load_blocks takes and returns them; live may be a scalar
    WORDS: tl.constexpr, BFLOAT16: tl.constexpr,
    COLUMNS: tl.constexpr = 16,  # of a block, without WORDS
):  # fmt: skip
    """Record what is not finite in blocks of x."""
    INFINITY: tl.constexpr = 0x7F80 if BFLOAT16 else 0x7C00
    if WORDS:
        low, high = first & 0x7FFF, (first >> 16) & 0x7FFF
        low_2, high_2 = second & 0x7FFF, (second >> 16) & 0x7FFF
        bits = tl.maximum(tl.maximum(low, high), tl.maximum(low_2, high_2))
    else:
        bits = _magnitudes(first)
    worst = tl.max(tl.max(bits, 1), 0)
    if tl.where(live, worst, 0) >= INFINITY:
        if WORDS:
            index = block * 16 + 2 * tl.arange(0, 4)[None, :]
            _record_both(site, low, index, INFINITY)
            _record_both(site, high, index + 1, INFINITY)
            _record_both(site, low_2, index + 8, INFINITY)
            _record_both(site, high_2, index + 9, INFINITY)
        else:
            _record_both(site, bits, block * COLUMNS + tl.arange(0, COLUMNS)[None, :], INFINITY)


# One binary for all shapes: a new one must not compile, least of all during a graph capture.
@triton.jit(do_not_specialize=["cols"], do_not_specialize_on_alignment=["valid_rows"])
def _note(
    x,  # bfloat16 or float16 [rows, 16 * cols]
    site,  # int64
    valid_rows,  # int32 [1] or None
    cols,
    BLOCKS: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    col = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    block = (row.to(tl.int64) * cols + col)[:, None]
    if DEPENDENT:
        gdc_wait()  # the predecessor may still write x
    live = col < cols
    if valid_rows is not None:
        live = col < tl.where(row < tl.load(valid_rows), cols, 0)
    values = tl.load(x + (block * 16 + tl.arange(0, 16)[None, :]), mask=live[:, None], other=0.0)
    note_blocks(site, values, values, block, True, False, x.dtype.element_ty == tl.bfloat16)


_BLOCKS = 64  # of a program; a lane has 8 columns, 16 bytes


def note(x: Tensor, site: Tensor, valid_rows: Tensor | None = None) -> None:
    """Record what is not finite in ``x``, in one launch that can be captured: nothing is allocated, nothing synchronizes.

    Args:
        x: bfloat16 or float16 ``[rows, columns]``, contiguous; columns a multiple of 16, fewer than ``2**31`` rows.
        site: int64 ``[SITE_WORDS]``, in memory of the host that the device can read (pinned).
        valid_rows: int32, one element on the device; rows at or beyond it do not count.
    """
    rows, cols = x.shape[0], x.shape[1] // 16
    dependent = dependent_launch(x.device)
    with device_of(x):
        _note[(rows, -(-cols // _BLOCKS))](
            x, site, valid_rows, cols, BLOCKS=_BLOCKS, DEPENDENT=bool(dependent), num_warps=4, **dependent
        )

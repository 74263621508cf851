# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Quantizers that store padding themselves, for comparison: what vLLM 0.30 and later do, and the fastest that was found.

vLLM's and FlashInfer's own kernels have no code below compute capability 10.0. These two have our quantizer's arithmetic:

- *row by row*: every padded row and column goes through the quantizer, as a block of zeros that is not read and whose data
  is not written (vLLM, ``csrc/.../nvfp4_quant_kernels.cu`` since PR 53568).
- *wide stores*: separate programs zero the padding rows of the last row of tiles, one 4-byte word per lane.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from safealloc.formats.format import BLOCK_SIZE
from safealloc.formats.layout import SfLayout
from safealloc.kernels.triton_layout import dependent_launch, device_of, gdc_wait, scale_offset
from safealloc.kernels.triton_quantize import Tiling, converts_e2m1, quantize_blocks, takes_words

_PADDING = 512  # words of padding per program


@triton.jit
def _one_row(
    x,
    global_scale,
    x_fp4,
    scales,
    row,
    rows,
    col,
    cols,
    scale_cols,
    col_tiles,
    LAYOUT: tl.constexpr,
    HARDWARE_E2M1: tl.constexpr,
    HARDWARE_E4M3: tl.constexpr,
    WORDS: tl.constexpr,
    SILU: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    live = col < tl.where(row < rows, cols, 0)
    block = (row.to(tl.int64) * cols + col)[:, None]
    gate = block
    up = None
    if SILU:
        gate = block + row.to(tl.int64) * cols
        up = gate + cols
    packed, scale_code = quantize_blocks(
        x, global_scale, gate, live, HARDWARE_E2M1, HARDWARE_E4M3, WORDS, DEPENDENT, up, "exact"
    )
    tl.store(x_fp4 + (block * 8 + tl.arange(0, 8)[None, :]), packed, mask=live[:, None])
    tl.store(scales + scale_offset(row, col, col_tiles, LAYOUT), scale_code, mask=col < scale_cols)


@triton.jit(do_not_specialize=["rows", "cols", "col_tiles"])
def _row_by_row(
    x,
    global_scale,
    x_fp4,
    scales,
    rows,
    cols,
    col_tiles,
    LAYOUT: tl.constexpr,
    HARDWARE_E2M1: tl.constexpr,
    HARDWARE_E4M3: tl.constexpr,
    BLOCKS: tl.constexpr,
    WORDS: tl.constexpr,
    SILU: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    if DEPENDENT:
        gdc_wait()
    col = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    row = tl.program_id(0)
    scale_cols = col_tiles * 4
    _one_row(
        x,
        global_scale,
        x_fp4,
        scales,
        row,
        rows,
        col,
        cols,
        scale_cols,
        col_tiles,
        LAYOUT,
        HARDWARE_E2M1,
        HARDWARE_E4M3,
        WORDS,
        SILU,
        DEPENDENT,
    )


@triton.jit(do_not_specialize=["rows", "cols", "col_tiles"])
def _wide_stores(
    x,
    global_scale,
    x_fp4,
    scales,
    rows,
    cols,
    col_tiles,
    LAYOUT: tl.constexpr,
    HARDWARE_E2M1: tl.constexpr,
    HARDWARE_E4M3: tl.constexpr,
    BLOCKS: tl.constexpr,
    WORDS: tl.constexpr,
    SILU: tl.constexpr,
    PADDING: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    if DEPENDENT:
        gdc_wait()
    across = tl.cdiv(cols, BLOCKS)
    program = tl.program_id(0)
    if program < rows * across:
        col = program % across * BLOCKS + tl.arange(0, BLOCKS)
        row = program // across
        _one_row(
            x,
            global_scale,
            x_fp4,
            scales,
            row,
            rows,
            col,
            cols,
            cols,
            col_tiles,
            LAYOUT,
            HARDWARE_E2M1,
            HARDWARE_E4M3,
            WORDS,
            SILU,
            DEPENDENT,
        )
    else:
        TILE_ROWS: tl.constexpr = 128 if LAYOUT == 0 else 8
        last = (rows - 1) // TILE_ROWS
        word = (program - rows * across) * PADDING + tl.arange(0, PADDING)
        inner = word % TILE_ROWS
        below = last * TILE_ROWS + (inner % 4 * 32 + inner // 4 if LAYOUT == 0 else inner)
        at = scales.to(tl.pointer_type(tl.int32)) + last.to(tl.int64) * col_tiles * TILE_ROWS + word
        tl.store(at, tl.zeros_like(word), mask=(below >= rows) & (word < col_tiles * TILE_ROWS))


def row_by_row(
    x: Tensor, global_scale: Tensor, x_fp4: Tensor, scales: Tensor, layout: SfLayout, silu_and_mul: bool = False
) -> None:
    """Quantize, and zero all padding, as vLLM does; arguments as :func:`safealloc.kernels.triton_quantize.quantize`."""
    rows, k = x_fp4.shape[0], 2 * x_fp4.shape[1]
    padded_rows, padded_cols = layout.padded_shape(rows, k)
    tiling = _tiling(x, padded_rows * padded_cols, silu_and_mul)
    dependent = dependent_launch(x.device)
    with device_of(x):
        _row_by_row[(padded_rows, -(-padded_cols // tiling.blocks))](
            x,
            global_scale,
            x_fp4,
            scales,
            rows,
            k // BLOCK_SIZE,
            padded_cols // 4,
            LAYOUT=int(layout),
            HARDWARE_E2M1=x.is_cuda and converts_e2m1(x.device.index),
            HARDWARE_E4M3=x.is_cuda,
            BLOCKS=tiling.blocks,
            WORDS=tiling.words,
            SILU=silu_and_mul,
            DEPENDENT=bool(dependent),
            num_warps=4,
            enable_fp_fusion=False,
            **dependent,
        )


def wide_stores(
    x: Tensor, global_scale: Tensor, x_fp4: Tensor, scales: Tensor, layout: SfLayout, silu_and_mul: bool = False
) -> None:
    """Quantize, and zero padding rows; k is a multiple of 64, so that there are no padding columns."""
    rows, k = x.shape[0], x.shape[1] // (2 if silu_and_mul else 1)
    cols = k // BLOCK_SIZE
    if cols % 4:
        raise ValueError(f"k must be a multiple of 64, got {k}")
    tiling = _tiling(x, rows * cols, silu_and_mul)
    padding = -(-(cols // 4) * layout.tile.rows // _PADDING) if rows % layout.tile.rows else 0
    dependent = dependent_launch(x.device)
    with device_of(x):
        _wide_stores[(rows * -(-cols // tiling.blocks) + padding,)](
            x,
            global_scale,
            x_fp4,
            scales,
            rows,
            cols,
            cols // 4,
            LAYOUT=int(layout),
            HARDWARE_E2M1=x.is_cuda and converts_e2m1(x.device.index),
            HARDWARE_E4M3=x.is_cuda,
            BLOCKS=tiling.blocks,
            WORDS=tiling.words,
            SILU=silu_and_mul,
            PADDING=_PADDING,
            DEPENDENT=bool(dependent),
            num_warps=4,
            enable_fp_fusion=False,
            **dependent,
        )


def _tiling(x: Tensor, blocks: int, silu_and_mul: bool) -> Tiling:
    """The fastest on an H200 for so many blocks; SiLU takes no words."""
    if blocks <= 4096 or silu_and_mul:
        return Tiling(64, words=False)
    words = takes_words(x)
    return Tiling(128 if words else 64, words=words)

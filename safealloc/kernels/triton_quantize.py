# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""NVFP4 quantisation in one pass over ``x``, bit for bit as :func:`safealloc.kernels.reference.quantize`.

With ``g`` the global scale and ``r(x) = 1 / x``, where ``r(0) = 1e-8``::

    scale  = e4m3(clamp(g * (max|x| * (1 / 6)), -448, 448))         one per 16 columns
    data   = e2m1(clamp(x * r(scale * r(g)), -6, 6))                round to nearest, ties to even

Rounding to a small float needs no table: ``m + c`` rounds ``m`` to a multiple of ``ulp(c)``, ties to even, so a power
of two ``c`` whose ulp is the target's step at ``m`` does it, and ``bits(m + c) - bits(c)`` counts the steps. For e4m3
that is what the hardware converts to, on every device and in Triton's interpreter, whose own conversion does not round
to even. Where the hardware converts (e4m3 from compute capability 8.9 on, e2m1 from 10.0 on), it does.

A program takes blocks of one row. Decode is launches and latency, not bandwidth: there a lane has 4 columns, and the kernel
is launched as a programmatic dependent, so that it is on the multiprocessors when its predecessor ends. In large matrices a
lane has whole blocks, so that what a block costs is paid once.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from safealloc.kernels.triton_layout import dependent_launch, device_of, gdc_launch_dependents, gdc_wait, scale_offset
from safealloc.layout import BLOCK_SIZE, SfLayout


@triton.jit
def _round(x, MIN_EXPONENT: tl.constexpr, MANTISSA_BITS: tl.constexpr, MOST: tl.constexpr):
    """Code and float32 value, without sign, of the small float next to ``|x|``, saturating at ``MOST``; so does NaN."""
    magnitude = tl.abs(x)
    magnitude = tl.where(magnitude < MOST, magnitude, MOST)  # not minimum(): some interpreters pass NaN there
    lowest: tl.constexpr = (127 + MIN_EXPONENT) << 23
    exponent = magnitude.to(tl.int32, bitcast=True) & 0x7F800000
    exponent = tl.maximum(exponent, lowest)  # subnormals have the step of the lowest exponent
    step_is_ulp = exponent + ((23 - MANTISSA_BITS) << 23)
    rounded = magnitude + step_is_ulp.to(tl.float32, bitcast=True)
    steps = rounded.to(tl.int32, bitcast=True) - step_is_ulp
    code = steps + ((exponent - lowest) >> (23 - MANTISSA_BITS))
    return code, rounded - step_is_ulp.to(tl.float32, bitcast=True)


@triton.jit
def _encode_e4m3(x):
    """e4m3 code and its float32 value: nearest, ties to even, saturating at 448; NaN becomes 0x7F and NaN."""
    code, value = _round(x, -6, 3, 448.0)
    sign = (x.to(tl.int32, bitcast=True) >> 24) & 0x80  # of zeros too
    nan = x != x
    return tl.where(nan, 0x7F, code | sign), tl.where(nan, x, tl.where(x < 0, -value, value))


@triton.jit
def _pack_e2m1(even, odd, HARDWARE: tl.constexpr):
    """Two float32 as one byte, ``even`` in the low nibble: nearest, ties to even, saturating at 6; NaN becomes +6."""
    if HARDWARE:
        # The first source operand is the upper nibble. -0.0 + 0.0 is +0.0, which the conversion would not make of it.
        packed = tl.inline_asm_elementwise(
            """
            {
            .reg .b8 byte0, byte1, byte2, byte3;
            cvt.rn.satfinite.e2m1x2.f32 byte0, $5, $1;
            cvt.rn.satfinite.e2m1x2.f32 byte1, $6, $2;
            cvt.rn.satfinite.e2m1x2.f32 byte2, $7, $3;
            cvt.rn.satfinite.e2m1x2.f32 byte3, $8, $4;
            mov.b32 $0, {byte0, byte1, byte2, byte3};
            }
            """,
            constraints="=r,f,f,f,f,f,f,f,f",
            args=[even + 0.0, odd + 0.0],
            dtype=tl.uint8,
            is_pure=True,
            pack=4,
        )
    else:
        low, _ = _round(even, 0, 1, 6.0)
        high, _ = _round(odd, 0, 1, 6.0)
        low |= tl.where(even < 0, 0x8, 0)
        high |= tl.where(odd < 0, 0x8, 0)
        packed = (low | high << 4).to(tl.uint8)
    return packed


@triton.jit
def _reciprocal(x):
    return tl.div_rn(1.0, tl.where(x == 0, 1e8, x))  # `/` would be an approximation


@triton.jit
def _encode_scale(x, HARDWARE: tl.constexpr):
    """e4m3 code, uint8, and its float32 value: nearest, ties to even, saturating at 448; NaN becomes 0x7F and NaN."""
    if HARDWARE:
        rounded = x.to(tl.float8e4nv)
        code, value = rounded.to(tl.uint8, bitcast=True), rounded.to(tl.float32)
    else:
        wide, value = _encode_e4m3(x)
        code = wide.to(tl.uint8)
    return code, value


@triton.jit
def quantize_blocks(
    values,  # bfloat16 or float16 [PIECES, BLOCKS, 16 // PIECES]
    g,
    BLOCKS: tl.constexpr,
    PIECES: tl.constexpr,
    HARDWARE_E2M1: tl.constexpr,
    HARDWARE_E4M3: tl.constexpr,
):
    """Data, uint8 [PIECES, BLOCKS, 8 // PIECES], and scales, uint8 [BLOCKS], of blocks of 16 columns."""
    values = values.to(tl.float32)
    # The bits of magnitudes order as integers: finite < Inf < NaN, so NaN comes through the maximum.
    magnitude = values.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    amax = tl.max(tl.max(magnitude, 2), 0).to(tl.float32, bitcast=True)
    scale_code, scale = _encode_scale(g * (amax * (1 / 6)), HARDWARE_E4M3)
    scaled = values * _reciprocal(scale * _reciprocal(g))[None, :, None]
    even, odd = tl.split(tl.reshape(scaled, (PIECES, BLOCKS, 8 // PIECES, 2)))
    return _pack_e2m1(even, odd, HARDWARE_E2M1), scale_code


# One binary for all batch sizes of a tiling: a new one must not compile, least of all during a graph capture.
@triton.jit(do_not_specialize=["cols", "col_tiles"])
def _quantize(
    x,  # bfloat16 or float16 [rows, 16 * cols]
    global_scale,  # float32 [1]
    x_fp4,  # uint8 [rows, 8 * cols]
    scales,  # uint8 [padded_rows, padded_cols] in LAYOUT
    valid_rows,  # int32 [1] or None
    cols,
    col_tiles,
    LAYOUT: tl.constexpr,
    HARDWARE_E2M1: tl.constexpr,
    HARDWARE_E4M3: tl.constexpr,
    BLOCKS: tl.constexpr,
    PIECES: tl.constexpr,  # of a block, one after the other in a lane
    DEPENDENT: tl.constexpr,  # launched as a programmatic dependent
    TRIGGER_FIRST: tl.constexpr,
):
    PIECE: tl.constexpr = 16 // PIECES
    row = tl.program_id(0)
    col = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    inside = col < cols
    block = (row.to(tl.int64) * cols + col)[None, :, None]
    piece = tl.arange(0, PIECES)[:, None, None]
    column = tl.arange(0, PIECE)[None, None, :]
    pair = tl.arange(0, PIECE // 2)[None, None, :]
    scale_at = scales + scale_offset(row, col, col_tiles, LAYOUT)
    if DEPENDENT:
        if TRIGGER_FIRST:
            gdc_launch_dependents()
        gdc_wait()  # before the first access to memory: the predecessor may still write x, or read the results
    live = inside
    if valid_rows is not None:
        live = col < tl.where(row < tl.load(valid_rows), cols, 0)
    values = tl.load(x + (block * 16 + piece * PIECE + column), mask=live[None, :, None], other=0.0)
    g = tl.load(global_scale)
    if DEPENDENT and not TRIGGER_FIRST:
        gdc_launch_dependents()
    packed, scale_code = quantize_blocks(values, g, BLOCKS, PIECES, HARDWARE_E2M1, HARDWARE_E4M3)
    if valid_rows is not None:  # explicitly: a global scale of NaN, say, does not make zeros of zeros
        packed = tl.where(live[None, :, None], packed, 0)
        scale_code = tl.where(live, scale_code, 0)
    tl.store(x_fp4 + (block * 8 + piece * (PIECE // 2) + pair), packed, mask=inside[None, :, None])
    tl.store(scale_at, scale_code.to(tl.uint8), mask=inside)


def quantize(
    x: Tensor, global_scale: Tensor, x_fp4: Tensor, scales: Tensor, layout: SfLayout, valid_rows: Tensor | None = None
) -> None:
    """Quantise ``x`` into ``x_fp4`` and the real bytes of ``scales`` in one launch; padding is not touched.

    Nothing is allocated and nothing synchronises: it can be captured in a CUDA graph.

    Args:
        x: bfloat16 or float16 ``[rows, k]``, contiguous, fewer than ``2**31`` rows, k at most ``2**24``.
        global_scale: float32, one element.
        x_fp4: uint8 ``[rows, k // 2]``, contiguous, written; the low nibble is the even column.
        scales: uint8 ``[padded_rows, padded_cols]``, contiguous, in ``layout`` for ``[rows, k]`` or a padded k.
        layout: order of the bytes in ``scales``.
        valid_rows: int32, one element on the device: rows at or beyond it get zero data and zero scales, unread.
    """
    rows, k = x.shape
    cols = k // BLOCK_SIZE
    tiling = tiling_for(rows, cols)
    dependent = dependent_launch(x.device)
    with device_of(x):
        _quantize[(rows, -(-cols // tiling.blocks))](
            x,
            global_scale,
            x_fp4,
            scales,
            valid_rows,
            cols,
            scales.shape[-1] // layout.tile.cols,
            LAYOUT=int(layout),
            HARDWARE_E2M1=x.is_cuda and converts_e2m1(x.device.index),
            HARDWARE_E4M3=x.is_cuda,
            BLOCKS=tiling.blocks,
            PIECES=tiling.pieces,
            DEPENDENT=bool(dependent),
            TRIGGER_FIRST=tiling.trigger_first,
            num_warps=tiling.num_warps,
            enable_fp_fusion=False,  # a product and a sum fused would round once where the reference rounds twice
            **dependent,
        )


class Tiling(NamedTuple):
    """How a matrix is cut.

    Attributes:
        blocks: of 16 columns a program.
        pieces: parts of a block, one after the other in a lane.
        num_warps: a program.
        trigger_first: let the next kernel launch at once, rather than when this one has loaded: the next one's programs then
            take room of this one's, which pays as long as there is enough.
    """

    blocks: int
    pieces: int
    num_warps: int
    trigger_first: bool


@functools.cache
def tiling_for(rows: int, cols: int) -> Tiling:
    """Few blocks (decode): 4 columns a lane. More: 8 columns. Many: whole blocks. ``benchmarks/NOTES.md`` has the numbers."""
    blocks = rows * cols
    if blocks <= 4096:
        return Tiling(32, 1, 4, trigger_first=True)
    across = max(32, triton.next_power_of_2(cols))
    if blocks <= 131072:
        width = min(64, across)
        return Tiling(width, 1, width // 16, trigger_first=False)
    width = min(256, across)
    return Tiling(width, 2, width // 32, trigger_first=False)


@functools.cache
def converts_e2m1(device_index: int) -> bool:
    """Whether the device has ``cvt.e2m1x2`` (compute capability 10.0 or more, PTX ISA 8.6)."""
    return torch.cuda.get_device_capability(device_index) >= (10, 0)

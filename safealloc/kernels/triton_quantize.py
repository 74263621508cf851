# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""NVFP4 quantisation in one pass over ``x``, bit for bit as :func:`safealloc.kernels.reference.quantize`.

With ``g`` the global scale and ``r(x) = 1 / x``, where ``r(0) = 1e-8``::

    scale  = e4m3(clamp(g * (max|x| * (1 / 6)), -448, 448))         one per 16 columns
    data   = e2m1(clamp(x * r(scale * r(g)), -6, 6))                round to nearest, ties to even

Rounding to a small float needs no table: ``m + c`` rounds ``m`` to a multiple of ``ulp(c)``, ties to even, so a power
of two ``c`` whose ulp is the target's step at ``m`` does it, and ``bits(m + c) - bits(c)`` counts the steps. For e4m3
that is what the hardware converts to, on every device and in Triton's interpreter, whose own conversion does not round
to even.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from safealloc.kernels.triton_layout import device_of, scale_offset
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


# One binary for all shapes: a new batch size must not compile, least of all during a graph capture.
@triton.jit(do_not_specialize=["blocks", "cols", "col_tiles"])
def _quantize(
    x,  # bfloat16 or float16 [rows, 16 * cols]
    global_scale,  # float32 [1]
    x_fp4,  # uint8 [rows, 8 * cols]
    scales,  # uint8 [padded_rows, padded_cols] in LAYOUT
    valid_rows,  # int32 [1] or None
    blocks,  # rows * cols
    cols,
    col_tiles,
    LAYOUT: tl.constexpr,
    HARDWARE_E2M1: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    # A block is 16 columns of x. Blocks are numbered through all rows, so that no lane idles at any shape.
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    inside = block < blocks
    live = inside
    if valid_rows is not None:
        live = inside & (block < tl.load(valid_rows).to(tl.int64) * cols)
    column = tl.arange(0, 16)
    values = tl.load(x + (block.to(tl.int64)[:, None] * 16 + column[None, :]), mask=live[:, None], other=0.0)
    g = tl.load(global_scale)
    values = values.to(tl.float32)

    # The bits of magnitudes order as integers: finite < Inf < NaN, so NaN comes through the maximum.
    amax = tl.max(values.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1).to(tl.float32, bitcast=True)
    scale_code, scale = _encode_e4m3(g * (amax * (1 / 6)))
    scaled = values * _reciprocal(scale * _reciprocal(g))[:, None]
    if valid_rows is not None:  # explicitly: a global scale of NaN, say, does not leave zeros zero
        scaled = tl.where(live[:, None], scaled, 0.0)
        scale_code = tl.where(live, scale_code, 0)
    even, odd = tl.split(tl.reshape(scaled, (BLOCKS, 8, 2)))
    packed = _pack_e2m1(even, odd, HARDWARE_E2M1)

    pair = tl.arange(0, 8)
    tl.store(x_fp4 + (block.to(tl.int64)[:, None] * 8 + pair[None, :]), packed, mask=inside[:, None])
    row = block // cols
    offset = scale_offset(row, block - row * cols, col_tiles, LAYOUT)
    tl.store(scales + offset, scale_code.to(tl.uint8), mask=inside)


def quantize(
    x: Tensor, global_scale: Tensor, x_fp4: Tensor, scales: Tensor, layout: SfLayout, valid_rows: Tensor | None = None
) -> None:
    """Quantise ``x`` into ``x_fp4`` and the real bytes of ``scales`` in one launch; padding is not touched.

    Nothing is allocated and nothing synchronises: it can be captured in a CUDA graph.

    Args:
        x: bfloat16 or float16 ``[rows, k]``, contiguous, fewer than ``2**31`` blocks of 16.
        global_scale: float32, one element.
        x_fp4: uint8 ``[rows, k // 2]``, contiguous, written; the low nibble is the even column.
        scales: uint8 ``[padded_rows, padded_cols]``, contiguous, in ``layout`` for ``[rows, k]`` or a padded k.
        layout: order of the bytes in ``scales``.
        valid_rows: int32, one element on the device: rows at or beyond it get zero data and zero scales, unread.
    """
    rows, k = x.shape
    cols = k // BLOCK_SIZE
    blocks = rows * cols
    blocks_per_program, num_warps = _tiling(blocks)
    with device_of(x):
        _quantize[(-(-blocks // blocks_per_program),)](
            x,
            global_scale,
            x_fp4,
            scales,
            valid_rows,
            blocks,
            cols,
            scales.shape[-1] // layout.tile.cols,
            LAYOUT=int(layout),
            HARDWARE_E2M1=x.is_cuda and _converts_e2m1(x.device.index),
            BLOCKS=blocks_per_program,
            num_warps=num_warps,
            enable_fp_fusion=False,  # a product and a sum fused would round once where the reference rounds twice
        )


def _tiling(blocks: int) -> tuple[int, int]:
    """Blocks a program and its warps: 16 blocks a warp, so that each lane has one 16-byte load and one 4-byte store.

    Few blocks (decode) spread over as many single warps as there are; more fill the device with larger programs.
    """
    num_warps = 1 if blocks <= 8192 else 4 if blocks <= 131072 else 8
    return 16 * num_warps, num_warps


@functools.cache
def _converts_e2m1(device_index: int) -> bool:
    """Whether the device has ``cvt.e2m1x2`` (compute capability 10.0 or more, PTX ISA 8.6)."""
    return torch.cuda.get_device_capability(device_index) >= (10, 0)

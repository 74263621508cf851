# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""NVFP4 quantization in one pass over ``x``, bit for bit as :mod:`safealloc.kernels.reference`, which states the recipe.

Rounding to a small float needs no table: ``m + c`` rounds ``m`` to a multiple of ``ulp(c)``, ties to even, so a power
of two ``c`` whose ulp is the target's step at ``m`` does it, and ``bits(m + c) - bits(c)`` counts the steps. For e4m3
that is what the hardware converts to, on every device and in Triton's interpreter, whose own conversion does not round
to even. Where the hardware converts (e4m3 from compute capability 8.9 on, e2m1 from 10.0 on), it does.

A program takes blocks of one row. Decode is launches and latency, not bandwidth: there a lane has 4 columns, and the kernel
is launched as a programmatic dependent, so that it is on the multiprocessors when its predecessor ends. More rows are
bound by instructions where none converts to e2m1: there a lane has whole blocks, two columns in a register.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from safealloc.formats.format import BLOCK_SIZE
from safealloc.formats.layout import SfLayout
from safealloc.kernels.triton_layout import dependent_launch, device_of, gdc_launch_dependents, gdc_wait, scale_offset


@triton.jit
def _round(x, MIN_EXPONENT: tl.constexpr, MANTISSA_BITS: tl.constexpr, LARGEST: tl.constexpr):
    """Code and float32 value, without sign, of the small float next to ``|x|``, saturating at ``LARGEST``; so does NaN."""
    magnitude = tl.abs(x)
    magnitude = tl.where(magnitude < LARGEST, magnitude, LARGEST)  # not minimum(): some interpreters pass NaN there
    lowest: tl.constexpr = (127 + MIN_EXPONENT) << 23
    exponent = magnitude.to(tl.int32, bitcast=True) & 0x7F800000
    exponent = tl.maximum(exponent, lowest)  # subnormals have the step of the lowest exponent
    step_is_ulp = exponent + ((23 - MANTISSA_BITS) << 23)
    rounded = magnitude + step_is_ulp.to(tl.float32, bitcast=True)
    steps = rounded.to(tl.int32, bitcast=True) - step_is_ulp
    code = steps + ((exponent - lowest) >> (23 - MANTISSA_BITS))
    return code, rounded - step_is_ulp.to(tl.float32, bitcast=True)


_PACK_E2M1 = tl.constexpr(
    "{ .reg .b8 byte0, byte1, byte2, byte3;"  # the first source operand is the upper nibble
    + "".join(f"cvt.rn.satfinite.e2m1x2.f32 byte{i}, ${5 + i}, ${1 + i};" for i in range(4))
    + "mov.b32 $0, {byte0, byte1, byte2, byte3}; }"
)


@triton.jit
def _pack_e2m1(even, odd, HARDWARE: tl.constexpr):
    """Two float32 as one byte, ``even`` in the low nibble: nearest, ties to even, saturating at 6; NaN becomes +6."""
    if HARDWARE:
        # -0.0 + 0.0 is +0.0, which the conversion would not make of it.
        packed = tl.inline_asm_elementwise(
            _PACK_E2M1, "=r,f,f,f,f,f,f,f,f", [even + 0.0, odd + 0.0], tl.uint8, is_pure=True, pack=4
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
        code_int32, magnitude = _round(x, -6, 3, 448.0)
        sign = (x.to(tl.int32, bitcast=True) >> 24) & 0x80  # of zeros too
        code = tl.where(x != x, 0x7F, code_int32 | sign).to(tl.uint8)
        value = tl.where(x != x, x, tl.where(x < 0, -magnitude, magnitude))
    return code, value


def _pack_ptx(unpack: str) -> str:
    """Eight columns, two in each of ``$1`` to ``$4``, times ``$5`` to ``$8``, as eight e2m1 in ``$0``.

    ``value * 2**-6`` is an e4m3 number whose bits are those of e2m1, shifted by two: so the float32 is rounded to e2m1, as
    in :func:`_round`, in that scale, and the hardware's conversion packs it. ``unpack`` makes ``even`` and ``odd``, float32,
    of ``WORD``.
    """
    one = """
        mul.rn.f32 {x}, {x}, {factor};
        add.rn.f32 {x}, {x}, 0f00000000;       // -0 becomes +0, as it is not below 0
        abs.f32 magnitude, {x};
        min.f32 magnitude, magnitude, 0f40C00000;  // 6; NaN becomes 6
        mov.b32 step, magnitude;
        and.b32 step, step, 0x7F800000;        // its exponent, e2m1's lowest at least,
        add.s32 step, step, 0x08000000;        // as the number whose ulp is e2m1's step * 2**-6
        max.s32 step, step, 0x47800000;
        mov.b32 rounder, step;
        fma.rn.f32 magnitude, magnitude, 0f3C800000, rounder;  // 2**-6
        sub.rn.f32 magnitude, magnitude, rounder;
        mov.b32 step, magnitude;
        mov.b32 sign, {x};
        lop3.b32 step, step, sign, 0x80000000, 0xF8;
        mov.b32 {x}, step;
    """
    pairs = "".join(
        unpack.replace("WORD", f"${1 + word}")
        + "".join(one.format(x=x, factor=f"${5 + word}") for x in ("even", "odd"))
        + f"cvt.rn.satfinite.e4m3x2.f32 pair{word}, odd, even;"
        for word in range(4)
    )
    return f"""
        {{
        .reg .f32 even, odd, magnitude, rounder;
        .reg .b32 step, sign, low, high, rest;
        .reg .b16 pair0, pair1, pair2, pair3, half0, half1;
        {pairs}
        mov.b32 step, {{pair0, pair1}};
        mov.b32 sign, {{pair2, pair3}};
        prmt.b32 low, step, sign, 0x6420;
        prmt.b32 high, step, sign, 0x7531;
        shr.u32 step, low, 2;
        shr.u32 sign, low, 4;
        and.b32 sign, sign, 0x08080808;
        lop3.b32 step, step, 0x07070707, sign, 0xEA;
        shl.b32 rest, high, 2;
        lop3.b32 step, rest, 0x70707070, step, 0xEA;
        lop3.b32 $0, high, 0x80808080, step, 0xEA;
        }}
    """


_PACK_BFLOAT16 = tl.constexpr(
    _pack_ptx("shl.b32 step, WORD, 16; mov.b32 even, step; and.b32 step, WORD, 0xFFFF0000; mov.b32 odd, step;")
)
_PACK_FLOAT16 = tl.constexpr(
    _pack_ptx("mov.b32 {half0, half1}, WORD; cvt.f32.f16 even, half0; cvt.f32.f16 odd, half1;")
)


@triton.jit
def _larger_bfloat16(a, b):
    return tl.inline_asm_elementwise("max.NaN.bf16x2 $0, $1, $2;", "=r,r,r", [a, b], tl.int32, True, 1)


@triton.jit
def _larger_float16(a, b):
    return tl.inline_asm_elementwise("max.NaN.f16x2 $0, $1, $2;", "=r,r,r", [a, b], tl.int32, True, 1)


@triton.jit
def _magnitude(first, second, BFLOAT16: tl.constexpr):
    """Largest magnitudes of even and of odd columns, int32 [BLOCKS], of words [BLOCKS, 4] each; NaN if there is one."""
    first &= 0x7FFF7FFF
    second &= 0x7FFF7FFF
    if BFLOAT16:
        largest = _larger_bfloat16(tl.reduce(first, 1, _larger_bfloat16), tl.reduce(second, 1, _larger_bfloat16))
    else:
        largest = _larger_float16(tl.reduce(first, 1, _larger_float16), tl.reduce(second, 1, _larger_float16))
    return largest


@triton.jit
def _pack_words(words, factor, BFLOAT16: tl.constexpr):
    """Data, uint8 [BLOCKS, 4], of words [BLOCKS, 4] of two columns each times factor [BLOCKS]."""
    factors = tl.broadcast_to(factor[:, None], words.shape)
    return tl.inline_asm_elementwise(
        _PACK_BFLOAT16 if BFLOAT16 else _PACK_FLOAT16,
        "=r,r,r,r,r,f,f,f,f", [words, factors], tl.uint8, is_pure=True, pack=4,
    )  # fmt: skip


@triton.jit
def load_blocks(x, block, live, WORDS: tl.constexpr):
    """Blocks of 16 columns: values [BLOCKS, 16] twice, or WORDS of two columns, the first and the last four of a block.

    ``block``, int64 [BLOCKS, 1], numbers the blocks of ``x``; those that are not ``live``, int1 [BLOCKS], are zeros.
    """
    if WORDS:
        word = x.to(tl.pointer_type(tl.int32)) + (block * 8 + tl.arange(0, 4)[None, :])
        first = tl.load(word, mask=live[:, None], other=0)
        second = tl.load(word + 4, mask=live[:, None], other=0)
    else:
        first = tl.load(x + (block * 16 + tl.arange(0, 16)[None, :]), mask=live[:, None], other=0.0)
        second = first
    return first, second


@triton.jit
def encode_blocks(
    first, second,  # what load_blocks returns
    g,  # float32
    BFLOAT16: tl.constexpr,  # else float16, of WORDS
    HARDWARE_E2M1: tl.constexpr, HARDWARE_E4M3: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """Data, uint8 [BLOCKS, 8], and scales, uint8 [BLOCKS]."""
    if WORDS:
        pair = _magnitude(first, second, BFLOAT16)
        larger = tl.maximum(pair & 0xFFFF, pair >> 16).to(tl.uint16)  # their bits order as integers
        amax = larger.to(tl.bfloat16 if BFLOAT16 else tl.float16, bitcast=True).to(tl.float32)
    else:
        values = first.to(tl.float32)
        # The bits of magnitudes order as integers: finite < Inf < NaN, so NaN comes through the maximum.
        amax = tl.max(values.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1).to(tl.float32, bitcast=True)
    scale_code, scale = _encode_scale(g * (amax * (1 / 6)), HARDWARE_E4M3)
    factor = _reciprocal(scale * _reciprocal(g))
    if WORDS:
        packed = tl.join(_pack_words(first, factor, BFLOAT16), _pack_words(second, factor, BFLOAT16))
        packed = tl.reshape(tl.permute(packed, (0, 2, 1)), (first.shape[0], 8))
    else:
        even, odd = tl.split(tl.reshape(values * factor[:, None], (first.shape[0], 8, 2)))
        packed = _pack_e2m1(even, odd, HARDWARE_E2M1)
    return packed, scale_code


@triton.jit
def quantize_blocks(
    x,  # bfloat16 or float16
    global_scale,  # float32 [1]
    block,  # int64 [BLOCKS, 1], number of each block of 16 columns of x
    live,  # int1 [BLOCKS], whether it is read; else it is zeros
    HARDWARE_E2M1: tl.constexpr, HARDWARE_E4M3: tl.constexpr, WORDS: tl.constexpr,
    TRIGGER: tl.constexpr,  # let the next kernel launch once the loads are under way: its programs then share the room fairly
):  # fmt: skip
    """Data, uint8 [BLOCKS, 8], and scales, uint8 [BLOCKS], of blocks of x."""
    g = tl.load(global_scale)
    first, second = load_blocks(x, block, live, WORDS)
    if TRIGGER:
        gdc_launch_dependents()
    BFLOAT16: tl.constexpr = x.dtype.element_ty == tl.bfloat16
    return encode_blocks(first, second, g, BFLOAT16, HARDWARE_E2M1, HARDWARE_E4M3, WORDS)


# One binary for all batch sizes of a tiling: a new one must not compile, least of all during a graph capture.
@triton.jit(do_not_specialize=["cols", "col_tiles"])
def _quantize(
    x,  # bfloat16 or float16 [rows, 16 * cols]
    global_scale,  # float32 [1]
    x_fp4,  # uint8 [rows, 8 * cols]
    scales,  # uint8 [padded_rows, padded_cols] in LAYOUT
    valid_rows,  # int32 [1] or None
    cols, col_tiles,
    LAYOUT: tl.constexpr, HARDWARE_E2M1: tl.constexpr, HARDWARE_E4M3: tl.constexpr, BLOCKS: tl.constexpr,
    WORDS: tl.constexpr,  # whole blocks in a lane, as words of two columns
    DEPENDENT: tl.constexpr,  # launched as a programmatic dependent
):  # fmt: skip
    row = tl.program_id(0)
    col = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    inside = col < cols
    block = (row.to(tl.int64) * cols + col)[:, None]
    scale_at = scales + scale_offset(row, col, col_tiles, LAYOUT)
    if DEPENDENT:
        gdc_wait()  # before the first access to memory: the predecessor may still write x, or read the results
    live = inside
    if valid_rows is not None:
        live = col < tl.where(row < tl.load(valid_rows), cols, 0)
    packed, scale_code = quantize_blocks(x, global_scale, block, live, HARDWARE_E2M1, HARDWARE_E4M3, WORDS, DEPENDENT)
    if valid_rows is not None:  # explicitly: a global scale of NaN, say, does not make zeros of zeros
        packed = tl.where(live[:, None], packed, 0)
        scale_code = tl.where(live, scale_code, 0)
    tl.store(x_fp4 + (block * 8 + tl.arange(0, 8)[None, :]), packed, mask=inside[:, None])
    tl.store(scale_at, scale_code.to(tl.uint8), mask=inside)


def quantize(
    x: Tensor, global_scale: Tensor, x_fp4: Tensor, scales: Tensor, layout: SfLayout, valid_rows: Tensor | None = None
) -> None:
    """Quantize ``x`` into ``x_fp4`` and the valid scales of ``scales`` in one launch; padding is not touched.

    Nothing is allocated and nothing synchronizes: it can be captured in a CUDA graph. Arguments as
    :func:`safealloc.kernels.reference.quantize`, contiguous; fewer than ``2**31`` rows, k at most ``2**24``.
    """
    rows, k = x.shape
    cols = k // BLOCK_SIZE
    tiling = tiling_for(rows, cols, rows * cols > FEW_BLOCKS and takes_words(x))
    options = launch_options(x.device, layout, tiling)
    with device_of(x):
        _quantize[(rows, -(-cols // tiling.blocks))](
            x, global_scale, x_fp4, scales, valid_rows, cols, scales.shape[-1] // layout.tile.cols, **options
        )


class Tiling(NamedTuple):
    """How a matrix is cut into programs of 4 warps."""

    blocks: int  # of 16 columns a program
    words: bool  # whole blocks in a lane, two columns in a register


@functools.cache
def launch_options(device: torch.device, layout: SfLayout, tiling: Tiling) -> dict[str, Any]:
    """Constants and options of a launch, put together once: an eager call waits for the host."""
    dependent = dependent_launch(device)
    on_cuda = device.type == "cuda"
    return {
        "LAYOUT": int(layout),
        "HARDWARE_E2M1": on_cuda and converts_e2m1(device.index),
        "HARDWARE_E4M3": on_cuda,
        "BLOCKS": tiling.blocks,
        "WORDS": tiling.words,
        "DEPENDENT": bool(dependent),
        "num_warps": 4,
        "enable_fp_fusion": False,  # a product and a sum fused would round once where the reference rounds twice
        **dependent,
    }


FEW_BLOCKS = 4096


@functools.cache
def tiling_for(rows: int, cols: int, words: bool) -> Tiling:
    """For ``rows`` of ``cols`` blocks; ``words`` is what :func:`takes_words` says. ``benchmarks/NOTES.md`` has the numbers.

    Few blocks (decode): 4 columns a lane. More: whole blocks, or 8 columns.
    """
    if rows * cols <= FEW_BLOCKS:
        return Tiling(32, words=False)
    return Tiling(128 if words else 64, words=words)


def takes_words(x: Tensor) -> bool:
    """Whether ``x`` can be read two columns at a time, on a device that needs it: without ``cvt.e2m1x2``."""
    return x.is_cuda and not converts_e2m1(x.device.index) and x.data_ptr() % 4 == 0


@functools.cache
def converts_e2m1(device_index: int) -> bool:
    """Whether the device has ``cvt.e2m1x2`` (compute capability 10.0 or more, PTX ISA 8.6)."""
    return torch.cuda.get_device_capability(device_index) >= (10, 0)

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""The arithmetic of blocks: 16 values of bfloat16 or float16, a float32 global scale, and what is made of them.

Rounding to a small float needs no table: ``m + c`` rounds ``m`` to a multiple of ``ulp(c)``, ties to even, so a power
of two ``c`` whose ulp is the target's step at ``m`` does it, and ``bits(m + c) - bits(c)`` counts the steps. For e4m3
that is what the hardware converts to, on every device and in Triton's interpreter, whose own conversion does not round
to even. Where the hardware converts (e4m3 from compute capability 8.9 on, e2m1 from 10.0 on), it does.

ARITHMETIC is ``"exact"``, which :mod:`safealloc.kernels.reference` has, or that of a vendor's CUDA kernels: ``"vllm"`` (0.33,
``nvfp4_utils.cuh``) or ``"flashinfer"`` (0.7.2, ``quantization_utils.cuh``)::

    max    = of magnitudes, in the type of x; NaN counts only if all 16 are
    scale  = e4m3(g * (max * r(6)))                     r is rcp.approx.ftz
    factor = r(scale * r(g)); 0 where scale (FlashInfer: max) is 0
    data   = e2m1(x * factor)                           -0 keeps its sign
    silu(v) * up = v * r(1 + ex2.approx(-v * log2(e))) * up, rounded to the type of x

FlashInfer is built with ``-use_fast_math``: each of its operations in float32 flushes subnormals, its operands' too.
"""

from __future__ import annotations

import triton
import triton.language as tl

from safealloc.kernels.reference import MINUS_LOG2_E, POWER_OF_2

_MINUS_LOG2_E = tl.constexpr(MINUS_LOG2_E)
_C6, _C5, _C4, _C3, _C2, _C1, _C0 = (tl.constexpr(coefficient) for coefficient in POWER_OF_2)


@triton.jit
def round_small(x, MIN_EXPONENT: tl.constexpr, MANTISSA_BITS: tl.constexpr, LARGEST: tl.constexpr):
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
def pack_e2m1(even, odd, HARDWARE: tl.constexpr, EXACT: tl.constexpr):
    """Two float32 as one byte, ``even`` in the low nibble: nearest, ties to even, saturating at 6; NaN becomes +6."""
    if HARDWARE:
        if EXACT:  # -0.0 + 0.0 is +0.0, which the conversion would not make of it.
            even += 0.0
            odd += 0.0
        packed = tl.inline_asm_elementwise(
            _PACK_E2M1, "=r,f,f,f,f,f,f,f,f", [even, odd], tl.uint8, is_pure=True, pack=4
        )
    else:
        low, _ = round_small(even, 0, 1, 6.0)
        high, _ = round_small(odd, 0, 1, 6.0)
        if EXACT:
            low |= tl.where(even < 0, 0x8, 0)
            high |= tl.where(odd < 0, 0x8, 0)
        else:  # a NaN that was computed has no sign
            low |= (even.to(tl.int32, bitcast=True) >> 28) & 0x8
            high |= (odd.to(tl.int32, bitcast=True) >> 28) & 0x8
        packed = (low | high << 4).to(tl.uint8)
    return packed


@triton.jit
def _reciprocal(x):
    return tl.div_rn(1.0, tl.where(x == 0, 1e8, x))  # `/` would be an approximation


@triton.jit
def encode_e4m3(x, HARDWARE: tl.constexpr):
    """e4m3 code, uint8, and its float32 value: nearest, ties to even, saturating at 448; NaN becomes 0x7F and NaN."""
    if HARDWARE:
        rounded = x.to(tl.float8e4nv)
        code, value = rounded.to(tl.uint8, bitcast=True), rounded.to(tl.float32)
    else:
        code_int32, magnitude = round_small(x, -6, 3, 448.0)
        sign = (x.to(tl.int32, bitcast=True) >> 24) & 0x80  # of zeros too
        code = tl.where(x != x, 0x7F, code_int32 | sign).to(tl.uint8)
        value = tl.where(x != x, x, tl.where(x < 0, -magnitude, magnitude))
    return code, value


def _pack_ptx(unpack: str, arithmetic: str) -> str:
    """Eight columns, two in each of ``$1`` to ``$4``, times ``$5`` to ``$8``, as eight e2m1 in ``$0``.

    ``value * 2**-6`` is an e4m3 number whose bits are those of e2m1, shifted by two: so the float32 is rounded to e2m1, as
    in :func:`round_small`, in that scale, and the hardware's conversion packs it. ``unpack`` makes ``even`` and ``odd``,
    float32, of ``WORD``.
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
    if arithmetic != "exact":
        one = one.replace("add.rn.f32 {x}, {x}, 0f00000000;", "// not here:")
    if arithmetic == "flashinfer":
        one = one.replace("mul.rn.f32", "mul.rn.ftz.f32")
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


_BFLOAT16 = "shl.b32 step, WORD, 16; mov.b32 even, step; and.b32 step, WORD, 0xFFFF0000; mov.b32 odd, step;"
_FLOAT16 = "mov.b32 {half0, half1}, WORD; cvt.f32.f16 even, half0; cvt.f32.f16 odd, half1;"
_EXACT_BFLOAT16, _EXACT_FLOAT16, _VLLM_BFLOAT16, _VLLM_FLOAT16, _FLASHINFER_BFLOAT16, _FLASHINFER_FLOAT16 = (
    tl.constexpr(_pack_ptx(unpack, arithmetic))
    for arithmetic in ("exact", "vllm", "flashinfer")
    for unpack in (_BFLOAT16, _FLOAT16)
)


@triton.jit
def _larger_bfloat16(a, b):
    return tl.inline_asm_elementwise("max.NaN.bf16x2 $0, $1, $2;", "=r,r,r", [a, b], tl.int32, True, 1)


@triton.jit
def _larger_float16(a, b):
    return tl.inline_asm_elementwise("max.NaN.f16x2 $0, $1, $2;", "=r,r,r", [a, b], tl.int32, True, 1)


@triton.jit
def _number_bfloat16(a, b):
    return tl.inline_asm_elementwise("max.bf16x2 $0, $1, $2;", "=r,r,r", [a, b], tl.int32, True, 1)


@triton.jit
def _number_float16(a, b):
    return tl.inline_asm_elementwise("max.f16x2 $0, $1, $2;", "=r,r,r", [a, b], tl.int32, True, 1)


@triton.jit
def _magnitude_of_words(first, second, BFLOAT16: tl.constexpr, EXACT: tl.constexpr):
    """Largest magnitude, float32 [BLOCKS], of words [BLOCKS, 4] each; NaN if there is one, or, not EXACT, if all are."""
    first &= 0x7FFF7FFF
    second &= 0x7FFF7FFF
    if BFLOAT16 and EXACT:
        pair = _larger_bfloat16(tl.reduce(first, 1, _larger_bfloat16), tl.reduce(second, 1, _larger_bfloat16))
    elif EXACT:
        pair = _larger_float16(tl.reduce(first, 1, _larger_float16), tl.reduce(second, 1, _larger_float16))
    elif BFLOAT16:
        pair = _number_bfloat16(tl.reduce(first, 1, _number_bfloat16), tl.reduce(second, 1, _number_bfloat16))
        pair = _number_bfloat16(pair, pair >> 16)
    else:
        pair = _number_float16(tl.reduce(first, 1, _number_float16), tl.reduce(second, 1, _number_float16))
        pair = _number_float16(pair, pair >> 16)
    if EXACT:
        pair = tl.maximum(pair & 0xFFFF, pair >> 16)  # their bits order as integers
    return pair.to(tl.uint16).to(tl.bfloat16 if BFLOAT16 else tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _pack_words(words, factor, BFLOAT16: tl.constexpr, ARITHMETIC: tl.constexpr):
    """Data, uint8 [BLOCKS, 4], of words [BLOCKS, 4] of two columns each times factor [BLOCKS]."""
    factors = tl.broadcast_to(factor[:, None], words.shape)
    return tl.inline_asm_elementwise(
        (
            (_EXACT_BFLOAT16 if BFLOAT16 else _EXACT_FLOAT16) if ARITHMETIC == "exact"
            else (_VLLM_BFLOAT16 if BFLOAT16 else _VLLM_FLOAT16) if ARITHMETIC == "vllm"
            else (_FLASHINFER_BFLOAT16 if BFLOAT16 else _FLASHINFER_FLOAT16)
        ),
        "=r,r,r,r,r,f,f,f,f", [words, factors], tl.uint8, is_pure=True, pack=4,
    )  # fmt: skip


@triton.jit
def _flush(x):
    return tl.where(tl.abs(x) < 1.1754943508222875e-38, x * 0.0, x)  # 2**-126


# Where there is no hardware, in Triton's interpreter, what is approximate is rounded to nearest instead.


@triton.jit
def _times(a, b, HARDWARE: tl.constexpr, ARITHMETIC: tl.constexpr):
    """``a * b`` as the vendor's compiler makes it."""
    if ARITHMETIC == "vllm":
        product = a * b
    elif HARDWARE:
        product = tl.inline_asm_elementwise("mul.rn.ftz.f32 $0, $1, $2;", "=f,f,f", [a, b], tl.float32, True, 1)
    else:
        product = _flush(_flush(a) * _flush(b))
    if not HARDWARE:
        product = tl.where(product == product, product, float("nan"))  # a CPU's has a sign
    return product


@triton.jit
def _approximate_reciprocal(x, HARDWARE: tl.constexpr):
    if HARDWARE:
        reciprocal = tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)
    else:
        reciprocal = _flush(tl.div_rn(1.0, _flush(x)))
    return reciprocal


@triton.jit
def _vendor_scale(amax, g, HARDWARE: tl.constexpr, ARITHMETIC: tl.constexpr):
    """Scale's code, uint8, and the factor of the values, float32, both [BLOCKS]."""
    if ARITHMETIC == "flashinfer":
        amax = _times(amax, tl.full((), 1.0, tl.float32), HARDWARE, ARITHMETIC)  # compared as flushed below
    sixth = _approximate_reciprocal(tl.full((), 6.0, tl.float32), HARDWARE)
    scaled = _times(g, _times(amax, sixth, HARDWARE, ARITHMETIC), HARDWARE, ARITHMETIC)
    code, scale = encode_e4m3(scaled, HARDWARE)
    product = _times(scale, _approximate_reciprocal(g, HARDWARE), HARDWARE, ARITHMETIC)
    factor = _approximate_reciprocal(product, HARDWARE)
    return code, tl.where((amax if ARITHMETIC == "flashinfer" else scale) == 0, 0.0, factor)


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
    HARDWARE_E2M1: tl.constexpr, HARDWARE_E4M3: tl.constexpr, WORDS: tl.constexpr, ARITHMETIC: tl.constexpr,
):  # fmt: skip
    """Data, uint8 [BLOCKS, 8], and scales, uint8 [BLOCKS]."""
    EXACT: tl.constexpr = ARITHMETIC == "exact"
    tl.static_assert(EXACT or ARITHMETIC == "vllm" or ARITHMETIC == "flashinfer")
    if WORDS:
        amax = _magnitude_of_words(first, second, BFLOAT16, EXACT)
    else:
        values = first.to(tl.float32)
        if EXACT:
            # The bits of magnitudes order as integers: finite < Inf < NaN, so NaN comes through the maximum.
            amax = tl.max(values.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1).to(tl.float32, bitcast=True)
        else:
            amax = tl.max(tl.abs(values), 1)  # which drops NaN
    if EXACT:
        scale_code, scale = encode_e4m3(g * (amax * (1 / 6)), HARDWARE_E4M3)
        factor = _reciprocal(scale * _reciprocal(g))
    else:
        scale_code, factor = _vendor_scale(amax, g, HARDWARE_E4M3, ARITHMETIC)
    if WORDS:
        packed = tl.join(
            _pack_words(first, factor, BFLOAT16, ARITHMETIC), _pack_words(second, factor, BFLOAT16, ARITHMETIC)
        )
        packed = tl.reshape(tl.permute(packed, (0, 2, 1)), (first.shape[0], 8))
    else:
        scaled = values * factor[:, None] if EXACT else _times(values, factor[:, None], HARDWARE_E4M3, ARITHMETIC)
        even, odd = tl.split(tl.reshape(scaled, (first.shape[0], 8, 2)))
        packed = pack_e2m1(even, odd, HARDWARE_E2M1, EXACT)
    return packed, scale_code


@triton.jit
def _silu(v):
    t = v * _MINUS_LOG2_E
    t = tl.where(t < 128.0, t, 128.0)
    t = tl.where(t > -126.0, t, -126.0)
    whole = (t + 12582912.0) - 12582912.0
    f = t - whole
    power = ((((_C6 * f + _C5) * f + _C4) * f + _C3) * f + _C2) * f + _C1
    power = power * f + _C0
    power = (power.to(tl.int32, bitcast=True) + (whole.to(tl.int32) << 23)).to(tl.float32, bitcast=True)
    return tl.div_rn(v, 1.0 + power)


@triton.jit
def _narrow(x, BFLOAT16: tl.constexpr, HARDWARE: tl.constexpr):
    """float32 as bfloat16 or float16, to nearest, ties to even: Triton's interpreter would cut off bfloat16."""
    if not BFLOAT16:
        narrow = x.to(tl.float16)
    else:
        if not HARDWARE:
            bits = x.to(tl.int32, bitcast=True)
            rounded = bits + 0x7FFF + ((bits >> 16) & 1)
            x = (tl.where(x != x, bits, rounded) & -0x10000).to(tl.float32, bitcast=True)
        narrow = x.to(tl.bfloat16)
    return narrow


def _silu_ptx(flush: str) -> str:
    return f"""
        {{
        .reg .f32 power;
        mul.rn{flush}.f32 power, $1, 0fBFB8AA3B;  // -log2(e)
        ex2.approx.ftz.f32 power, power;  // what it flushes is nothing beside 1
        add.rn{flush}.f32 power, power, 0f3F800000;
        rcp.approx.ftz.f32 power, power;  // div.approx by 1 or more is this and a product
        mul.rn{flush}.f32 $0, $1, power;
        }}
    """


_VLLM_SILU, _FLASHINFER_SILU = (tl.constexpr(_silu_ptx(flush)) for flush in ("", ".ftz"))


@triton.jit
def silu_and_mul(gate, up, BFLOAT16: tl.constexpr, HARDWARE: tl.constexpr, ARITHMETIC: tl.constexpr):
    """``silu(gate) * up``, bfloat16 or float16, computed in float32."""
    gate = gate.to(tl.float32)
    up = up.to(tl.float32)
    if ARITHMETIC == "exact":
        product = _silu(gate) * up
    else:
        if not HARDWARE:
            silu = tl.div_rn(gate, 1.0 + tl.exp2(_times(gate, _MINUS_LOG2_E, HARDWARE, ARITHMETIC)))
        elif ARITHMETIC == "vllm":
            silu = tl.inline_asm_elementwise(_VLLM_SILU, "=f,f", [gate], tl.float32, True, 1)
        else:
            silu = tl.inline_asm_elementwise(_FLASHINFER_SILU, "=f,f", [gate], tl.float32, True, 1)
        product = _times(silu, up, HARDWARE, ARITHMETIC)
    return _narrow(product, BFLOAT16, HARDWARE)

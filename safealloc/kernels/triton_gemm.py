# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""NVFP4 matrix product on 16-bit tensor cores, as :func:`safealloc.kernels.reference.mm`.

::

    out = alpha * sum_k (e2m1(a[m, k]) * e4m3(a_scales[m, k // 16])) * (e2m1(b[n, k]) * e4m3(b_scales[n, k // 16]))

An operand e2m1 * e4m3 has at most 6 significant bits, is a multiple of 2**-10 and at most 2688. So ``2**-6`` of it, which is
what e2m1's bits in e4m3's fields times the scale are, is exact in float16, and only the float32 sum over k rounds. Low
nibbles are even columns and high nibbles odd ones, and a sum does not mind its order: a step takes the even columns first.

Decode has few rows of ``a`` and streams ``b``. What that costs is decoding ``b`` and moving it to the tensor cores, so the
weight is their left operand, which may stay in registers: rows and columns are permuted (both operands alike, and the
rows of the result) such that the 16 bytes which a lane loads are the ones its tensor core wants. Where ``b`` has too few
rows to fill the device, several programs share a tile's columns and a second kernel adds up.

Scale bytes are read as the tensor cores of Blackwell read them: whole tiles of 4 columns, with zero data beyond k. So NaN
in a padding column reaches its row (NaN * 0). Rows beyond the matrix are never read.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from safealloc.formats.format import BLOCK_SIZE
from safealloc.formats.layout import SfLayout
from safealloc.kernels.triton_layout import dependent_launch, device_of, gdc_launch_dependents, gdc_wait

_TILES = 2
"""Tiles of 4 scale columns a step: 64 bytes of a row, which are 4 lanes' and two steps of a tensor core."""


def _ptx(fields: str) -> str:
    """Four e2m1 as float16: ``fields`` moves sign, exponent and mantissa to where e4m3 has them."""
    return f"""
        {{
        .reg .b32 sign, value;
        .reg .b16 low, high;
        {fields}
        and.b32 sign, sign, 0x80808080;
        lop3.b32 value, value, 0x1C1C1C1C, sign, 0xEA;
        mov.b32 {{low, high}}, value;
        cvt.rn.f16x2.e4m3x2 $0, low;
        cvt.rn.f16x2.e4m3x2 $1, high;
        }}
    """


_ODD_NIBBLES = tl.constexpr(_ptx("mov.b32 sign, $2; shr.u32 value, $2, 2;"))
_EVEN_NIBBLES = tl.constexpr(_ptx("shl.b32 sign, $2, 4; shl.b32 value, $2, 2;"))


@triton.jit
def _decode_e2m1(packed, ODD: tl.constexpr, PTX: tl.constexpr):
    """float16 ``2**-6 * value`` of the high (ODD) or low nibbles of uint8: hardware converts e4m3's fields."""
    if PTX:
        value = tl.inline_asm_elementwise(
            _ODD_NIBBLES if ODD else _EVEN_NIBBLES, "=r,=r,r", [packed], tl.float16, is_pure=True, pack=4
        )
    else:
        code = packed.to(tl.uint16) >> (4 if ODD else 0)
        value = (((code & 0x7) << 9) | ((code & 0x8) << 12)).to(tl.float16, bitcast=True) * 256.0  # 2 ** (14 - 6)
    return value


@triton.jit
def _decode_scales(words, ROWS: tl.constexpr, TILES: tl.constexpr, PTX: tl.constexpr):
    """float16 [ROWS, 32 * TILES], a scale for each byte of data, of int32 [ROWS, TILES], 4 e4m3 each."""
    byte = (words[:, :, None] >> (8 * tl.arange(0, 4)[None, None, :])).to(tl.uint8)
    if PTX:
        scale = byte.to(tl.float8e4nv, bitcast=True).to(tl.float16)
    else:
        code = byte.to(tl.uint16)
        bits = ((code & 0x7F) << 7) | ((code & 0x80) << 8)
        scale = bits.to(tl.float16, bitcast=True) * 256.0  # 2 ** (15 - 7)
        scale = tl.where((code & 0x7F) == 0x7F, float("nan"), scale)
    scale = tl.broadcast_to(scale[:, :, :, None], (ROWS, TILES, 4, 8))
    return tl.reshape(scale, (ROWS, TILES * 32))


@triton.jit
def _row_words(row, col_tiles, LAYOUT: tl.constexpr):
    """Where the words (tiles' rows of 4 scales) of a row begin."""
    if LAYOUT == 0:
        word = row // 128 * col_tiles * 128 + row % 32 * 4 + row % 128 // 32
    elif LAYOUT == 1:
        word = row // 8 * col_tiles * 8 + row % 8
    else:
        word = row * col_tiles
    return word


@triton.jit
def _load_words(scales, word, inside, col, cols, ALIGNED: tl.constexpr):
    """int32 words of 4 scales from column ``col`` on; not ALIGNED, ``word`` counts bytes, and columns beyond cols are 0."""
    if ALIGNED:
        words = tl.load(scales.to(tl.pointer_type(tl.int32)) + word, mask=inside, other=0)
    else:
        words = tl.zeros_like(word)
        for byte in tl.static_range(4):
            there = inside & (col + byte < cols)
            words |= tl.load(scales + word + byte, mask=there, other=0).to(tl.int32) << (8 * byte)
    return words


@triton.jit
def _operand_columns(x, ROWS: tl.constexpr, TILES: tl.constexpr):
    """Columns in the order that makes a lane's 16 contiguous bytes its part of a 16-bit tensor core operand."""
    x = tl.permute(tl.reshape(x, (ROWS, TILES // 2, 4, 4, 2, 2)), (0, 1, 3, 4, 2, 5))
    return tl.reshape(x, (ROWS, TILES * 32))


@triton.jit
def _operand(packed, scale, ROWS: tl.constexpr, TILES: tl.constexpr, PTX: tl.constexpr):
    """float16 [ROWS, 64 * TILES]: the even columns' products with their scales, then the odd ones'."""
    even = _operand_columns(_decode_e2m1(packed, False, PTX) * scale, ROWS, TILES)
    odd = _operand_columns(_decode_e2m1(packed, True, PTX) * scale, ROWS, TILES)
    return tl.reshape(tl.permute(tl.join(even, odd), (0, 2, 1)), (ROWS, TILES * 64))


@triton.jit
def _operand_rows(x, ROWS: tl.constexpr, COLS: tl.constexpr, WARPS: tl.constexpr):
    """Rows in the order that makes a warp's rows its part of such an operand."""
    x = tl.permute(tl.reshape(x, (ROWS // (16 * WARPS), 2, WARPS, 8, COLS)), (0, 2, 1, 3, 4))
    return tl.reshape(x, (ROWS, COLS))


@triton.jit
def _result_columns(x, ROWS: tl.constexpr, COLS: tl.constexpr, WARPS: tl.constexpr):
    """The tile [ROWS, COLS] of the result from its transpose, whose rows are in :func:`_operand_rows`' order: sorted by n."""
    x = tl.permute(tl.reshape(x, (COLS // (16 * WARPS), WARPS, 2, 8, ROWS)), (0, 2, 1, 3, 4))
    x = tl.permute(tl.reshape(x, (COLS // 4, 4, ROWS)), (2, 1, 0))
    return tl.reshape(x, (ROWS, COLS))


# One binary for all row counts of a tiling: a new batch size must not compile, least of all during a graph capture. Columns
# and strides are specialized: whether they are multiples of 16 decides how wide loads and stores are.
@triton.jit(do_not_specialize=["m", "alpha_stride", "steps"])
def _mm(
    a, b,  # uint8 [m, 8 * cols], [n, 8 * cols]
    a_scales, b_scales,  # uint8, in LAYOUT for [m, cols], in 128x4 for [n, cols]
    alpha,  # float32 [1] or [m], or None
    out,  # [m, n]
    partial,  # float32 [programs that share a tile, m, n], or None: the tile's sum goes to out
    m, n, cols,
    alpha_stride,  # 0 where alpha has one element
    out_stride_m, out_stride_n,
    steps,  # of TILES tiles, of each program
    LAYOUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TILES: tl.constexpr,
    WHOLE_STEPS: tl.constexpr,  # cols is a multiple of 4 * TILES
    A_ALIGNED: tl.constexpr, B_ALIGNED: tl.constexpr,  # the words of a_scales, of b_scales are aligned
    WARPS: tl.constexpr, STAGES: tl.constexpr, PTX: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    BYTES: tl.constexpr = TILES * 32
    # Programs that share a tile of b are neighbors, so that the weight comes from memory once. A tile's rows of b are those
    # whose scales lie together: every 32nd, of as many groups as fit.
    tiles_m = tl.cdiv(m, BLOCK_M)
    row_m = tl.program_id(0) % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)
    tile_n = tl.program_id(0) // tiles_m
    lane_n = tl.arange(0, BLOCK_N)
    group, part = tile_n // (128 // BLOCK_N), tile_n % (128 // BLOCK_N)
    row_n = group * 128 + lane_n % 4 * 32 + part * (BLOCK_N // 4) + lane_n // 4
    first = tl.program_id(1) * steps

    col_tiles = tl.cdiv(cols, 4)
    A_STRIDE: tl.constexpr = 128 if LAYOUT == 0 else 8 if LAYOUT == 1 else 1  # words between a row's tiles
    tile = first * TILES + tl.arange(0, TILES)[None, :]
    if A_ALIGNED:
        a_word = _row_words(row_m, col_tiles, LAYOUT)[:, None] + tile * A_STRIDE
    elif LAYOUT == 2:
        a_word = row_m[:, None] * cols + tile * 4
    else:
        a_word = (_row_words(row_m, col_tiles, LAYOUT)[:, None] + tile * A_STRIDE) * 4
    b_word = (group * col_tiles * 128 + part * BLOCK_N + lane_n)[:, None] + tile * 128
    if not B_ALIGNED:
        b_word *= 4
    a_stride: tl.constexpr = A_STRIDE if A_ALIGNED else A_STRIDE * 4
    b_stride: tl.constexpr = 128 if B_ALIGNED else 512
    byte = first * BYTES + tl.arange(0, BYTES)[None, :]
    a_at = a + row_m.to(tl.int64)[:, None] * (cols * 8) + byte
    b_at = b + row_n.to(tl.int64)[:, None] * (cols * 8) + byte
    in_m, in_n = (row_m < m)[:, None], (row_n < n)[:, None]
    # Tiles have 4 columns, of which some may be padding, but linear scales end where the matrix does.
    scale_cols = cols if LAYOUT == 2 else col_tiles * 4

    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    if DEPENDENT:
        gdc_wait()  # before the first access to memory
    for step in tl.range(first, tl.minimum(first + steps, tl.cdiv(col_tiles, TILES)), num_stages=STAGES):
        a_in, b_in, a_tiles_in, b_tiles_in = in_m, in_n, in_m, in_n | True
        if not WHOLE_STEPS:
            in_bytes = tl.arange(0, BYTES)[None, :] < cols * 8 - step * BYTES
            in_tiles = tl.arange(0, TILES)[None, :] < col_tiles - step * TILES
            a_in, b_in = in_m & in_bytes, in_n & in_bytes
            a_tiles_in, b_tiles_in = in_m & in_tiles, in_tiles | (in_n & False)
        a_packed = tl.load(a_at, mask=a_in, other=0)
        b_packed = tl.load(b_at, mask=b_in, other=0)
        col = (step * TILES + tl.arange(0, TILES)[None, :]) * 4
        a_words = _load_words(a_scales, a_word, a_tiles_in, col, scale_cols, A_ALIGNED)
        b_words = _load_words(b_scales, b_word, b_tiles_in, col, col_tiles * 4, B_ALIGNED)
        a_scale = _decode_scales(a_words, BLOCK_M, TILES, PTX)
        b_scale = _decode_scales(b_words, BLOCK_N, TILES, PTX)
        a_part = _operand(a_packed, a_scale, BLOCK_M, TILES, PTX)
        b_part = _operand_rows(_operand(b_packed, b_scale, BLOCK_N, TILES, PTX), BLOCK_N, 2 * BYTES, WARPS)
        total = tl.dot(b_part, tl.trans(a_part), total)
        a_at += BYTES
        b_at += BYTES
        a_word += TILES * a_stride
        b_word += TILES * b_stride

    if DEPENDENT:
        gdc_launch_dependents()
    total = _result_columns(total, BLOCK_M, BLOCK_N, WARPS) * 4096.0  # 2 ** 12, of two operands that were 2 ** -6 each
    lane_n = tl.arange(0, BLOCK_N)
    row_n = group * 128 + lane_n // (BLOCK_N // 4) * 32 + part * (BLOCK_N // 4) + lane_n % (BLOCK_N // 4)
    inside = in_m & (row_n < n)[None, :]
    row_m, row_n = row_m.to(tl.int64)[:, None], row_n.to(tl.int64)[None, :]
    if partial is not None:
        tl.store(partial + (tl.program_id(1).to(tl.int64) * m + row_m) * n + row_n, total, mask=inside)
    else:
        if alpha is not None:
            total *= tl.load(alpha + row_m * alpha_stride, mask=in_m, other=0.0)
        tl.store(out + row_m * out_stride_m + row_n * out_stride_n, total.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["alpha_stride", "shares"])
def _add_up(
    partial,  # float32 [shares, m, n]
    alpha, out, n, alpha_stride, out_stride_m, out_stride_n, shares, BLOCK: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    row, m = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    if DEPENDENT:
        gdc_wait()
    for share in range(shares):
        total += tl.load(partial + (share * m + row) * n + col, mask=col < n, other=0.0)
    if DEPENDENT:
        gdc_launch_dependents()  # not before: programs of the next GEMM would be placed around this one's
    if alpha is not None:
        total *= tl.load(alpha + row * alpha_stride)
    tl.store(out + row * out_stride_m + col.to(tl.int64) * out_stride_n, total.to(out.dtype.element_ty), mask=col < n)


def mm(
    a: Tensor,
    b: Tensor,
    a_scales: Tensor,
    b_scales: Tensor,
    alpha: Tensor | None,
    out: Tensor,
    layout: SfLayout,
    *,
    enable_pdl: bool = True,
    skip_check: bool = False,
) -> None:
    """``out = alpha * (a @ b.T)`` in float32, rounded once to ``out.dtype``, in one launch, or two where ``b`` is small.

    Nothing synchronizes. What is summed in which order depends on the shapes alone.

    Args:
        a: one-byte dtype ``[m, k // 2]``, as all operands; contiguous, m at least 1.
        b: ``[n, k // 2]``, contiguous.
        a_scales: contiguous, at least ``layout``'s bytes for ``[m, k]``.
        b_scales: contiguous, at least layout_128x4's bytes for ``[n, k]``.
        alpha: float32, any strides, of one element or one per row, or ``None`` for 1.
        out: bfloat16, float16 or float32 ``[m, n]``, any strides, written.
        layout: order of the bytes in ``a_scales``.
        enable_pdl, skip_check: FlashInfer's, without meaning here: dependent launches are used where the device has them.
    """
    a, b, a_scales, b_scales = _as_bytes(a), _as_bytes(b), _as_bytes(a_scales), _as_bytes(b_scales)
    m, n, cols = a.shape[0], b.shape[0], 2 * a.shape[1] // BLOCK_SIZE
    multiprocessors = _multiprocessors(a.device)
    steps = -(-cols // (4 * _TILES))
    tiling = tiling_for(m, n, steps, multiprocessors)
    tiles = _tiles(m, n, tiling.block_m, tiling.block_n)
    shares = shares_for(tiles, steps, multiprocessors)
    steps = -(-steps // shares)
    alpha = None if alpha is None else alpha.reshape(-1)
    alpha_stride = 0 if alpha is None or alpha.numel() == 1 else alpha.stride(0)
    a_aligned = a_scales.data_ptr() % 4 == 0 and (layout is not SfLayout.layout_linear or cols % 4 == 0)
    b_aligned = b_scales.data_ptr() % 4 == 0
    _check_addressable("a_scales", layout.nbytes(m, cols * BLOCK_SIZE), a_aligned)
    _check_addressable("b_scales", SfLayout.layout_128x4.nbytes(n, cols * BLOCK_SIZE), b_aligned)
    partial = torch.empty((shares, m, n), dtype=torch.float32, device=a.device) if shares > 1 else None
    dependent = dependent_launch(a.device)
    with device_of(a):
        _mm[(tiles, shares)](
            a,
            b,
            a_scales,
            b_scales,
            None if shares > 1 else alpha,
            out,
            partial,
            m,
            n,
            cols,
            alpha_stride,
            out.stride(0),
            out.stride(1),
            steps,
            LAYOUT=int(layout),
            BLOCK_M=tiling.block_m,
            BLOCK_N=tiling.block_n,
            TILES=_TILES,
            WHOLE_STEPS=cols % (4 * _TILES) == 0,
            A_ALIGNED=a_aligned,
            B_ALIGNED=b_aligned,
            WARPS=tiling.num_warps,
            STAGES=tiling.num_stages,
            PTX=a.is_cuda,
            DEPENDENT=bool(dependent),
            num_warps=tiling.num_warps,
            num_stages=tiling.num_stages,
            enable_fp_fusion=False,  # nothing here could fuse; Triton 3.9 warns where it is left open
            **dependent,
        )
        if partial is not None:
            _add_up[(m, -(-n // _ADD_UP_COLUMNS))](
                partial,
                alpha,
                out,
                n,
                alpha_stride,
                out.stride(0),
                out.stride(1),
                shares,
                BLOCK=_ADD_UP_COLUMNS,
                DEPENDENT=bool(dependent),
                enable_fp_fusion=False,
                **dependent,
            )


def _check_addressable(name: str, nbytes: int, aligned: bool) -> None:
    """Raises: ValueError: more scales than the kernel's 32-bit offsets reach, in words of 4 where they are aligned."""
    most = (1 << 33) if aligned else 1 << 31
    if nbytes > most - (1 << 20):  # the loop's last step may look that far beyond
        raise ValueError(
            f"{name} has {nbytes} bytes, the Triton GEMM addresses less than 2**{most.bit_length() - 1}"
            f"{'' if aligned else ', where rows of scales are no whole 4-byte words'}: split the rows"
        )


def _as_bytes(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype is torch.uint8 else tensor.view(torch.uint8)


_ADD_UP_COLUMNS = 1024


class Tiling(NamedTuple):
    """Rows of a and b a program, its warps and pipeline stages."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


@functools.cache
def tiling_for(m: int, n: int, steps: int, multiprocessors: int) -> Tiling:
    """At decode the weight's bytes are all that counts; with more rows of a the conversion of b must pay for itself.

    With few rows, tiles have the width, 128 or 64, that gives most programs, up to 2 a multiprocessor; where both give more
    than that, 64.
    """
    if m <= 16:
        at_once = _PROGRAMS * multiprocessors
        tiles = [_tiles(m, n, 16, width) for width in (128, 64)]
        with_128, with_64 = (count * shares_for(count, steps, multiprocessors) for count in tiles)
        if with_128 <= at_once and not with_128 < with_64 <= at_once:
            return Tiling(16, 128, 4, 4)
        return Tiling(16, 64, 4, 4 if with_64 <= at_once else 6)
    if m <= 32:
        return Tiling(32, 128, 8, 4)
    if m <= 64:
        return Tiling(64, 128, 8, 4)
    return Tiling(128, 128, 4, 3)


def _tiles(m: int, n: int, block_m: int, block_n: int) -> int:
    """Of the result; n is padded to 128, as its scales are."""
    return -(-m // block_m) * -(-n // 128) * (128 // block_n)


_MAX_SHARES = 4
_PROGRAMS = 2  # a multiprocessor


def shares_for(tiles: int, steps: int, multiprocessors: int) -> int:
    """How many programs share a tile: up to 4, so that a multiprocessor has 2 programs, each with 16 steps or more."""
    return max(1, min(_MAX_SHARES, _PROGRAMS * multiprocessors // tiles, steps // 16))


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 132  # as an H200 has, in Triton's interpreter
    return torch.cuda.get_device_properties(device).multi_processor_count

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""NVFP4 matrix product on 16-bit tensor cores, as :func:`safealloc.kernels.reference.mm`.

::

    out = alpha * sum_k (e2m1(a[m, k]) * e4m3(a_scales[m, k // 16])) * (e2m1(b[n, k]) * e4m3(b_scales[n, k // 16]))

An operand e2m1 * e4m3 has at most 6 significant bits, is a multiple of 2**-10 and at most 2688: exact in float16, so only
the float32 sum over k rounds. Low nibbles are even columns and high nibbles odd ones, and a sum does not mind its order:
each step is one dot of the even columns and one of the odd.

Scale bytes are read as the tensor cores of Blackwell read them: whole tiles of 4 columns, with zero data beyond k. So NaN
in a padding column reaches its row (NaN * 0). Rows beyond the matrix are never read.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from safealloc.kernels.triton_layout import device_of, scale_offset
from safealloc.layout import BLOCK_SIZE, SfLayout


@triton.jit
def _decode_e2m1(code):
    """float16 value of the low 4 bits of a uint16: shifted into float16's fields, it lacks the exponents' difference."""
    bits = ((code & 0x7) << 9) | ((code & 0x8) << 12)
    return bits.to(tl.float16, bitcast=True) * 16384.0  # 2 ** (15 - 1); float16's subnormals are e2m1's too


@triton.jit
def _decode_e4m3(byte):
    """float16 value of a uint8."""
    code = byte.to(tl.uint16)
    bits = ((code & 0x7F) << 7) | ((code & 0x80) << 8)
    value = bits.to(tl.float16, bitcast=True) * 256.0  # 2 ** (15 - 7)
    return tl.where((code & 0x7F) == 0x7F, float("nan"), value)


@triton.jit
def _load_operand(
    x_fp4,  # uint8 [rows, 8 * cols]
    scales,  # uint8, in LAYOUT
    row,  # int32 [ROWS]
    rows,
    col,  # int32, first scale column
    cols,
    col_tiles,
    LAYOUT: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Even and odd columns, float16 [ROWS, 8 * COLS] each; zero outside the matrix."""
    inside = (row < rows)[:, None]
    byte = col * 8 + tl.arange(0, 8 * COLS)[None, :]
    offset = row.to(tl.int64)[:, None] * (cols * 8) + byte
    packed = tl.load(x_fp4 + offset, mask=inside & (byte < cols * 8), other=0).to(tl.uint16)

    scale_col = col + tl.arange(0, COLS)[None, :]
    scale_cols = cols if LAYOUT == 2 else col_tiles * 4
    offset = scale_offset(row[:, None], scale_col, col_tiles, LAYOUT)
    scale = _decode_e4m3(tl.load(scales + offset, mask=inside & (scale_col < scale_cols), other=0))
    scale = scale[:, :, None]  # one for 8 bytes

    even = tl.reshape(_decode_e2m1(packed), (ROWS, COLS, 8)) * scale
    odd = tl.reshape(_decode_e2m1(packed >> 4), (ROWS, COLS, 8)) * scale
    return tl.reshape(even, (ROWS, 8 * COLS)), tl.reshape(odd, (ROWS, 8 * COLS))


# One binary for all row counts: a new batch size must not compile, least of all during a graph capture. Columns and
# strides are specialised: whether they are multiples of 16 decides how wide loads and stores are.
@triton.jit(do_not_specialize=["m", "n", "alpha_stride"])
def _mm(
    a,  # uint8 [m, 8 * cols]
    b,  # uint8 [n, 8 * cols]
    a_scales,  # uint8, in LAYOUT for [m, cols]
    b_scales,  # uint8, in 128x4 for [n, cols]
    alpha,  # float32 [1] or [m], or None
    out,  # [m, n]
    m,
    n,
    cols,
    alpha_stride,  # 0 where alpha has one element
    out_stride_m,
    out_stride_n,
    LAYOUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    COLS: tl.constexpr,  # scale columns a step: 16 * COLS columns of a and b
):
    # Programs that share a tile of b are neighbours, so that the weight comes from memory once.
    tiles_m = tl.cdiv(m, BLOCK_M)
    row_m = tl.program_id(0) % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)
    row_n = tl.program_id(0) // tiles_m * BLOCK_N + tl.arange(0, BLOCK_N)
    col_tiles = tl.cdiv(cols, 4)
    a_col_tiles = cols if LAYOUT == 2 else col_tiles
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for col in range(0, cols, COLS):
        a_even, a_odd = _load_operand(a, a_scales, row_m, m, col, cols, a_col_tiles, LAYOUT, BLOCK_M, COLS)
        b_even, b_odd = _load_operand(b, b_scales, row_n, n, col, cols, col_tiles, 0, BLOCK_N, COLS)
        total = tl.dot(a_even, tl.trans(b_even), total)
        total = tl.dot(a_odd, tl.trans(b_odd), total)
    inside_m = row_m < m
    if alpha is not None:
        total *= tl.load(alpha + row_m * alpha_stride, mask=inside_m, other=0.0)[:, None]
    offset = row_m.to(tl.int64)[:, None] * out_stride_m + row_n.to(tl.int64)[None, :] * out_stride_n
    tl.store(out + offset, total.to(out.dtype.element_ty), mask=inside_m[:, None] & (row_n < n)[None, :])


def mm(
    a: Tensor, b: Tensor, a_scales: Tensor, b_scales: Tensor, alpha: Tensor | None, out: Tensor, layout: SfLayout
) -> None:
    """``out = alpha * (a @ b.T)`` in float32, rounded once to ``out.dtype``, in one launch.

    Nothing is allocated and nothing synchronises.

    Args:
        a: uint8 ``[m, k // 2]``, contiguous, m at least 1.
        b: uint8 ``[n, k // 2]``, contiguous.
        a_scales: uint8, contiguous, at least ``layout``'s bytes for ``[m, k]``.
        b_scales: uint8, contiguous, at least layout_128x4's bytes for ``[n, k]``.
        alpha: float32, contiguous, of one element or one per row, or ``None`` for 1.
        out: bfloat16, float16 or float32 ``[m, n]``, any strides, written.
        layout: order of the bytes in ``a_scales``.
    """
    m, n, cols = a.shape[0], b.shape[0], 2 * a.shape[1] // BLOCK_SIZE
    block_m, block_n, block_cols, num_warps, num_stages = _tiling(m)
    with device_of(a):
        _mm[(-(-m // block_m) * -(-n // block_n),)](
            a,
            b,
            a_scales,
            b_scales,
            alpha,
            out,
            m,
            n,
            cols,
            0 if alpha is None or alpha.numel() == 1 else 1,
            out.stride(0),
            out.stride(1),
            LAYOUT=int(layout),
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            COLS=block_cols,
            num_warps=num_warps,
            num_stages=num_stages,
            enable_fp_fusion=False,  # nothing here could fuse; Triton 3.9 warns where it is left open
        )


def _tiling(m: int) -> tuple[int, int, int, int, int]:
    """Rows of a, rows of b and scale columns a step, warps, pipeline stages.

    At decode the weight's bytes are all that counts: few rows of b a program, so that many programs stream it, in long
    pieces. With more rows of a the conversion of b must pay for itself, so tiles grow.
    """
    if m <= 16:
        return 16, 32, 16, 4, 4
    if m <= 32:
        return 32, 32, 16, 4, 4
    if m <= 64:
        return 64, 64, 8, 4, 3
    return 128, 128, 4, 8, 3

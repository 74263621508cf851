# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""NVFP4 quantization of rows grouped by expert (MoE), bit for bit as :mod:`safealloc.kernels.reference_grouped`.

A row has a program for each part of its columns. Cleaning programs, which come first, take some rows each: they clear the
scale row that the row of the same number had at the previous step, unless it is valid now, and record the new one. So the
buffer's record of a row belongs to one program, and cleaning takes as long as the other programs need anyway. If the previous
step had more rows, each cleaning program takes its share of them.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from safealloc.formats.format import BLOCK_SIZE
from safealloc.formats.layout import SfLayout
from safealloc.kernels.triton_encode import encode_blocks, load_blocks, silu_and_mul
from safealloc.kernels.triton_layout import dependent_launch, device_of, gdc_launch_dependents, gdc_wait, scale_offset
from safealloc.kernels.triton_nan import note_blocks
from safealloc.kernels.triton_quantize import FEW_BLOCKS, launch_options, takes_words, tiling_for

_ROWS_CLEANED_ALONE = 1  # by each program, where no other program quantizes


@triton.jit
def _load_groups(expert_offsets, blockscale_offsets, expert, rows, experts):
    """First row, row behind the last, and first scale row of each expert's group, int32; none beyond ``experts``."""
    there = expert < experts
    first = tl.load(expert_offsets + expert, mask=there, other=0)
    end = tl.minimum(tl.load(expert_offsets + expert + 1, mask=there, other=0), rows)
    base = tl.load(blockscale_offsets + expert, mask=there, other=0)
    return first, end, base


@triton.jit
def _place_of(row, first, end, base, scale_rows, AXIS: tl.constexpr):
    """Scale row of a row, counted from 1; 0 for a row outside of every group. A row belongs to one group at most.

    Experts are along AXIS: 0 for one row, 1 for a column of rows.
    """
    place = tl.sum(tl.where((first <= row) & (row < end), base + (row - first) + 1, 0), AXIS, keep_dims=AXIS == 1)
    return tl.where((place > 0) & (place <= scale_rows), place, 0)


@triton.jit
def _divide(number, divisor, reciprocal):
    """Quotient and remainder, int32, faster than by a division, which matters where the kernel takes a microsecond.

    ``reciprocal`` is ``(2**31 - 1) // divisor``. The quotient that it gives is at most one too small.
    """
    quotient = tl.umulhi((2 * number).to(tl.uint32), reciprocal.to(tl.uint32)).to(tl.int32)
    rest = number - quotient * divisor
    return tl.where(rest < divisor, quotient, quotient + 1), tl.where(rest < divisor, rest, rest - divisor)


@triton.jit(do_not_specialize=["rows", "capacity", "experts", "col_tiles", "scale_rows"])
def _clean(
    scales, record, expert_offsets, blockscale_offsets,
    rows, capacity, experts, col_tiles, scale_rows,
    LAYOUT: tl.constexpr, EXPERTS: tl.constexpr, TILE_COLS: tl.constexpr, ROWS: tl.constexpr, DEPENDENT: tl.constexpr,
    WAIT: tl.constexpr,  # for the predecessor: as a kernel of its own
):  # fmt: skip
    if WAIT and DEPENDENT:
        gdc_wait()
    leader = tl.program_id(0) * ROWS  # the first row of this program's
    # Everything is [ROWS, EXPERTS], or 1 of either: other shapes move between warps, which must then synchronize.
    expert = tl.arange(0, EXPERTS)[None, :]
    row = leader + tl.arange(0, ROWS)[:, None]
    first, end, base = _load_groups(expert_offsets, blockscale_offsets, expert, rows, experts)
    inside = row < rows
    old = tl.load(record + row, mask=inside, other=0)
    leader += rows
    # Behind a row without an entry the previous step had no more rows, so this entry tells whether there are more.
    more = tl.load(record + leader, mask=leader < capacity, other=0)
    if DEPENDENT:
        gdc_launch_dependents()
    place = _place_of(row, first, end, base, scale_rows, 1)
    words = scales  # a word is a tile's bytes of one row, zero padding columns included
    if TILE_COLS == 4:
        words = scales.to(tl.pointer_type(tl.int32))
    WORDS: tl.constexpr = 128 if ROWS <= 2 else 32
    at = row
    rounds = 0
    going = rows  # not 0: the first round does not wait for a load
    while going != 0:  # rows of the previous step: these, and beyond this step's rows one in so many
        valid = tl.sum(((base < old) & (old <= base + (end - first))).to(tl.int32), 1, keep_dims=True)
        clear = tl.where((old > 0) & (old <= scale_rows) & (valid == 0), col_tiles, 0)
        scale_row = tl.maximum(old, 1) - 1
        for start in range(0, col_tiles, WORDS):
            word = start + tl.arange(0, WORDS)[None, :]
            offset = scale_offset(scale_row, word * TILE_COLS, col_tiles, LAYOUT) // TILE_COLS
            tl.store(words + offset, 0, mask=word < clear)
        going = more
        at += rows
        rounds += 1
        leader += rows
        readable = tl.where(going != 0, capacity, 0)
        old = tl.load(record + at, mask=inside & (at < readable), other=0)
        more = tl.load(record + leader, mask=leader < readable, other=0)
    tl.debug_barrier()  # every warp has to have read before one of them writes
    tl.store(record + row, tl.where(place > 0, place, -1), mask=inside)
    for turn in range(1, rounds):
        beyond = row + turn * rows
        tl.store(record + beyond, 0, mask=inside & (beyond < capacity))


# One binary for all batch sizes of a tiling: a new one must not compile, least of all during a graph capture.
@triton.jit(
    do_not_specialize=["rows", "capacity", "experts", "cols", "col_tiles", "scale_rows", "parts", "parts_reciprocal"]
)
def _quantize_grouped(
    x,  # bfloat16 or float16 [rows, 16 * cols], SILU: [rows, 32 * cols]
    global_scales,  # float32 [experts]
    x_fp4,  # uint8 [rows, 8 * cols]
    scales,  # uint8 [scale_rows, padded_cols] in LAYOUT
    record,  # int32 [capacity], or None: nothing is cleaned
    expert_offsets, blockscale_offsets,  # int32 [experts + 1]
    valid_rows,  # int32 [1] or None
    row_tokens,  # int32 [rows] or None
    site,  # int64 of a record (triton_nan) or None
    rows, capacity, experts, cols, col_tiles, scale_rows,
    parts,  # of a row, each with a program
    parts_reciprocal,  # for _divide
    LAYOUT: tl.constexpr, HARDWARE_E2M1: tl.constexpr, HARDWARE_E4M3: tl.constexpr,
    EXPERTS: tl.constexpr,  # a power of 2
    TILE_COLS: tl.constexpr, BLOCKS: tl.constexpr, WORDS: tl.constexpr, SILU: tl.constexpr, ARITHMETIC: tl.constexpr,
    ROWS: tl.constexpr,  # that a cleaning program cleans
    DEPENDENT: tl.constexpr,  # launched as a programmatic dependent
):  # fmt: skip
    cleaning = False
    if record is None:
        row = tl.program_id(0)
        part = tl.program_id(1)
    else:
        cleaners = tl.cdiv(rows, ROWS)
        number = tl.program_id(0) - cleaners
        cleaning = number < 0
        row, part = _divide(number, parts, parts_reciprocal)
    if DEPENDENT:
        gdc_wait()  # before the first access to memory: the predecessor may still write x, or read the results
    if record is not None and cleaning:
        _clean(
            scales, record, expert_offsets, blockscale_offsets, rows, capacity, experts, col_tiles, scale_rows,
            LAYOUT, EXPERTS, TILE_COLS, ROWS, DEPENDENT, False,
        )  # fmt: skip
    else:
        col = part * BLOCKS + tl.arange(0, BLOCKS)
        inside = col < cols
        block = (row.to(tl.int64) * cols + col)[:, None]
        if SILU:
            gate, _ = load_blocks(x, block + row.to(tl.int64) * cols, inside, False)
            up, _ = load_blocks(x, block + (row + 1).to(tl.int64) * cols, inside, False)
        else:
            head, tail = load_blocks(x, block, inside, WORDS)
        expert = tl.arange(0, EXPERTS)
        first, end, base = _load_groups(expert_offsets, blockscale_offsets, expert, rows, experts)
        g = tl.load(global_scales + expert, mask=expert < experts, other=0.0)
        valid = row >= 0
        if valid_rows is not None:
            token = row
            if row_tokens is not None:
                token = tl.load(row_tokens + row)
            valid = token < tl.load(valid_rows)
        if DEPENDENT:
            gdc_launch_dependents()
        place = _place_of(row, first, end, base, scale_rows, 0)
        if ARITHMETIC == "exact":
            g = tl.sum(tl.where((first <= row) & (row < end), g, 0.0), 0)
        else:  # its bits, so that -0 stays what it is
            bits = tl.where((first <= row) & (row < end), g.to(tl.int32, bitcast=True), 0)
            g = tl.sum(bits, 0).to(tl.float32, bitcast=True)
        BFLOAT16: tl.constexpr = x.dtype.element_ty == tl.bfloat16
        if site is not None:
            noted = tl.where(valid, place, 0) > 0
            if SILU:
                note_blocks(site, gate, gate, block + row.to(tl.int64) * cols, noted, False, BFLOAT16)
                note_blocks(site, up, up, block + (row + 1).to(tl.int64) * cols, noted, False, BFLOAT16)
            else:
                note_blocks(site, head, tail, block, noted, WORDS, BFLOAT16)
        if SILU:
            head = silu_and_mul(gate, up, BFLOAT16, HARDWARE_E4M3, ARITHMETIC)
            tail = head
        packed, scale_code = encode_blocks(head, tail, g, BFLOAT16, HARDWARE_E2M1, HARDWARE_E4M3, WORDS, ARITHMETIC)
        live = tl.where(valid, place, 0) > 0
        packed = tl.where(live, packed, 0)
        scale_code = tl.where(live, scale_code.to(tl.uint8), 0).to(tl.uint8)
        tl.store(x_fp4 + (block * 8 + tl.arange(0, 8)[None, :]), packed.to(tl.uint8), mask=inside[:, None])
        offset = scale_offset(tl.maximum(place, 1) - 1, col, col_tiles, LAYOUT)
        tl.store(scales + offset, scale_code, mask=col < tl.where(place > 0, cols, 0))


def quantize(
    x: Tensor,
    global_scales: Tensor,
    x_fp4: Tensor,
    scales: Tensor,
    layout: SfLayout,
    record: Tensor | None,
    expert_offsets: Tensor,
    blockscale_offsets: Tensor,
    valid_rows: Tensor | None = None,
    row_tokens: Tensor | None = None,
    silu_and_mul: bool = False,
    arithmetic: str = "exact",
    *,
    nan: Tensor | None = None,
) -> None:
    """Quantize rows grouped by expert, and clear the scales that only the previous step wrote, in one launch.

    Nothing is allocated and nothing synchronizes: it can be captured in a CUDA graph. Nothing beyond ``scales`` is touched,
    whatever the offsets. Arguments as :func:`safealloc.kernels.reference_grouped.quantize`, contiguous.
    ``nan`` is where to record what is not finite in ``x``, as :func:`safealloc.kernels.triton_nan.note` takes it.
    """
    rows, cols = x_fp4.shape[0], 2 * x_fp4.shape[1] // BLOCK_SIZE
    experts = global_scales.shape[0]
    words = not silu_and_mul and rows * cols > FEW_BLOCKS and takes_words(x)
    tiling = tiling_for(rows, cols, words)
    parts = -(-cols // tiling.blocks)
    rows_cleaned = _rows_cleaned(rows * cols, silu_and_mul)
    grid = (rows, parts) if record is None else (-(-rows // rows_cleaned) + rows * parts,)
    options = launch_options(x.device, layout, tiling, silu_and_mul, arithmetic)
    with device_of(x):
        _quantize_grouped[grid](
            x, global_scales, x_fp4, scales, record, expert_offsets, blockscale_offsets, valid_rows, row_tokens, nan,
            rows, 0 if record is None else record.shape[0], experts, cols, scales.shape[1] // layout.tile.cols,
            scales.shape[0], parts, ((1 << 31) - 1) // parts,
            EXPERTS=triton.next_power_of_2(experts), TILE_COLS=layout.tile.cols, ROWS=rows_cleaned, **options,
        )  # fmt: skip


def _rows_cleaned(blocks: int, silu_and_mul: bool) -> int:
    """How many rows a cleaning program takes; ``benchmarks/NOTES.md`` has the numbers.

    As many as leave it no slower than its neighbors; around one wave of these, so many that all fit into it.
    """
    return 16 if silu_and_mul and blocks > FEW_BLOCKS else 4


def clean(
    scales: Tensor,
    layout: SfLayout,
    cols: int,
    record: Tensor,
    expert_offsets: Tensor,
    blockscale_offsets: Tensor,
    rows: int,
) -> None:
    """Clear the scales that only the previous step wrote, and update the record, in one launch.

    Nothing is allocated and nothing synchronizes. Arguments as :func:`safealloc.kernels.reference_grouped.clean`.
    """
    experts = expert_offsets.shape[0] - 1
    dependent = dependent_launch(scales.device)
    with device_of(scales):
        _clean[(-(-rows // _ROWS_CLEANED_ALONE),)](
            scales, record, expert_offsets, blockscale_offsets,
            rows, record.shape[0], experts, scales.shape[1] // layout.tile.cols, scales.shape[0],
            LAYOUT=int(layout), EXPERTS=triton.next_power_of_2(experts), TILE_COLS=layout.tile.cols,
            ROWS=_ROWS_CLEANED_ALONE, DEPENDENT=bool(dependent), WAIT=True,
            num_warps=4, enable_fp_fusion=False, **dependent,
        )  # fmt: skip

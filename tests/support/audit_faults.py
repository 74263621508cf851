"""Faulty producers and consumers with the verdict that the audit must reach, and correct ones that it must accept.

The consumers read memory as hardware does: at an offset from the first byte of the buffer, wherever that ends.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from safealloc import ScaleSpec, SfLayout, mm_fp4
from safealloc.audit.consumers import product
from safealloc.audit.findings import (
    BEYOND,
    DIRTIES,
    LEAVES,
    READS,
    WRONG_DATA,
    WRONG_LAYOUT,
    WRONG_RESULT,
    WRONG_SCALES,
)
from safealloc.formats.format import BLOCK_SIZE, E2M1_MAX, E4M3_MAX, NAN_SCALE
from safealloc.kernels import reference

LARGEST = E2M1_MAX**2 * E4M3_MAX
"""What a padding scale is multiplied by where its data and the weight are as large as they can be."""

SHAPES = ((1, 512), (5, 480), (33, 480), (40, 512), (130, 208))
"""Each fault shows at one of them at least; all have padding in 128x4."""


@dataclass(frozen=True)
class Planted:
    """A producer or a consumer, and what the audit must find.

    Attributes:
        name: what is wrong with it, or right.
        fn: as the audit takes it.
        verdict: what must be found at one shape at least, beside verdicts that are all right; ``None``: it is correct.
        says: what the details at 5 rows must contain.
        layout: what it is told to write or read.
    """

    name: str
    fn: Callable[..., Any]
    verdict: str | None = None
    says: tuple[str, ...] = ()
    layout: SfLayout = SfLayout.layout_128x4


# --- Producers ------------------------------------------------------------------------------------------------------


def _parts(scales: torch.Tensor, layout: SfLayout, rows: int, k: int) -> dict[str, torch.Tensor]:
    """Flat offsets of padding rows, padding columns, and padding rows without their padding columns."""
    padded_rows, padded_cols = layout.padded_shape(rows, k)
    offsets = layout.offsets(padded_rows, padded_cols * BLOCK_SIZE, scales.device)
    cols = k // BLOCK_SIZE
    return {
        "rows": offsets[rows:].flatten(),
        "columns": offsets[:rows, cols:].flatten(),
        "rows without padding columns": offsets[rows:, :cols].flatten(),
    }


def quantize_and_write(
    x, global_scale, x_fp4, scales, layout, *, zero=("rows", "columns"), write=None, byte=0x38, last=False
):
    """The reference, with some padding zeroed and some written."""
    reference.quantize(x, global_scale, x_fp4, scales, layout)
    parts = _parts(scales, layout, *x.shape)
    for part in zero:
        scales.view(-1)[parts[part]] = 0
    if write is not None:
        scales.view(-1)[parts[write][-1:] if last else parts[write]] = byte


def writes_outside(x, global_scale, x_fp4, scales, layout, *, of_data=False, at=0):
    """One byte: ``at`` from behind the buffer's last byte."""
    quantize_and_write(x, global_scale, x_fp4, scales, layout)
    buffer = x_fp4 if of_data else scales
    outside = torch.as_strided(buffer, (1,), (1,), buffer.storage_offset() + buffer.numel() + at)
    outside.fill_(0x38)


def writes_before(x, global_scale, x_fp4, scales, layout):
    writes_outside(x, global_scale, x_fp4, scales, layout, at=-1 - scales.numel())


def writes_other_layout(x, global_scale, x_fp4, scales, layout, *, other):
    """In 8x4 or linear order into a buffer of 128x4, the rest zero."""
    _, linear = reference.encode(x, global_scale.reshape(()))
    quantize_and_write(x, global_scale, x_fp4, scales, layout)
    swizzled = other.swizzle(linear).view(-1)
    scales.zero_().view(-1)[: swizzled.numel()] = swizzled


def off_by(x, global_scale, x_fp4, scales, layout, *, steps):
    """Every third scale some e4m3 values off, as an approximate reciprocal may have one."""
    quantize_and_write(x, global_scale, x_fp4, scales, layout)
    offsets = layout.offsets(*x.shape, x.device).flatten()[::3]
    scales.view(-1)[offsets] -= steps


def forgets_last_row(x, global_scale, x_fp4, scales, layout):
    """Writes its data, but not its scales."""
    kept = scales.clone()
    quantize_and_write(x, global_scale, x_fp4, scales, layout)
    last = layout.offsets(*x.shape, x.device)[-1]
    scales.view(-1)[last] = kept.view(-1)[last]


def swaps_nibbles(x, global_scale, x_fp4, scales, layout):
    quantize_and_write(x, global_scale, x_fp4, scales, layout)
    x_fp4.copy_(x_fp4 << 4 | x_fp4 >> 4)


def allocates(x, global_scale, x_fp4, scales, layout, *, write):
    """Returns buffers of its own, from torch.empty, and passes them on to ``write``."""
    scales = torch.empty(layout.padded_shape(*x.shape), dtype=torch.uint8, device=x.device)
    x_fp4 = torch.empty_like(x_fp4)
    write(x, global_scale, x_fp4, scales, layout)
    return x_fp4, scales.view(torch.float8_e4m3fn)


def _writing(**options: Any) -> Callable[..., Any]:
    return functools.partial(quantize_and_write, **options)


FAULTY_PRODUCERS = (
    Planted(
        "writes valid scales only", reference.quantize, LEAVES, ("padding rows 5-127 left", "padding columns 30-31")
    ),
    Planted(
        "writes valid scales only, 8x4",
        reference.quantize,
        LEAVES,
        ("padding rows 5-7 left", "columns 30-31 left"),
        layout=SfLayout.layout_8x4,
    ),
    Planted(
        "zeroes rows, skips columns", _writing(zero=("rows",)), LEAVES, ("rows 5-127 zeroed", "columns 30-31 left")
    ),
    Planted("zeroes columns only", _writing(zero=("columns",)), LEAVES, ("rows 5-127 left", "columns 30-31 zeroed")),
    Planted(
        "zeroes rows as far as the real columns go",
        _writing(zero=("rows without padding columns", "columns")),
        LEAVES,
        ("padding rows 5-127 left, 246 of 3936 bytes", "columns 30-31 zeroed"),
    ),
    Planted(
        "zeroes rows only, 8x4",
        _writing(zero=("rows",)),
        LEAVES,
        ("rows 5-7 zeroed", "columns 30-31 left"),
        layout=SfLayout.layout_8x4,
    ),
    Planted("writes one byte past its tile", writes_outside, BEYOND, ("1 bytes written outside", "at 4096")),
    Planted(
        "writes one byte past its tile, 8x4",
        writes_outside,
        BEYOND,
        ("1 bytes written outside", "at 256"),
        layout=SfLayout.layout_8x4,
    ),
    Planted("writes one byte past the data", functools.partial(writes_outside, of_data=True), BEYOND, ("of the data",)),
    Planted("writes one byte before its tile", writes_before, BEYOND, ("at -1",)),
    Planted(
        "writes 1.0 into the last padding byte", _writing(write="rows", last=True), DIRTIES, ("first 0x38 at row 127",)
    ),
    Planted(
        "writes NaN into padding columns",
        _writing(write="columns", byte=NAN_SCALE),
        DIRTIES,
        ("0x7F at row 0, column 30",),
    ),
    Planted(
        "quantizes rows below the last",
        _writing(write="rows", byte=0x70),
        DIRTIES,
        ("0x70 at row 5, column 0",),
        layout=SfLayout.layout_8x4,
    ),
    Planted("writes a sentinel into padding", _writing(write="rows", byte=0xA5), DIRTIES, ("first 0xA5 at row 5",)),
    Planted("writes the other sentinel", _writing(write="columns", byte=0x5B), DIRTIES, ("first 0x5B at row 0",)),
    Planted(
        "writes 8x4 for 128x4",
        functools.partial(writes_other_layout, other=SfLayout.layout_8x4),
        WRONG_SCALES,
        ("are in 8x4",),
    ),
    Planted(
        "writes linear for 128x4",
        functools.partial(writes_other_layout, other=SfLayout.layout_linear),
        WRONG_SCALES,
        ("are in linear",),
    ),
    Planted("scales two steps off", functools.partial(off_by, steps=2), WRONG_SCALES, ("row 0, column 0",)),
    Planted("forgets the last row", forgets_last_row, WRONG_SCALES, ("row 4, column 0",)),
    Planted("swaps nibbles", swaps_nibbles, WRONG_DATA, ("more than a step",)),
    Planted(
        "allocates, and leaves padding",
        functools.partial(allocates, write=reference.quantize),
        LEAVES,
        ("rows 5-127 left",),
    ),
    Planted(
        "allocates, and writes a sentinel into padding",
        functools.partial(allocates, write=_writing(write="rows", byte=0x5B)),
        DIRTIES,
        ("first 0x5B at row 5",),
    ),
    Planted(
        "allocates, and writes padding columns",
        functools.partial(allocates, write=_writing(write="columns")),
        DIRTIES,
        ("first 0x38 at row 0, column 30",),
    ),
)

CORRECT_PRODUCERS = (
    *(Planted(f"zeroes all padding, {layout.name}", quantize_and_write, layout=layout) for layout in SfLayout),
    *(
        Planted(f"scales one step off, {layout.name}", functools.partial(off_by, steps=1), layout=layout)
        for layout in (SfLayout.layout_128x4, SfLayout.layout_8x4)
    ),
    *(
        Planted(f"allocates, {layout.name}", functools.partial(allocates, write=quantize_and_write), layout=layout)
        for layout in SfLayout
    ),
)


# --- Consumers ------------------------------------------------------------------------------------------------------


def _memory(scales: torch.Tensor, nbytes: int) -> torch.Tensor:
    """So many bytes from the first one of a buffer on, as a pointer sees them."""
    return torch.as_strided(scales, (nbytes,), (1,), scales.storage_offset())


def _padding_zeroed(scales, layout, rows, k, kinds=("rows", "columns")):
    clean = scales.clone()
    for kind in kinds:
        clean.view(-1)[_parts(clean, layout, rows, k)[kind]] = 0
    return clean


def isolates(a, b, a_descale, b_descale, alpha, layout):
    """Takes padding for zero."""
    rows, k = a.shape[0], 2 * a.shape[1]
    clean = _padding_zeroed(a_descale, layout, rows, k)
    return product(a, b, clean, b_descale, alpha, layout).to(torch.bfloat16)


def reads_as(a, b, a_descale, b_descale, alpha, layout, *, other):
    """Isolates, but in another layout than it was told."""
    memory = _memory(a_descale, other.nbytes(a.shape[0], 2 * a.shape[1]))
    return isolates(a, b, memory.view(other.padded_shape(a.shape[0], 2 * a.shape[1])), b_descale, alpha, other)


def reads_outer_rows_swapped(a, b, a_descale, b_descale, alpha, layout):
    """A 128x4 tile of 16 inner and 8 outer rows: no known layout."""
    rows, k = a.shape[0], 2 * a.shape[1]
    tiles = a_descale.view(-1, 16, 8, 4).transpose(1, 2).reshape(a_descale.shape[0] // 128, -1, 128, 4)
    linear = tiles.transpose(1, 2).reshape(a_descale.shape)[:rows, : k // BLOCK_SIZE]
    return product(a, b, SfLayout.layout_128x4.swizzle(linear.contiguous()), b_descale, alpha, SfLayout.layout_128x4)


def leaks_row(a, b, a_descale, b_descale, alpha, layout, *, into=0):
    """Adds the first scale below the last row to one valid row, as a reduction that runs one row too far does."""
    rows, k = a.shape[0], 2 * a.shape[1]
    out = isolates(a, b, a_descale, b_descale, alpha, layout)
    behind = layout.logical(a_descale, rows, k)[rows:, 0].view(torch.float8_e4m3fn).float()
    if behind.numel():
        out[into] += (behind[0] * LARGEST * alpha).to(out.dtype)
    return out


def leaks_columns(a, b, a_descale, b_descale, alpha, layout):
    """Finite bytes too: it adds padding columns' scales."""
    rows, k = a.shape[0], 2 * a.shape[1]
    out = isolates(a, b, a_descale, b_descale, alpha, layout)
    beside = layout.logical(a_descale, rows, k)[:rows, k // BLOCK_SIZE :].view(torch.float8_e4m3fn).float()
    return out + (beside.sum(1, keepdim=True) * LARGEST * alpha).to(out.dtype)


def nan_rows_spoil_all(a, b, a_descale, b_descale, alpha, layout):
    """Whatever row a NaN is in, as an absolute maximum over the whole tile does."""
    rows, k = a.shape[0], 2 * a.shape[1]
    out = isolates(a, b, a_descale, b_descale, alpha, layout)
    spoilt = layout.logical(a_descale, rows, k)[rows:].view(torch.float8_e4m3fn).float().isnan().any()
    return torch.where(spoilt, torch.nan, out)


def reads_one_row_too_far(a, b, a_descale, b_descale, alpha, layout):
    """The last row gets the scales of the row below it."""
    rows, k = a.shape[0], 2 * a.shape[1]
    logical = layout.logical(a_descale, rows, k)[:, : k // BLOCK_SIZE].contiguous()
    linear = torch.cat((logical[: rows - 1], logical[rows : rows + 1]))
    return product(a, b, layout.swizzle(linear), b_descale, alpha, layout)


def forgets_alpha(a, b, a_descale, b_descale, alpha, layout):
    return isolates(a, b, a_descale, b_descale, None, layout)


def is_noisy(a, b, a_descale, b_descale, alpha, layout):
    """Adds in another order at each call."""
    out = isolates(a, b, a_descale, b_descale, alpha, layout).float()
    order = torch.randint(2, out.shape, device=out.device)
    return out * (1 + 1e-4 * order)


def repairs(a, b, a_descale, b_descale, alpha, layout):
    """Zeroes the padding of the buffer it is given, and multiplies as the hardware does."""
    ScaleSpec(a.shape[0], 2 * a.shape[1], layout).zero_padding(a_descale)
    return product(a, b, a_descale, b_descale, alpha, layout).to(torch.float16)


def through_mm_fp4(a, b, a_descale, b_descale, alpha, layout):
    return mm_fp4(
        a, b, a_descale, b_descale, alpha, use_8x4_sf_layout=layout is SfLayout.layout_8x4, backend="reference"
    )


def _as(other: SfLayout) -> Callable[..., Any]:
    return functools.partial(reads_as, other=other)


FAULTY_CONSUMERS = (
    Planted(
        "leaks a padding row into the first",
        leaks_row,
        READS,
        ("NaN in padding rows changes 1 of 5 rows (0)", "448 in padding rows"),
    ),
    Planted(
        "leaks a padding row into the last, 8x4",
        functools.partial(leaks_row, into=-1),
        READS,
        ("padding rows changes 1 of 5 rows (4)",),
        layout=SfLayout.layout_8x4,
    ),
    Planted(
        "NaN in a padding row spoils all", nan_rows_spoil_all, READS, ("NaN in padding rows changes 5 of 5 rows (0-4)",)
    ),
    Planted(
        "multiplies padding columns as the hardware does",
        product,
        READS,
        ("NaN in padding columns changes 5 of 5 rows",),
    ),
    Planted(
        "multiplies padding columns, 8x4",
        product,
        READS,
        ("NaN in padding columns changes 5 of 5 rows",),
        layout=SfLayout.layout_8x4,
    ),
    Planted("adds padding columns", leaks_columns, READS, ("1.0 in padding columns changes 5 of 5 rows",)),
    Planted(
        "reads 8x4 as 128x4", _as(SfLayout.layout_128x4), WRONG_LAYOUT, ("reads 128x4",), layout=SfLayout.layout_8x4
    ),
    Planted("reads 128x4 as 8x4", _as(SfLayout.layout_8x4), WRONG_LAYOUT, ("reads 8x4",)),
    Planted("reads 128x4 as linear", _as(SfLayout.layout_linear), WRONG_LAYOUT, ("reads linear",)),
    Planted(
        "reads linear as 128x4",
        _as(SfLayout.layout_128x4),
        WRONG_LAYOUT,
        ("reads 128x4",),
        layout=SfLayout.layout_linear,
    ),
    Planted("reads a tile of another order", reads_outer_rows_swapped, WRONG_LAYOUT, ("reads no known layout",)),
    Planted("reads one row too far", reads_one_row_too_far, WRONG_LAYOUT, ("reads no known layout", "row 4, column 0")),
    Planted("forgets alpha", forgets_alpha, WRONG_RESULT, ("with clean padding",)),
)

CORRECT_CONSUMERS = (
    *(Planted(f"isolates, {layout.name}", isolates, layout=layout) for layout in SfLayout),
    *(
        Planted(f"adds in any order, {layout.name}", is_noisy, layout=layout)
        for layout in (SfLayout.layout_128x4, SfLayout.layout_8x4)
    ),
    *(
        Planted(f"zeroes padding itself, {layout.name}", repairs, layout=layout)
        for layout in (SfLayout.layout_128x4, SfLayout.layout_8x4)
    ),
    *(
        Planted(f"mm_fp4, {layout.name}", through_mm_fp4, layout=layout)
        for layout in (SfLayout.layout_128x4, SfLayout.layout_8x4)
    ),
)

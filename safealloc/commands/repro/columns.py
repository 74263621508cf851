"""Padding columns: k whose scale columns are not a multiple of 4, in a buffer that is written and read in one layout."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from safealloc.commands.repro import operands
from safealloc.commands.repro.operands import Section, Weight
from safealloc.formats.format import BLOCK_SIZE, NAN_SCALE
from safealloc.formats.layout import SfLayout, short

N = 64
K = (16, 48, 80, 496, 720)
ROWS = (1, 5, 8, 33)
LAYOUTS = (SfLayout.layout_128x4, SfLayout.layout_8x4)


@dataclass(frozen=True, slots=True)
class ColumnsRow:
    """One shape."""

    rows: int  # of the activation
    k: int  # columns of the activation
    layout: str  # of its scales, written and read
    padding_columns: int  # scale columns beyond k / 16
    nan_rows_stale: int  # rows with NaN, with 0x7F in the padding columns only
    nan_rows_stale_expected: int  # all of them, since the tile multiplies them by zero data and NaN * 0 is NaN
    nan_rows_zeroed: int  # the same call with the padding zeroed
    nan_rows_zeroed_expected: int  # none

    @property
    def as_stated(self) -> bool:
        measured = (self.nan_rows_stale, self.nan_rows_zeroed)
        return measured == (self.nan_rows_stale_expected, self.nan_rows_zeroed_expected)

    def cells(self) -> dict[str, object]:
        shape = {"rows": self.rows, "k": self.k, "layout": self.layout, "padding columns": self.padding_columns}
        stale, zeroed = (f"{count}/{self.rows}" for count in (self.nan_rows_stale, self.nan_rows_zeroed))
        return {**shape, "NaN rows, stale": stale, "NaN rows, zeroed": zeroed}


def columns(device: torch.device, backend: str, seed: int) -> Section:
    """Stale bytes in padding columns, and the same products of "reference" or "triton" once ``mm_fp4`` zeroed them."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for k in K:
        weight = Weight.random(N, k, device, generator)
        for m, layout in itertools.product(ROWS, LAYOUTS):
            rows.append(_row(operands.random_activation(m, k, device, generator), layout, weight, backend))
    stale = f"{sum(row.nan_rows_stale for row in rows)} of {sum(row.rows for row in rows)}"
    text = (
        f"A stale 0x7F in the padding columns alone spoils {stale} rows, at any row count and in both layouts, though "
        f"nothing disagrees here; once the padding is zero (safealloc.mm_fp4 zeroes a buffer that no pool made), "
        f"{sum(row.nan_rows_zeroed for row in rows)}."
    )
    return Section("columns", "Stale bytes in padding columns", backend, text, rows)


def _row(x: Tensor, layout: SfLayout, weight: Weight, backend: str) -> ColumnsRow:
    m, k = x.shape
    x_fp4, scales = operands.quantize(x, layout, backend, weight.alpha)
    stale = scales.masked_fill(_padding_columns(m, k, layout).to(x.device), NAN_SCALE)
    counts = []
    for mode in ("trust", "zero"):  # the second zeroes the padding of `stale` in place
        with operands.foreign_scales(mode):
            counts.append(
                operands.nan_rows(weight.multiply(x_fp4, stale, backend, use_8x4=layout is SfLayout.layout_8x4))
            )
    return ColumnsRow(m, k, short(layout), layout.padded_shape(m, k)[1] - k // BLOCK_SIZE, counts[0], m, counts[1], 0)


def _padding_columns(rows: int, k: int, layout: SfLayout) -> Tensor:
    """Bool, in the shape of the buffer: True in padding columns, of all rows."""
    mask = torch.zeros(layout.padded_shape(rows, k), dtype=torch.uint8)
    mask[:, k // BLOCK_SIZE :] = 1
    return layout.swizzle(mask).bool()

"""Padding columns: k whose scale columns are not a multiple of 4, in a buffer that is written and read in one layout."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from safealloc.commands.repro.operands import (
    Section,
    Weight,
    foreign_scales,
    nan_rows,
    quantize_into,
    random_activation,
    zeroed,
)
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
        return (
            self.nan_rows_stale == self.nan_rows_stale_expected
            and self.nan_rows_zeroed == self.nan_rows_zeroed_expected
        )

    def cells(self) -> dict[str, str]:
        return {
            "rows": str(self.rows),
            "k": str(self.k),
            "layout": self.layout,
            "padding columns": str(self.padding_columns),
            "NaN rows, stale": f"{self.nan_rows_stale}/{self.rows}",
            "NaN rows, zeroed": f"{self.nan_rows_zeroed}/{self.rows}",
        }


def columns(device: torch.device, backend: str, seed: int) -> Section:
    """Stale bytes in padding columns, and the same products once ``mm_fp4`` zeroed them.

    Args:
        device: where it is computed.
        backend: "reference" or "triton".
        seed: of the operands.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for k in K:
        weight = Weight.random(N, k, device, generator)
        for m, layout in itertools.product(ROWS, LAYOUTS):
            x = random_activation(m, k, device, generator)
            rows.append(_row(x, layout, weight, backend))
    stale = f"{sum(row.nan_rows_stale for row in rows)} of {sum(row.rows for row in rows)}"
    text = (
        f"A stale 0x7F in the padding columns alone spoils {stale} rows, at any row count and in both layouts, though "
        f"nothing disagrees here; once the padding is zero (safealloc.mm_fp4 zeroes a buffer that no pool made), "
        f"{sum(row.nan_rows_zeroed for row in rows)}."
    )
    return Section("columns", "Stale bytes in padding columns", backend, text, rows)


def _row(x: Tensor, layout: SfLayout, weight: Weight, backend: str) -> ColumnsRow:
    m, k = x.shape
    scales = zeroed(m, k, layout, x.device)
    x_fp4, _ = quantize_into(x, scales, layout, backend, torch.ones(1, device=x.device))
    stale = scales.masked_fill(_padding_columns(m, k, layout).to(x.device), NAN_SCALE)
    counts = []
    for mode in ("trust", "zero"):  # the second zeroes the padding of `stale` in place
        with foreign_scales(mode):
            counts.append(nan_rows(weight.multiply(x_fp4, stale, backend, use_8x4=layout is SfLayout.layout_8x4)))
    return ColumnsRow(m, k, short(layout), layout.padded_shape(m, k)[1] - k // BLOCK_SIZE, counts[0], m, counts[1], 0)


def _padding_columns(rows: int, k: int, layout: SfLayout) -> Tensor:
    """Bool, in the shape of the buffer: True in padding columns, of all rows."""
    mask = torch.zeros(layout.padded_shape(rows, k), dtype=torch.uint8)
    mask[:, k // BLOCK_SIZE :] = 1
    return layout.swizzle(mask).bool()

"""vLLM issue 37563, step by step: where its NaN come from, and what is still wrong once the padding is zero.

The published script pads an activation to 128 rows, quantizes it twice with different padding, treats the scale bytes that
differ as padding, poisons them with 0x7F and multiplies. What it quantizes has 128 rows, so the scales are in layout_128x4;
the layout that it tells the GEMM depends on the number of rows before padding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from safealloc.commands.repro import operands
from safealloc.commands.repro.operands import Section, Weight
from safealloc.formats.format import BLOCK_SIZE, NAN_SCALE
from safealloc.formats.layout import MAX_ROWS_8X4, SfLayout, short

K, N, PADDED_ROWS = 512, 256, 128
ROWS = (1, 2, 4, 8, 16, 32, 64)
BACKENDS = ("cutlass", "trtllm")
OTHER_PADDING = 448.0
"""What the padding rows hold the second time: each of their scales differs from that of zeros."""

PUBLISHED_NAN_ROWS = {
    "cutlass": {1: 0, 2: 0, 4: 0, 8: 0, 16: 0, 32: 0, 64: 0},
    "trtllm": {1: 1, 2: 2, 4: 4, 8: 8, 16: 14, 32: 24, 64: 0},
}
"""Rows with NaN among the m rows that are not padding, as in the issue; compared with, never used."""


def layout_read(backend: str, rows: int) -> SfLayout:
    """The layout that vLLM makes the backend read: 8x4 for trtllm up to 32 rows (``flashinfer_scaled_fp4_mm``)."""
    return SfLayout.layout_8x4 if backend == "trtllm" and rows <= MAX_ROWS_8X4 else SfLayout.layout_128x4


@dataclass(frozen=True, slots=True)
class PublishedRow:
    """One row of the published table."""

    m: int  # rows that are not padding
    backend: str  # of the published run; it decides only the layout that is read
    layout_written: str  # of the scales
    layout_read: str  # of the scales
    padding_bytes: int  # scale bytes that the comparison found to be padding
    padding_bytes_expected: int  # those of the 128 - m padding rows
    nan_rows: int  # of the m rows, with 0x7F in the padding
    published_nan_rows: int  # the same, as published
    # largest change of an output of the m rows, with 1.0 in the padding instead of the original 0
    max_diff_finite: float
    # largest error of an output of the m rows, with zero in the padding, against the exact product
    max_diff_zeroed: float
    largest_correct: float  # largest magnitude of the exact product, to compare the errors with

    @property
    def as_stated(self) -> bool:
        """The NaN counts are the published ones, and numbers are wrong exactly where the layouts disagree."""
        disagree = self.layout_written != self.layout_read
        return (
            self.nan_rows == self.published_nan_rows
            and self.padding_bytes == self.padding_bytes_expected
            and (self.max_diff_finite != 0) == disagree
            and (self.max_diff_zeroed != 0) == disagree
        )

    def cells(self) -> dict[str, object]:
        call = {"m": self.m, "backend": self.backend, "written": self.layout_written, "read": self.layout_read}
        nan = {"NaN rows": f"{self.nan_rows}/{self.m}", "issue": f"{self.published_nan_rows}/{self.m}"}
        errors = {"diff, pad 1.0": f"{self.max_diff_finite:g}", "error, pad 0": f"{self.max_diff_zeroed:g}"}
        return {**call, **nan, **errors, "largest correct": f"{self.largest_correct:g}"}


def published(device: torch.device, backend: str, seed: int) -> Section:
    """The published table, computed by backend "reference" or "triton", which read scales where the layout says."""
    generator = torch.Generator().manual_seed(seed)
    weight = Weight.random(N, K, device, generator)
    rows = []
    for m in ROWS:
        x = operands.random_activation(m, K, device, generator)
        rows += [_row(x, name, weight, backend) for name in BACKENDS]
    rows.sort(key=lambda row: (BACKENDS.index(row.backend), row.m))
    return Section("published", "vLLM issue 37563, again", backend, _text(rows), rows)


def _row(x: Tensor, name: str, weight: Weight, backend: str) -> PublishedRow:
    m = x.shape[0]
    written, read = SfLayout.layout_128x4, layout_read(name, m)
    padding_rows = (0, 0, 0, PADDED_ROWS - m)
    x_fp4, original = operands.quantize(pad(x, padding_rows), written, backend, weight.alpha)
    _, other = operands.quantize(pad(x, padding_rows, value=OTHER_PADDING), written, backend, weight.alpha)
    padding = original != other

    def multiply(scales: Tensor, told: SfLayout) -> Tensor:
        return weight.multiply(x_fp4, scales, backend, use_8x4=told is SfLayout.layout_8x4)[:m]

    with operands.foreign_scales("trust"):
        exact = multiply(original, written)
        unpoisoned = multiply(original, read)
        poisoned, finite, zeroed = (
            multiply(original.masked_fill(padding, byte), read) for byte in (NAN_SCALE, operands.ONE, 0)
        )
    return PublishedRow(
        m=m,
        backend=name,
        layout_written=short(written),
        layout_read=short(read),
        padding_bytes=int(padding.sum()),
        padding_bytes_expected=(PADDED_ROWS - m) * (K // BLOCK_SIZE),
        nan_rows=operands.nan_rows(poisoned),
        published_nan_rows=PUBLISHED_NAN_ROWS[name][m],
        max_diff_finite=operands.max_diff(finite, unpoisoned),
        max_diff_zeroed=operands.max_diff(zeroed, exact),
        largest_correct=float(exact.float().abs().max()),
    )


def _text(rows: list[PublishedRow]) -> str:
    disagree = [row for row in rows if row.layout_written != row.layout_read]
    agree = [row for row in rows if row.layout_written == row.layout_read]
    worst = max(disagree, key=lambda row: row.max_diff_zeroed)
    return (
        f"The layouts disagree: {worst.backend} reads in {worst.layout_read} up to m = {max(row.m for row in disagree)} what "
        f"was written in {worst.layout_written}, and poisoned padding spoils {sum(row.nan_rows for row in disagree)} of "
        f"{sum(row.m for row in disagree)} rows; where they agree, {sum(row.nan_rows for row in agree)} of "
        f"{sum(row.m for row in agree)}. Zeroing the padding alone leaves wrong numbers: finite, and off by "
        f"{min(row.max_diff_zeroed for row in disagree):g} to {worst.max_diff_zeroed:g} where the largest correct output is "
        f"{min(row.largest_correct for row in disagree):g} to {max(row.largest_correct for row in disagree):g}."
    )

"""The calls of the other sections through safealloc: scales from a pool, in the layout that is read."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from safealloc import LayoutMismatchError, ScalePool, nvfp4_quantize
from safealloc.commands.repro import columns, operands
from safealloc.commands.repro.operands import Section, Weight
from safealloc.commands.repro.published import BACKENDS, PADDED_ROWS, ROWS, K, N, layout_read
from safealloc.formats.layout import SfLayout, short
from safealloc.kernels import reference
from safealloc.ops.backends import GEMMS, Call

COLUMNS_K = (48, 496)
COLUMNS_ROWS = (1, 33)
ROUNDING = 2.0**-8
"""Half a step of bfloat16, relative to the value: how far a correct float32 product may be off after rounding."""


@dataclass(frozen=True, slots=True)
class SafeallocRow:
    """One call."""

    section: str  # whose row this is again
    backend: str  # of the published run, or "-"
    m: int  # rows of the activation
    k: int  # columns of the activation
    layout: str  # written, and read without a flag
    nan_rows: int  # of the m rows. The buffer's valid scales were 0x7F before this call: it served a matrix of NaN
    bitwise_equal: bool  # to the same GEMM over a fresh zeroed buffer with the same valid scales
    max_error: float  # of an output, against the float32 product of the dequantized operands
    largest_correct: float  # largest magnitude of that product
    # the call with the contradicting flag raised LayoutMismatchError, and so did the published call (the
    # scales of the matrix padded to 128 rows, told 8x4)
    refused: bool

    @property
    def as_stated(self) -> bool:
        # Twice the rounding: the order of the float32 sum can move a value over one rounding boundary.
        correct = self.max_error <= 2 * ROUNDING * self.largest_correct
        return self.nan_rows == 0 and self.bitwise_equal and correct and self.refused

    def cells(self) -> dict[str, object]:
        backend = self.backend if self.section == "published" else self.section
        call = {"backend": backend, "m": self.m, "k": self.k, "layout": self.layout}
        equal = {"NaN rows": f"{self.nan_rows}/{self.m}", "bitwise equal": self.bitwise_equal}
        return {**call, **equal, "max error": f"{self.max_error:.2g}", "refused": self.refused}


def through_pool(device: torch.device, backend: str, quantizer: str, seed: int) -> Section:
    """The published rows and some with padding columns, through a pool and any GEMM; our quantizers only."""
    generator = torch.Generator().manual_seed(seed)
    calls = {(N, K): [("published", name, m, layout_read(name, m)) for name, m in itertools.product(BACKENDS, ROWS)]}
    if GEMMS[backend].package is None:  # FlashInfer's take k in whole tiles
        shapes = [("columns", "-", m, layout) for m, layout in itertools.product(COLUMNS_ROWS, columns.LAYOUTS)]
        calls |= {(columns.N, k): shapes for k in COLUMNS_K}
    rows, refusals = [], []
    with ScalePool(device) as pool:
        for (n, k), of_one_weight in calls.items():
            weight = Weight.random(n, k, device, generator)
            for section, name, m, layout in of_one_weight:
                x = operands.random_activation(m, k, device, generator)
                if refusal := GEMMS[backend].refusal(Call(device, layout, torch.bfloat16)):
                    refusals.append(refusal)
                else:
                    rows.append(_row(section, name, x, layout, weight, backend, quantizer, pool))
    return Section("safealloc", "The same calls through safealloc", backend, _text(rows, refusals), rows)


def _row(
    section: str, name: str, x: Tensor, layout: SfLayout, weight: Weight, backend: str, quantizer: str, pool: ScalePool
) -> SafeallocRow:
    def quantize(x: Tensor, layout: SfLayout = layout) -> tuple[Tensor, Tensor]:
        return nvfp4_quantize(x, weight.alpha, layout=layout, pool=pool, backend=quantizer)

    def refuses(x_fp4: Tensor, scales: Tensor, *, use_8x4: bool) -> bool:
        try:
            given.multiply(x_fp4, scales, backend, use_8x4=use_8x4)
        except LayoutMismatchError:
            return True
        return False

    m, k = x.shape
    given = weight.shuffled() if backend == "trtllm" else weight
    quantize(torch.full_like(x, float("nan")))  # the buffer comes back with 0x7F where scales were
    x_fp4, scales = quantize(x)
    y = given.multiply(x_fp4, scales, backend, use_8x4=None)

    fresh = torch.zeros_like(scales)
    offsets = layout.offsets(m, k, x.device)
    fresh.view(-1)[offsets] = scales.view(-1)[offsets]
    use_8x4 = layout is SfLayout.layout_8x4
    with operands.foreign_scales("trust"):
        same = given.multiply(x_fp4, fresh, backend, use_8x4=use_8x4)

    dense = reference.dequantize(weight.fp4, weight.scales, SfLayout.layout_128x4)
    exact = reference.dequantize(x_fp4, fresh, layout) @ dense.T
    refused = refuses(x_fp4, scales, use_8x4=not use_8x4)
    if section == "published" and use_8x4:
        padded = quantize(pad(x, (0, 0, 0, PADDED_ROWS - m)), SfLayout.layout_128x4)
        refused &= refuses(*padded, use_8x4=True)
    bitwise_equal = torch.equal(y.view(torch.int16), same.view(torch.int16))
    errors = operands.max_diff(y, exact), float(exact.abs().max())
    return SafeallocRow(section, name, m, k, short(layout), operands.nan_rows(y), bitwise_equal, *errors, refused)


def _text(rows: list[SafeallocRow], refusals: list[str]) -> str:
    text = (
        f"Scales from a pool: {sum(row.nan_rows for row in rows)} of {sum(row.m for row in rows)} rows have NaN, "
        f"{sum(row.bitwise_equal for row in rows)} of {len(rows)} products equal the same GEMM over a fresh zeroed buffer "
        f"bit for bit, and {sum(row.refused for row in rows)} of {len(rows)} calls that contradict their buffer's layout, "
        "the published one among them, are refused with LayoutMismatchError."
    )
    if refusals:
        text += f" Not run: {len(refusals)} rows, since this backend refuses them ({refusals[0]})."
    return text

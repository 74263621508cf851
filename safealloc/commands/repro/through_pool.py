"""The calls of the other sections through safealloc: scales from a pool, in the layout that is read."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from safealloc import LayoutMismatchError, ScalePool, nvfp4_quantize
from safealloc.commands.repro import columns
from safealloc.commands.repro.operands import (
    Section,
    Weight,
    foreign_scales,
    max_diff,
    nan_rows,
    random_activation,
    zeroed,
)
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

    def cells(self) -> dict[str, str]:
        return {
            "backend": self.backend if self.section == "published" else self.section,
            "m": str(self.m),
            "k": str(self.k),
            "layout": self.layout,
            "NaN rows": f"{self.nan_rows}/{self.m}",
            "bitwise equal": "yes" if self.bitwise_equal else "NO",
            "max error": f"{self.max_error:.2g}",
            "refused": "yes" if self.refused else "NO",
        }


def through_pool(device: torch.device, backend: str, quantizer: str, seed: int) -> Section:
    """The published rows and some with padding columns, through a pool.

    Args:
        device: where it is computed.
        backend: of the GEMM: "reference", "triton" or one of FlashInfer's.
        quantizer: "reference" or "triton".
        seed: of the operands.
    """
    generator = torch.Generator().manual_seed(seed)
    cases: list[tuple[str, str, Tensor, SfLayout, Weight]] = []
    weight = Weight.random(N, K, device, generator)
    for name, m in itertools.product(BACKENDS, ROWS):
        x = random_activation(m, K, device, generator)
        cases.append(("published", name, x, layout_read(name, m), weight))
    if GEMMS[backend].package is None:  # FlashInfer's take k in whole tiles
        for k in COLUMNS_K:
            weight = Weight.random(columns.N, k, device, generator)
            for m, layout in itertools.product(COLUMNS_ROWS, columns.LAYOUTS):
                cases.append(("columns", "-", random_activation(m, k, device, generator), layout, weight))
    rows, refusals = [], []
    with ScalePool(device) as pool:
        for section, name, x, layout, weight in cases:
            refusal = GEMMS[backend].refusal(Call(device, layout, torch.bfloat16))
            if refusal is None:
                rows.append(_row(section, name, x, layout, weight, backend, quantizer, pool))
            else:
                refusals.append(refusal)
    return Section("safealloc", "The same calls through safealloc", backend, _text(rows, refusals), rows)


def _row(
    section: str, name: str, x: Tensor, layout: SfLayout, weight: Weight, backend: str, quantizer: str, pool: ScalePool
) -> SafeallocRow:
    m, k = x.shape
    global_scale = torch.ones(1, device=x.device)

    def quantize(x: Tensor, layout: SfLayout = layout) -> tuple[Tensor, Tensor]:
        return nvfp4_quantize(x, global_scale, layout=layout, pool=pool, backend=quantizer)

    given = weight.shuffled() if backend == "trtllm" else weight
    quantize(torch.full_like(x, float("nan")))  # the buffer comes back with 0x7F where scales were
    x_fp4, scales = quantize(x)
    y = given.multiply(x_fp4, scales, backend, use_8x4=None)

    fresh = zeroed(m, k, layout, x.device)
    offsets = layout.offsets(m, k, x.device)
    fresh.view(-1)[offsets] = scales.view(-1)[offsets]
    use_8x4 = layout is SfLayout.layout_8x4
    with foreign_scales("trust"):
        same = given.multiply(x_fp4, fresh, backend, use_8x4=use_8x4)

    dense = reference.dequantize(weight.fp4, weight.scales, SfLayout.layout_128x4)
    exact = reference.dequantize(x_fp4, fresh, layout) @ dense.T
    refused = _refuses(lambda: given.multiply(x_fp4, scales, backend, use_8x4=not use_8x4))
    if section == "published" and use_8x4:
        padded = x.new_zeros(PADDED_ROWS, k)
        padded[:m] = x
        padded_fp4, padded_scales = quantize(padded, SfLayout.layout_128x4)
        refused &= _refuses(lambda: given.multiply(padded_fp4, padded_scales, backend, use_8x4=True))
    return SafeallocRow(
        section=section,
        backend=name,
        m=m,
        k=k,
        layout=short(layout),
        nan_rows=nan_rows(y),
        bitwise_equal=torch.equal(y.view(torch.int16), same.view(torch.int16)),
        max_error=max_diff(y, exact),
        largest_correct=float(exact.abs().max()),
        refused=refused,
    )


def _refuses(call: Callable[[], Tensor]) -> bool:
    with contextlib.suppress(LayoutMismatchError):
        call()
        return False
    return True


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

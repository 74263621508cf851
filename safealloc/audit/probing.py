"""At which offset a GEMM reads each scale, and so in which layout, recovered from its outputs alone.

All data is 1.0, and row ``j`` of the weight is 1.0 at one place of scale block ``j`` and zero elsewhere, so that output
``(row, j)`` is the scale that the GEMM read for ``(row, j)``. The scale bytes spell out their own offsets, one digit a run,
with e4m3 values as digits, which are exact in bfloat16 and float16. A few runs tell the offset of every valid scale, where
changing one byte at a time would take one run for each byte.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from safealloc.formats.format import BLOCK_SIZE, NAN_SCALE
from safealloc.formats.layout import SfLayout, short

Consumer = Callable[..., Tensor]
"""``fn(a, b, a_descale, b_descale, alpha, layout) -> out``; see :func:`safealloc.audit.audit_consumer`."""

ALPHABET = tuple(range(0x08, NAN_SCALE))
"""Bytes of all normal positive e4m3 values, 2**-6 to 448."""

ONE = 0x38
"""1.0 as e4m3."""


@dataclass(frozen=True, slots=True)
class Probe:
    """Where scales were read.

    Attributes:
        layout: what the GEMM was told.
        offsets: int64 ``[rows, k // 16]``: the byte it read for each scale, or -1 where the output is not one scale.
        reads: layouts with these offsets; more than one where the shape does not tell them apart, and there may be none.
    """

    layout: SfLayout
    offsets: Tensor
    reads: tuple[SfLayout, ...]

    def __str__(self) -> str:
        """In words, with an example where it is not what was asked for."""
        if self.layout in self.reads:
            return f"reads {short(self.layout)}"
        rows, cols = self.offsets.shape
        expected = self.layout.offsets(rows, cols * BLOCK_SIZE)
        row, column = (int(index) for index in (self.offsets != expected).nonzero()[0])
        byte = int(self.offsets[row, column])
        read = "no single byte" if byte < 0 else f"byte {byte}"
        named = " or ".join(short(layout) for layout in self.reads) or "no known layout"
        return (
            f"reads {named}: it takes {read} for row {row}, column {column}; in {short(self.layout)} that scale is byte "
            f"{int(expected[row, column])}"
        )


def probe(
    fn: Consumer, layout: SfLayout, rows: int, k: int, device: torch.device, *, alphabet: Sequence[int] = ALPHABET
) -> Probe:
    """Recover where a GEMM reads its activation's scales.

    Args:
        fn: the GEMM.
        layout: what it is told.
        rows, k: of the activation.
        device: of the tensors.
        alphabet: the digits, at least 2 bytes of distinct normal e4m3 values; the more, the fewer runs.
    """
    a, b, b_descale, alpha = _operands(rows, k, device)
    numbers = torch.arange(max(other.nbytes(rows, k) for other in SfLayout))
    valid = torch.zeros_like(numbers, dtype=torch.bool)
    valid[layout.offsets(rows, k)] = True
    offsets = torch.empty(0)
    for only_valid in (False, True):  # padding that leaks into an output hides what was read, so try again with it zero
        decoded = torch.zeros(rows, k // BLOCK_SIZE, dtype=torch.int64)
        unknown = torch.zeros_like(decoded, dtype=torch.bool)
        step = 1
        while step < len(numbers):
            digits = torch.tensor(alphabet, dtype=torch.uint8)[numbers // step % len(alphabet)]
            memory = torch.where(valid, digits, 0) if only_valid else digits
            out = fn(a.clone(), b, scales_in(memory.to(device), layout, rows, k), b_descale, alpha, layout)
            digit = _digits(out[:, : k // BLOCK_SIZE].float().cpu(), alphabet)
            unknown |= digit < 0
            decoded += digit * step
            step *= len(alphabet)
        decoded[unknown] = -1
        offsets = offsets if only_valid else decoded
        candidates = (layout,) if only_valid else tuple(SfLayout)
        reads = tuple(other for other in candidates if torch.equal(other.offsets(rows, k), decoded))
        if reads:
            return Probe(layout, decoded, reads)
    return Probe(layout, offsets, ())


def scales_in(memory: Tensor, layout: SfLayout, rows: int, k: int) -> Tensor:
    """The start of flat ``memory`` as a scale buffer; a GEMM that reads beyond it finds the rest."""
    return memory[: layout.nbytes(rows, k)].view(layout.padded_shape(rows, k))


def _digits(values: Tensor, alphabet: Sequence[int]) -> Tensor:
    """Index into the alphabet of each value, -1 where it is none of them."""
    known = torch.tensor(alphabet, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    equal = (values[..., None] - known).abs() <= known / 64  # neighbors are 1/15 or more apart
    return torch.where(equal.any(-1), equal.int().argmax(-1), -1)


def _operands(rows: int, k: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    cols = k // BLOCK_SIZE
    n = -(-cols // 128) * 128  # what every vendor's GEMM takes
    a = torch.full((rows, k // 2), 0x22, dtype=torch.uint8, device=device)
    b = torch.zeros((n, k // 2), dtype=torch.uint8)
    block = torch.arange(cols)
    b[block, block * (BLOCK_SIZE // 2)] = 0x02
    scales = SfLayout.layout_128x4.swizzle(torch.full((n, cols), ONE, dtype=torch.uint8))
    return a, b.to(device).T, scales.to(device).T, torch.ones(1, device=device)

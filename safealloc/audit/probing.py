"""At which offset a GEMM reads each scale, and so in which layout and format, recovered from its outputs alone.

All data is 1.0, and row ``j`` of the weight is 1.0 at one place of scale block ``j`` and zero elsewhere, so that output
``(row, j)`` is the scale that the GEMM read for ``(row, j)``. The scale bytes spell out their own offsets, one digit a run,
with values as digits that are exact in bfloat16 and float16. A few runs tell the offset of every valid scale, where changing
one byte at a time would take one run for each byte.

A GEMM of FP4 that takes NVFP4 scales for MXFP4 scales, or the reverse, is looked for with bytes that are digits in both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from safealloc.formats.format import NAN_SCALE, ScaleFormat
from safealloc.formats.layout import SfLayout, short

Consumer = Callable[..., Tensor]
"""``fn(a, b, a_descale, b_descale, alpha, layout) -> out``, of MX without alpha; :func:`safealloc.audit.audit_consumer`."""

ALPHABET = tuple(range(0x08, NAN_SCALE))
"""Bytes of all normal positive e4m3 values, 2**-6 to 448."""

MX_ALPHABET = tuple(range(127 - 14, 127 + 16))
"""Bytes of the e8m0 values that are normal in float16, 2**-14 to 2**15."""

_BOTH = (*range(0x71, NAN_SCALE), *range(0x88, 0x8F))  # normal as e4m3, and within 2**16 of 1.0 as e8m0
_ONE = {ScaleFormat.nvfp4: 0x38, ScaleFormat.mxfp8: 0x7F, ScaleFormat.mxfp4: 0x7F}
_IN_BOTH = 0x7E  # 448 as e4m3, 0.5 as e8m0, whose 1.0 is NaN as e4m3
_MISTAKEN = {ScaleFormat.nvfp4: ScaleFormat.mxfp4, ScaleFormat.mxfp4: ScaleFormat.nvfp4}


@dataclass(frozen=True, slots=True)
class Probe:
    """Where scales were read.

    Attributes:
        layout: what the GEMM was told.
        offsets: int64 ``[rows, k // format.block_size]``: the byte it read for each scale, or -1 where the output is not one
            scale.
        reads: layouts with these offsets; more than one where the shape does not tell them apart, and there may be none.
        format: what the GEMM was told.
        read_format: what it takes the scales for; ``None`` where no layout was recognized.
    """

    layout: SfLayout
    offsets: Tensor
    reads: tuple[SfLayout, ...]
    format: ScaleFormat = ScaleFormat.nvfp4
    read_format: ScaleFormat | None = None

    @property
    def as_told(self) -> bool:
        """Whether layout and format are what the GEMM was told."""
        return self.layout in self.reads and self.read_format is self.format

    def __str__(self) -> str:
        """In words, with an example where it is not what was asked for."""
        told = short(self.layout)
        if self.as_told:
            return f"reads {told}"
        rows, cols = self.offsets.shape
        expected = self.layout.offsets(rows, cols * self.format.block_size, format=self.format)
        differs = self.offsets != expected
        row, column = (int(index) for index in differs.nonzero()[0]) if bool(differs.any()) else (0, 0)
        byte = int(self.offsets[row, column])
        read = "no single byte" if byte < 0 else f"byte {byte}"
        named = " or ".join(map(short, self.reads)) or "no known layout"
        if self.read_format not in (None, self.format):
            named += f" as {self.read_format.name.upper()} scales of {self.read_format.block_size} columns each"
            told += f" of {self.format.name.upper()}"
        return (
            f"reads {named}: it takes {read} for row {row}, column {column}; in {told} that scale is byte "
            f"{int(expected[row, column])}"
        )


def probe(
    fn: Consumer,
    layout: SfLayout,
    rows: int,
    k: int,
    device: torch.device,
    *,
    alphabet: Sequence[int] | None = None,
    format: ScaleFormat = ScaleFormat.nvfp4,
) -> Probe:
    """Recover where a GEMM reads its activation's scales.

    Args:
        fn: the GEMM.
        layout, format: what it is told.
        rows, k: of the activation.
        device: of the tensors.
        alphabet: the digits, at least 2 bytes of distinct normal scales; the more, the fewer runs. ``None`` is
            ``ALPHABET``, of MX ``MX_ALPHABET``.
    """
    if alphabet is None:
        alphabet = ALPHABET if format is ScaleFormat.nvfp4 else MX_ALPHABET
    numbers = torch.arange(room(rows, k, format))
    expected = layout.offsets(rows, k, format=format)
    valid = torch.zeros_like(numbers, dtype=torch.bool)
    valid[expected] = True

    def decode(digits_of: Sequence[int], read: ScaleFormat, weight_byte: int, only_valid: bool) -> Tensor:
        """The byte that was read for each scale, if the GEMM reads this format."""
        a, b, b_descale = _operands(rows, k, device, format, weight_byte)
        values = torch.tensor(digits_of, dtype=torch.uint8).view(read.dtype).float()
        values *= float(torch.tensor([weight_byte], dtype=torch.uint8).view(read.dtype).float())
        decoded, step = torch.zeros_like(expected), 1
        unknown = torch.zeros_like(decoded, dtype=torch.bool)
        while step < len(numbers):
            digits = torch.tensor(digits_of, dtype=torch.uint8)[numbers // step % len(digits_of)]
            memory = (torch.where(valid, digits, 0) if only_valid else digits).to(device)
            scales = scales_in(memory, layout, rows, k, format)
            out = call(fn, a.clone(), b, scales, b_descale, torch.ones(1, device=device), layout, format)
            digit = _digits(out[:, : expected.shape[1]].float().cpu(), values)
            unknown |= digit < 0
            decoded += digit * step
            step *= len(digits_of)
        decoded[unknown] = -1
        return decoded

    first = decode(alphabet, format, _ONE[format], False)
    if reads := tuple(other for other in SfLayout if torch.equal(other.offsets(rows, k, format=format), first)):
        return Probe(layout, first, reads, format, format)
    # Padding that leaks into an output hides what was read, so try again with it zero.
    if torch.equal(decode(alphabet, format, _ONE[format], True), expected):
        return Probe(layout, expected, (layout,), format, format)
    mistaken = _MISTAKEN.get(format)
    if mistaken is not None and k % mistaken.block_size == 0:
        columns = torch.arange(expected.shape[1]) * format.block_size // mistaken.block_size
        found = decode(_BOTH, mistaken, _IN_BOTH, False)
        offsets = {other: other.offsets(rows, k, format=mistaken)[:, columns] for other in SfLayout}
        if reads := tuple(other for other in SfLayout if torch.equal(offsets[other], found)):
            return Probe(layout, found, reads, format, mistaken)
    return Probe(layout, first, (), format)


def call(
    fn: Consumer,
    a: Tensor,
    b: Tensor,
    a_descale: Tensor,
    b_descale: Tensor,
    alpha: Tensor | None,
    layout: SfLayout,
    format: ScaleFormat,
) -> Tensor:
    """A consumer's product; those of MX take no alpha."""
    return fn(a, b, a_descale, b_descale, *([alpha] if format is ScaleFormat.nvfp4 else []), layout)


def room(rows: int, k: int, format: ScaleFormat) -> int:
    """Bytes of the largest scales that a GEMM may take the scales of such a matrix for."""
    formats = {format, _MISTAKEN.get(format, format)}
    return max(layout.nbytes(rows, k, format=one) for one in formats if k % one.block_size == 0 for layout in SfLayout)


def scales_in(memory: Tensor, layout: SfLayout, rows: int, k: int, format: ScaleFormat = ScaleFormat.nvfp4) -> Tensor:
    """The start of flat ``memory`` as a scale buffer; a GEMM that reads beyond it finds the rest."""
    return memory[: layout.nbytes(rows, k, format=format)].view(layout.padded_shape(rows, k, format=format))


def for_gemm(scales: Tensor, format: ScaleFormat) -> Tensor:
    """A weight's scales as the library's call takes them: of FP4 transposed."""
    return scales if format is ScaleFormat.mxfp8 else scales.T


def data_for_gemm(data: Tensor, format: ScaleFormat) -> Tensor:
    """Quantized bytes in the dtype that the library's call takes."""
    return data.view(torch.float8_e4m3fn) if format is ScaleFormat.mxfp8 else data


def _digits(values: Tensor, known: Tensor) -> Tensor:
    """Index into the known values of each value, -1 where it is none of them."""
    equal = (values[..., None] - known).abs() <= known.abs() / 64  # neighbors are 1/15 or more apart
    return torch.where(equal.any(-1), equal.int().argmax(-1), -1)


def _operands(
    rows: int, k: int, device: torch.device, format: ScaleFormat, weight_byte: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Activation, weight and the weight's scales, which are all this byte."""
    cols = k // format.block_size
    n = -(-cols // 128) * 128  # what every vendor's GEMM takes
    one, two_ones = (0x38, 0x38) if format is ScaleFormat.mxfp8 else (0x02, 0x22)
    a = torch.full(format.data_shape(rows, k), two_ones, dtype=torch.uint8, device=device)
    b = torch.zeros(format.data_shape(n, k), dtype=torch.uint8)
    block = torch.arange(cols)
    b[block, block * (format.block_size // format.values_per_byte)] = one
    memory = torch.full((room(n, k, format),), weight_byte, dtype=torch.uint8, device=device)
    scales = scales_in(memory, SfLayout.layout_128x4, n, k, format)
    return data_for_gemm(a, format), data_for_gemm(b.to(device), format).T, for_gemm(scales, format)

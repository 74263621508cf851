"""Is padding zero, and if not, where?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from safealloc.layout import BLOCK_SIZE, ScaleSpec


@dataclass(frozen=True, slots=True)
class Corruption:
    """A buffer whose padding is not zero.

    Attributes:
        spec: shape and layout of the buffer.
        address: device address of its first byte.
        row, column: the first byte that is not zero, in scale rows and columns of the padded matrix.
        value: that byte.
        count: how many padding bytes are not zero.
    """

    spec: ScaleSpec
    address: int
    row: int
    column: int
    value: int
    count: int

    def __str__(self) -> str:
        return (
            f"buffer at 0x{self.address:x} ({self.spec}): {self.count} padding bytes are not zero, first 0x{self.value:02X} "
            f"at scale row {self.row}, column {self.column}"
        )


def find_corruptions(buffers: Sequence[tuple[ScaleSpec, Tensor]]) -> list[Corruption]:
    """The buffers whose padding is not zero; one synchronisation if all is well.

    Args:
        buffers: specs and contiguous uint8 ``[padded_rows, padded_cols]`` buffers of one device.
    """
    dirty = [
        torch.stack([padding.any() for padding in views]).any()
        for spec, buffer in buffers
        if (views := spec.padding_views(buffer))
    ]
    if not dirty or not bool(torch.stack(dirty).any()):
        return []
    return [corruption for spec, buffer in buffers if (corruption := _describe(spec, buffer)) is not None]


def _describe(spec: ScaleSpec, buffer: Tensor) -> Corruption | None:
    logical = spec.layout.logical(buffer, spec.rows, spec.k, padded_k=spec.padded_k)
    logical[: spec.rows, : spec.k // BLOCK_SIZE] = 0
    positions = logical.nonzero()
    if not len(positions):
        return None
    row, column = (int(index) for index in positions[0])
    return Corruption(spec, buffer.data_ptr(), row, column, int(logical[row, column]), len(positions))

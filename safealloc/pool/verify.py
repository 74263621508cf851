"""Is padding zero, and if not, where?"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from safealloc.errors import Corruption
from safealloc.formats.spec import ScaleSpec
from safealloc.pool.buffer import RED_ZONE, RED_ZONE_BYTE, red_zones_of


def find_corruptions(buffers: Sequence[tuple[ScaleSpec, Tensor]]) -> list[Corruption]:
    """The buffers whose padding is not zero; one synchronization if all is well.

    Args:
        buffers: specs and contiguous uint8 ``[padded_rows, padded_cols]`` buffers of one device.
    """
    dirty = [
        torch.stack([padding.any() for padding in views]).any()
        for spec, buffer in buffers
        if (views := [_padding(spec, buffer)] if spec.record else spec.padding_views(buffer))
    ]
    if not dirty or not bool(torch.stack(dirty).any()):
        return []
    return [corruption for spec, buffer in buffers if (corruption := _describe(spec, buffer)) is not None]


def repair_padding(buffers: Sequence[tuple[ScaleSpec, Tensor]], corruptions: Sequence[Corruption]) -> None:
    """Zero the padding of those buffers that are corrupt."""
    dirty = {corruption.address for corruption in corruptions}
    for spec, buffer in buffers:
        if buffer.data_ptr() in dirty:
            spec.zero_padding(buffer)


def _padding(spec: ScaleSpec, buffer: Tensor) -> Tensor:
    """The buffer in matrix order, uint8 ``[padded_rows, padded_cols]``, with zero for each valid scale; a copy."""
    logical = spec.layout.logical(buffer, spec.stored_rows, spec.k, padded_k=spec.padded_k, format=spec.format)
    valid = logical[: spec.stored_rows, : spec.cols]
    record = spec.record_in(buffer)
    if record is None:
        valid.zero_()
    else:
        valid.masked_fill_(spec.valid_rows_in(record)[:, None], 0)
    return logical


def _describe(spec: ScaleSpec, buffer: Tensor) -> Corruption | None:
    logical = _padding(spec, buffer)
    positions = logical.nonzero()
    if not len(positions):
        return None
    row, column = (int(index) for index in positions[0])
    return Corruption(spec, buffer.data_ptr(), row, column, int(logical[row, column]), len(positions))


def find_written_red_zones(buffers: Sequence[tuple[ScaleSpec, Tensor]]) -> list[Corruption]:
    """The buffers around which somebody wrote; one synchronization if all is well.

    Args:
        buffers: as in :func:`find_corruptions`, all made with red zones.
    """
    zones = [(spec, buffer, red_zones_of(spec, buffer)) for spec, buffer in buffers]
    written = [torch.cat(both).ne(RED_ZONE_BYTE).any() for _, _, both in zones]
    if not written or not bool(torch.stack(written).any()):
        return []
    found = []
    for spec, buffer, both in zones:
        for zone, first in zip(both, (-RED_ZONE, 0), strict=True):
            at = zone.ne(RED_ZONE_BYTE).nonzero().view(-1)
            if len(at):
                value, outside = int(zone[at[0]]), first + int(at[0])
                found.append(Corruption(spec, buffer.data_ptr(), 0, 0, value, len(at), outside))
    return found


def repair_red_zones(buffers: Sequence[tuple[ScaleSpec, Tensor]], corruptions: Sequence[Corruption]) -> None:
    """Restore the red zones of those buffers around which somebody wrote."""
    written = {corruption.address for corruption in corruptions if corruption.outside is not None}
    for spec, buffer in buffers:
        if buffer.data_ptr() in written:
            for zone in red_zones_of(spec, buffer):
                zone.fill_(RED_ZONE_BYTE)

"""The oracle's own arithmetic: which bytes of a buffer are scales, by the published formulas and not by the package's."""

from __future__ import annotations

import torch
from torch import Tensor

from safealloc import SfLayout
from safealloc.pool.buffer import Buffer

NAN = 0x7F  # as e4m3


class NotApplicableError(Exception):
    """The action makes no sense in this state; nothing was tried."""


class LossError(Exception):
    """The package broke a promise."""


def check(condition: bool, what: str) -> None:
    """Raise a loss where a promise does not hold."""
    if not condition:
        raise LossError(what)


def offsets(rows: int, cols: int, col_tiles: int, layout: SfLayout, device: torch.device) -> Tensor:
    """Where the scales of a ``[rows, cols]`` matrix of scales lie, int64 ``[rows, cols]``."""
    r = torch.arange(rows, device=device)[:, None]
    c = torch.arange(cols, device=device)[None, :]
    if layout is SfLayout.layout_128x4:
        return ((r // 128) * col_tiles + c // 4) * 512 + (r % 32) * 16 + ((r % 128) // 32) * 4 + c % 4
    if layout is SfLayout.layout_8x4:
        return ((r // 8) * col_tiles + c // 4) * 32 + (r % 8) * 4 + c % 4
    return r * cols + c


def valid_bytes(buffer: Buffer) -> Tensor:
    """Which bytes of a buffer hold scales now, bool ``[nbytes]``."""
    spec, device = buffer.spec, buffer.base.device
    padded_rows, padded_cols = buffer.base.shape
    cols = spec.k // 16
    places = offsets(padded_rows, cols, padded_cols // 4, spec.layout, device)
    row = torch.arange(padded_rows, device=device)[:, None]
    record = buffer.spec.record_in(buffer.base)  # the scale row of each row, from 1
    valid = row < spec.rows if record is None else torch.isin(row, record[record > 0] - 1)
    found = torch.zeros(buffer.base.numel(), dtype=torch.bool, device=device)
    found[places[valid.expand(-1, cols)]] = True
    return found


def has_padding(buffer: Buffer) -> bool:
    """Whether any byte of the buffer is padding now."""
    return not bool(valid_bytes(buffer).all())

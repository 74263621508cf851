"""``torch.ops.safealloc.acquire``: :meth:`ScalePool.acquire` on the default pool, for traced code."""

from __future__ import annotations

import torch
from torch import Tensor

from safealloc.formats.format import ScaleFormat
from safealloc.formats.layout import checked_layout
from safealloc.ops.inductor import forbid_reuse
from safealloc.ops.library import empty_scales, register
from safealloc.pool.default import default_pool


def _acquire(
    rows: int, k: int, layout: int, device: torch.device, padded_k: int | None = None, format: str = "nvfp4"
) -> Tensor:
    return default_pool(device).acquire(rows, k, checked_layout(layout), padded_k=padded_k, format=ScaleFormat[format])


def _fake(
    rows: int, k: int, layout: int, device: torch.device, padded_k: int | None = None, format: str = "nvfp4"
) -> Tensor:
    forbid_reuse(torch.ops.safealloc.acquire.default)
    return empty_scales(rows, k, checked_layout(layout), device, padded_k, ScaleFormat[format])


register(
    'acquire(SymInt rows, SymInt k, int layout, Device device, SymInt? padded_k=None, str format="nvfp4") -> Tensor',
    _acquire,
    _fake,
    torch.Tag.nondeterministic_seeded,  # not a constant to fold, nor a call to merge with an equal one
)

"""``torch.ops.safealloc.acquire``: :meth:`ScalePool.acquire` on the default pool, for traced code."""

from __future__ import annotations

import torch
from torch import Tensor

from safealloc.formats.layout import checked_layout
from safealloc.ops.inductor import forbid_reuse
from safealloc.ops.library import empty_scales, library
from safealloc.pool.default import default_pool

library.define(
    "acquire(SymInt rows, SymInt k, int layout, Device device, SymInt? padded_k=None) -> Tensor",
    # Not a constant to fold, nor a call to merge with an equal one.
    tags=(torch.Tag.nondeterministic_seeded, torch.Tag.pt2_compliant_tag),
)


def _acquire(rows: int, k: int, layout: int, device: torch.device, padded_k: int | None = None) -> Tensor:
    return default_pool(device).acquire(rows, k, layout, padded_k=padded_k)  # type: ignore[arg-type]


def _acquire_fake(rows: int, k: int, layout: int, device: torch.device, padded_k: int | None = None) -> Tensor:
    forbid_reuse(torch.ops.safealloc.acquire.default)
    return empty_scales(rows, k, checked_layout(layout), device, padded_k)


library.impl("acquire", _acquire, "CompositeExplicitAutograd")
torch.library.register_fake("safealloc::acquire", _acquire_fake, lib=library)

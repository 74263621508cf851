"""What scales lie at an address: a note for each buffer that a pool has made, for as long as its storage lives."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from safealloc.formats.spec import ScaleSpec

# No lock: each line is one step of the interpreter, and what a purge lets go of may run finalizers that come back here.
_notes: dict[int, tuple[ScaleSpec, Any, int]] = {}  # address -> spec, weak storage, number of the pool
_purge_at = 1024


def remember(tensor: Tensor, spec: ScaleSpec, pool: int = 0) -> None:
    """Note which scales lie where ``tensor`` starts, for as long as its storage lives; pool 0 is no pool."""
    global _purge_at
    if len(_notes) >= _purge_at:
        for address, note in list(_notes.items()):
            if note[1].expired() and _notes.get(address) is note:
                _notes.pop(address, None)
        _purge_at = max(1024, 2 * len(_notes))
    _notes[tensor.data_ptr()] = (spec, StorageWeakRef(tensor.untyped_storage()), pool)


def spec_of(tensor: Tensor, pool: int | None = None) -> ScaleSpec | None:
    """The scales that a tensor from any pool (or from ``pool``) holds; ``None`` for other memory."""
    note = _notes.get(tensor.data_ptr())
    if note is None:
        return None
    spec, storage, owner = note
    if storage.expired() or (pool is not None and pool != owner):
        return None
    return spec

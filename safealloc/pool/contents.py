"""What scales lie at an address: a note for each buffer that a pool has made, for as long as its storage lives."""

from __future__ import annotations

import os
import threading
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from safealloc.formats.spec import ScaleSpec

_lock = threading.RLock()  # reentrant: what a purge lets go of may run finalizers
_notes: dict[int, tuple[ScaleSpec, Any, int]] = {}  # address -> spec, weak storage, number of the pool
_purge_at = 1024


def remember(tensor: Tensor, spec: ScaleSpec, pool: int = 0) -> None:
    """Note which scales lie where ``tensor`` starts, for as long as its storage lives; pool 0 is no pool."""
    global _purge_at
    with _lock:
        if len(_notes) >= _purge_at:
            for address in [address for address, (_, storage, _) in _notes.items() if storage.expired()]:
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


def _after_fork() -> None:
    global _lock
    _lock = threading.RLock()  # a thread of the parent may have held it


os.register_at_fork(after_in_child=_after_fork)

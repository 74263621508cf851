"""What scales lie in a storage: a note for each buffer that a pool has made, for as long as its storage lives."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from safealloc.formats.spec import ScaleSpec


class Note(NamedTuple):
    """What is known of a storage.

    Attributes:
        spec: of the buffer in it.
        address: of the buffer's first byte.
        pool: the number of its pool; 0 is no pool.
        storage: weak.
    """

    spec: ScaleSpec
    address: int
    pool: int
    storage: Any

    def spec_in(self, tensor: Tensor) -> ScaleSpec | None:
        """What a tensor of the storage holds: the whole buffer or whole row tiles of it; ``None`` for any other view."""
        offset, nbytes = tensor.data_ptr() - self.address, tensor.numel() * tensor.element_size()
        if self.spec.experts is not None:  # a buffer serves fewer rows, by its first ones
            return self.spec if offset == 0 else None
        return self.spec.row_tiles(offset, nbytes) if tensor.is_contiguous() else None


# No lock: each line is one step of the interpreter, and what a purge lets go of may run finalizers that come back here.
_notes: dict[int, Note] = {}  # by address of the storage
_purge_at = 1024


def remember(tensor: Tensor, spec: ScaleSpec, pool: int = 0) -> None:
    """Note which scales ``tensor`` holds, for as long as its storage lives; pool 0 is no pool."""
    global _purge_at
    if len(_notes) >= _purge_at:
        for address, note in list(_notes.items()):
            if note.storage.expired() and _notes.get(address) is note:
                _notes.pop(address, None)
        _purge_at = max(1024, 2 * len(_notes))
    storage = tensor.untyped_storage()
    _notes[storage.data_ptr()] = Note(spec, tensor.data_ptr(), pool, StorageWeakRef(storage))


def note_of(tensor: Tensor, pool: int | None = None) -> Note | None:
    """What is known of the storage of a tensor, any view of it, from any pool (or from ``pool``)."""
    note = _notes.get(tensor.untyped_storage().data_ptr())
    if note is None or note.storage.expired() or (pool is not None and pool != note.pool):
        return None
    return note


def spec_of(tensor: Tensor, pool: int | None = None) -> ScaleSpec | None:
    """The scales that a tensor holds, a whole buffer or whole row tiles of one; ``None`` for other views and memory."""
    note = note_of(tensor, pool)
    return None if note is None else note.spec_in(tensor)

"""What scales lie in a storage: a note for each buffer that a pool has made, and for each tensor that somebody declared.

A pool's note lasts as long as the buffer's storage. A declared one is of a range of a storage, and ends sooner where a write
to it is seen: PyTorch counts the in-place writes to a tensor and all its views in one version counter, which the note
compares. An inference tensor has no such counter, and a kernel that gets a raw address does not count.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from safealloc.formats.spec import ScaleSpec

DECLARED = -1
"""The pool of a note that was declared; 0 is that of a copy of a pool's buffer."""


class Note(NamedTuple):
    """What is known of a storage, or of a range of it.

    Attributes:
        spec: of the scales in it.
        address: of their first byte.
        pool: the number of its pool; 0 is no pool, :data:`DECLARED` says that the range was declared.
        storage: weak.
        parts: how many such matrices lie one behind the other, each padded to whole tiles of its own.
        origin: what wrote it, for messages; empty where that is not known.
        start: where the storage began when the note was made.
        counter: an empty tensor with the version counter of the declared one; ``None`` where there is none.
        version: what the counter said.
    """

    spec: ScaleSpec
    address: int
    pool: int
    storage: Any
    parts: int = 1
    origin: str = ""
    start: int = 0
    counter: Tensor | None = None
    version: int = 0

    @property
    def end(self) -> int:
        return self.address + self.parts * self.spec.scale_bytes

    def spec_in(self, tensor: Tensor) -> ScaleSpec | None:
        """What a tensor of the storage holds: the whole buffer or whole row tiles of it; ``None`` for any other view."""
        offset, nbytes = tensor.data_ptr() - self.address, tensor.numel() * tensor.element_size()
        if self.spec.experts is not None:  # a buffer serves fewer rows, by its first ones
            return self.spec if offset == 0 else None
        if self.parts > 1:
            offset %= self.spec.scale_bytes  # of the part that it begins in; beyond that part's end is no matrix
        return self.spec.row_tiles(offset, nbytes) if tensor.is_contiguous() else None

    def holds(self) -> bool:
        """Whether no write to a declared range was seen."""
        return self.counter is None or self.counter._version == self.version

    def __str__(self) -> str:
        if self.parts == 1:
            return str(self.spec)
        return f"{self.parts} matrices one behind the other, each {self.spec}"


# No lock: each line is one step of the interpreter, and what a purge lets go of may run finalizers that come back here.
_notes: dict[int, Note] = {}  # by address of the storage
# By identity of the storage, which nothing else can have while a note refers to it.
_declared: dict[int, tuple[Note, ...]] = {}
_purge_at = 1024
_probe = torch.empty(0, device="cpu")


def remember(tensor: Tensor, spec: ScaleSpec, pool: int = 0) -> None:
    """Note which scales ``tensor`` holds, for as long as its storage lives; pool 0 is no pool."""
    _purge()
    storage = tensor.untyped_storage()
    _declared.pop(storage._cdata, None)
    _notes[storage.data_ptr()] = Note(spec, tensor.data_ptr(), pool, StorageWeakRef(storage))


def remember_declared(tensor: Tensor, spec: ScaleSpec, parts: int = 1, origin: str = "") -> None:
    """Note what was declared of a contiguous tensor, in place of what was declared of any byte of it before.

    Where PyTorch gives aliases version counters of their own, no note is made, since no write would end it: in the first call
    of compiled code.

    Args:
        tensor: its bytes are ``parts`` times ``spec.scale_bytes``; not of a pool.
        spec, parts, origin: as in :class:`Note`.
    """
    _purge()
    storage = tensor.untyped_storage()
    if not tensor.is_inference() and not _aliases_are_counted():
        forget_declared(tensor)
        return
    counter = None if tensor.is_inference() else tensor.detach()
    if counter is not None:
        counter.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)  # keeps the counter, lets the memory go
    note = Note(
        spec,
        tensor.data_ptr(),
        DECLARED,
        StorageWeakRef(storage),
        parts,
        origin,
        storage.data_ptr(),
        counter,
        0 if counter is None else counter._version,
    )
    _declared[storage._cdata] = (*_declared_beside(tensor, storage), note)


def forget_declared(tensor: Tensor) -> None:
    """Drop what was declared of any byte of ``tensor``, which was written."""
    if _declared:
        storage = tensor.untyped_storage()
        if storage._cdata in _declared:
            _declared[storage._cdata] = _declared_beside(tensor, storage)


def note_of(tensor: Tensor, pool: int | None = None) -> Note | None:
    """What is known of the storage of a tensor, any view of it, from any pool (or from ``pool``).

    What was declared of a range counts for tensors inside of it.
    """
    storage = tensor.untyped_storage()
    note = _notes.get(storage.data_ptr())
    if note is None or note.storage.expired():
        return _declared_around(tensor, storage) if pool is None and _declared else None
    return None if pool is not None and pool != note.pool else note


def pool_note_of(tensor: Tensor) -> Note | None:
    """What is known of the storage of a tensor from any pool, declared or not."""
    note = note_of(tensor)
    return None if note is None or note.pool == DECLARED else note


def spec_of(tensor: Tensor, pool: int | None = None) -> ScaleSpec | None:
    """The scales that a tensor holds, a whole buffer or whole row tiles of one; ``None`` for other views and memory."""
    note = note_of(tensor, pool)
    return None if note is None else note.spec_in(tensor)


def pool_spec_of(tensor: Tensor) -> ScaleSpec | None:
    """:func:`spec_of` for what a pool made, whatever was declared."""
    note = pool_note_of(tensor)
    return None if note is None else note.spec_in(tensor)


def is_whole_storage(tensor: Tensor) -> bool:
    """Whether nothing else lies in the storage of a contiguous tensor."""
    return tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


def _declared_around(tensor: Tensor, storage: torch.UntypedStorage) -> Note | None:
    start = storage.data_ptr()
    first, end = _range(tensor)
    for note in _declared.get(storage._cdata, ()):
        if note.address <= first < end <= note.end and note.start == start and note.holds():
            return note
    return None


def _declared_beside(tensor: Tensor, storage: torch.UntypedStorage) -> tuple[Note, ...]:
    """The notes of a storage, without those of a byte of ``tensor`` and those that hold no longer."""
    start = storage.data_ptr()
    first, end = _range(tensor)
    return tuple(
        note
        for note in _declared.get(storage._cdata, ())
        if (end <= note.address or note.end <= first) and note.start == start and note.holds()
    )


def _aliases_are_counted() -> bool:
    alias = _probe.detach()
    torch.autograd.graph.increment_version(_probe)
    return alias._version == _probe._version


def _range(tensor: Tensor) -> tuple[int, int]:
    """The address of the first byte of a tensor, and the one behind its last; empty for an empty tensor."""
    first = tensor.data_ptr()
    if not tensor.numel():
        return first, first
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return first, first + (last + 1) * tensor.element_size()


def _purge() -> None:
    global _purge_at
    if len(_notes) + len(_declared) < _purge_at:
        return
    for address, note in list(_notes.items()):
        if note.storage.expired() and _notes.get(address) is note:
            _notes.pop(address, None)
    for identity, notes in list(_declared.items()):
        if (not notes or notes[0].storage.expired()) and _declared.get(identity) is notes:
            _declared.pop(identity, None)
    _purge_at = max(1024, 2 * (len(_notes) + len(_declared)))

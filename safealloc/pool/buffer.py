"""One buffer: its memory, and who may still read or write it.

A buffer's life, and what moves it on (the pool decides, :mod:`safealloc.pool.inventory` files it)::

    made --> STOCK --acquire--> a stream --capture--> a graph memory-pool handle
               ^                                            |
               +---- the last graph of the handle is gone --+

It is *held* while somebody has a tensor of its storage, *idle* once nobody has and no other stream has to pass, and forgotten
by eviction, ``trim`` or ``close``.
"""

from __future__ import annotations

import mmap
import sys
from collections.abc import Hashable

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from safealloc.formats.format import NAN_SCALE
from safealloc.formats.spec import ScaleSpec
from safealloc.pool.driver import Capture

ALIGNMENT = 512
"""Bytes; what CUDA's allocators give, and what TMA and the 128x4 tile ask for at most."""

STOCK = "stock"
"""Owner of a buffer that no stream and no graph has touched since it was made or came back."""

_use_count = torch._C._storage_Use_Count
_references = sys.getrefcount


class Buffer:
    """A zero-padded buffer and everybody who may still read or write it.

    ``base`` never leaves the pool: a caller gets ``base.data``, a fresh tensor of the same storage, so that every holder
    shows in the storage's use count (views, dtype views, autograd, DLPack) or in the reference count of its Python object
    (``tensor.untyped_storage()``). What both are when nobody holds it differs between versions of PyTorch, so it is read
    when the buffer is made.

    Attributes:
        spec: what it holds.
        base: uint8 ``[padded_rows, padded_cols]``.
        owner: a raw stream, a graph memory-pool handle, or ``STOCK``.
        kept: stays until the pool is closed; else it is in the cache, and may be evicted.
        last_use: the pool's count of requests when an eager caller was handed it last.
        readers: other streams that have to pass before the next use, by raw stream.
        capture: the last capture that was given it, and
        stream: on which of its streams.
        record: which rows are valid, for grouped scales (:class:`safealloc.ScaleSpec`).
    """

    __slots__ = (
        "__weakref__",
        "address",
        "base",
        "capture",
        "idle_references",
        "idle_uses",
        "kept",
        "last_use",
        "owner",
        "readers",
        "record",
        "spec",
        "storage",
        "storage_address",
        "stream",
    )

    def __init__(self, spec: ScaleSpec, base: Tensor, owner: Hashable, *, kept: bool) -> None:
        self.spec = spec
        self.base = base
        self.address = base.data_ptr()
        self.owner = owner
        self.kept = kept
        self.last_use = 0
        self.readers: dict[int, torch.cuda.Event | torch.cuda.Stream] = {}
        self.capture: Capture | None = None
        self.stream: int | None = None
        self.record = spec.record_in(base)
        self.storage = base.untyped_storage()
        self.storage_address: int = self.storage._cdata
        self.idle_uses: int = _use_count(self.storage_address)
        self.idle_references = _references(self.storage)

    @property
    def nbytes(self) -> int:
        return self.spec.nbytes

    def held(self) -> bool:
        """Somebody holds a tensor, a view or the storage."""
        return _use_count(self.storage_address) != self.idle_uses or _references(self.storage) != self.idle_references

    def idle(self) -> bool:
        """Nobody holds it and no other stream has to pass first."""
        return not self.held() and not self.readers

    def passed(self) -> bool:
        """Idle, once the streams of :meth:`ScalePool.record_stream` have passed what they had when the holders went."""
        if self.held():
            return False
        for key, reader in list(self.readers.items()):
            if isinstance(reader, torch.cuda.Stream):
                reader = self.readers[key] = reader.record_event()
            if reader.query():
                del self.readers[key]
        return not self.readers

    def release(self) -> None:
        """Before the pool forgets the buffer: let the allocator wait for the streams that were recorded."""
        for reader in self.readers.values():
            if isinstance(reader, torch.cuda.Stream):
                self.base.record_stream(reader)
            else:
                reader.synchronize()


class OneCallBuffer:
    """A buffer that was made for one call: watched while somebody holds it, never handed out again."""

    __slots__ = ("_offset", "_storage", "nbytes", "spec")

    def __init__(self, spec: ScaleSpec, tensor: Tensor) -> None:
        self.spec = spec
        self.nbytes = spec.nbytes
        self._storage = StorageWeakRef(tensor.untyped_storage())
        self._offset = tensor.storage_offset()

    def alive(self) -> bool:
        return not self._storage.expired()

    def tensor(self) -> Tensor | None:
        """The buffer, if somebody still holds it."""
        storage = torch.UntypedStorage._new_with_weak_ptr(self._storage.cdata)
        if storage is None:
            return None
        padded_rows, padded_cols = self.spec.padded_shape
        empty = torch.empty(0, dtype=torch.uint8, device=storage.device)
        return empty.set_(storage, self._offset, (padded_rows, padded_cols), (padded_cols, 1))


def zero_padded(spec: ScaleSpec, device: torch.device, *, poison: bool = False) -> Tensor:
    """New scales, uint8 ``[padded_rows, padded_cols]``, aligned, padding zero.

    The valid bytes are whatever was there, or with ``poison`` NaN. Grouped scales are all zero, and so is their record: no
    row is valid yet.
    """
    # A pool outlives the mode it grows in: a tensor of inference mode could not be written outside of it.
    with torch.inference_mode(False), torch.no_grad():
        memory = _aligned(spec.nbytes, device)
        scales = spec.scales_in(memory)
        if spec.record:
            memory.zero_()
        else:
            if poison:
                memory.fill_(NAN_SCALE)
            spec.zero_padding(scales)
    return scales


def _aligned(nbytes: int, device: torch.device) -> Tensor:
    if device.type == "cpu":  # whole pages: a slice of more would be aligned too, but start at another storage offset
        pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        return torch.frombuffer(pages, dtype=torch.uint8)
    memory = torch.empty(nbytes, dtype=torch.uint8, device=device)
    if memory.data_ptr() % ALIGNMENT:  # not the caching allocator (PYTORCH_NO_CUDA_MEMORY_CACHING)
        memory = torch.empty(nbytes + ALIGNMENT - 1, dtype=torch.uint8, device=device)
        start = -memory.data_ptr() % ALIGNMENT
        memory = memory[start : start + nbytes]
    return memory

"""One buffer: its memory, how it is claimed, and who may still read or write it.

A buffer's life, and what moves it on (the pool decides, :mod:`safealloc.pool.inventory` files it)::

    made --> STOCK --acquire--> a stream --capture--> a graph memory-pool handle
               ^                                            |
               +-- RETURNING <-- the last graph is gone ----+

    any of them --evict, trim, close--> GONE

Nothing asks whether a buffer is idle and takes it then: between the two, a signal handler, a finalizer or another thread
could take it too. :meth:`Buffer.claim` takes a tensor of it first and looks afterwards whether that is the only one. Two who
claim at once may both be refused; never do both get it.
"""

from __future__ import annotations

import mmap
import time
from collections.abc import Hashable, Iterable, Sequence
from typing import Self

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from safealloc import _torch
from safealloc.formats.spec import ScaleSpec
from safealloc.pool import driver

ALIGNMENT = 512
"""Bytes; what CUDA's allocators give, and what TMA and the 128x4 tile ask for at most."""

RED_ZONE = 512
"""Bytes before and behind each buffer of a pool with ``debug``, which nobody may write."""

RED_ZONE_BYTE = 0xA5
"""What they hold."""

STOCK = "stock"
"""Owner of a buffer that no stream and no graph has touched since it was made or came back."""

RETURNING = "returning"
"""Owner of a buffer whose graphs are gone, until all that was queued before has passed."""

GONE = "gone"
"""Owner of a buffer that is about to be forgotten: nobody gets it any more."""

_use_count = _torch.use_count
_references = _torch.references
_standard = _torch.standard_deleter


class Drain:
    """Events on several streams: when they have passed, so has all that was queued there before."""

    __slots__ = ("_events",)

    def __init__(self, events: Sequence[torch.cuda.Event]) -> None:
        self._events = list(events)

    @classmethod
    def on(cls, streams: Iterable[int], device: torch.device) -> Self | None:
        """Record the events; ``None`` where one of the streams is capturing."""
        if device.type != "cuda":
            return cls(())
        streams = list(streams)
        if not all(driver.may_record(stream) for stream in streams):
            return None
        return cls([driver.record_event(stream, device) for stream in streams])

    def passed(self) -> bool:
        """Whether all have; never waits, and is allowed while a capture is under way."""
        if not all(map(driver.event_passed, self._events)):
            return False
        self._events = []
        return True

    def passes_within(self, seconds: float) -> bool:
        """Whether all have, at once or soon: an event on a stream that has nothing to do takes some microseconds."""
        end = time.monotonic() + seconds
        while not self.passed():
            if time.monotonic() > end:
                return False
        return True


class Buffer:
    """A zero-padded buffer and everybody who may still read or write it.

    ``base`` never leaves the pool: a caller gets ``base.data``, a fresh tensor of the same storage, so that every holder
    shows in the storage's use count (views, dtype views, autograd, DLPack) or in the reference count of its Python object
    (``tensor.untyped_storage()``). What both are while exactly one such tensor lives differs between versions of PyTorch, so
    it is read when the buffer is made.

    Attributes:
        spec: what it holds.
        base: uint8 ``[padded_rows, padded_cols]``.
        owner: a raw stream, a graph memory-pool handle, ``STOCK``, ``RETURNING`` or ``GONE``; ``None`` until it is filed.
        ready_for: the raw stream that the hit path may hand it to; ``None`` where other streams have to pass first.
        kept: stays until the pool is closed; else it is in the cache, and may be evicted.
        last_use: the pool's count of requests when an eager caller was handed it last.
        readers: other streams that have to pass before the next use, by raw stream, with an event once nobody holds it.
        captures: the captures that were given it, and on which stream; ``None``: not again in that capture.
        drain, drained_use: events recorded when nobody held it, and ``last_use`` then.
    """

    __slots__ = (
        "__weakref__",
        "address",
        "base",
        "captures",
        "cdata",
        "claimed_references",
        "claimed_uses",
        "drain",
        "drained_use",
        "kept",
        "last_use",
        "owner",
        "readers",
        "ready_for",
        "spec",
        "standard",
        "storage",
    )

    def __init__(self, spec: ScaleSpec, base: Tensor, *, kept: bool) -> None:
        self.spec = spec
        self.base = base
        self.address = base.data_ptr()
        self.owner: Hashable = None
        self.ready_for: int | None = None
        self.kept = kept
        self.last_use = 0
        self.readers: dict[int, torch.cuda.Event | None] = {}
        self.captures: dict[int, int | None] = {}
        self.drain: Drain | None = None
        self.drained_use = -1
        self.storage = base.untyped_storage()
        self.cdata: int = self.storage._cdata
        self.standard = _standard(self.cdata) if base.is_cuda else None  # CPU memory moves when it is shared
        claim = base.data
        self.claimed_uses: int = _use_count(self.cdata)
        self.claimed_references = _references(self.storage)
        del claim

    @property
    def nbytes(self) -> int:
        return self.spec.nbytes

    def claim(self) -> Tensor | None:
        """A tensor of the buffer, if it is the only one; ``None`` if somebody holds another, or the memory is not as it was.

        References are counted before and after the uses, since a holder may move from one counter to the other in between.
        """
        tensor = self.base.data
        if (
            _references(self.storage) == self.claimed_references
            and _use_count(self.cdata) == self.claimed_uses
            and _references(self.storage) == self.claimed_references
            and tensor.data_ptr() == self.address
            and (self.standard is None or _standard(self.cdata) == self.standard)
        ):
            return tensor
        return None

    def held(self) -> bool:
        """Somebody holds a tensor, a view or the storage."""
        return _use_count(self.cdata) != self.claimed_uses - 1 or _references(self.storage) != self.claimed_references

    def altered(self) -> bool:
        """A holder has resized or moved the storage, or sent it to another process: it is never handed out again."""
        if self.base.data_ptr() != self.address:
            return True
        return self.standard is not None and _standard(self.cdata) != self.standard

    def give_to(self, owner: Hashable) -> None:
        """Change the owner of a buffer that is claimed: from here on it belongs to nobody else."""
        self.ready_for = None
        self.owner = owner
        if isinstance(owner, int) and not self.readers:
            self.ready_for = owner

    def read_by(self, stream: int) -> None:
        """Another stream reads it too, and has to pass what it has queued when the last holder is gone."""
        self.ready_for = None
        self.readers[stream] = None

    def passed_readers(self) -> bool:
        """Of a buffer that is claimed: whether every reader has passed what it had queued when the holders went."""
        for stream, event in list(self.readers.items()):
            if event is None:
                if not driver.may_record(stream):  # it is capturing
                    continue
                self.readers[stream] = event = driver.record_event(stream, self.base.device)
            if driver.event_passed(event):
                self.readers.pop(stream, None)
        return not self.readers

    def drain_with(self, drain: Drain) -> None:
        """Of a buffer that is claimed: these events were recorded while nobody held it, for :meth:`drained`."""
        self.drained_use = -1
        self.drain = drain
        self.drained_use = self.last_use

    def drained(self) -> bool:
        """Of a buffer that is claimed: whether all that was queued before nobody held it has passed."""
        return self.drain is not None and self.drained_use == self.last_use and not self.readers and self.drain.passed()

    def release(self) -> None:
        """Before the pool forgets the buffer: let the allocator wait for the streams that were recorded."""
        for stream, event in self.readers.items():
            if event is None or not driver.event_passed(event):
                self.base.record_stream(torch.cuda.ExternalStream(stream, device=self.base.device))


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
        if storage is None or storage.nbytes() < self._offset + self.spec.scale_bytes:  # gone, or resized by a holder
            return None
        padded_rows, padded_cols = self.spec.padded_shape
        empty = torch.empty(0, dtype=torch.uint8, device=storage.device)
        return empty.set_(storage, self._offset, (padded_rows, padded_cols), (padded_cols, 1))


def zero_padded(spec: ScaleSpec, device: torch.device, *, poison: bool = False, red_zones: bool = False) -> Tensor:
    """New scales, uint8 ``[padded_rows, padded_cols]``, aligned, padding zero.

    The valid bytes are whatever was there, or with ``poison`` NaN of the format. Grouped scales are all zero, and so is their
    record: no row is valid yet. With ``red_zones`` they lie between two zones of ``RED_ZONE`` bytes.
    """
    # A pool outlives the mode it grows in: a tensor of inference mode could not be written outside of it.
    with torch.inference_mode(False), torch.no_grad():
        if red_zones:
            memory = _aligned(spec.nbytes + 2 * RED_ZONE, device)
            memory[:RED_ZONE] = RED_ZONE_BYTE
            memory[RED_ZONE + spec.nbytes :] = RED_ZONE_BYTE
            memory = memory[RED_ZONE : RED_ZONE + spec.nbytes]
        else:
            memory = _aligned(spec.nbytes, device)
        scales = spec.scales_in(memory)
        if spec.record:
            memory.zero_()
        else:
            if poison:
                memory.fill_(spec.format.nan_bytes[0])
            spec.zero_padding(scales)
    return scales


def red_zones_of(spec: ScaleSpec, scales: Tensor) -> tuple[Tensor, Tensor]:
    """The bytes before and behind a buffer that was made with red zones, uint8 ``[RED_ZONE]`` each.

    Args:
        spec: of the buffer.
        scales: all its scales.
    """
    start = scales.storage_offset()
    before = scales.as_strided((RED_ZONE,), (1,), start - RED_ZONE)
    return before, scales.as_strided((RED_ZONE,), (1,), start + spec.nbytes)


def _aligned(nbytes: int, device: torch.device) -> Tensor:
    if device.type == "cpu":  # whole pages: a slice of more would be aligned too, but start at another storage offset
        pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        return torch.frombuffer(pages, dtype=torch.uint8)
    with driver.relaxed():
        memory = torch.empty(nbytes, dtype=torch.uint8, device=device)
        if memory.data_ptr() % ALIGNMENT:  # not the caching allocator (PYTORCH_NO_CUDA_MEMORY_CACHING)
            memory = torch.empty(nbytes + ALIGNMENT - 1, dtype=torch.uint8, device=device)
            start = -memory.data_ptr() % ALIGNMENT
            memory = memory[start : start + nbytes]
    return memory

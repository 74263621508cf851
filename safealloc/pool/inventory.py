"""What a pool holds: buffers by shape and owner, the cache's order, bytes and limits, and the memory they are made of."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

from safealloc.errors import PoolExhaustedError
from safealloc.formats.spec import ScaleSpec
from safealloc.pool.buffer import Buffer, LooseBuffer, make_base, remember
from safealloc.pool.memory import PrivateMemory


class Inventory:
    """Buffers of one pool. Nothing here decides who may have one; the pool's lock is held at each call.

    Args:
        device: where they live.
        max_bytes, cache_bytes: as in :class:`safealloc.ScalePool`.
        pool: the pool's number, for :func:`safealloc.pool.buffer.spec_of`.
        poison: whether real bytes of new buffers are NaN.
    """

    def __init__(
        self, device: torch.device, max_bytes: int | None, cache_bytes: int, pool: int, *, poison: bool = False
    ) -> None:
        self.device = device
        self.max_bytes = max_bytes
        self.cache_bytes = cache_bytes
        self.pool = pool
        self.poison = poison
        # (rows, k, layout, padded_k, owner), as the hit path asks; of routed rows ("grouped", k, layout, experts, owner)
        self.by_key: dict[tuple[Any, ...], list[Buffer]] = {}
        self.by_address: dict[int, Buffer] = {}
        self.recent: OrderedDict[Buffer, None] = OrderedDict()  # the cache, least recently used first
        self.loose: list[LooseBuffer] = []
        self.bytes = 0
        self.cached_bytes = 0
        self.evictions = 0
        self._memory: PrivateMemory | None = None  # on CUDA

    def owned(self, spec: ScaleSpec, owner: Hashable) -> list[Buffer]:
        """The buffers of a shape that belong to a stream, a graph memory-pool handle, or nobody yet.

        A buffer for routed rows serves fewer of them as well; the smallest that does comes first.
        """
        found = self.by_key.get(_key(spec, owner), [])
        return found if spec.experts is None else [buffer for buffer in found if buffer.spec.rows >= spec.rows]

    def change_owner(self, buffer: Buffer, owner: Hashable) -> None:
        """File a buffer under another owner."""
        if buffer.owner == owner:
            return
        self._unfile(buffer)
        if self.device.type == "cuda" and isinstance(owner, int):  # its memory may be another stream's
            buffer.base.record_stream(torch.cuda.current_stream(self.device))
        buffer.owner = owner
        self._file(buffer)

    def keep(self, buffer: Buffer) -> None:
        """Take a buffer out of the cache: it stays until the pool is closed."""
        if not buffer.kept:
            self._leave_cache(buffer)
            buffer.kept = True

    # --- making -------------------------------------------------------------------------------------------------------

    def make(self, spec: ScaleSpec, owner: Hashable, *, kept: bool) -> Buffer:
        """A new buffer.

        Raises:
            PoolExhaustedError: beyond ``max_bytes``.
            torch.OutOfMemoryError: no memory, even without the idle cache.
        """
        self.make_room(spec.nbytes)
        try:
            base = self._base_from_memory(spec)
        except torch.OutOfMemoryError:
            self.trim()
            base = self._base_from_memory(spec)
        buffer = Buffer(spec, base, owner, kept=kept)
        self._file(buffer)
        self.by_address[buffer.address] = buffer
        self.bytes += buffer.nbytes
        if not kept:
            self.recent[buffer] = None
            self.cached_bytes += buffer.nbytes
        remember(base, spec, self.pool)
        return buffer

    def make_loose(self, spec: ScaleSpec) -> Tensor:
        """A buffer for one call, from the allocator that everybody uses; raises as :meth:`make`."""
        self.make_room(spec.nbytes)
        tensor = make_base(spec, self.device, poison=self.poison)
        self.loose = [loose for loose in self.loose if loose.alive()]
        self.loose.append(LooseBuffer(spec, tensor))
        remember(tensor, spec, self.pool)
        return tensor

    def _base_from_memory(self, spec: ScaleSpec) -> Tensor:
        if self.device.type != "cuda":
            return make_base(spec, self.device, poison=self.poison)
        if self._memory is None:
            self._memory = PrivateMemory(self.device)
        with self._memory.active():
            return make_base(spec, self.device, poison=self.poison)

    # --- giving up ----------------------------------------------------------------------------------------------------

    def make_room_in_cache(self, nbytes: int) -> bool:
        """Whether the cache has room for so many more bytes, after giving up what is idle."""
        return nbytes <= self.cache_bytes and self._evict(self.cached_bytes + nbytes - self.cache_bytes)

    def make_room(self, nbytes: int) -> None:
        """Raises: PoolExhaustedError: so many more bytes are beyond ``max_bytes``; then nothing was given up."""
        if self.max_bytes is None:
            return
        loose = sum(loose.nbytes for loose in self.loose if loose.alive())
        if not self._evict(self.bytes + loose + nbytes - self.max_bytes):
            raise PoolExhaustedError(
                f"{nbytes} more bytes would take the pool beyond max_bytes={self.max_bytes}: it holds {self.bytes} in "
                f"{len(self.by_address)} buffers, and callers hold {loose} that were made for one call"
            )

    def trim(self) -> int:
        """Give up the cache's idle buffers, and what is free to the device; their bytes."""
        before = self.bytes
        self._forget_idle()  # apart, so that no variable here holds one when the memory is released
        self.release_memory()
        return before - self.bytes

    def clear(self) -> None:
        """Forget every buffer; held tensors stay valid."""
        while self.by_address:
            self.forget(next(iter(self.by_address.values())))
        self.loose.clear()
        self.release_memory()

    def forget(self, buffer: Buffer) -> None:
        """Forget one buffer."""
        buffer.release()
        if not buffer.kept:
            self._leave_cache(buffer)
        self._unfile(buffer)
        del self.by_address[buffer.address]
        self.bytes -= buffer.nbytes

    def release_memory(self) -> None:
        """Give what is free to the device. Buffers that are left stay where they are, new ones come from elsewhere."""
        if self._memory is not None:
            self._memory.release()
            self._memory = None
            torch.cuda.empty_cache()

    def _evict(self, nbytes: int) -> bool:
        """Give up idle buffers of the cache of at least so many bytes, least recently used first; none if too few."""
        victims, found = [], 0
        for buffer in self.recent:
            if found >= nbytes:
                break
            if not buffer.held():
                victims.append(buffer)
                found += buffer.nbytes
        if found < nbytes:
            return False
        for buffer in victims:
            self.forget(buffer)
        self.evictions += len(victims)
        return True

    def _forget_idle(self) -> None:
        for buffer in [buffer for buffer in self.recent if not buffer.held()]:
            self.forget(buffer)

    def _leave_cache(self, buffer: Buffer) -> None:
        del self.recent[buffer]
        self.cached_bytes -= buffer.nbytes

    def _file(self, buffer: Buffer) -> None:
        filed = self.by_key.setdefault(_key(buffer.spec, buffer.owner), [])
        filed.append(buffer)
        filed.sort(key=lambda buffer: buffer.spec.rows)

    def _unfile(self, buffer: Buffer) -> None:
        key = _key(buffer.spec, buffer.owner)
        self.by_key[key].remove(buffer)
        if not self.by_key[key]:
            del self.by_key[key]


def _key(spec: ScaleSpec, owner: Hashable) -> tuple[Any, ...]:
    if spec.experts is not None:
        return "grouped", spec.k, spec.layout, spec.experts, owner
    return spec.rows, spec.k, spec.layout, spec.padded_k, owner

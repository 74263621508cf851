"""What a pool holds: buffers by shape and owner, bytes and limits, and the memory they are made of."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from safealloc.errors import PoolExhaustedError
from safealloc.formats.spec import ScaleSpec
from safealloc.pool.buffer import STOCK, Buffer, OneCallBuffer, zero_padded
from safealloc.pool.contents import remember
from safealloc.pool.memory import PrivateMemory


class Inventory:
    """Buffers of one pool. Nothing here decides who may have one; the pool's lock is held at each call.

    Args:
        device: where they live.
        max_bytes, cache_bytes: as in :class:`safealloc.ScalePool`.
        pool: the pool's number, for :func:`safealloc.pool.contents.spec_of`.
        poison: whether the valid bytes of new buffers are NaN.
        ready: whether idle buffers may be handed out by the pool's hit path; else ``ready`` stays empty.
    """

    def __init__(
        self,
        device: torch.device,
        max_bytes: int | None = None,
        cache_bytes: int = 0,
        pool: int = 0,
        *,
        poison: bool = False,
        ready: bool = False,
    ) -> None:
        self.device = device
        self.max_bytes = max_bytes
        self.cache_bytes = cache_bytes
        self.pool = pool
        self.poison = poison
        # (rows, k, layout, padded_k, owner), as the hit path asks; of grouped scales ("grouped", k, layout, experts, owner)
        self._filed: dict[tuple[Any, ...], list[Buffer]] = {}
        self.ready = self._filed if ready else {}
        self.by_address: dict[int, Buffer] = {}
        self.one_call: list[OneCallBuffer] = []
        self.bytes = 0
        self.cached_bytes = 0
        self.evictions = 0
        self._memory: PrivateMemory | None = None  # on CUDA

    def take(
        self, spec: ScaleSpec, owners: Iterable[Hashable], allowed: Callable[[Buffer], bool], taker: Hashable
    ) -> Buffer | None:
        """The first buffer of a shape that is allowed, filed under its taker; ``None`` where there is none.

        Args:
            spec: the shape. A buffer of grouped scales serves fewer rows as well; the smallest that does comes first.
            owners: whose buffers are looked at, in this order.
            allowed: whether a buffer may be taken.
            taker: the new owner, a raw stream or a graph memory-pool handle.
        """
        for owner in owners:
            for buffer in self.owned(spec, owner):
                if allowed(buffer):
                    self._change_owner(buffer, taker)
                    return buffer
        return None

    def owned(self, spec: ScaleSpec, owner: Hashable) -> list[Buffer]:
        """The buffers that serve a shape and belong to a raw stream, a graph memory-pool handle, or ``STOCK``."""
        found = self._filed.get(_key(spec, owner), [])
        return found if spec.experts is None else [buffer for buffer in found if buffer.spec.rows >= spec.rows]

    def streams(self) -> set[Hashable]:
        """The raw streams that own buffers."""
        return {key[-1] for key in self._filed if isinstance(key[-1], int)}

    def keep(self, buffer: Buffer) -> None:
        """Take a buffer out of the cache: it stays until the pool is closed."""
        if not buffer.kept:
            self.cached_bytes -= buffer.nbytes
            buffer.kept = True

    def return_to_stock(self, owners: Collection[Hashable]) -> None:
        """Give the buffers of graphs that are gone back to everybody, once the device has passed."""
        returning = [buffer for buffer in self.by_address.values() if buffer.owner in owners]
        if returning:
            torch.cuda.synchronize(self.device)
        for buffer in returning:
            self._change_owner(buffer, STOCK)
            buffer.capture, buffer.last_use = None, 0
            buffer.readers.clear()

    # --- making -------------------------------------------------------------------------------------------------------

    def make_cached(self, spec: ScaleSpec, owner: Hashable) -> Buffer | None:
        """A new buffer in the cache, or ``None`` where the cache has no room for it; raises as :meth:`make`."""
        room = spec.nbytes <= self.cache_bytes and self._evict(self.cached_bytes + spec.nbytes - self.cache_bytes)
        return self.make(spec, owner, kept=False) if room else None

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
        remember(base, spec, self.pool)
        self._file(buffer)
        self.by_address[buffer.address] = buffer
        self.bytes += buffer.nbytes
        if not kept:
            self.cached_bytes += buffer.nbytes
        return buffer

    def make_all(self, specs: Sequence[ScaleSpec]) -> None:
        """New buffers that are kept, in stock: all of them or none; raises as :meth:`make`."""
        self.make_room(sum(spec.nbytes for spec in specs))
        made: list[Buffer] = []
        try:
            for spec in specs:
                made.append(self.make(spec, STOCK, kept=True))
        except BaseException:
            for buffer in made:
                self.forget(buffer)
            raise

    def make_for_one_call(self, spec: ScaleSpec) -> Tensor:
        """A buffer for one call, from the allocator that everybody uses; raises as :meth:`make`."""
        self.make_room(spec.nbytes)
        tensor = zero_padded(spec, self.device, poison=self.poison)
        self.one_call = [buffer for buffer in self.one_call if buffer.alive()]
        self.one_call.append(OneCallBuffer(spec, tensor))
        remember(tensor, spec, self.pool)
        return tensor

    def make_in_capture(self, spec: ScaleSpec) -> Tensor:
        """Zeros that the graph under capture owns, and zeroes at every replay."""
        tensor = spec.scales_in(torch.zeros(spec.nbytes, dtype=torch.uint8, device=self.device))
        remember(tensor, spec, self.pool)
        return tensor

    def _base_from_memory(self, spec: ScaleSpec) -> Tensor:
        if self.device.type != "cuda":
            return zero_padded(spec, self.device, poison=self.poison)
        if self._memory is None:
            self._memory = PrivateMemory(self.device)
        with self._memory.active():
            return zero_padded(spec, self.device, poison=self.poison)

    # --- giving up ----------------------------------------------------------------------------------------------------

    def make_room(self, nbytes: int) -> None:
        """Raises: PoolExhaustedError: so many more bytes are beyond ``max_bytes``; then nothing was given up."""
        if self.max_bytes is None:
            return
        one_call = sum(buffer.nbytes for buffer in self.one_call if buffer.alive())
        if not self._evict(self.bytes + one_call + nbytes - self.max_bytes):
            raise PoolExhaustedError(
                f"{nbytes} more bytes would take the pool beyond max_bytes={self.max_bytes}: it holds {self.bytes} in "
                f"{len(self.by_address)} buffers, and callers hold {one_call} that were made for one call"
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
        self.one_call.clear()
        self.release_memory()

    def forget(self, buffer: Buffer) -> None:
        """Forget one buffer."""
        buffer.release()
        if not buffer.kept:
            self.cached_bytes -= buffer.nbytes
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
        if nbytes <= 0:
            return True
        cached = [buffer for buffer in self.by_address.values() if not buffer.kept]
        victims, found = [], 0
        for buffer in sorted(cached, key=lambda buffer: buffer.last_use):
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
        for buffer in [buffer for buffer in self.by_address.values() if not buffer.kept and not buffer.held()]:
            self.forget(buffer)

    # --- filing -------------------------------------------------------------------------------------------------------

    def _change_owner(self, buffer: Buffer, owner: Hashable) -> None:
        if buffer.owner == owner:
            return
        self._unfile(buffer)
        if self.device.type == "cuda" and isinstance(owner, int):  # its memory may be another stream's
            buffer.base.record_stream(torch.cuda.current_stream(self.device))
        buffer.owner = owner
        self._file(buffer)

    def _file(self, buffer: Buffer) -> None:
        filed = self._filed.setdefault(_key(buffer.spec, buffer.owner), [])
        filed.append(buffer)
        filed.sort(key=lambda buffer: buffer.spec.rows)

    def _unfile(self, buffer: Buffer) -> None:
        key = _key(buffer.spec, buffer.owner)
        self._filed[key].remove(buffer)
        if not self._filed[key]:
            del self._filed[key]


def _key(spec: ScaleSpec, owner: Hashable) -> tuple[Any, ...]:
    if spec.experts is not None:
        return "grouped", spec.k, spec.layout, spec.experts, owner
    return spec.rows, spec.k, spec.layout, spec.padded_k, owner

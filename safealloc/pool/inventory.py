"""What a pool holds: buffers by shape and owner, limits, and the memory they are made of.

``by_address`` is the truth. The lists that the hit path reads are hints: a buffer is in the list of its owner *before* its
owner is set, and leaves the list of its last owner afterwards, and whoever claims it looks at the owner. So every change is
committed by one store, and an interrupt at any line leaves a buffer where it was or where it should be:

- made: hint, ``by_address``, owner. Without an owner it is adopted by the next who looks for its shape.
- moved: claimed, hint, owner; the old hint goes.
- forgotten: ``GONE`` as its owner, then out of ``by_address``; what was interrupted in between is swept by the next look.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from safealloc import _torch
from safealloc.errors import PoolExhaustedError
from safealloc.formats.spec import ScaleSpec
from safealloc.pool import driver
from safealloc.pool.buffer import GONE, RETURNING, STOCK, Buffer, Drain, OneCallBuffer, zero_padded
from safealloc.pool.contents import remember
from safealloc.pool.memory import PrivateMemory

logger = logging.getLogger("safealloc.pool")


class Inventory:
    """Buffers of one pool. Nothing here decides who may have one; slow paths come in one at a time, or nested.

    Args:
        device: where they live.
        max_bytes, cache_bytes: as in :class:`safealloc.ScalePool`.
        pool: the pool's number, for :func:`safealloc.pool.contents.spec_of`.
        poison: whether the valid bytes of new buffers are NaN.
        red_zones: whether new buffers lie between red zones.
        ready: whether buffers may be handed out by the pool's hit path; else ``ready`` stays empty.
    """

    def __init__(
        self,
        device: torch.device,
        max_bytes: int | None = None,
        cache_bytes: int = 0,
        pool: int = 0,
        *,
        poison: bool = False,
        red_zones: bool = False,
        ready: bool = False,
    ) -> None:
        self.device = device
        self.max_bytes = max_bytes
        self.cache_bytes = cache_bytes
        self.pool = pool
        self.poison = poison
        self.red_zones = red_zones
        # (rows, k, layout, padded_k, format, owner), as the hit path asks; of grouped scales
        # ("grouped", k, layout, experts, format, owner)
        self._hints: dict[tuple[Any, ...], list[Buffer]] = {}
        self.ready = self._hints if ready else {}
        self.by_address: dict[int, Buffer] = {}
        self.one_call: list[OneCallBuffer] = []
        self.evictions = 0
        self._returning = False
        self._memory: PrivateMemory | None = None  # on CUDA

    # --- looking ------------------------------------------------------------------------------------------------------

    def buffers(self) -> list[Buffer]:
        """Every buffer; what an interrupt left half forgotten is forgotten here."""
        found = list(self.by_address.values())
        for buffer in found:
            if buffer.owner is GONE:
                self.by_address.pop(buffer.address, None)
        return [buffer for buffer in found if buffer.owner is not GONE]

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(buffer.nbytes for buffer in self.buffers())

    def streams(self) -> set[int]:
        """The raw streams that own buffers."""
        return {buffer.owner for buffer in self.buffers() if isinstance(buffer.owner, int)}

    def unused(self, spec: ScaleSpec) -> int:
        """How many buffers in stock serve a shape."""
        return sum(not buffer.held() for buffer in self._serving(spec, STOCK) if buffer.owner is STOCK)

    def _serving(self, spec: ScaleSpec, owner: Hashable) -> list[Buffer]:
        """Buffers that serve a shape and may belong to ``owner``; the smallest that serves grouped scales comes first."""
        found = [*self._hints.get(_key(spec, owner), ())]
        if spec.experts is None:
            return found
        return sorted((one for one in found if one.spec.rows >= spec.rows), key=lambda one: one.spec.rows)

    # --- taking -------------------------------------------------------------------------------------------------------

    def take(
        self, spec: ScaleSpec, owners: Iterable[Hashable], allowed: Callable[[Buffer], bool], taker: Hashable
    ) -> tuple[Buffer, Tensor] | None:
        """The first buffer of a shape that can be claimed and is allowed, with the claim; ``None`` where there is none.

        Args:
            spec: the shape. A buffer of grouped scales serves fewer rows as well.
            owners: whose buffers are looked at, in this order.
            allowed: whether a buffer that is claimed may be taken.
            taker: the new owner, a raw stream or a graph memory-pool handle.
        """
        for owner in owners:
            for buffer in self._serving(spec, owner):
                claim = buffer.claim()
                if claim is None:
                    if not buffer.held() and buffer.altered():
                        self._give_up(buffer)
                    continue
                if buffer.owner is None and self.by_address.get(buffer.address) is buffer:
                    buffer.give_to(owner)  # an interrupt left it unfiled
                if buffer.owner != owner:
                    self._drop_hint(buffer, owner)
                elif allowed(buffer):
                    self._move(buffer, taker)
                    return buffer, claim
                del claim
        return None

    def _give_up(self, buffer: Buffer) -> None:
        logger.warning(
            "a holder resized, moved or shared the memory of a buffer, which is not used again: %s", buffer.spec
        )
        self.forget(buffer)

    # --- making -------------------------------------------------------------------------------------------------------

    def make_cached(self, spec: ScaleSpec, owner: Hashable) -> tuple[Buffer, Tensor] | None:
        """A new buffer in the cache, or ``None`` where the cache has no room for it; raises as :meth:`make`."""
        if not _torch.reusable or spec.nbytes > self.cache_bytes:
            return None
        cached = sum(buffer.nbytes for buffer in self.buffers() if not buffer.kept)
        if not self._evict(cached + spec.nbytes - self.cache_bytes):
            return None
        return self.make(spec, owner, kept=False)

    def make(
        self, spec: ScaleSpec, owner: Hashable, *, kept: bool, filled_on: int | None = None
    ) -> tuple[Buffer, Tensor]:
        """A new buffer, with a claim on it.

        Args:
            spec, owner, kept: of the buffer.
            filled_on: the raw stream that is current, which whoever takes the buffer out of stock has to let pass.

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
        buffer = Buffer(spec, base, kept=kept)
        claim = base.data
        drain = None if filled_on is None else Drain.on([filled_on], self.device)
        if drain is not None:
            buffer.drain_with(drain)
        remember(base, spec, self.pool)
        self._hint(buffer, owner)
        self.by_address[buffer.address] = buffer
        buffer.give_to(owner)
        return buffer, claim

    def make_all(self, specs: Sequence[ScaleSpec], stream: int) -> None:
        """New buffers that are kept, in stock: all of them or none; raises as :meth:`make`.

        Args:
            specs: one for each.
            stream: the raw stream that is current, on which they are filled.
        """
        self.make_room(sum(spec.nbytes for spec in specs))
        before = set(self.by_address)
        try:
            for spec in specs:
                self.make(spec, STOCK, kept=True, filled_on=stream)
        except BaseException:
            for address in set(self.by_address) - before:
                self.forget(self.by_address[address])
            raise

    def make_for_one_call(self, spec: ScaleSpec) -> Tensor:
        """A buffer for one call, from the allocator that everybody uses; raises as :meth:`make`."""
        self.make_room(spec.nbytes)
        tensor = self._zero_padded(spec)
        self.one_call = [*(buffer for buffer in self.one_call if buffer.alive()), OneCallBuffer(spec, tensor)]
        remember(tensor, spec, self.pool)
        return tensor

    def make_in_capture(self, spec: ScaleSpec) -> Tensor:
        """Zeros that the graph under capture owns, and zeroes at every replay."""
        tensor = spec.scales_in(torch.zeros(spec.nbytes, dtype=torch.uint8, device=self.device))
        remember(tensor, spec, self.pool)
        return tensor

    def _base_from_memory(self, spec: ScaleSpec) -> Tensor:
        if self.device.type != "cuda":
            return self._zero_padded(spec)
        if self._memory is None:
            self._memory = PrivateMemory(self.device)
        return self._memory.allocate(lambda: self._zero_padded(spec))

    def _zero_padded(self, spec: ScaleSpec) -> Tensor:
        return zero_padded(spec, self.device, poison=self.poison, red_zones=self.red_zones)

    # --- waiting for what was queued ----------------------------------------------------------------------------------

    def start_drain(self) -> None:
        """Of every buffer of eager work that nobody holds: record that from here on only what is queued has to pass."""
        drains = {stream: Drain.on([stream], self.device) for stream in self.streams()}
        for buffer in self.buffers():
            claim = buffer.claim()
            drain = drains.get(buffer.owner) if isinstance(buffer.owner, int) else None
            if claim is not None and drain is not None and not buffer.drained():
                buffer.drain_with(drain)
            del claim

    def return_from(self, handles: Collection[Hashable]) -> None:
        """The graphs of these handles are gone: their buffers come back once nobody holds them and all has passed."""
        self._returning = True
        for buffer in self.buffers():
            if buffer.owner in handles:
                self._hint(buffer, RETURNING)
                last, buffer.drain = buffer.owner, None
                buffer.give_to(RETURNING)
                self._drop_hint(buffer, last)

    def collect_returning(self, streams: Collection[int]) -> None:
        """Put back into stock what has come back; ``streams`` are all on which it may have been used."""
        returning = [buffer for buffer in self.buffers() if buffer.owner is RETURNING] if self._returning else []
        drain = None
        for buffer in returning:
            claim = buffer.claim()
            if claim is not None and buffer.drain is None:
                drain = drain or Drain.on(streams, self.device)
                buffer.drain = drain
            if claim is not None and buffer.drain is not None and buffer.drain.passed():
                buffer.captures, buffer.readers = {}, {}
                buffer.drain_with(buffer.drain)
                self._move(buffer, STOCK)
            del claim
        self._returning = any(buffer.owner is RETURNING for buffer in returning)

    # --- giving up ----------------------------------------------------------------------------------------------------

    def make_room(self, nbytes: int) -> None:
        """Raises: PoolExhaustedError: so many more bytes are beyond ``max_bytes``; then nothing was given up."""
        if self.max_bytes is None:
            return
        one_call = sum(buffer.nbytes for buffer in self.one_call if buffer.alive())
        held = self.nbytes
        if not self._evict(held + one_call + nbytes - self.max_bytes):
            raise PoolExhaustedError(
                f"{nbytes} more bytes would take the pool beyond max_bytes={self.max_bytes}: it holds {held} in "
                f"{len(self.by_address)} buffers, and callers hold {one_call} that were made for one call"
            )

    def trim(self, reserved: bool = False) -> int:
        """Give up the cache's idle buffers, or all that no graph has, and what is free to the device; their bytes."""
        before = self.nbytes
        self._forget_idle(reserved)  # apart, so that no variable here holds one when the memory is released
        self.release_memory()
        return before - self.nbytes

    def clear(self) -> None:
        """Forget every buffer; held tensors stay valid."""
        self._forget_all()
        self._hints.clear()
        self.one_call.clear()
        self.release_memory()

    def forget(self, buffer: Buffer) -> None:
        """Forget one buffer."""
        owner = buffer.owner
        buffer.give_to(GONE)
        buffer.release()
        self.by_address.pop(buffer.address, None)
        self._drop_hint(buffer, owner)

    def release_memory(self) -> None:
        """Give what is free to the device. Buffers that are left stay where they are, new ones come from elsewhere."""
        memory = self._memory
        if memory is not None:
            self._memory = None
            memory.release()
            with driver.relaxed():  # somebody may be capturing
                torch.cuda.empty_cache()

    def _evict(self, nbytes: int) -> bool:
        """Give up idle buffers of the cache of at least so many bytes, least recently used first; none if too few."""
        if nbytes <= 0:
            return True
        claims, found = [], 0
        for buffer in sorted((one for one in self.buffers() if not one.kept), key=lambda one: one.last_use):
            if found >= nbytes:
                break
            claim = buffer.claim()
            if claim is not None or (not buffer.held() and buffer.altered()):
                claims.append((buffer, claim))
                found += buffer.nbytes
        if found < nbytes:
            return False
        for buffer, _ in claims:
            self.forget(buffer)
            self.evictions += 1
        return True

    def _forget_all(self) -> None:
        for buffer in self.buffers():
            self.forget(buffer)

    def _forget_idle(self, reserved: bool) -> None:
        for buffer in self.buffers():
            free = not buffer.kept or (reserved and (buffer.owner is STOCK or isinstance(buffer.owner, int)))
            claim = buffer.claim() if free else None
            if claim is not None or (not buffer.held() and buffer.altered()):
                self.forget(buffer)
            del claim

    # --- hints --------------------------------------------------------------------------------------------------------

    def _move(self, buffer: Buffer, owner: Hashable) -> None:
        """Change the owner of a buffer that is claimed."""
        last = buffer.owner
        if last == owner:
            buffer.give_to(owner)  # readers may have passed
            return
        if self.device.type == "cuda" and isinstance(owner, int):  # its memory may be another stream's
            buffer.base.record_stream(torch.cuda.current_stream(self.device))
        self._hint(buffer, owner)
        buffer.give_to(owner)
        self._drop_hint(buffer, last)

    def _hint(self, buffer: Buffer, owner: Hashable) -> None:
        hints = self._hints.setdefault(_key(buffer.spec, owner), [])
        if buffer not in hints:
            hints.append(buffer)

    def _drop_hint(self, buffer: Buffer, owner: Hashable) -> None:
        """A hint that is not true any more goes; one that is stays."""
        key = _key(buffer.spec, owner)
        hints = self._hints.get(key)
        if hints is not None and buffer.owner != owner:
            if buffer in hints:
                hints.remove(buffer)
            if len(self._hints) > 1024 + 4 * len(self.by_address):  # an eager prefill brings thousands of shapes
                for key in [key for key, hints in list(self._hints.items()) if not hints]:
                    self._hints.pop(key, None)


def _key(spec: ScaleSpec, owner: Hashable) -> tuple[Any, ...]:
    if spec.experts is not None:
        return "grouped", spec.k, spec.layout, spec.experts, spec.format, owner
    return spec.rows, spec.k, spec.layout, spec.padded_k, spec.format, owner

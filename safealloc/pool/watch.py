"""Watching: checks that are stacked around a pool's handouts, and know nothing of who gets which buffer.

- ``verify`` looks at all padding now, and synchronizes; with ``debug`` before each handout.
- The guard (:mod:`safealloc.pool.guard`) checks at every N-th handout and replay, asynchronously; ``safe_point`` reports what
  it has found.
"""

from __future__ import annotations

import logging
from dataclasses import replace

import torch
from torch import Tensor

from safealloc.errors import Corruption, PaddingCorruptionError, SafeAllocError
from safealloc.formats.spec import ScaleSpec
from safealloc.pool.buffer import Buffer
from safealloc.pool.driver import Capture
from safealloc.pool.guard import Guard
from safealloc.pool.inventory import Inventory
from safealloc.pool.nan import NanWatch
from safealloc.pool.verify import find_corruptions, find_written_red_zones, repair_padding, repair_red_zones

logger = logging.getLogger("safealloc.pool")


class Watch:
    """The checks of one pool; its lock is held at each call but :attr:`alarmed`.

    Args:
        inventory: whose buffers are checked.
        debug: verify before each handout.
        verify_every: handouts or replays between two checks of a buffer by the guard; 0 is no guard.
        verify_repair: zero and log what the guard finds, instead of raising.
        nan: what watches the inputs of quantizers.
    """

    def __init__(
        self,
        inventory: Inventory,
        *,
        debug: bool = False,
        verify_every: int = 0,
        verify_repair: bool = False,
        nan: NanWatch | None = None,
    ) -> None:
        self._inventory = inventory
        self._debug = debug
        self._repair = verify_repair
        self._guard = Guard(inventory.device, verify_every) if verify_every else None
        self._nan = nan

    @property
    def alarmed(self) -> bool:
        """Whether the guard, or what watches for NaN, found something that was not reported yet."""
        return (self._guard is not None and self._guard.alarmed) or (self._nan is not None and self._nan.alarmed)

    def before_handout(self, capture: Capture | None) -> None:
        """Raise or repair what is known to be dirty; with ``debug``, look at everything.

        Raises:
            PaddingCorruptionError: padding is not zero.
            SafeAllocError: ``debug`` in a capture.
        """
        if self._debug:
            if capture is not None:
                raise SafeAllocError("debug=True verifies at each acquire, which a CUDA graph capture forbids")
            self.verify()
        if capture is None and self._guard is not None and self._guard.alarmed:
            self._report_padding(self._guard)

    def handed_out(self, tensor: Tensor, capture: Capture | None) -> None:
        """A tensor is about to be returned to a caller of the pool, in a capture or not."""
        buffer = self._inventory.by_address.get(tensor.data_ptr())
        if self._guard is not None and buffer is not None:  # not what was made for one call
            self._guard.handed_out(buffer, capture)

    def verify(self, repair: bool = False) -> int:
        """Check all buffers, and those made for one call that somebody still holds; how many were checked.

        Raises:
            PaddingCorruptionError: padding is not zero, without ``repair``.
        """
        self._synchronize()
        buffers = [(buffer.spec, buffer.base) for buffer in self._inventory.buffers() if not buffer.altered()]
        one_call = [(buffer.spec, buffer.tensor()) for buffer in self._inventory.one_call]
        buffers += [(spec, tensor) for spec, tensor in one_call if tensor is not None]
        del one_call
        count = len(buffers)
        self._raise_or_repair(buffers, repair)
        return count

    def report_alarms(self) -> None:
        """Raise or repair what the guard has found since the last call, and log the first NaN.

        Raises:
            PaddingCorruptionError: padding is not zero, without ``verify_repair``.
            NanError: a NaN, with ``SAFEALLOC_STRICT=1``.
        """
        if self._guard is not None and self._guard.alarmed:
            self._report_padding(self._guard)
        if self._nan is not None and self._nan.alarmed:
            self._nan.report()

    def _report_padding(self, guard: Guard) -> None:
        self._synchronize()
        alarmed = [(buffer.spec, buffer.base) for buffer in guard.alarms()]
        if not self._raise_or_repair(alarmed, self._repair):
            logger.warning("a check found padding that was not zero, and that is zero now")

    def close(self) -> None:
        """Check nothing any more."""
        if self._guard is not None:
            self._guard.close()

    def _raise_or_repair(self, buffers: list[tuple[ScaleSpec, Tensor]], repair: bool) -> bool:
        """Whether any was dirty. Empties the list, which the traceback of the error would hold."""
        corruptions = [self._with_suspect(corruption) for corruption in self._find(buffers)]
        if corruptions and repair:
            repair_padding(buffers, corruptions)
            if self._inventory.red_zones:
                repair_red_zones(buffers, corruptions)
            self._synchronize()
        buffers.clear()
        if corruptions and not repair:
            raise PaddingCorruptionError(corruptions)
        for corruption in corruptions:
            logger.warning("zeroed padding that somebody wrote: %s", corruption)
        return bool(corruptions)

    def _find(self, buffers: list[tuple[ScaleSpec, Tensor]]) -> list[Corruption]:
        return find_corruptions(buffers) + (find_written_red_zones(buffers) if self._inventory.red_zones else [])

    def _with_suspect(self, corruption: Corruption) -> Corruption:
        buffer: Buffer | None = self._inventory.by_address.get(corruption.address)
        if self._guard is None or buffer is None:
            return corruption
        return replace(corruption, handed_to=self._guard.suspect(buffer))

    def _synchronize(self) -> None:
        if self._inventory.device.type == "cuda":
            torch.cuda.synchronize(self._inventory.device)

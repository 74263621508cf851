"""The guard: asynchronous checks of padding, for production.

Each buffer's padding is checked at every N-th handout, and, where CUDA graphs are captured, at every N-th replay of each. A
kernel sets a word in the host's memory if it finds a byte that is not zero; the pool reads that word when it is called next.
Nothing synchronizes while all is well.
"""

from __future__ import annotations

import ctypes
import logging
import os
import sys
import weakref
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from safealloc import _optional
from safealloc.errors import SafeAllocError
from safealloc.formats.spec import ScaleSpec
from safealloc.pool.buffer import Buffer
from safealloc.pool.driver import Capture
from safealloc.pool.verify import find_corruptions

_SLOTS = 1 << 12  # flags; a buffer has the one of its number, modulo
_PIECES = 1 << 16  # what a table has room for: some 8 GB of scales
_GRAPHS = 1024  # that count replays each on their own; more of them share counters
_PACKAGE = str(Path(__file__).parents[1]) + os.sep
_HAND_OUT = tuple(_PACKAGE + os.path.join(*path) for path in (("pool", ""), ("ops", "acquire.py")))
_TORCH = str(Path(torch.__file__).parent)
_never_freed: list[Tensor] = []  # flags: a kernel in flight may set one after the pool is gone

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Watched:
    """What a guard knows of one buffer.

    Attributes:
        slot: of its flag.
        handouts: to eager callers.
        handed_to: who was handed it last.
        suspect: who had been handed it last when it was last checked; ``None`` in graphs, which have many in turn.
        in_table: whether graphs check it.
    """

    slot: int
    handouts: int = 0
    handed_to: str = ""
    suspect: str | None = None
    in_table: bool = False


class Guard:
    """Asynchronous checks of one pool's buffers; the pool's lock is held at each call but :attr:`alarmed`.

    Args:
        device: of the buffers.
        every: handouts or replays between two checks, at least 1.

    Raises:
        SafeAllocError: on CUDA without Triton, or in a capture.
    """

    def __init__(self, device: torch.device, every: int) -> None:
        self.every = every
        self._on_cuda = device.type == "cuda"
        self._watched: weakref.WeakKeyDictionary[Buffer, _Watched] = weakref.WeakKeyDictionary()
        self._made = 0
        if self._on_cuda and (missing := _optional.missing("triton")):
            raise SafeAllocError(f"verify_every needs Triton on CUDA: {missing}")
        self._flags = torch.zeros(_SLOTS, dtype=torch.int32, pin_memory=self._on_cuda)
        _never_freed.append(self._flags)
        # reading a tensor's element costs a hundred times as much
        self._words = (ctypes.c_int32 * _SLOTS).from_address(self._flags.data_ptr())
        self._replays = ReplayChecks.make(device, self._flags) if self._on_cuda else None

    @property
    def alarmed(self) -> bool:
        """Whether a check found something that :meth:`alarms` has not returned yet."""
        return self._words[0] != 0

    def alarms(self) -> list[Buffer]:
        """The buffers in which a check found padding that is not zero, since the last call."""
        self._words[0] = 0  # before the others: what is set from here on sets this one again
        found = [buffer for buffer, watched in self._watched.items() if self._words[watched.slot]]
        for buffer in found:
            self._words[self._watched[buffer].slot] = 0
        return found

    def suspect(self, buffer: Buffer) -> str | None:
        """Who was handed a buffer last, before it was checked."""
        watched = self._watched.get(buffer)
        return None if watched is None else watched.suspect or watched.handed_to or None

    def handed_out(self, buffer: Buffer, capture: Capture | None) -> None:
        """A buffer is about to be returned to a caller of the pool, in a capture or not."""
        watched = self._watched.get(buffer)
        if watched is None:
            self._made += 1
            watched = self._watched[buffer] = _Watched(1 + self._made % (_SLOTS - 1))
        if capture is not None:
            watched.suspect = None
            assert self._replays is not None
            if not watched.in_table:
                watched.in_table = True
                self._replays.add(buffer.spec, buffer.base, watched.slot)
            self._replays.check_in(capture, self.every)
        else:
            watched.handouts += 1
            if watched.handouts % self.every == 0:
                watched.suspect = watched.handed_to
                self._check(buffer, watched.slot)
        watched.handed_to = _caller()

    def close(self) -> None:
        """Check nothing any more, and wait until no replay does."""
        self._watched.clear()
        if self._replays is not None:
            self._replays.table[0, 0] = 0
            torch.cuda.synchronize(self._replays.counters.device)

    def _check(self, buffer: Buffer, slot: int) -> None:
        if self._on_cuda:
            from safealloc.kernels import triton_guard

            triton_guard.check(buffer.spec, buffer.base, self._flags, slot)
        elif find_corruptions([(buffer.spec, buffer.base)]):
            self._words[slot] = self._words[0] = 1


@dataclass(slots=True)
class ReplayChecks:
    """The node that each captured graph gets, and the table of what all of them check.

    Attributes:
        table: int64, in pinned memory, so that buffers which are handed out after the node was captured count too.
        flags: the guard's.
        counters: int32 on the device, a row a graph.
        seen: captures that have their node.
    """

    table: Tensor
    flags: Tensor
    counters: Tensor
    seen: set[int] = field(default_factory=set)
    pieces: int = 0

    @classmethod
    def make(cls, device: torch.device, flags: Tensor) -> Self:
        from safealloc.kernels.triton_guard import WORDS, check_table

        if torch.cuda.is_current_stream_capturing():
            raise SafeAllocError("verify_every: make the pool before the capture, not in it")
        programs = torch.cuda.get_device_properties(device).multi_processor_count
        table = torch.zeros((1 + _PIECES, WORDS), dtype=torch.int64, pin_memory=True)
        counters = torch.zeros((_GRAPHS, -(-programs // 4) * 4), dtype=torch.int32, device=device)
        check_table(table, flags, counters[0], 1)  # compiles it: a capture must not
        torch.cuda.synchronize(device)  # whatever stream counts first
        return cls(table, flags, counters)

    def add(self, spec: ScaleSpec, base: Tensor, slot: int) -> None:
        """Have all graphs check a buffer, which stays until the pool is closed.

        Args:
            spec: of the buffer.
            base: all its scales, uint8 ``[padded_rows, padded_cols]``.
            slot: its flag.
        """
        from safealloc.kernels.triton_guard import pieces_of

        pieces = pieces_of(spec, base)
        if self.pieces + len(pieces) > _PIECES:
            logger.warning("verify_every has no room for %s in graphs: only eager calls are checked", spec)
            return
        if pieces:
            rows = slice(1 + self.pieces, 1 + self.pieces + len(pieces))
            self.table[rows] = torch.tensor([(*piece, slot) for piece in pieces], dtype=torch.int64)
        self.pieces += len(pieces)
        self.table[0, 0] = self.pieces  # last: a replay may be reading

    def check_in(self, capture: Capture, every: int) -> None:
        """Record the graph's node, if it has none yet."""
        if capture.id in self.seen:
            return
        from safealloc.kernels.triton_guard import check_table

        check_table(self.table, self.flags, self.counters[len(self.seen) % _GRAPHS], every)
        capture.keep(self.table)
        capture.keep(self.counters)
        self.seen.add(capture.id)


def _caller() -> str:
    """Who asked the pool: the function of this package that did, if one did, and where it was called from."""
    frame = sys._getframe(1)
    inner = ""
    while frame.f_back is not None:
        file = frame.f_code.co_filename
        if file.startswith(_PACKAGE):
            if not file.startswith(_HAND_OUT):
                inner = frame.f_code.co_name
        elif not file.startswith(_TORCH):
            break
        frame = frame.f_back
    where = f"{frame.f_code.co_filename}:{frame.f_lineno} ({frame.f_code.co_name})"
    return f"{inner} at {where}" if inner else where

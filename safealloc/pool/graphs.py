"""Which captures a pool has served, and whose graphs are alive."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from safealloc.formats.spec import ScaleSpec
from safealloc.pool import driver
from safealloc.pool.buffer import STOCK, Buffer, Drain
from safealloc.pool.driver import Capture
from safealloc.pool.inventory import Inventory
from safealloc.pool.reports import GraphReport

_PATIENCE = 1e-3
"""Seconds that a capture waits for a stream that has nothing to do, to take over a buffer of it."""


@dataclass(slots=True)
class CaptureUse:
    """What a pool knows of one capture.

    Attributes:
        capture: as the driver knows it.
        handle: the graph memory-pool handle that its buffers belong to.
        since: requests that the pool had answered when it first saw the capture.
        synchronized: whether the device had passed what was queued before the capture began.
        buffers: what the capture was given.
    """

    capture: Capture
    handle: Hashable
    since: int
    synchronized: bool
    buffers: dict[Buffer, None]

    def may_reuse(self, stream: int) -> Callable[[Buffer], bool]:
        """Whether the capture may have a buffer of its own handle, that is claimed, on one of its streams.

        Graphs of one handle replay one after the other. Within one graph only the stream orders, and a reader on another
        stream joins at some point that is not known here.
        """
        return lambda buffer: buffer.captures.get(self.capture.id, stream) == stream

    def may_take_over(self, stream: int) -> Callable[[Buffer], bool]:
        """Whether the capture may have a buffer, that is claimed, of eager work (a warm-up) or in stock.

        A replay may write it on any stream, so that all that was queued has to have passed: events that were recorded while
        nobody held it, here at the latest. On a stream that is capturing itself none can be recorded: there it takes whoever
        begins captures to synchronize first (``torch.cuda.graph`` does), and to have said so.
        """

        def allowed(buffer: Buffer) -> bool:
            if buffer.drained():
                return True
            if buffer.readers or not isinstance(buffer.owner, int):
                return False
            if self.synchronized and buffer.owner == stream:
                return buffer.last_use <= self.since
            drain = Drain.on([buffer.owner], buffer.base.device)
            if drain is None:
                return False
            buffer.drain_with(drain)
            return buffer.base.is_cuda and drain.passes_within(_PATIENCE)

        return allowed

    def take(self, inventory: Inventory, spec: ScaleSpec, stream: int) -> Tensor | None:
        """A buffer for the capture, which stays where it is as long as the graph lives; ``None`` where there is none."""
        found = inventory.take(spec, (self.handle,), self.may_reuse(stream), self.handle)
        if found is None:
            eager = (STOCK, *inventory.streams())
            found = inventory.take(spec, eager, self.may_take_over(stream), self.handle)
        if found is None:
            return None
        buffer, tensor = found
        buffer.kept = True
        buffer.captures[self.capture.id] = stream
        self.capture.keep(buffer.base)
        self.buffers[buffer] = None
        return tensor


class GraphUses:
    """The captures that one pool has served, as long as their graphs live; the pool's lock is held at each call."""

    def __init__(self, pool: int) -> None:
        self._pool = pool
        self._uses: dict[int, CaptureUse] = {}  # by the driver's number of the capture
        self._seen_destroyed = 0  # graphs of the process found destroyed when the pool last took buffers back
        self._shared: tuple[Hashable, bool] = (
            None,
            False,
        )  # handle of captures that somebody else begins; synchronized
        self._reports: weakref.WeakKeyDictionary[Any, GraphReport] = weakref.WeakKeyDictionary()

    def use_of(self, capture: Capture, requests: int) -> CaptureUse:
        """What is known of a capture under way.

        Args:
            capture: of the current stream.
            requests: how many the pool has answered so far.
        """
        use = self._uses.get(capture.id)
        if use is None:
            shared, synchronized = self._shared
            handle = capture.handle or shared or ("capture", capture.id)
            use = CaptureUse(capture, handle, requests, synchronized and capture.handle is None, {})
            use = self._uses.setdefault(capture.id, use)
        return use

    def return_gone(self, inventory: Inventory) -> None:
        """Let go of the buffers of handles whose last graph was destroyed since the last call."""
        destroyed = driver.destroyed()
        if destroyed == self._seen_destroyed:
            return
        dead = {number for number, use in list(self._uses.items()) if not use.capture.alive}
        living = {use.handle for number, use in list(self._uses.items()) if number not in dead}
        inventory.return_from({use.handle for number, use in list(self._uses.items()) if number in dead} - living)
        for number in dead:
            self._uses.pop(number, None)
        self._seen_destroyed = destroyed  # last: what is interrupted is looked at again

    def handles(self) -> set[Hashable]:
        """The handles of living graphs."""
        return {use.handle for use in list(self._uses.values()) if use.capture.alive}

    def alive(self) -> int:
        """How many captures of living graphs were served."""
        return sum(use.capture.alive for use in list(self._uses.values()))

    def share(self, synchronized: bool) -> contextlib.ExitStack:
        """Let captures that somebody else begins share one handle; closing the stack restores what was before."""
        restore = contextlib.ExitStack()
        restore.callback(setattr, self, "_shared", self._shared)
        self._shared = ("shared captures of pool", self._pool), synchronized
        return restore

    def note(self, graph: torch.cuda.CUDAGraph, capture: Capture, nodes: dict[str, int] | None) -> None:
        """Make the report of a graph whose capture ends."""
        use = self._uses.get(capture.id)
        buffers = tuple(use.buffers) if use else ()
        specs = tuple(buffer.spec for buffer in buffers)
        self._reports[graph] = GraphReport(specs, sum(buffer.nbytes for buffer in buffers), nodes)

    def report(self, graph: torch.cuda.CUDAGraph) -> GraphReport | None:
        """The report of a graph; ``None`` where none was made."""
        return self._reports.get(graph)

    def clear(self) -> None:
        """Forget every capture."""
        self._uses.clear()

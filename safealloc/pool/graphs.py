"""Which captures a pool has served, and whose graphs are alive."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch

from safealloc.pool import driver
from safealloc.pool.buffer import Buffer
from safealloc.pool.driver import Capture
from safealloc.pool.reports import GraphReport


@dataclass(slots=True)
class CaptureUse:
    """What a pool knows of one capture.

    Attributes:
        capture: as the driver knows it.
        handle: the graph memory-pool handle that its buffers belong to.
        since: requests that the pool had answered when it first saw the capture.
        buffers: what the capture was given.
    """

    capture: Capture
    handle: Hashable
    since: int
    buffers: dict[Buffer, None]

    def may_reuse(self, stream: int) -> Callable[[Buffer], bool]:
        """Whether the capture may have a buffer of its own handle, on one of its streams.

        Graphs of one handle replay one after the other. Within one graph only the stream orders, and a reader on another
        stream joins at some point that is not known here.
        """

        def allowed(buffer: Buffer) -> bool:
            if buffer.held():
                return False
            return buffer.capture is not self.capture or (buffer.stream == stream and not buffer.readers)

        return allowed

    def may_take_over(self, buffer: Buffer) -> bool:
        """Whether the capture may have a reserved buffer, or one that eager work (a warm-up) left before it began.

        Whoever begins a capture lets the device pass what came before it (``torch.cuda.graph`` synchronizes), so that no
        replay can meet it. What eager callers of other threads were handed since then is left alone.
        """
        return buffer.idle() and buffer.last_use <= self.since

    def give(self, buffer: Buffer, stream: int) -> None:
        """Note that the capture was given a buffer: it stays where it is as long as the graph lives."""
        if buffer.capture is not self.capture:
            buffer.readers.clear()
        buffer.capture, buffer.stream = self.capture, stream
        self.capture.keep(buffer.base)
        self.buffers[buffer] = None


class GraphUses:
    """The captures that one pool has served, as long as their graphs live; the pool's lock is held at each call."""

    def __init__(self, pool: int) -> None:
        self._pool = pool
        self._uses: dict[int, CaptureUse] = {}  # by the driver's number of the capture
        self._seen_destroyed = 0  # graphs of the process found destroyed when the pool last took buffers back
        self._shared_handle: Hashable = None  # of captures that somebody else began, where they share one
        self._reports: weakref.WeakKeyDictionary[Any, GraphReport] = weakref.WeakKeyDictionary()

    def use_of(self, capture: Capture, requests: int) -> CaptureUse:
        """What is known of a capture under way.

        Args:
            capture: of the current stream.
            requests: how many the pool has answered so far.
        """
        use = self._uses.get(capture.id)
        if use is None:
            handle = capture.handle or self._shared_handle or ("capture", capture.id)
            use = self._uses[capture.id] = CaptureUse(capture, handle, requests, {})
        return use

    def take_gone(self) -> set[Hashable]:
        """The handles whose last graph was destroyed since the last call; they are forgotten here."""
        destroyed = driver.destroyed()
        if destroyed == self._seen_destroyed:
            return set()
        self._seen_destroyed = destroyed
        dead = [use for use in self._uses.values() if not use.capture.alive]
        for use in dead:
            del self._uses[use.capture.id]
        return {use.handle for use in dead} - self.handles()

    def handles(self) -> set[Hashable]:
        """The handles of living graphs."""
        return {use.handle for use in self._uses.values()}

    def alive(self) -> int:
        """How many captures of living graphs were served."""
        return sum(use.capture.alive for use in self._uses.values())

    def share(self) -> contextlib.ExitStack:
        """Let captures that somebody else begins share one handle; closing the stack restores what was before."""
        restore = contextlib.ExitStack()
        restore.callback(setattr, self, "_shared_handle", self._shared_handle)
        self._shared_handle = ("shared captures of pool", self._pool)
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

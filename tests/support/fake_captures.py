"""Streams, captures and graphs on a CPU: numbers for raw streams, and captures whose graphs end when a test says so."""

# ruff: noqa: N802 - functions of the CUDA driver have its names

from __future__ import annotations

import ctypes
from collections.abc import Hashable, Iterator
from typing import Any

import pytest
from torch import Tensor

from safealloc import ScalePool, SfLayout
from safealloc.pool import driver


class FakeCapture:
    """What :class:`safealloc.pool.driver.Capture` is to a pool."""

    _numbers = iter(range(1, 1 << 62))

    def __init__(self, handle: Hashable = None) -> None:
        self.id = next(self._numbers)
        self.handle = handle
        self.alive = True
        self.kept: list[object] = []

    def keep(self, thing: object) -> None:
        self.kept.append(thing)


class FakeCuda:
    """What :mod:`safealloc.pool.driver` calls of the CUDA driver: captures, user objects, and a thread's capture mode."""

    _ids = iter(range(1 << 40, 1 << 62))

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.capturing: dict[int, tuple[int, int]] = {}  # raw stream: id and graph of its capture
        self.mode = 0  # global
        self._addresses: dict[int, int] = {}  # of what a destructor is called with, by user object
        self._retained: dict[int, list[int]] = {}  # user objects by graph
        monkeypatch.setattr(driver, "_libcuda", lambda: self)

    def begin(self, stream: int) -> int:
        """A capture on a raw stream; returns its graph."""
        graph = next(self._ids)
        self.capturing[stream] = next(self._ids), graph
        return graph

    def destructors_of(self, graph: int, *, backwards: bool = False) -> Iterator[int]:
        """Destroy a graph: its user objects' destructors run one by one, one a step."""
        objects = self._retained.pop(graph)
        for number in reversed(objects) if backwards else objects:
            self.run_destructor(number)
            yield number

    def run_destructor(self, number: int) -> None:
        """Of a user object."""
        ctypes.CDLL(None).sem_post(ctypes.c_void_p(self._addresses.pop(number)))

    def cuStreamGetCaptureInfo_v2(self, stream: Any, status: Any, number: Any, graph: Any, *unused: None) -> int:
        if stream.value in self.capturing:
            number._obj.value, graph._obj.value = self.capturing[stream.value]
        status._obj.value = int(stream.value in self.capturing)
        return 0

    def cuUserObjectCreate(self, out: Any, address: Any, destructor: Any, count: int, flags: int) -> int:
        out._obj.value = next(self._ids)
        self._addresses[out._obj.value] = address.value
        return 0

    def cuGraphRetainUserObject(self, graph: Any, user_object: Any, count: int, flags: int) -> int:
        self._retained.setdefault(graph.value, []).append(user_object.value)
        return 0

    def cuThreadExchangeStreamCaptureMode(self, mode: Any) -> int:
        self.mode, mode._obj.value = mode._obj.value, self.mode
        return 0


class FakeWorld:
    """A CPU pool, which stream is current, and which streams are in which capture."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch | None = None, **options: Any) -> None:
        self.pool = ScalePool("cpu", **options)
        self.stream = 1
        self.capture_of: dict[int, FakeCapture] = {}
        self.destroyed = 0
        self.pool._raw_stream = lambda index: self.stream  # type: ignore[method-assign]
        self.pool._capturing = lambda stream: stream in self.capture_of  # type: ignore[method-assign]
        self.pool._capture = lambda: self.capture_of.get(self.stream)  # type: ignore[method-assign, return-value]
        if monkeypatch is not None:
            monkeypatch.setattr(driver, "destroyed", lambda: self.destroyed)

    def acquire(self, stream: int, rows: int = 8, k: int = 64) -> Tensor:
        self.stream = stream
        return self.pool.acquire(rows, k, SfLayout.layout_8x4)

    def address(self, stream: int, rows: int = 8, k: int = 64) -> int:
        """Of an acquire whose tensor is dropped at once."""
        return self.acquire(stream, rows, k).data_ptr()

    def begin(self, *streams: int, handle: Hashable = None) -> FakeCapture:
        capture = FakeCapture(handle)
        for stream in streams:
            self.capture_of[stream] = capture
        return capture

    def end(self, capture: FakeCapture) -> None:
        self.capture_of = {stream: one for stream, one in self.capture_of.items() if one is not capture}

    def destroy(self, capture: FakeCapture) -> None:
        """Its graph is gone, and so is what it kept."""
        self.end(capture)
        capture.alive = False
        capture.kept.clear()
        self.destroyed += 1

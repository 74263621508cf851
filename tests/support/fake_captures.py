"""Streams, captures and graphs on a CPU: numbers for raw streams, and captures whose graphs end when a test says so."""

from __future__ import annotations

from collections.abc import Hashable
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

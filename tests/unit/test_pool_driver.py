"""What the pool hears from the CUDA driver, with a stand-in for it."""

from __future__ import annotations

import functools
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.fake_captures import FakeCuda

from safealloc.pool import driver

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="semaphores are libc's")


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    return FakeCuda(monkeypatch)


@pytest.mark.parametrize("backwards", [False, True])
def test_a_graph_whose_destructors_run_one_by_one_is_found_destroyed_in_the_end(
    cuda: FakeCuda, backwards: bool
) -> None:
    """In whichever order they run, and however often somebody looks in between."""
    graph = cuda.begin(9)
    capture = driver.under_way(9)
    assert driver.under_way(9) is capture
    before = driver.destroyed()
    for _ in cuda.destructors_of(graph, backwards=backwards):
        driver.destroyed()
        driver.destroyed()
    assert not capture.alive
    assert driver.destroyed() == before + 1


def test_graphs_whose_destructors_are_interleaved_are_each_found_destroyed(cuda: FakeCuda) -> None:
    graphs = [cuda.begin(stream) for stream in (1, 2, 3)]
    captures = [driver.under_way(stream) for stream in (1, 2, 3)]
    before = driver.destroyed()
    steps = [cuda.destructors_of(graph, backwards=graph == graphs[1]) for graph in graphs]
    for step in (steps[0], steps[1], steps[2], steps[1], steps[0]):
        next(step)
        driver.destroyed()
    assert [capture.alive for capture in captures] == [False, False, False]
    next(steps[2])
    assert driver.destroyed() == before + 3


def test_a_finalizer_that_looks_at_the_capture_first_leaves_one_capture(
    cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = cuda.begin(9)
    original, seen = cuda.cuUserObjectCreate, []

    def finalizer_comes_in(*given):
        monkeypatch.setattr(cuda, "cuUserObjectCreate", original)
        seen.append(driver.under_way(9))
        return original(*given)

    monkeypatch.setattr(cuda, "cuUserObjectCreate", finalizer_comes_in)
    assert driver.under_way(9) is seen[0]
    before = driver.destroyed()
    for _ in cuda.destructors_of(graph):
        driver.destroyed()
    after = driver.destroyed()
    assert after > before
    assert not seen[0].alive
    cuda.begin(8)
    driver.under_way(8)
    assert driver.destroyed() == after


@pytest.mark.parametrize("mode", [0, 1, 2])
def test_a_threads_capture_mode_is_as_before_after_what_needs_another(cuda: FakeCuda, mode: int) -> None:
    cuda.mode = mode
    with driver.relaxed():
        assert cuda.mode == 2
        with driver.relaxed():
            assert cuda.mode == 2
        assert cuda.mode == 2
    assert cuda.mode == mode
    with pytest.raises(KeyboardInterrupt), driver.relaxed():
        raise KeyboardInterrupt
    assert cuda.mode == mode


def test_an_interrupt_before_the_mode_was_exchanged_changes_nothing(cuda: FakeCuda, monkeypatch) -> None:
    original = cuda.cuThreadExchangeStreamCaptureMode

    def interrupted(mode):
        monkeypatch.setattr(cuda, "cuThreadExchangeStreamCaptureMode", original)
        raise KeyboardInterrupt

    monkeypatch.setattr(cuda, "cuThreadExchangeStreamCaptureMode", interrupted)
    with pytest.raises(KeyboardInterrupt), driver.relaxed():
        pass
    assert cuda.mode == 0


def test_a_stream_is_asked_whether_it_captures_and_an_error_means_that_nothing_may_be_recorded(monkeypatch) -> None:
    errors, statuses, asked = {7: 906}, {3: 1, 4: 2}, []

    def is_capturing(stream: Any, status: Any) -> int:
        asked.append(stream.value or 0)
        status._obj.value = statuses.get(stream.value, 0)
        return errors.get(stream.value, 0)

    library = SimpleNamespace(cuStreamIsCapturing=is_capturing)
    monkeypatch.setattr(driver.ctypes, "PyDLL", lambda name: library)
    monkeypatch.setattr(driver, "_stream_status", functools.cache(driver._StreamStatus))
    capturing = driver.capture_query(torch.device("cuda", 0))
    assert [capturing(stream) for stream in (3, 4, 5, 3)] == [True, True, False, True]
    assert [driver.may_record(stream) for stream in (0, 3, 4, 5, 7)] == [True, False, False, True, False]
    with pytest.raises(RuntimeError, match="failed with 906 for stream 0x7"):
        capturing(7)
    statuses.clear()
    assert not capturing(3)
    assert asked == [3, 4, 5, 3, 0, 3, 4, 5, 7, 7, 3]

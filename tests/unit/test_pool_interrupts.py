"""All or nothing: an exception at any line of the pool leaves every later call right, and no buffer lost."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.fake_captures import FakeCapture, FakeWorld
from support.internals import buffers_of, inventory_of

from safealloc import SafeAllocError, SfLayout
from safealloc.pool import pool as pool_module

LAYOUT = SfLayout.layout_8x4
POOL_FILES = str(Path(pool_module.__file__).parent)


class Interrupt(BaseException):
    """As KeyboardInterrupt, it is no Exception."""


def interrupted_at(line: int, action: Callable[[], object]) -> bool:
    """Run ``action``, raising at its ``line``-th line in the pool's files; whether it came that far."""
    lines = 0

    def trace(frame, event, arg):
        nonlocal lines
        if not frame.f_code.co_filename.startswith(POOL_FILES):
            return None
        if event == "line":
            lines += 1
            if lines == line:
                sys.settrace(None)
                raise Interrupt
        return trace

    sys.settrace(trace)
    try:
        action()
    except Interrupt:
        return True
    finally:
        sys.settrace(None)
    return False


def check(world: FakeWorld) -> None:
    """Nothing is held, every buffer can be had, no two are shared, bytes agree, and padding is zero."""
    pool = world.pool
    world.capture_of.clear()
    world.stream = 1
    pool.stats()  # sweeps what is half forgotten
    pool.take_back()
    held = [buffer for buffer in buffers_of(pool) if buffer.held()]
    assert held == [], "an interrupted call still holds a buffer"
    pool.verify()
    before = {buffer.address for buffer in buffers_of(pool) if isinstance(buffer.owner, int) or buffer.owner == "stock"}
    kept: list[torch.Tensor] = []
    for stream in (1, 2, 3):
        world.stream = stream
        for buffer in buffers_of(pool):
            if buffer.owner == stream or buffer.owner == "stock" or buffer.owner is None:
                spec = buffer.spec
                if spec.experts is None:
                    kept.append(pool.acquire(spec.rows, spec.k, spec.layout, padded_k=spec.padded_k))
                else:
                    kept.append(pool.acquire_grouped(spec.rows, spec.k, spec.experts, spec.layout))
    got = [tensor.data_ptr() for tensor in kept]
    assert len(set(got)) == len(got), "two live tensors share memory"
    assert before <= set(got), "a buffer is lost"
    stats = pool.stats()
    assert stats.bytes == sum(buffer.nbytes for buffer in buffers_of(pool))
    kept.clear()
    pool.trim()
    assert all(buffer.kept for buffer in buffers_of(pool)), "trim left a cached buffer"
    pool.close()
    assert buffers_of(pool) == []
    assert inventory_of(pool).nbytes == 0


def capture_with(world: FakeWorld, stream: int = 9) -> FakeCapture:
    return world.begin(stream, handle=("graph", stream))


def acquire_a_new_shape(world: FakeWorld) -> None:
    world.acquire(1, rows=5)


def acquire_what_is_there(world: FakeWorld) -> None:
    world.acquire(1, rows=4)


def acquire_from_stock_on_another_stream(world: FakeWorld) -> None:
    world.acquire(2, rows=6)


def acquire_evicts(world: FakeWorld) -> None:
    for rows in range(10, 16):
        world.acquire(1, rows=rows)


def acquire_for_one_call(world: FakeWorld) -> None:
    world.acquire(1, rows=4000)


def acquire_grouped(world: FakeWorld) -> None:
    world.stream = 1
    world.pool.acquire_grouped(7, 64, 3)


def acquire_in_a_capture(world: FakeWorld) -> None:
    capture = capture_with(world)
    world.acquire(9, rows=6)
    world.acquire(9, rows=77)
    world.end(capture)


def graphs_come_and_go(world: FakeWorld) -> None:
    capture = capture_with(world)
    world.acquire(9, rows=6)
    world.destroy(capture)
    for _ in range(3):
        world.acquire(1, rows=4)


def reserve(world: FakeWorld) -> None:
    world.pool.reserve([6, 8], 64, LAYOUT, copies=2)


def trim(world: FakeWorld) -> None:
    world.pool.trim()


def verify(world: FakeWorld) -> None:
    world.pool.verify()


def stats(world: FakeWorld) -> None:
    world.pool.stats()


def close(world: FakeWorld) -> None:
    world.pool.close()


def take_back(world: FakeWorld) -> None:
    world.pool.take_back()


ACTIONS = [
    acquire_a_new_shape,
    acquire_what_is_there,
    acquire_from_stock_on_another_stream,
    acquire_evicts,
    acquire_for_one_call,
    acquire_grouped,
    acquire_in_a_capture,
    graphs_come_and_go,
    reserve,
    trim,
    verify,
    stats,
    close,
    take_back,
]


def prepared(monkeypatch: pytest.MonkeyPatch, **options: object) -> FakeWorld:
    world = FakeWorld(monkeypatch, cache_bytes=400, **options)
    world.stream = 1
    world.pool.reserve(6, 64, LAYOUT, copies=2)
    for rows in (1, 2, 4, 17):
        world.acquire(1, rows=rows)
    world.acquire(2, rows=3)
    return world


@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param({"verify_every": 1}, marks=pytest.mark.slow),
        pytest.param({"max_bytes": 60_000}, marks=pytest.mark.slow),
    ],
    ids=["plain", "watched", "limited"],
)
@pytest.mark.parametrize("action", ACTIONS, ids=lambda action: action.__name__)
@pytest.mark.filterwarnings("ignore::safealloc.CaptureGrowthWarning")
def test_an_exception_at_any_line(monkeypatch: pytest.MonkeyPatch, action, options) -> None:
    injected = 0
    for line in itertools.count(1):
        world = prepared(monkeypatch, **options)
        if not interrupted_at(line, lambda: action(world)):  # noqa: B023
            break
        injected += 1
        if action is close:
            world.pool.close()
            assert buffers_of(world.pool) == []
            with pytest.raises(SafeAllocError):
                world.acquire(1)
        else:
            check(world)
    assert injected > 5


def test_an_exception_that_interrupts_the_repair_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two in a row, in an acquire that evicts: what the first leaves half done, the second meets."""
    injected = 0
    for first in range(1, 400, 3):
        for second in (2, 9, 23, 41):
            world = prepared(monkeypatch)
            if not interrupted_at(first, lambda: acquire_evicts(world)):  # noqa: B023
                return
            interrupted_at(second, lambda: acquire_evicts(world))  # noqa: B023
            check(world)
            injected += 2
    assert injected > 100


def test_memory_runs_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """An allocation that fails leaves nothing behind, in an acquire and in the middle of a reserve."""
    for failing in range(1, 5):
        world = prepared(monkeypatch)
        calls = itertools.count(1)
        allocate = inventory_of(world.pool)._base_from_memory

        def fail(spec, calls=calls, failing=failing, allocate=allocate):
            if next(calls) >= failing:
                raise torch.OutOfMemoryError("no memory")
            return allocate(spec)

        monkeypatch.setattr(inventory_of(world.pool), "_base_from_memory", fail)
        before = len(buffers_of(world.pool))
        with pytest.raises(torch.OutOfMemoryError):
            world.pool.reserve([30, 31, 32, 33], 64, LAYOUT)
        assert sum(buffer.kept for buffer in buffers_of(world.pool)) == 2
        assert len(buffers_of(world.pool)) <= before
        monkeypatch.setattr(inventory_of(world.pool), "_base_from_memory", allocate)
        check(world)

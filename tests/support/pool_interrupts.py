"""Exceptions at any line of a pool, and whether everything is right afterwards.

``cd tests; python -m support.pool_interrupts SECONDS [FILE [SEED]]`` injects them at random, with re-entries beside, and
writes what came out as JSON.
"""

from __future__ import annotations

import gc
import json
import platform
import random
import signal
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.fake_captures import FakeCapture, FakeWorld
from support.internals import buffers_of, inventory_of

from safealloc import ScalePool, SfLayout
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
    for rows in (10, 60, 61):  # gives up nothing, then four buffers, then three
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


OPTIONS: tuple[dict[str, int], ...] = ({}, {"verify_every": 1}, {"max_bytes": 60_000})


def inject(seconds: float, numbers: random.Random) -> int:
    """Exceptions at random lines of random actions, each followed by the checks; how many."""
    injected = 0
    end = time.monotonic() + seconds
    with pytest.MonkeyPatch.context() as monkeypatch:
        while time.monotonic() < end:
            world = prepared(monkeypatch, **numbers.choice(OPTIONS))
            action = numbers.choice(ACTIONS)
            injected += interrupted_at(numbers.randint(1, 300), lambda: action(world))  # noqa: B023
            if action is not close:
                check(world)
    return injected


def re_enter(seconds: float) -> dict[str, int]:
    """An acquire in a signal handler and in finalizers while the main thread acquires; how often, and what was shared."""
    pool = ScalePool("cpu")
    pool.reserve(4, 64, LAYOUT, copies=64)
    held: list[torch.Tensor] = []
    entered = shared = acquires = 0

    def enter(*_: object) -> None:
        nonlocal entered
        entered += 1
        held.append(pool.acquire(4, 64, LAYOUT))

    class Cycle:
        def __init__(self) -> None:
            self.me = self

        def __del__(self) -> None:
            enter()

    before, threshold = signal.signal(signal.SIGALRM, enter), gc.get_threshold()
    signal.setitimer(signal.ITIMER_REAL, 1e-3, 1e-3)
    gc.set_threshold(23)
    end = time.monotonic() + seconds
    try:
        while time.monotonic() < end:
            Cycle()
            tensor = pool.acquire(4, 64, LAYOUT)
            acquires += 1
            while held:
                shared += held.pop().data_ptr() == tensor.data_ptr()
            del tensor
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        gc.set_threshold(*threshold)
        gc.collect()
    return {"acquires": acquires, "re_entries": entered, "shared": shared}


def main() -> None:
    seconds = float(sys.argv[1])
    warnings.simplefilter("ignore")
    result = {
        "command": "python -m support.pool_interrupts",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "exceptions_injected": inject(seconds * 0.8, random.Random(int(sys.argv[3]) if len(sys.argv) > 3 else 0)),
        "lost_or_shared": 0,  # a buffer that is lost or shared ends this with an AssertionError
        **re_enter(seconds * 0.2),
    }
    print(json.dumps(result))
    if len(sys.argv) > 2:
        Path(sys.argv[2]).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

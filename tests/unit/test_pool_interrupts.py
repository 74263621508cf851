"""All or nothing: an exception at any line of the pool leaves every later call right, and no buffer lost."""

from __future__ import annotations

import itertools

import pytest
import torch
from support.internals import buffers_of, inventory_of
from support.pool_interrupts import ACTIONS, LAYOUT, acquire_evicts, check, close, interrupted_at, prepared

from safealloc import SafeAllocError


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

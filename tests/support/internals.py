"""The one place where tests reach into a pool: what it holds, and what watches it."""

from __future__ import annotations

from safealloc import ScalePool
from safealloc.pool.buffer import Buffer
from safealloc.pool.guard import Guard
from safealloc.pool.inventory import Inventory
from safealloc.pool.watch import Watch


def inventory_of(pool: ScalePool) -> Inventory:
    """What the pool holds."""
    return pool._inventory


def buffers_of(pool: ScalePool) -> list[Buffer]:
    """Every buffer that the pool holds, oldest first."""
    return list(pool._inventory.by_address.values())


def watch_of(pool: ScalePool) -> Watch:
    """The checks of the pool."""
    return pool._watch


def guard_of(pool: ScalePool) -> Guard:
    """The guard of a pool with ``verify_every``."""
    guard = pool._watch._guard
    assert guard is not None
    return guard


def check_all(pool: ScalePool) -> None:
    """Have the guard check every buffer that it watches, as the N-th handout would."""
    guard = guard_of(pool)
    for buffer, watched in guard._watched.items():
        guard._check(buffer, watched.slot)


def watched_buffers(pool: ScalePool) -> int:
    """How many buffers the guard knows."""
    return len(guard_of(pool)._watched)


def unlock(pool: ScalePool) -> None:
    """Release what an exception on the exit line of a ``with`` statement left locked; only a tracer can raise there."""
    lock = pool._entrance._lock
    while lock._is_owned():
        lock.release()

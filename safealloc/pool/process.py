"""Objects that own memory of one process: no pickle, no use after a fork."""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, NoReturn

from safealloc.errors import PoolPicklingError, SafeAllocError


class OfOneProcess:
    """Base of what belongs to the process that made it."""

    def __init__(self) -> None:
        _alive.add(self)

    def __reduce__(self) -> NoReturn:
        raise PoolPicklingError(f"a {type(self).__name__} holds memory of one process and cannot be pickled or copied")

    def _leave_to_parent(self, parent: int) -> None:
        """In a forked child: become unusable, and leave what is held to the process ``parent``."""
        raise NotImplementedError


class Entrance:
    """The lock of one pool."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        _locks[id(self)] = self._lock
        weakref.finalize(self, _locks.pop, id(self), None).atexit = False

    def __call__(self) -> AbstractContextManager[Any]:
        """What a ``with`` statement enters: the lock itself, which no interrupt between two lines leaves locked.

        Only a thread that is in another pool, by a finalizer or a handler, does not wait for ever: who is in this pool may be
        waiting for the other one in the same way.
        """
        if _is_owned(self._lock) or not any(map(_is_owned, [*_locks.values()])):
            return self._lock
        return self._entered_soon()

    @contextlib.contextmanager
    def _entered_soon(self) -> Iterator[None]:
        if not self._lock.acquire(timeout=_PATIENCE):
            raise SafeAllocError(
                "a finalizer or a signal handler called a pool in which another thread waits for this one"
            )
        try:
            yield
        finally:
            self._lock.release()


_PATIENCE = 2.0  # seconds; two threads in two pools that need each other's give up then
_is_owned: Callable[[Any], bool] = getattr(type(threading.RLock()), "_is_owned")  # noqa: B009  by this thread
_locks: dict[int, Any] = {}  # of all pools, by their entrance
_alive: weakref.WeakSet[OfOneProcess] = weakref.WeakSet()


def _after_fork() -> None:
    for one in list(_alive):
        one._leave_to_parent(os.getppid())


os.register_at_fork(after_in_child=_after_fork)

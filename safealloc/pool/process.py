"""Objects that own memory of one process: no pickle, no use after a fork."""

from __future__ import annotations

import os
import threading
import weakref
from typing import NoReturn

import torch

from safealloc.errors import PoolPicklingError


class OfOneProcess:
    """Base of what belongs to the process that made it."""

    def __init__(self) -> None:
        _alive.add(self)

    def __reduce__(self) -> NoReturn:
        raise PoolPicklingError(f"a {type(self).__name__} holds memory of one process and cannot be pickled or copied")

    def _leave_to_parent(self, parent: int) -> None:
        """In a forked child: become unusable, and leave what is held to the process ``parent``."""
        raise NotImplementedError


def lock_of(device: torch.device) -> threading.RLock:
    """The one lock of all pools on a device.

    A thread that is in one pool may get into another by a finalizer or a signal handler. With a lock for each pool, two such
    threads could wait for each other.
    """
    return _locks.get(device) or _locks.setdefault(device, threading.RLock())


_locks: dict[torch.device, threading.RLock] = {}
_alive: weakref.WeakSet[OfOneProcess] = weakref.WeakSet()


def _after_fork() -> None:
    _locks.clear()  # a thread of the parent may have held one
    for one in list(_alive):
        one._leave_to_parent(os.getppid())


os.register_at_fork(after_in_child=_after_fork)

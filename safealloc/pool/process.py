"""Objects that own memory of one process: no pickle, no use after a fork."""

from __future__ import annotations

import os
import weakref
from typing import NoReturn

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


_alive: weakref.WeakSet[OfOneProcess] = weakref.WeakSet()


def _after_fork() -> None:
    for one in list(_alive):
        one._leave_to_parent(os.getppid())


os.register_at_fork(after_in_child=_after_fork)

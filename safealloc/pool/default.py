"""The pool that every function uses when none is given."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from safealloc import settings
from safealloc._checks import checked_device
from safealloc.pool.pool import ScalePool

_pools: dict[Any, ScalePool] = {}  # by torch.device
_replacement: ContextVar[ScalePool | None] = ContextVar("safealloc_pool", default=None)


def default_pool(device: torch.device | str | int | None = None) -> ScalePool:
    """The pool of the innermost :func:`use_pool`, if it is on ``device``; else the process's pool for ``device``.

    Args:
        device: ``None`` is the current CUDA device, or the CPU where there is none.

    Raises:
        ValueError: no such device, or a ``SAFEALLOC_*`` variable (:mod:`safealloc.settings`) has no such value.
    """
    replacement = _replacement.get()
    if replacement is not None and replacement.device == device:
        return replacement
    pool = _pools.get(device)
    if pool is None:
        device = checked_device(device)
        if replacement is not None and replacement.device == device:
            return replacement
        pool = _pools.get(device)
        if pool is None:  # no lock: a finalizer may come in here too, and whose pool comes second is dropped
            pool = _pools.setdefault(device, ScalePool(device, **dataclasses.asdict(settings.watch())))
    return pool


@contextlib.contextmanager
def use_pool(pool: ScalePool) -> Iterator[ScalePool]:
    """Inside, ``pool`` is the default pool of its device, for this context (threads started inside do not inherit it).

    Raises:
        TypeError: not a pool.
        PoolClosedError: the pool was closed.
    """
    checked_pool(pool).take_back()  # here, since what follows may be a capture
    token = _replacement.set(pool)
    try:
        yield pool
    finally:
        _replacement.reset(token)


def checked_pool(pool: ScalePool, x: Tensor | None = None) -> ScalePool:
    """``pool``, or a TypeError; a ValueError if it is not on the device of ``x``."""
    if not isinstance(pool, ScalePool):
        raise TypeError(f"expected a ScalePool, got {type(pool).__name__}")
    if x is not None and pool.device != x.device:
        raise ValueError(f"x is on {x.device}, the pool on {pool.device}")
    return pool


os.register_at_fork(after_in_child=_pools.clear)

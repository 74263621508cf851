"""Pools that are closed, memory that is given back, and NaN in what is free."""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch
from support.internals import buffers_of
from support.soak.oracle import NAN, LossError, check
from support.soak.registry import action
from support.soak.walk import MIB, POOLS, Soak

from safealloc import PoolClosedError, SfLayout


@action()
def reopen(soak: Soak) -> None:
    """Close a pool: each later call is refused, and its graphs still replay."""
    name = soak.numbers.choice(tuple(POOLS))
    old = soak.pools[name]
    held = old.acquire(5, 96, SfLayout.layout_128x4)
    storages = soak.unused_storages(old)
    old.close()
    refused: tuple[Callable[[], object], ...] = (
        lambda: old.acquire(5, 80, SfLayout.layout_128x4),
        lambda: old.reserve(5, 80),
        old.verify,
        old.trim,
        old.take_back,
    )
    for call in refused:
        try:
            call()
        except PoolClosedError:
            continue
        raise LossError("a closed pool went on")
    held.fill_(1)
    check(int(held.sum()) == held.numel(), "a held tensor of a closed pool is gone")
    soak.check_gone(storages)
    soak.make_pool(name)
    for one in soak.graphs:
        if one.pool is old:
            soak.replay(one)


@action()
def collect(soak: Soak) -> None:
    """Give back what nobody uses."""
    gc.collect()
    soak.pool().trim()
    if soak.on_cuda:
        torch.cuda.empty_cache()


@action()
def adversary(soak: Soak) -> None:
    """Fill free memory with NaN bytes."""
    sizes = [buffer.nbytes for pool in soak.pools.values() for buffer in buffers_of(pool)]
    sizes = [*soak.numbers.sample(sizes, min(len(sizes), 20)), 512, 1 << 16, MIB, 2 * MIB]
    if soak.on_cuda:
        sizes += [64 * MIB] * soak.numbers.choice((0, 0, 20))
    blocks = [torch.full((size,), NAN, dtype=torch.uint8, device=soak.device) for size in sizes]
    soak.counts["bytes poisoned"] += sum(sizes)
    del blocks

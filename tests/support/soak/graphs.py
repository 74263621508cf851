"""CUDA graphs: captured, replayed, failed half-way, deleted."""

from __future__ import annotations

import gc

import torch
from support.soak.lifetimes import adversary
from support.soak.limits import device_memory_limit
from support.soak.oracle import LossError, NotApplicableError, check
from support.soak.registry import action
from support.soak.walk import MIB, Captured, Soak
from support.soak.work import Dense

from safealloc import SafeAllocError, ScalePool, SfLayout, capture


@action(cuda=True)
def capture_graph(soak: Soak) -> None:
    """A graph of 1 to 6 works, with a graph memory-pool handle of its own or another graph's."""
    pool = soak.pool()
    works = [soak.work(pool) for _ in range(soak.numbers.randint(1, 6))]
    share = soak.numbers.random() < 0.4
    soak.replay(soak.captured(pool, works, share), soak.numbers.randint(1, 3))
    soak.counts["captures"] += 1


@action(cuda=True)
def grown_in_a_capture(soak: Soak) -> None:
    """A capture of a pool that has nothing: zeros are recorded in the graph, and the graph outlives the pool."""
    works = [soak.work(soak.pools["plain"]) for _ in range(soak.numbers.randint(1, 3))]
    for work in works:
        work.run()  # compiles
    soak.make_room_for_a_graph()
    with ScalePool(soak.device) as cold:
        for work in works:
            work.pool = cold
        with capture(pool=cold) as graph:
            for work in works:
                work.run()
        stats = cold.stats()
        check(
            (stats.buffers, stats.capture_fallbacks) == (0, len(works)), f"{len(works)} works in a cold pool: {stats}"
        )
        one = Captured(graph, works, cold, {})
        soak.graphs.append(one)
        soak.replay(one)
    adversary(soak)
    soak.replay(one, 3)


@action(cuda=True)
def replay(soak: Soak) -> None:
    """Some graphs many times, with eager calls of the same pools in between."""
    if not soak.graphs:
        raise NotApplicableError("no graph")
    for one in soak.numbers.choices(soak.graphs, k=3):
        if one.pool in soak.pools.values():
            soak.work(one.pool).run()
        soak.replay(one, soak.numbers.randint(1, 200))


@action(cuda=True)
def failing_capture(soak: Soak) -> None:
    """A capture that fails half-way, by an exception, a missing buffer or a real allocation failure; then it is retried."""
    how = soak.numbers.choice(("raise", "grow", "memory", "synchronize"))
    pool = soak.pools["strict"] if how == "grow" else soak.pool()
    works = [soak.work(pool) for _ in range(3)]
    for work in works:
        work.run()
    failures = {
        "raise": KeyError,
        "grow": SafeAllocError,
        "memory": torch.OutOfMemoryError,
        "synchronize": RuntimeError,
    }
    with soak.unchanged(pool):
        try:
            with capture(pool=pool):
                works[0].run()
                if how == "raise":
                    raise KeyError("half-way")
                if how == "grow":
                    pool.acquire(77, 48, SfLayout.layout_8x4)
                elif how == "memory":
                    free, _ = torch.cuda.mem_get_info(soak.device)
                    torch.empty(free + (1 << 40), dtype=torch.uint8, device=soak.device)
                else:
                    torch.cuda.synchronize()
                works[1].run()
        except failures[how]:
            soak.counts[f"failed captures: {how}"] += 1
        else:
            raise LossError(f"a capture that has to fail ({how}) went through")
    soak.replay(soak.captured(pool, works))


@action(cuda=True)
def out_of_memory_in_a_capture(soak: Soak) -> None:
    """The device is nearly full when a capture needs memory: it fails, and goes through once there is room."""
    pool = soak.pool("plain", "repairing")
    works = [Dense(soak, pool) for _ in range(2)]
    for work in works:
        work.run()
    soak.synchronize()
    failed = False
    with device_memory_limit(128 * MIB), soak.unchanged(pool, cache=False):
        try:
            with capture(pool=pool):
                works[0].run()
                torch.empty(256 * MIB, dtype=torch.uint8, device=soak.device)
        except torch.OutOfMemoryError:
            failed = True
    torch.cuda.empty_cache()
    check(failed, "there was memory in a capture on a full device")
    soak.counts["failed captures: full device"] += 1
    soak.replay(soak.captured(pool, works))


@action(cuda=True)
def delete_graphs(soak: Soak) -> None:
    """Some graphs go, and their buffers come back."""
    for _ in range(min(len(soak.graphs), soak.numbers.randint(1, 4))):
        del soak.graphs[soak.numbers.randrange(len(soak.graphs))]
        soak.counts["graphs deleted"] += 1
    if soak.numbers.random() < 0.5:
        gc.collect()

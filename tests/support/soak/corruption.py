"""Padding that somebody writes, and the checks that have to find it."""

from __future__ import annotations

from pathlib import Path

import torch
from support.internals import buffers_of, inventory_of
from support.soak.oracle import NAN, LossError, NotApplicableError, check, has_padding
from support.soak.registry import action
from support.soak.walk import Soak
from support.soak.work import Dense, Work

from safealloc import PaddingCorruptionError


@action()
def written_padding(soak: Soak) -> None:
    """Somebody writes padding: ``verify`` names it, and repairs it."""
    pool = soak.pool("plain", "strict")
    buffer = soak.padded_buffer(pool)
    before = buffer.base.clone()
    row, column = soak.corrupt(buffer)
    try:
        pool.verify()
    except PaddingCorruptionError as error:
        (found,) = error.corruptions
        at = (found.address, found.row, found.column, found.value, found.count)
        check(at == (buffer.address, row, column, NAN, 1), f"named {found}, it was row {row}, column {column}")
    else:
        raise LossError(f"verify did not find row {row}, column {column} of {buffer.spec}")
    pool.verify(repair=True)
    pool.verify()
    check(torch.equal(buffer.base, before), "a repair changed more than the padding")
    soak.counts["planted and named"] += 1


@action()
def guarded(soak: Soak) -> None:
    """Somebody writes padding of a buffer that is handed out again: the guard raises or repairs, within two handouts."""
    name = soak.numbers.choice(("raising", "repairing"))
    pool = soak.pools[name]
    work = Dense(soak, pool)
    work.run()
    address = pool.acquire(work.rows, work.k, work.layout).data_ptr()
    buffer = inventory_of(pool).by_address.get(address)
    if buffer is None or not has_padding(buffer):
        raise NotApplicableError("no padding")
    soak.corrupt(buffer)
    raised = False
    for _ in range(3):
        try:
            work.run()
            soak.synchronize()
            pool.safe_point()
        except PaddingCorruptionError as error:
            check([one.address for one in error.corruptions] == [address], f"named {error}")
            check(str(Path(__file__).parent) in (error.corruptions[0].handed_to or ""), f"blamed {error}")
            raised = True
            break
    check(raised == (name == "raising"), f"the pool {name!r} {'raised' if raised else 'did not raise'}")
    if raised:
        pool.verify(repair=True)
    soak.counts["guard: eager"] += 1


@action(cuda=True)
def guarded_replay(soak: Soak) -> None:
    """Somebody writes padding of a buffer that a graph uses: its replays find it."""
    name = soak.numbers.choice(("raising", "repairing"))
    pool = soak.pools[name]
    works: list[Work] = [Dense(soak, pool) for _ in range(2)]
    one = soak.captured(pool, works)
    found = [buffer for buffer in buffers_of(pool) if buffer.address in one.addresses and has_padding(buffer)]
    if not found:
        raise NotApplicableError("no buffer of its own has padding")
    buffer = soak.numbers.choice(found)
    soak.corrupt(buffer)
    for _ in range(2):
        one.graph.replay()
    soak.synchronize()
    raised = False
    try:
        pool.safe_point()
    except PaddingCorruptionError as error:
        check([corruption.address for corruption in error.corruptions] == [buffer.address], f"named {error}")
        raised = True
        pool.verify(repair=True)
    check(raised == (name == "raising"), f"the pool {name!r} {'raised' if raised else 'did not raise'}")
    soak.counts["guard: replays"] += 1
    soak.replay(one, 3)

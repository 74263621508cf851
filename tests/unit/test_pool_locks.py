"""Finalizers, threads and forks come in at any line: nobody waits for somebody who waits for him."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable

import pytest
from support.internals import inventory_of

from safealloc import SafeAllocError, ScalePool, SfLayout, default_pool, settings
from safealloc.pool import default, process

LAYOUT = SfLayout.layout_8x4


def on_next_miss(pool: ScalePool, hook: Callable[[], object]) -> None:
    """Call ``hook`` inside the pool's next miss, as a finalizer that the collector runs there would be."""
    inventory = inventory_of(pool)
    original = inventory.make_cached

    def make_cached(*given):
        inventory.make_cached = original
        hook()
        return original(*given)

    inventory.make_cached = make_cached


def ends(*calls: Callable[[], object]) -> bool:
    """Whether the calls, each on a thread, come to an end."""
    threads = [threading.Thread(target=call, daemon=True) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    return not any(thread.is_alive() for thread in threads)


@pytest.mark.parametrize("method", ["acquire", "stats", "trim", "verify", "close"])
def test_finalizers_that_call_each_others_pools_from_two_threads_do_not_wait_for_ever(
    monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    monkeypatch.setattr(process, "_PATIENCE", 0.3)
    one, other = ScalePool("cpu"), ScalePool("cpu")
    both_inside = threading.Barrier(2)

    def finalizer_of(pool: ScalePool) -> Callable[[], None]:
        def run() -> None:
            with contextlib.suppress(threading.BrokenBarrierError):  # one thread waits outside, which is right
                both_inside.wait(0.5)
            with contextlib.suppress(
                SafeAllocError
            ):  # of one of the two; Python prints what a finalizer raises, and goes on
                pool.acquire(3, 64, LAYOUT) if method == "acquire" else getattr(pool, method)()

        return run

    on_next_miss(one, finalizer_of(other))
    on_next_miss(other, finalizer_of(one))

    def call(pool: ScalePool) -> Callable[[], object]:
        def run() -> None:
            try:
                pool.acquire(4, 64, LAYOUT)
            except RuntimeError:
                assert method == "close"

        return run

    assert ends(call(one), call(other))
    other_thread = threading.Thread(target=lambda: free.append(ScalePool("cpu").acquire(4, 64, LAYOUT)))
    free: list[object] = []
    other_thread.start()
    other_thread.join(10)
    assert free


def test_a_finalizer_in_another_pool_gets_an_error_where_it_would_wait_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(process, "_PATIENCE", 0.1)
    one, other, inside, leave = ScalePool("cpu"), ScalePool("cpu"), threading.Event(), threading.Event()
    on_next_miss(other, lambda: (inside.set(), leave.wait(10)))
    thread = threading.Thread(target=other.acquire, args=(4, 64, LAYOUT), daemon=True)
    thread.start()
    assert inside.wait(10)
    raised: list[Exception] = []

    def finalizer() -> None:
        try:
            other.acquire(3, 64, LAYOUT)
        except SafeAllocError as error:
            raised.append(error)

    on_next_miss(one, finalizer)
    one.acquire(4, 64, LAYOUT)
    assert "another thread waits for this one" in str(raised[0])
    leave.set()
    thread.join(10)
    other.acquire(3, 64, LAYOUT)


def test_a_finalizer_may_ask_for_the_default_pool_while_it_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """And there is still one default pool."""
    monkeypatch.setattr(default, "_pools", {})
    original, got = settings.watch, []

    def finalizer_comes_in():
        monkeypatch.setattr(settings, "watch", original)
        got.append(default_pool("cpu"))
        return original()

    monkeypatch.setattr(settings, "watch", finalizer_comes_in)
    assert ends(lambda: got.append(default_pool("cpu")))
    first, second = got
    assert first is second is default_pool("cpu")


def test_a_fork_while_another_thread_is_in_a_pool_leaves_no_lock_behind() -> None:
    pool, inside, leave = ScalePool("cpu"), threading.Event(), threading.Event()
    on_next_miss(pool, lambda: (inside.set(), leave.wait(10)))
    thread = threading.Thread(target=pool.acquire, args=(4, 64, LAYOUT), daemon=True)
    thread.start()
    assert inside.wait(10)
    child = os.fork()
    if child == 0:
        signal.alarm(10)  # ends a child that waits
        status = 1
        try:
            ScalePool("cpu").acquire(4, 64, LAYOUT)
            default_pool("cpu").acquire(4, 64, LAYOUT)
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    leave.set()
    thread.join(10)
    assert not thread.is_alive()

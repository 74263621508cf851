"""Claims that cannot be shared: whoever comes in between two lines of an acquire gets another buffer, or none."""

from __future__ import annotations

import gc
import itertools
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from support.fake_captures import FakeWorld
from support.internals import buffers_of

from safealloc import ScalePool, SfLayout
from safealloc.pool import pool as pool_module

LAYOUT = SfLayout.layout_8x4
POOL_FILES = str(Path(pool_module.__file__).parent)


@pytest.fixture
def pool() -> Iterator[ScalePool]:
    with ScalePool("cpu") as pool:
        pool.reserve(4, 64, LAYOUT, copies=8)
        yield pool


def reenter_at_every_line(pool: ScalePool, action: Callable[[], object], inner: Callable[[], None]) -> int:
    """Call ``inner`` at each line of the pool's files that ``action`` runs, once a run; how many runs that took."""
    for run in itertools.count(1):
        lines = 0

        def trace(frame, event, arg):
            nonlocal lines
            if not frame.f_code.co_filename.startswith(POOL_FILES):
                return None
            if event == "line":
                lines += 1
                if lines == run:  # noqa: B023
                    sys.settrace(None)
                    inner()
                    sys.settrace(trace)
            return trace

        sys.settrace(trace)
        try:
            result = action()
        finally:
            sys.settrace(None)
        if isinstance(result, torch.Tensor):
            check_apart(result, *held)
        held.clear()
        if lines < run:
            return run
    raise AssertionError


held: list[torch.Tensor] = []


def check_apart(*tensors: torch.Tensor) -> None:
    addresses = [tensor.data_ptr() for tensor in tensors]
    assert len(set(addresses)) == len(addresses), "two live tensors share memory"


@pytest.mark.parametrize("kind", ["hit", "from stock", "miss", "made for one call", "grouped"])
def test_an_acquire_at_any_line_of_an_acquire_gets_another_buffer(kind: str) -> None:
    options = {"cache_bytes": 0} if kind == "made for one call" else {}
    with ScalePool("cpu", **options) as pool:
        if kind in ("hit", "from stock"):
            pool.reserve(4, 64, LAYOUT, copies=4)
        if kind == "hit":
            del [pool.acquire(4, 64, LAYOUT) for _ in range(4)][:]

        def acquire() -> torch.Tensor:
            if kind == "grouped":
                return pool.acquire_grouped(4, 64, 2)
            return pool.acquire(4, 64, LAYOUT)

        runs = reenter_at_every_line(pool, acquire, lambda: held.append(acquire()))
        assert runs > 5
        assert pool.verify() == pool.stats().buffers
        assert pool.stats().live == 0


@pytest.mark.parametrize("outer", ["trim", "verify", "reserve", "stats"])
def test_an_acquire_at_any_line_of_another_method_gets_a_buffer_of_its_own(pool: ScalePool, outer: str) -> None:
    for rows in range(1, 5):
        pool.acquire(rows, 64, LAYOUT)
    actions = {
        "trim": pool.trim,
        "verify": pool.verify,
        "reserve": lambda: pool.reserve(4, 64, LAYOUT, copies=9),
        "stats": pool.stats,
    }
    inner = lambda: held.extend([pool.acquire(4, 64, LAYOUT), pool.acquire(2, 64, LAYOUT)])  # noqa: E731
    assert reenter_at_every_line(pool, actions[outer], inner) > 5
    assert pool.stats().live == 0
    pool.verify()


@pytest.mark.parametrize("inner", ["trim", "verify", "reserve", "stats", "close"])
def test_any_method_at_any_line_of_an_acquire(inner: str) -> None:
    made: list[ScalePool] = []

    def fresh() -> ScalePool:
        made.append(ScalePool("cpu"))
        made[-1].acquire(4, 64, LAYOUT)
        made[-1].acquire(3, 64, LAYOUT)
        return made[-1]

    state = {"pool": fresh()}

    def action() -> None:
        pool = state["pool"] = fresh()
        tensor = None
        try:
            tensor = pool.acquire(4, 64, LAYOUT)
            other = pool.acquire(5, 64, LAYOUT)
        except RuntimeError:  # closed
            assert inner == "close"
            return
        tensor[:4].fill_(7)
        other[:5].fill_(9)
        assert (tensor[:4] == 7).all()

    def call() -> None:
        pool = state["pool"]
        {"trim": pool.trim, "verify": pool.verify, "stats": pool.stats, "close": pool.close}.get(
            inner, lambda: pool.reserve(4, 64, LAYOUT, copies=2)
        )()

    assert reenter_at_every_line(state["pool"], action, call) > 20


def test_signal_handlers_that_acquire(pool: ScalePool) -> None:
    """Real signals, at any bytecode rather than at any line."""
    found: list[torch.Tensor] = []
    shared = entered = 0

    def handler(*_: object) -> None:
        nonlocal entered
        entered += 1
        found.append(pool.acquire(4, 64, LAYOUT))
        if not over:  # a signal may still be pending when the timer is switched off
            signal.setitimer(signal.ITIMER_REAL, 2e-4)

    over = False
    before = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 2e-4)
    try:
        end = time.monotonic() + 1.5
        while time.monotonic() < end:
            tensor = pool.acquire(4, 64, LAYOUT)
            while found:
                shared += found.pop().data_ptr() == tensor.data_ptr()
            del tensor
    finally:
        over = True
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert entered > 100
    assert shared == 0


def test_finalizers_that_acquire(pool: ScalePool) -> None:
    """From Python 3.12 on the garbage collector runs between any two bytecodes, before at allocations."""
    found: list[torch.Tensor] = []
    shared = 0

    class Cycle:
        def __init__(self) -> None:
            self.me = self

        def __del__(self) -> None:
            found.append(pool.acquire(4, 64, LAYOUT))

    before = gc.get_threshold()
    gc.set_threshold(23)
    try:
        end = time.monotonic() + 1.0
        while time.monotonic() < end:
            Cycle()
            tensor = pool.acquire(4, 64, LAYOUT)
            while found:
                shared += found.pop().data_ptr() == tensor.data_ptr()
            del tensor
    finally:
        gc.set_threshold(*before)
        gc.collect()  # the last cycles go while the pool is open
    assert shared == 0


def test_threads_that_acquire_while_another_trims() -> None:
    errors: list[str] = []
    with ScalePool("cpu", cache_bytes=1 << 14) as pool:
        pool.reserve(4, 64, LAYOUT, copies=2)
        stop = time.monotonic() + 1.5

        def work(mark: int) -> None:
            try:
                while time.monotonic() < stop:
                    tensor = pool.acquire(4 + mark % 2, 64, LAYOUT)
                    tensor[:4].fill_(mark)
                    if not bool((tensor[:4] == mark).all()):
                        errors.append(f"thread {mark} lost its bytes")
                    del tensor
            except Exception as error:
                errors.append(repr(error))

        threads = [threading.Thread(target=work, args=(mark,)) for mark in (1, 2, 3, 4)]
        before = sys.getswitchinterval()
        sys.setswitchinterval(1e-5)
        try:
            for thread in threads:
                thread.start()
            while time.monotonic() < stop:
                pool.trim()
                pool.stats()
            for thread in threads:
                thread.join()
        finally:
            sys.setswitchinterval(before)
        assert errors == []
        assert pool.stats().live == 0


def test_finalizers_that_call_a_pool_while_notes_are_purged(pool: ScalePool) -> None:
    """No lock is held where a finalizer may come in, so that it cannot wait for itself."""

    class Engine:
        def __init__(self) -> None:
            self.me = self

        def __del__(self) -> None:
            pool.trim()
            pool.stats()

    for rows in range(1, 40):
        Engine()
        with ScalePool("cpu") as other:
            other.acquire(rows, 64, LAYOUT)
            gc.collect()


@pytest.mark.parametrize(
    "given", [(4.0, 64, LAYOUT), (True, 64, LAYOUT), (4, 64.0, LAYOUT), (4, 64, True), (4, 64, 1.0)]
)
def test_a_warm_pool_answers_as_a_cold_one(given: tuple[object, ...]) -> None:
    answers = []
    for warm in (False, True):
        with ScalePool("cpu") as pool:
            if warm:
                for rows in (1, 4):
                    pool.acquire(rows, 64, LAYOUT)
            try:
                answers.append(str(pool.acquire(*given).shape))  # type: ignore[arg-type]
            except (TypeError, ValueError) as error:
                answers.append(f"{type(error).__name__}: {error}")
    assert answers[0] == answers[1]


def test_a_storage_that_a_holder_moved_is_never_handed_out_again(pool: ScalePool, caplog) -> None:
    tensor = pool.acquire(4, 64, LAYOUT)
    tensor.untyped_storage().share_memory_()
    del tensor
    buffers = len(buffers_of(pool))
    seen = {pool.acquire(4, 64, LAYOUT).data_ptr() for _ in range(3)}
    assert len(seen) == 1
    assert len(buffers_of(pool)) <= buffers
    assert pool.verify() <= buffers
    pool.trim()


@pytest.mark.parametrize("how", ["acquire", "acquire in a capture", "trim"])
def test_a_storage_that_a_holder_sent_to_another_process_is_never_handed_out_again(
    monkeypatch, caplog, how: str
) -> None:
    """CUDA IPC replaces the deleter of a storage; here a stand-in says that it did."""
    world, sent = FakeWorld(monkeypatch), set()
    for module in ("buffer", "pool"):
        monkeypatch.setattr(f"safealloc.pool.{module}._standard", lambda cdata: cdata not in sent)
    world.pool.reserve(8, 64, LAYOUT, copies=1)
    if how == "acquire in a capture":
        world.begin(1, handle="graph")
    tensor = world.acquire(1)
    (buffer,) = buffers_of(world.pool)
    buffer.standard = True  # as on a GPU; on a CPU memory that is shared moves
    sent.add(buffer.cdata)
    del tensor
    if how == "trim":
        buffer.kept = False
        assert world.pool.trim() == buffer.nbytes
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert world.address(1) != buffer.address  # "buffer" keeps the memory, so that nobody else gets the address
        assert "resized, moved or shared" in caplog.text
    assert buffer not in buffers_of(world.pool)

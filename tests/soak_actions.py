"""What the random walk of ``soak.py`` does: an action is a function of the state, found by its name."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from typing import Any

import torch
from soak_state import (
    KS,
    L8,
    L128,
    MIB,
    NAN,
    POOLS,
    ROWS,
    Dense,
    LossError,
    NotNowError,
    Soak,
    Work,
    buffers_of,
    check,
    offsets,
    real,
)
from torch import Tensor

from safealloc import (
    LayoutMismatchError,
    PaddingCorruptionError,
    PoolClosedError,
    PoolExhaustedError,
    SafeAllocError,
    capture,
    mm_fp4,
    nvfp4_linear,
    nvfp4_quantize,
    use_pool,
)

Action = Callable[[Soak], None]
_ACTIONS: dict[str, Action] = {}
_ON_CUDA: set[str] = set()


def actions(device: torch.device) -> dict[str, Action]:
    """All that the device can do, by name."""
    return {name: one for name, one in _ACTIONS.items() if device.type == "cuda" or name not in _ON_CUDA}


def action(*, cuda: bool = False) -> Callable[[Action], Action]:
    def register(function: Action) -> Action:
        _ACTIONS[function.__name__] = function
        if cuda:
            _ON_CUDA.add(function.__name__)
        return function

    return register


@action()
def eager(soak: Soak) -> None:
    """A few calls, one after the other, with nothing in between."""
    works = [soak.work(soak.pool()) for _ in range(soak.numbers.randint(1, 6))]
    for work in works:
        work.run()
    soak.look_at(works)


@action()
def hold(soak: Soak) -> None:
    """Several tensors of one shape at once share no memory, however they are held."""
    pool = soak.pool("plain", "strict", "healing")
    rows, k = soak.numbers.choice(ROWS), soak.numbers.choice(KS)
    held = [pool.acquire(rows, k, L8) for _ in range(5)]
    views = [tensor.view(torch.int8)[:, :1] for tensor in held]
    for number, tensor in enumerate(held):
        tensor.view(-1)[:1] = number
    del tensor, held
    pool.acquire(rows, k, L8).view(-1)[:1] = 99
    check([int(view[0, 0]) for view in views] == list(range(5)), "two tensors that are alive share memory")


@action()
def threads(soak: Soak) -> None:
    """Several threads at once, each on a stream of its own."""
    shared = soak.pool("plain", "compact", "raising")
    several = [[soak.work(shared) for _ in range(4)] for _ in range(4)]
    soak.synchronize()
    errors: list[BaseException] = []

    def run(works: list[Work]) -> None:
        try:
            stream = torch.cuda.Stream(soak.device) if soak.on_cuda else None
            with torch.cuda.stream(stream):
                for work in works:
                    work.run()
        except BaseException as error:
            errors.append(error)

    running = [threading.Thread(target=run, args=(works,)) for works in several]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    if errors:
        raise errors[0]
    soak.look_at([work for works in several for work in works])


@action()
def beyond_max_bytes(soak: Soak) -> None:
    """A reserve that fails half-way by ``max_bytes``."""
    pool = soak.pool("strict")
    with soak.untouched(pool):
        try:
            pool.reserve((8, 1 << 14), (64, 1 << 13))
        except PoolExhaustedError:
            return
        raise LossError("a reserve went beyond max_bytes")


@action()
def out_of_memory(soak: Soak) -> None:
    """A reserve that fails half-way since the machine has no more memory."""
    pool = soak.pool("plain", "compact")
    if soak.on_cuda:
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(soak.device)
        rows, copies = 128 * (free // (128 * 1024) // 3), 6
    else:
        rows, copies = 1 << 43, 2
    with soak.untouched(pool, cache=False):
        try:
            pool.reserve((1, rows), 1 << 14, copies=copies)
        except (torch.OutOfMemoryError, RuntimeError, MemoryError, OSError) as error:
            soak.counts[f"out of memory: {type(error).__name__}"] += 1
        else:
            raise LossError("a reserve of all memory went through")
    if soak.on_cuda:
        torch.cuda.empty_cache()


@action()
def wrong_calls(soak: Soak) -> None:
    """Calls that are refused before anything is launched."""
    pool = soak.pool("plain", "strict")
    work = Dense(soak, pool)
    x_fp4, scales = nvfp4_quantize(work.x, soak.global_scale, layout=work.layout, pool=pool)
    weight, weight_scale = soak.weights[work.k]
    before = scales.clone()
    with soak.untouched(pool):
        for error, call in (
            (
                LayoutMismatchError,
                lambda: mm_fp4(
                    x_fp4, weight.T, scales, weight_scale.T, soak.alpha, use_8x4_sf_layout=work.layout is not L8
                ),
            ),
            (ValueError, lambda: pool.acquire(0, 64, L128)),
            (ValueError, lambda: pool.reserve(4, 63)),
            (TypeError, lambda: nvfp4_quantize([1.0], soak.global_scale, pool=pool)),
        ):
            try:
                call()
            except error:
                continue
            raise LossError(f"a call that has to be a {error.__name__} went through")
    check(torch.equal(scales, before), "a refused call wrote the scales")


@action()
def foreign(soak: Soak) -> None:
    """Scales that no pool made, with NaN in their padding: the result is that of clean ones."""
    work = Dense(soak, soak.pool())
    work.run()
    if work.layout.nbytes(work.rows, work.k) == work.rows * work.k // 16:
        raise NotNowError("no padding")
    places = offsets(work.rows, work.k // 16, work.scales.shape[1] // 4, work.layout, soak.device)
    poisoned = torch.full_like(work.scales, NAN)
    poisoned.view(-1)[places] = work.scales.view(-1)[places]
    weight, weight_scale = soak.weights[work.k]
    work.y.fill_(NAN)
    mm_fp4(
        work.data,
        weight.T,
        poisoned,
        weight_scale.T,
        soak.alpha,
        out=work.y,
        use_8x4_sf_layout=work.layout is L8,
    )
    soak.look_at([work])


@action()
def dirtied(soak: Soak) -> None:
    """Somebody writes padding: ``verify`` names it, and heals it."""
    pool = soak.pool("plain", "compact", "strict")
    buffer = soak.padded_buffer(pool)
    row, column = soak.dirty(buffer)
    try:
        pool.verify()
    except PaddingCorruptionError as error:
        (found,) = error.corruptions
        at = (found.address, found.row, found.column, found.value, found.count)
        check(at == (buffer.address, row, column, NAN, 1), f"named {found}, it was row {row}, column {column}")
    else:
        raise LossError(f"verify did not see row {row}, column {column} of {buffer.spec}")
    pool.verify(repair=True)
    pool.verify()
    soak.counts["planted and named"] += 1


@action()
def guarded(soak: Soak) -> None:
    """Somebody writes padding of a buffer that is handed out again: the guard raises or heals, within two turns."""
    name = soak.numbers.choice(("raising", "healing"))
    pool = soak.pools[name]
    work = Dense(soak, pool)
    work.run()
    address = pool.acquire(work.rows, work.k, work.layout).data_ptr()
    buffer = pool._inventory.by_address.get(address)
    if buffer is None or bool(real(buffer).all()):
        raise NotNowError("no padding")
    soak.dirty(buffer)
    raised = False
    for _ in range(3):
        try:
            work.run()
            soak.synchronize()
            pool.safe_point()
        except PaddingCorruptionError as error:
            check([one.address for one in error.corruptions] == [address], f"named {error}")
            raised = True
            break
    check(raised == (name == "raising"), f"the pool {name!r} {'raised' if raised else 'did not raise'}")
    if raised:
        pool.verify(repair=True)
    soak.counts["guard: eager"] += 1


@action()
def reopen(soak: Soak) -> None:
    """Close a pool; what it was asked for then is refused, and its graphs go on."""
    name = soak.numbers.choice(tuple(POOLS))
    old = soak.pools[name]
    held = None if old.compact else old.acquire(5, 80, L128)
    old.close()
    try:
        old.reserve(5, 80)
    except PoolClosedError:
        pass
    else:
        raise LossError("a closed pool went on")
    if held is not None:
        held.fill_(1)
        check(int(held.sum()) == held.numel(), "a held tensor of a closed pool is gone")
    soak.make_pool(name)
    for one in soak.graphs:
        if one.pool is old:
            soak.replay(one)


@action()
def collect(soak: Soak) -> None:
    """Give back what nobody uses, in every way that there is."""
    gc.collect()
    soak.pool().trim()
    if soak.on_cuda:
        torch.cuda.empty_cache()


@action()
def adversary(soak: Soak) -> None:
    """Fill memory that is free with NaN bytes."""
    sizes = [buffer.nbytes for pool in soak.pools.values() for buffer in buffers_of(pool)]
    sizes = [*soak.numbers.sample(sizes, min(len(sizes), 20)), 512, 1 << 16, MIB, 2 * MIB]
    if soak.on_cuda:
        sizes += [64 * MIB] * soak.numbers.choice((0, 0, 20))
    blocks = [torch.full((size,), NAN, dtype=torch.uint8, device=soak.device) for size in sizes]
    soak.counts["bytes poisoned"] += sum(sizes)
    del blocks


@action(cuda=True)
def capture_graph(soak: Soak) -> None:
    """A graph of 1 to 6 works, with a graph memory-pool handle of its own or another graph's."""
    pool = soak.pool()
    works = [soak.work(pool) for _ in range(soak.numbers.randint(1, 6))]
    share = soak.numbers.random() < 0.4
    soak.replay(soak.captured(pool, works, share), soak.numbers.randint(1, 3))
    soak.counts["captures"] += 1


@action(cuda=True)
def replay(soak: Soak) -> None:
    """Some graphs many times, with eager calls of the same pools in between."""
    if not soak.graphs:
        raise NotNowError("no graph")
    for one in soak.numbers.choices(soak.graphs, k=3):
        if one.pool in soak.pools.values():
            soak.work(one.pool).run()
        soak.replay(one, soak.numbers.randint(1, 200))


@action(cuda=True)
def compiled(soak: Soak) -> None:
    """``torch.compile`` over the opaque op."""
    if soak.compiled is None:
        linear = torch.compile(nvfp4_linear, dynamic=True)

        def call(*given: Any) -> Tensor:
            return linear(*given)

        soak.compiled = call
    pool = soak.pool("plain", "strict", "raising")
    work = Dense(soak, pool)
    work.run()
    weight, weight_scale = soak.weights[work.k]
    with use_pool(pool):
        y = soak.compiled(work.x, weight, weight_scale, soak.global_scale, soak.alpha)
    soak.look_at([work])
    check(torch.allclose(y, work.y, rtol=2**-6, atol=2e-3 * float(work.y.abs().max())), "a compiled call's result")


@action(cuda=True)
def two_streams(soak: Soak) -> None:
    """Calls on two streams at once, of one pool and of the same shapes; one reads what the other was given."""
    pool = soak.pool("plain", "compact", "strict")
    pairs = [(soak.work(pool), soak.numbers.choice(soak.streams)) for _ in range(8)]
    for stream in soak.streams:
        stream.wait_stream(soak.main_stream())
    read = []
    for work, stream in pairs:
        with torch.cuda.stream(stream):
            work.run()
            if not pool.compact:
                scales = pool.acquire(5, 208, L128)
                scales.fill_(0)
                other = soak.streams[stream is soak.streams[0]]
                other.wait_stream(stream)
                pool.record_stream(scales, other)
                with torch.cuda.stream(other):
                    torch.cuda._sleep(20_000)
                    read.append(scales.count_nonzero())
                del scales
    for stream in soak.streams:
        soak.main_stream().wait_stream(stream)
    soak.look_at([work for work, _ in pairs])
    check(not any(bool(one) for one in read), "a buffer was handed out while another stream read it")


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
    with soak.untouched(pool):
        try:
            with capture(pool=pool):
                works[0].run()
                if how == "raise":
                    raise KeyError("half-way")
                if how == "grow":
                    pool.acquire(77, 48, L8)
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
    pool = soak.pool("plain", "healing")
    works = [Dense(soak, pool) for _ in range(2)]
    for work in works:
        work.run()
    torch.cuda.empty_cache()
    soak.synchronize()
    ballast = []
    size = 16 << 30
    while size >= 2 * MIB:
        try:
            ballast.append(torch.empty(size, dtype=torch.uint8, device=soak.device))
        except torch.OutOfMemoryError:
            size //= 2
    failed = False
    try:
        with soak.untouched(pool, cache=False):
            try:
                with capture(pool=pool):
                    works[0].run()
                    torch.empty(256 * MIB, dtype=torch.uint8, device=soak.device)
            except torch.OutOfMemoryError:
                failed = True
    finally:
        ballast.clear()
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


@action(cuda=True)
def guarded_replay(soak: Soak) -> None:
    """Somebody writes padding of a buffer that a graph uses: its replays find it."""
    name = soak.numbers.choice(("raising", "healing"))
    pool = soak.pools[name]
    works: list[Work] = [Dense(soak, pool) for _ in range(2)]
    one = soak.captured(pool, works)
    found = [buffer for buffer in buffers_of(pool) if buffer.address in one.addresses and not bool(real(buffer).all())]
    if not found:
        raise NotNowError("no buffer of its own has padding")
    buffer = soak.numbers.choice(found)
    soak.dirty(buffer)
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

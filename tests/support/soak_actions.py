"""What the random walk of ``soak.py`` does: an action is a function of the state, found by its name."""

from __future__ import annotations

import contextlib
import dataclasses
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
    Captured,
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
    ScalePool,
    ScaleSpec,
    capture,
    mm_fp4,
    nvfp4_linear,
    nvfp4_quantize,
    set_foreign_scales,
    use_pool,
)
from safealloc.kernels import reference

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
    """Several tensors of one shape at once share no memory, however they are held, and the cache does not give them up."""
    pool = soak.pool("plain", "strict", "healing")
    rows, k = soak.numbers.choice(ROWS), soak.numbers.choice(KS)
    held = [pool.acquire(rows, k, L8) for _ in range(5)]
    views = [tensor.view(torch.int8)[:, :1] for tensor in held]
    for number, tensor in enumerate(held):
        tensor.view(-1)[:1] = number
    del tensor, held
    pool.acquire(rows, k, L8).view(-1)[:1] = 99
    if soak.numbers.random() < 0.5:
        pool.trim()
    for other in range(512, 512 + 64 * soak.numbers.choice((0, 16)), 64):  # more than a small cache has room for
        pool.acquire(other, 512, L128)
    there = {buffer.address for buffer in buffers_of(pool)}
    check({view.data_ptr() for view in views} <= there, "the pool gave up a buffer that somebody holds")
    check([int(view[0, 0]) for view in views] == list(range(5)), "two tensors that are alive share memory")


def serves(spec: ScaleSpec, asked: ScaleSpec) -> bool:
    """Whether a buffer of one shape is handed out for another: for routed rows, one for more of them is."""
    if asked.experts is None:
        return spec == asked
    return spec.rows >= asked.rows and dataclasses.replace(spec, rows=asked.rows) == asked


@action()
def reserve(soak: Soak) -> None:
    """What is reserved is there, unused, clean, poisoned where that was asked for, and no trim takes it."""
    name = soak.numbers.choice(tuple(POOLS))
    pool = soak.pools[name]
    rows, k, copies = soak.numbers.choice(ROWS), soak.numbers.choice(KS), soak.numbers.randint(1, 3)
    more: dict[str, int] = {} if pool.compact else soak.numbers.choice(({}, {"padded_k": k + 48}, {"experts": 4}))
    layout = L128 if "experts" in more else soak.numbers.choice((L128, L8))
    if "experts" in more:
        spec = ScaleSpec.grouped(rows, k, layout, more["experts"])
    else:
        spec = ScaleSpec.checked(rows, k, layout, more.get("padded_k"), compact=pool.compact)
    if pool.stats().bytes > POOLS[name].get("max_bytes", 1 << 62) // 2:
        raise NotNowError("what is reserved stays: graphs need the rest")
    before = {buffer.address for buffer in buffers_of(pool)}
    pool.reserve(rows, k, layout, copies, **more)
    pool.trim()
    found = [one for one in buffers_of(pool) if serves(one.spec, spec) and one.owner == "stock" and not one.held()]
    check(len(found) >= copies, f"{copies} buffers of {spec} were reserved, {len(found)} are there")
    for buffer in found:
        if buffer.address not in before and buffer.record is None and name in soak.poisoned:
            wrong = int((buffer.base.view(-1)[real(buffer)] != NAN).sum())
            check(wrong == 0, f"{wrong} scales of a new buffer are not poisoned: {spec}")


@action()
def padded_columns(soak: Soak) -> None:
    """A GEMM whose k is more than what was quantized: columns beyond are padding too."""
    pool = soak.pool("plain", "strict", "raising", "healing")
    at = soak.numbers.randrange(len(KS) - 1)
    rows, k, padded_k, layout = soak.numbers.choice(ROWS), KS[at], KS[at + 1], soak.numbers.choice((L128, L8))
    tiles, padded_tiles = -(-k // 64), -(-padded_k // 64)
    data, scales = nvfp4_quantize(soak.random(rows, k), soak.global_scale, layout=layout, pool=pool)
    linear = scales.view(-1)[offsets(rows, k // 16, tiles, layout, soak.device)]
    padded = torch.zeros(rows, padded_k // 2, dtype=torch.uint8, device=soak.device)
    padded[:, : k // 2] = data
    wide = pool.acquire(rows, k, layout, padded_k=padded_k)
    clean = torch.zeros_like(wide)
    for one in (wide, clean):
        one.view(-1)[offsets(rows, k // 16, padded_tiles, layout, soak.device)] = linear
    check(torch.equal(wide, clean), f"padding of [{rows}, {k}] in {layout.name}, padded to {padded_k}, is not zero")
    weight, weight_scale = soak.weights[padded_k]
    expected = torch.empty(rows, weight.shape[0], dtype=torch.bfloat16, device=soak.device)
    reference.mm(padded, weight, clean, weight_scale, soak.alpha, expected, layout)
    y = mm_fp4(padded, weight.T, wide, weight_scale.T, soak.alpha)
    close = torch.allclose(y, expected, rtol=2**-7, atol=1e-3 * float(expected.abs().max()))
    check(close, f"the GEMM of [{rows}, {k}] in {layout.name}, padded to {padded_k}")


@action()
def beyond_the_cache(soak: Soak) -> None:
    """Buffers for one call: clean, within ``max_bytes``, seen by ``verify``, and gone when nobody holds them."""
    pool, rows, k = soak.pools["strict"], 4 * 1024 + 5, 1008
    limit, nbytes = POOLS["strict"]["max_bytes"], L128.nbytes(rows, k)
    held: list[Tensor] = []
    with contextlib.suppress(PoolExhaustedError):
        while len(held) * nbytes <= limit:
            held.append(pool.acquire(rows, k, L128))
    check(len(held) * nbytes <= limit, f"{len(held)} buffers of {nbytes} bytes for one call, the limit is {limit}")
    if not held:
        raise NotNowError("the pool is full")
    padding = torch.ones(nbytes, dtype=torch.bool, device=soak.device)
    padding[offsets(rows, k // 16, -(-k // 64), L128, soak.device)] = False
    one = soak.numbers.choice(held)
    for tensor in held:
        stale = int(tensor.view(-1)[padding].count_nonzero())
        check(stale == 0, f"{stale} bytes of padding are not zero in a buffer for one call")
    one.view(-1)[padding.nonzero()[-1]] = NAN
    try:
        pool.verify()
    except PaddingCorruptionError as error:
        check([found.address for found in error.corruptions] == [one.data_ptr()], f"named {error}")
    else:
        raise LossError("verify did not see a buffer for one call")
    pool.verify(repair=True)
    check(not bool(one.view(-1)[padding].any()), "a buffer for one call was not healed")


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
    one_row_more = torch.cat([x_fp4, x_fp4[:1]])
    with soak.untouched(pool):
        for error, call in (
            (
                LayoutMismatchError,
                lambda: mm_fp4(
                    x_fp4, weight.T, scales, weight_scale.T, soak.alpha, use_8x4_sf_layout=work.layout is not L8
                ),
            ),
            (LayoutMismatchError, lambda: mm_fp4(one_row_more, weight.T, scales, weight_scale.T, soak.alpha)),
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
    """Scales that no pool made, with NaN in their padding: refused, or healed in place, with the result of clean ones."""
    work = Dense(soak, soak.pool())
    work.run()
    if work.layout.nbytes(work.rows, work.k) == work.rows * work.k // 16:
        raise NotNowError("no padding")
    places = offsets(work.rows, work.k // 16, work.scales.shape[1] // 4, work.layout, soak.device)
    poisoned = torch.full_like(work.scales, NAN)
    poisoned.view(-1)[places] = work.scales.view(-1)[places]
    weight, weight_scale = soak.weights[work.k]
    work.y.fill_(NAN)

    def multiply() -> None:
        given = (work.data, weight.T, poisoned, weight_scale.T, soak.alpha)
        mm_fp4(*given, out=work.y, use_8x4_sf_layout=work.layout is L8)

    mode, before = set_foreign_scales("error"), poisoned.clone()
    try:
        multiply()
    except SafeAllocError:
        check(torch.equal(poisoned, before), "refused foreign scales were written")
    else:
        raise LossError("foreign scales were taken where they are an error")
    finally:
        set_foreign_scales(mode)
    multiply()
    soak.look_at([work])
    check(torch.equal(poisoned, work.scales), "padding of foreign scales was not zeroed in place")


@action()
def dirtied(soak: Soak) -> None:
    """Somebody writes padding: ``verify`` names it, and heals it."""
    pool = soak.pool("plain", "compact", "strict")
    buffer = soak.padded_buffer(pool)
    before = buffer.base.clone()
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
    check(torch.equal(buffer.base, before), "a repair changed more than the padding")
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
            check(__file__.rpartition("_")[0] in (error.corruptions[0].handed_to or ""), f"blamed {error}")
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
    held = None if old.compact else old.acquire(5, 96, L128)
    storages = soak.storages(old)
    old.close()
    refused: tuple[Callable[[], object], ...] = (lambda: old.reserve(5, 80), old.verify, old.trim, old.take_back)
    if not old.compact:
        refused += (lambda: old.acquire(5, 80, L128),)
    for call in refused:
        try:
            call()
        except PoolClosedError:
            continue
        raise LossError("a closed pool went on")
    if held is not None:
        held.fill_(1)
        check(int(held.sum()) == held.numel(), "a held tensor of a closed pool is gone")
    soak.check_gone(storages)
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
    valid = work.rows if work.valid is None else int(work.valid)
    near = torch.allclose(y[:valid], work.y[:valid], rtol=2**-6, atol=2e-3 * float(work.y.abs().max()))
    check(near, "a compiled call's result")


@action(cuda=True)
def two_streams(soak: Soak) -> None:
    """Calls on two streams at once, of one pool and of the same shapes; one reads what the other was given."""
    pool = soak.pool("plain", "compact", "strict")
    pairs = [(soak.work(pool), soak.numbers.choice(soak.streams)) for _ in range(8)]
    written = offsets(5, 208 // 16, 4, L128, soak.device).flatten()
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
                    torch.cuda._sleep(1_000_000)  # cycles: what comes next is launched long before the read
                    read.append(scales.count_nonzero())
                del scales
                pool.acquire(5, 208, L128).view(-1).index_fill_(0, written, NAN)
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

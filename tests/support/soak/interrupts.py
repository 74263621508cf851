"""What comes in between two lines of a pool, what other people's captures do, and what holders do to memory."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from support.internals import buffers_of, unlock
from support.soak.oracle import check
from support.soak.registry import action
from support.soak.walk import Soak
from support.soak.work import KS, ROWS, N

from safealloc import ScalePool, SfLayout, mm_fp4, nvfp4_quantize
from safealloc.pool import pool as pool_module

POOL_FILES = str(Path(pool_module.__file__).parent)


class Interrupt(BaseException):
    """As KeyboardInterrupt, it is no Exception."""


def at_line(line: int, call: Callable[[], Any], then: Callable[[], None]) -> bool:
    """Run ``call``, and ``then`` at its ``line``-th line in the pool's files; whether it came that far."""
    lines = 0

    def trace(frame: Any, event: str, argument: Any) -> Any:
        nonlocal lines
        if not frame.f_code.co_filename.startswith(POOL_FILES):
            return None
        if event == "line":
            lines += 1
            if lines == line:
                sys.settrace(None)
                then()
        return trace

    sys.settrace(trace)
    try:
        call()
    except Interrupt:
        pass
    finally:
        sys.settrace(None)
    return lines >= line


def some_call(soak: Soak, pool: ScalePool) -> Callable[[], Any]:
    rows, k = soak.numbers.choice(ROWS), soak.numbers.choice(KS)
    layout = soak.numbers.choice(list(SfLayout))
    return soak.numbers.choice(
        (
            lambda: pool.acquire(rows, k, layout),
            lambda: pool.acquire(rows, k, layout, padded_k=k + 64),
            lambda: pool.acquire_grouped(rows, k, 4),
            lambda: pool.reserve(rows, k, layout) if pool.stats().buffers < 200 else None,
            pool.trim,
            pool.verify,
            pool.stats,
            pool.take_back,
        )
    )


@action()
def interrupted(soak: Soak) -> None:
    """An exception at any line of the pool; what it leaves behind is right, or repaired by the next call."""

    def interrupt() -> None:
        raise Interrupt

    pool = soak.pool("plain")
    for _ in range(20):
        came = at_line(soak.numbers.randint(1, 120), some_call(soak, pool), interrupt)
        unlock(pool)
        soak.counts["exceptions injected"] += came
    pool.stats()


@action()
def entered_again(soak: Soak) -> None:
    """An acquire at any line of another call gets memory of its own."""
    pool = soak.pool("plain", "strict")
    rows, k = soak.numbers.choice(ROWS), soak.numbers.choice(KS)
    for _ in range(20):
        got: list[torch.Tensor] = []

        def acquire(got: list[torch.Tensor] = got) -> None:
            got.append(pool.acquire(rows, k, SfLayout.layout_8x4))

        came = at_line(soak.numbers.randint(1, 60), acquire, acquire)
        soak.counts["calls entered again"] += came
        check(len({tensor.data_ptr() for tensor in got}) == len(got), "two tensors that are alive share memory")
        got.clear()


@action()
def row_tiles(soak: Soak) -> None:
    """Whole row tiles of a buffer are read as the rows that lie in them."""
    pool, k = soak.pool("plain"), soak.numbers.choice(KS)
    layout = soak.numbers.choice((SfLayout.layout_128x4, SfLayout.layout_8x4))
    x_fp4, scales = nvfp4_quantize(soak.random(300, k), soak.global_scale, layout=layout, pool=pool)
    weight, w_scales = soak.weights[k]
    whole = mm_fp4(x_fp4, weight.T, scales, w_scales.T, soak.alpha, backend="reference")
    start = soak.numbers.choice((0, 128, 256))
    stop = min(start + 128, 300)
    tile = layout.tile.rows
    part = scales[start : -(-stop // tile) * tile]
    y = mm_fp4(x_fp4[start:stop], weight.T, part, w_scales.T, soak.alpha, backend="reference")
    check(y.shape == (stop - start, N), f"a part has shape {tuple(y.shape)}")
    check(bool(torch.equal(y, whole[start:stop])), "row tiles of a buffer are not read as the whole buffer is")


@action()
def altered_memory(soak: Soak) -> None:
    """A holder resizes or moves the storage: it is never handed out again."""
    pool = soak.pool("plain")
    tensor = pool.acquire(9, 2064, SfLayout.layout_8x4)
    address = tensor.data_ptr()
    if soak.on_cuda:
        tensor.untyped_storage().resize_(soak.numbers.choice((0, 1 << 20)))
    else:
        tensor.untyped_storage().share_memory_()
    del tensor
    again = pool.acquire(9, 2064, SfLayout.layout_8x4)
    check(again.untyped_storage().nbytes() >= again.numel(), "memory that a holder took away was handed out")
    check(all(buffer.address != address or not buffer.altered() for buffer in buffers_of(pool)), "it is still there")
    soak.counts["storages altered"] += 1


@action(cuda=True)
def captures_of_others(soak: Soak) -> None:
    """Eager work that still runs when somebody captures, without synchronizing, keeps its buffer to itself."""
    pool = soak.pool("plain")
    eager, own = torch.cuda.Stream(soak.device), torch.cuda.Stream(soak.device)
    seen = torch.zeros(1, dtype=torch.uint8, device=soak.device)
    soak.synchronize()
    with torch.cuda.stream(eager):
        tensor = pool.acquire(8, 1040, SfLayout.layout_8x4)
        tensor.view(-1)[:1].fill_(7)
        torch.cuda._sleep(20_000_000)
        seen.copy_(tensor.view(-1)[:1])
        del tensor
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(own):
        graph.capture_begin(capture_error_mode="relaxed")
        taken = pool.acquire(8, 1040, SfLayout.layout_8x4)
        taken.view(-1)[:1].fill_(99)
        del taken
        graph.capture_end()
        graph.replay()
    soak.synchronize()
    check(int(seen) == 7, f"a replay wrote what eager work had yet to read: {int(seen)}")
    soak.counts["captures of others"] += 1

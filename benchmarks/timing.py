"""GPU time of CUDA graphs side by side: each round replays every graph, in an order of its own, so that drift meets all."""

from __future__ import annotations

import functools
import random
import statistics
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from safealloc.pool.capture import capture
from safealloc.pool.pool import ScalePool


def captured(step: Callable[[], object], pool: ScalePool) -> torch.cuda.CUDAGraph:
    """A graph of one call of ``step``, with a graph memory pool of its own.

    It is called once before, on the stream of the capture: that compiles its kernels and makes the pool's buffers. What
    ``step`` holds lives as long as the graph, which itself keeps no memory but its own.
    """
    with torch.cuda.device(pool.device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step()
        with capture(pool=pool, stream=stream) as graph:
            step()
    _read_by[graph] = step
    return graph


_read_by: weakref.WeakKeyDictionary[torch.cuda.CUDAGraph, Callable[[], object]] = weakref.WeakKeyDictionary()


def interleaved(
    graphs: Mapping[str, torch.cuda.CUDAGraph], rounds: int, replays: int, *, seed: int = 0
) -> dict[str, list[float]]:
    """Microseconds a replay of each graph in each round, by CUDA events, on the current stream of the current device.

    Args:
        graphs: by name; at least one.
        rounds: that count. One more goes before them, and is thrown away.
        replays: of each graph in a round, one after the other between two events.
        seed: of the order of the graphs, another in each round.
    """
    numbers = random.Random(seed)
    order = list(graphs)
    events = {name: [torch.cuda.Event(enable_timing=True) for _ in range(2)] for name in order}
    times: dict[str, list[float]] = {name: [] for name in order}
    for _ in range(rounds + 1):
        numbers.shuffle(order)
        graphs[order[0]].replay()  # not timed: the first event must not wait for the host, as no other does
        for name in order:
            start, end = events[name]
            start.record()
            for _ in range(replays):
                graphs[name].replay()
            end.record()
        torch.cuda.synchronize()
        for name, (start, end) in events.items():
            times[name].append(1e3 * start.elapsed_time(end) / replays)
    return {name: several[1:] for name, several in times.items()}


def median(times: Sequence[float]) -> float:
    """The median over rounds."""
    return statistics.median(times)


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Median of ``ours / theirs`` within a round."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def differences(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """``ours - theirs`` in each round."""
    return [a - b for a, b in zip(ours, theirs, strict=True)]


@dataclass(frozen=True, slots=True)
class Copy:
    """A copy that only moves bytes, to measure others by.

    Attributes:
        graph: of one copy.
        nbytes: read and written by it, together.
    """

    graph: torch.cuda.CUDAGraph
    nbytes: int


def fastest_copy(pool: ScalePool) -> Copy:
    """The copy of the size at which the device's own moves most bytes a second: the larger ones may be slower."""
    copies = {}
    for size in _COPIED:
        source = torch.randint(256, (size,), dtype=torch.uint8, device=pool.device)
        copy = functools.partial(torch.empty_like(source).copy_, source)
        copies[str(size)] = Copy(captured(copy, pool), 2 * size)
    times = interleaved({name: copy.graph for name, copy in copies.items()}, rounds=10, replays=5)
    return max(copies.values(), key=lambda copy: copy.nbytes / median(times[str(copy.nbytes // 2)]))


_COPIED = tuple(size << 20 for size in (128, 256, 512))  # bytes; far beyond an L2 cache (50 MB on an H200)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second, read and written, of the fastest copy on the device in a CUDA graph."""
    with torch.cuda.device(device), ScalePool(device) as pool:
        copy = fastest_copy(pool)
        return 1e6 * copy.nbytes / median(interleaved({"copy": copy.graph}, rounds=10, replays=10)["copy"])

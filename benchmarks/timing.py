"""GPU time of CUDA graphs side by side: each round replays every graph, in a new order, so that drift affects all alike."""

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
    """A graph of one call of ``step``, with its own graph memory pool.

    ``step`` is called once before, on the stream of the capture, to compile its kernels and make the pool's buffers. Its
    tensors live as long as the graph, which by itself keeps only the memory of its own pool.
    """
    with torch.cuda.device(pool.device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step()
        with capture(pool=pool, stream=stream) as graph:
            step()
    _step_of[graph] = step
    return graph


_step_of: weakref.WeakKeyDictionary[torch.cuda.CUDAGraph, Callable[[], object]] = weakref.WeakKeyDictionary()


def interleaved(
    graphs: Mapping[str, torch.cuda.CUDAGraph], rounds: int, replays: int, *, seed: int = 0
) -> dict[str, list[float]]:
    """Microseconds a replay of each graph in each round, by CUDA events, on the current stream of the current device.

    Args:
        graphs: by name; at least one.
        rounds: samples. One more round comes first and is discarded.
        replays: of each graph per round, between two events.
        seed: of the order of the graphs, which changes with each round.
    """
    numbers = random.Random(seed)
    order = list(graphs)
    events = {name: [torch.cuda.Event(enable_timing=True) for _ in range(2)] for name in order}
    times: dict[str, list[float]] = {name: [] for name in order}
    for _ in range(rounds + 1):
        numbers.shuffle(order)
        graphs[order[0]].replay()  # not timed: it keeps the device busy, so that no event waits for the host
        for name in order:
            start, end = events[name]
            start.record()
            for _ in range(replays):
                graphs[name].replay()
            end.record()
        torch.cuda.synchronize()
        for name, (start, end) in events.items():
            times[name].append(1e3 * start.elapsed_time(end) / replays)
    return {name: samples[1:] for name, samples in times.items()}


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
    """A copy, whose bandwidth others are compared with.

    Attributes:
        graph: of one copy.
        nbytes: that it reads and writes, together.
    """

    graph: torch.cuda.CUDAGraph
    nbytes: int


def fastest_copy(pool: ScalePool) -> Copy:
    """The copy with the highest bandwidth of a few sizes; larger ones may be slower."""
    copies = {}
    for size in _COPIED:
        source = torch.randint(256, (size,), dtype=torch.uint8, device=pool.device)
        copy = functools.partial(torch.empty_like(source).copy_, source)
        copies[str(size)] = Copy(captured(copy, pool), 2 * size)
    times = interleaved({name: copy.graph for name, copy in copies.items()}, rounds=10, replays=5)
    return max(copies.values(), key=lambda copy: copy.nbytes / median(times[str(copy.nbytes // 2)]))


_COPIED = tuple(size << 20 for size in (128, 256, 512))  # bytes; far beyond an L2 cache (50 MB on an H200)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second, read and written, of the fastest copy in a CUDA graph."""
    with torch.cuda.device(device), ScalePool(device) as pool:
        copy = fastest_copy(pool)
        return 1e6 * copy.nbytes / median(interleaved({"copy": copy.graph}, rounds=10, replays=10)["copy"])

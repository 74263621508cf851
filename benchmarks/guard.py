"""``safealloc bench guard``: what ``SAFEALLOC_VERIFY=N`` costs a decode step's graph, and a call on the host.

A captured graph has one more node. It counts at each replay, and at every N-th looks at all padding that any graph was
given. Both are measured: with an N that is never reached, and with 1. A step of any N costs the first, and an N-th of the
difference.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks import decode, timing
from benchmarks.host import LAYOUT, ROWS, Candidate, K, alternate
from benchmarks.models import MODELS, Model
from benchmarks.baselines import POOL, baselines
from benchmarks.summary import summary
from safealloc.formats.spec import ScaleSpec
from safealloc.kernels import triton_guard
from safealloc.pool.guard import REPAIR, VERIFY, Graphs
from safealloc.pool.pool import ScalePool

OFF, COUNTS, LOOKS = "off", "counts", "looks"
"""Without the node; with one that only counts; with one that looks at every replay."""

_NEVER = (1 << 31) - 1
_EVERY = {OFF: 0, COUNTS: _NEVER, LOOKS: 1}
_NODES = 20  # in a graph of nothing else, so that launching the graph does not count
_CAPTURED = (1, 2, 4, *range(8, 256, 8), *range(256, 513, 16))  # vLLM's default batch sizes

Tell = Callable[[str, float], None]
"""Told what is measured next, and which share of all is done."""


@dataclass(frozen=True, slots=True)
class Extent:
    """What is measured.

    Attributes:
        models: whose decode step is captured.
        batches: rows of a step.
        sizes: batch sizes that the buffers are made for which the node looks at.
        seconds: of replays at each batch size of a model.
        calls: on the host, a batch.
    """

    models: tuple[Model, ...]
    batches: tuple[int, ...]
    sizes: tuple[int, ...]
    seconds: float
    calls: int


FULL = Extent((MODELS[0], MODELS[2]), (1, 16, 64), _CAPTURED, 3.0, 2000)
QUICK = Extent(MODELS[1:2], (1, 16), _CAPTURED[:11], 0.2, 300)


def run(device: torch.device, quick: bool, progress: Tell) -> dict[str, Any]:
    """Measure everything.

    Args:
        device: a CUDA device of compute capability 8.9 or more.
        quick: a small model, fewer buffers and calls.
        progress: told where it is.
    """
    return measure(device, QUICK if quick else FULL, progress)


def measure(device: torch.device, extent: Extent, progress: Tell) -> dict[str, Any]:
    """As :func:`run`, of this extent."""
    steps, nodes = [], []
    with torch.cuda.device(device):
        for number, model in enumerate(extent.models):
            progress(f"{model.title}: weights", number / (len(extent.models) + 1))
            weights = decode.weights_of(model, device)
            for place, batch in enumerate(extent.batches):
                share = (number + place / len(extent.batches)) / (len(extent.models) + 1)
                progress(f"{model.title}, batch {batch}", share)
                step = decode.Step(model, weights, batch, device)
                found = _step(step, device, extent.seconds, batch)
                steps.append({"model": model.name, "tensor_parallel": model.tensor_parallel, "batch": batch, **found})
                del step
            del weights
            torch.cuda.empty_cache()
            nodes.append(
                {"model": model.name, "tensor_parallel": model.tensor_parallel, **_node(model, extent, device)}
            )
        progress("calls on the host", len(extent.models) / (len(extent.models) + 1))
        calls = _host(device, extent.calls)
        progress("done", 1.0)
    return {
        "steps": steps,
        "nodes": nodes,
        "host": {"rows": ROWS, "k": K, "calls": calls},
        "not_measured": {},
        "targets": [],
    }


@contextlib.contextmanager
def verifying(every: int) -> Iterator[None]:
    """Pools that are made meanwhile look at every so manieth handout and replay; 0: at none."""
    before = {name: os.environ.get(name) for name in (VERIFY, REPAIR)}
    os.environ.update({VERIFY: str(every), REPAIR: "0"})
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


def _step(step: decode.Step, device: torch.device, seconds: float, seed: int) -> dict[str, Any]:
    """A decode step captured over three pools."""
    with contextlib.ExitStack() as stack:
        pools = {name: stack.enter_context(_pool(device, every)) for name, every in _EVERY.items()}
        graphs = {
            name: timing.captured(functools.partial(step.run, baselines(pool)[POOL]), pool) for name, pool in pools.items()
        }
        rounds, replays = decode.rounds_of(timing.interleaved(graphs, 1, 1), seconds)
        times = timing.interleaved(graphs, rounds, replays, seed=seed)
        stats = pools[LOOKS].stats()
        for pool in pools.values():
            pool.safe_point()
            pool.verify()
        graphs.clear()
        torch.cuda.synchronize()
    return {"rounds": rounds, "replays": replays, "buffers": stats.buffers, "bytes": stats.bytes} | _against_off(times)


def _node(model: Model, extent: Extent, device: torch.device) -> dict[str, Any]:
    """The node alone, over all buffers of a model at all captured batch sizes."""
    specs = [ScaleSpec(rows, k, LAYOUT) for rows in extent.sizes for k in sorted({site.k for site in model.sites})]
    flags = torch.zeros(2, dtype=torch.int32, pin_memory=True)
    with _pool(device, 0) as pool:
        pool.reserve(extent.sizes, sorted({site.k for site in model.sites}), LAYOUT)
        watched = Graphs.make(device, flags)
        for buffer in pool._inventory.by_address.values():
            watched.add(buffer, 1)
        graphs = {}
        for row, (name, every) in enumerate({COUNTS: _NEVER, LOOKS: 1}.items()):

            def step(every: int = every, counters: torch.Tensor = watched.counters[row]) -> None:
                for _ in range(_NODES):
                    triton_guard.check_table(watched.table, flags, counters, every)

            graphs[name] = timing.captured(step, pool)
        times = timing.interleaved(graphs, 15, 20)
        graphs.clear()
        torch.cuda.synchronize()
        if int(flags[0]):
            raise RuntimeError("the guard reports padding that is zero")
    found = {name: summary([us / _NODES for us in several]) for name, several in times.items()}
    return {"sizes": len(extent.sizes), "buffers": len(specs), "bytes": sum(spec.nbytes for spec in specs)} | found


def _host(device: torch.device, calls: int) -> dict[str, Any]:
    """Microseconds of ``pool.acquire`` on the host, and of a safe point."""
    with contextlib.ExitStack() as stack:
        pools = {every: stack.enter_context(_pool(device, every)) for every in (0, 1000, 100, 1)}
        every = [
            Candidate(f"pool.acquire, {_named(n)}", functools.partial(pool.acquire, ROWS, K, LAYOUT))
            for n, pool in pools.items()
        ]
        every.append(Candidate(f"pool.safe_point, {_named(100)}", pools[100].safe_point))
        return {name: summary(us) for name, us in alternate(every, 15, calls, device, lambda what, done: None).items()}


def _named(every: int) -> str:
    return f"{VERIFY}={every}" if every else f"no {VERIFY}"


def _pool(device: torch.device, every: int) -> ScalePool:
    with verifying(every):
        return ScalePool(device, growth_in_capture="error")


def _against_off(times: Mapping[str, list[float]]) -> dict[str, Any]:
    """Summaries; differences and ratios are of one round."""
    off = times[OFF]
    return {OFF: summary(off)} | {
        name: summary(ours)
        | {"over_off": summary(timing.differences(ours, off)), "ratio_to_off": round(timing.ratio(ours, off), 5)}
        for name, ours in times.items()
        if name != OFF
    }

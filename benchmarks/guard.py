"""``python -m benchmarks guard``: what ``verify_every=N`` costs a decode step's graph, and a call on the host.

A captured graph has one more node. It counts replays, and at every N-th it checks all padding that any graph was given.
Both are measured: counting with an N that is never reached, checking with N = 1. For any other N, a step costs the first
plus an N-th of the difference, on average. What ``SAFEALLOC_NAN=1`` costs is measured beside it (:mod:`benchmarks.nan`).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks import decode, nan, timing
from benchmarks.baselines import POOL, baselines
from benchmarks.host import LAYOUT, ROWS, Candidate, K, alternate
from benchmarks.models import MODELS, Model
from benchmarks.summary import summary
from safealloc.commands.report import Progress
from safealloc.formats.spec import ScaleSpec
from safealloc.integrations.vllm.sizes import capture_sizes
from safealloc.kernels import triton_guard
from safealloc.pool.guard import ReplayChecks
from safealloc.pool.pool import ScalePool

OFF, COUNTS, CHECKS = "off", "counts", "checks"
"""Without the node; with a node that only counts; with one that checks at every replay."""

_NEVER = (1 << 31) - 1
_VERIFY_EVERY = {OFF: 0, COUNTS: _NEVER, CHECKS: 1}
_NODES = 20  # in a graph of nothing else, so that launching the graph does not count


@dataclass(frozen=True, slots=True)
class Extent:
    """What is measured.

    Attributes:
        models: whose decode step is captured.
        batches: rows of a step.
        sizes: batch sizes of the buffers that the node alone checks.
        seconds: of replays at each batch size of a model.
        calls: on the host, per batch.
    """

    models: tuple[Model, ...]
    batches: tuple[int, ...]
    sizes: tuple[int, ...]
    seconds: float
    calls: int


FULL = Extent((MODELS[0], MODELS[2]), (1, 16, 64), capture_sizes(512), 3.0, 2000)
QUICK = Extent(MODELS[1:2], (1, 16), capture_sizes(64), 0.2, 300)


def run(device: torch.device, quick: bool, progress: Progress) -> dict[str, Any]:
    """Measure everything.

    Args:
        device: a CUDA device of compute capability 8.9 or more.
        quick: a small model, fewer buffers and calls.
        progress: called before each model and batch size.
    """
    return measure(device, QUICK if quick else FULL, progress)


def measure(device: torch.device, extent: Extent, progress: Progress) -> dict[str, Any]:
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
                found["nan"] = _nan(step, device, extent.seconds, batch)
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


def _step(step: decode.Step, device: torch.device, seconds: float, seed: int) -> dict[str, Any]:
    """A decode step captured over three pools."""
    with contextlib.ExitStack() as stack:
        pools = {name: stack.enter_context(_pool(device, every)) for name, every in _VERIFY_EVERY.items()}
        graphs = {
            name: timing.captured(functools.partial(step.run, baselines(pool)[POOL]), pool)
            for name, pool in pools.items()
        }
        rounds, replays = decode.rounds_of(timing.interleaved(graphs, 1, 1), seconds)
        times = timing.interleaved(graphs, rounds, replays, seed=seed)
        stats = pools[CHECKS].stats()
        for pool in pools.values():
            pool.safe_point()
            pool.verify()
        graphs.clear()
        torch.cuda.synchronize()
    return {"rounds": rounds, "replays": replays, "buffers": stats.buffers, "bytes": stats.bytes} | _against_off(times)


def _nan(step: decode.Step, device: torch.device, seconds: float, seed: int) -> dict[str, Any]:
    """The same step with what tells the first NaN, in both ways."""
    with ScalePool(device) as plain, ScalePool(device, nan=True) as watching:
        graphs = nan.graphs_of(step, plain, watching)
        rounds, replays = decode.rounds_of(timing.interleaved(graphs, 1, 1), seconds)
        times = timing.interleaved(graphs, rounds, replays, seed=seed)
        graphs.clear()
        torch.cuda.synchronize()
        assert watching.nan is not None
        finite = not watching.nan.alarmed  # else what was timed is the recording
    return {"rounds": rounds, "replays": replays, "finite": finite} | _against_off(times)


def _node(model: Model, extent: Extent, device: torch.device) -> dict[str, Any]:
    """The node alone, over all buffers of a model at all captured batch sizes."""
    specs = [ScaleSpec(rows, k, LAYOUT) for rows in extent.sizes for k in sorted({site.k for site in model.sites})]
    flags = torch.zeros(2, dtype=torch.int32, pin_memory=True)
    with _pool(device, 0) as pool:
        checks = ReplayChecks.make(device, flags)
        buffers = [pool.acquire(spec.rows, spec.k, LAYOUT) for spec in specs]  # held, so that they are distinct
        for spec, buffer in zip(specs, buffers, strict=True):
            checks.add(spec, buffer, 1)
        graphs = {}
        for row, name in enumerate((COUNTS, CHECKS)):

            def step(every: int = _VERIFY_EVERY[name], counters: torch.Tensor = checks.counters[row]) -> None:
                for _ in range(_NODES):
                    triton_guard.check_table(checks.table, flags, counters, every)

            graphs[name] = timing.captured(step, pool)
        times = timing.interleaved(graphs, 15, 20)
        graphs.clear()
        torch.cuda.synchronize()
        if int(flags[0]):
            raise RuntimeError("the node reports dirty padding where all padding is zero")
    found = {name: summary([us / _NODES for us in samples]) for name, samples in times.items()}
    return {"sizes": len(extent.sizes), "buffers": len(specs), "bytes": sum(spec.nbytes for spec in specs)} | found


def _host(device: torch.device, calls: int) -> dict[str, Any]:
    """Microseconds of ``pool.acquire`` on the host, and of a safe point."""
    with contextlib.ExitStack() as stack:
        pools = {n: stack.enter_context(_pool(device, n)) for n in (0, 1000, 100, 1)}
        candidates = [
            Candidate(f"pool.acquire, verify_every={n}", functools.partial(pool.acquire, ROWS, K, LAYOUT))
            for n, pool in pools.items()
        ]
        candidates.append(Candidate("pool.safe_point, verify_every=100", pools[100].safe_point))
        times = alternate(candidates, 15, calls, device, lambda what, done: None)
        return {name: summary(us) for name, us in times.items()}


def _pool(device: torch.device, verify_every: int) -> ScalePool:
    return ScalePool(device, growth_in_capture="error", verify_every=verify_every)


def _against_off(times: Mapping[str, list[float]]) -> dict[str, Any]:
    """Summaries; differences and ratios are taken within a round."""
    off = times[OFF]
    return {OFF: summary(off)} | {
        name: summary(ours)
        | {"over_off": summary(timing.differences(ours, off)), "ratio_to_off": round(timing.ratio(ours, off), 5)}
        for name, ours in times.items()
        if name != OFF
    }

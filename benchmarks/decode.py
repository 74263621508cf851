"""``python -m benchmarks decode``: a model's linear layers at decode, in CUDA graphs that differ in how padding is kept zero.

A step quantizes and multiplies at each site of each layer, in layer order, with nothing in between. Each layer has its own
weights as far as memory allows, so that a step finds none of them in the L2 cache; all baselines share them. There is one
graph per baseline and batch size, and those of one batch size are replayed in turn.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks import timing
from benchmarks.baselines import POOL, ZEROS, Baseline, baselines
from benchmarks.models import MODELS, Model
from benchmarks.summary import summary
from safealloc.commands.plan.architectures import Site, as_dict
from safealloc.commands.report import Progress
from safealloc.formats.layout import SfLayout
from safealloc.kernels import triton_gemm
from safealloc.pool.pool import ScalePool

BATCHES = (1, 2, 4, 8, 16, 32, 64)
QUICK_MODELS, QUICK_BATCHES = MODELS[1:2], (1, 16)
GEMM_ONLY = "gemm only"
"""In place of a baseline: no quantization, on data and scales that stay."""

_WEIGHTS_SHARE = 0.6  # of the free memory
_MICROSECONDS_PER_ROUND = 3e3  # that the slowest graph replays, if so few replays take that long
_MAX_REPLAYS = 20  # per round
_MIN_ROUNDS, _MAX_ROUNDS = 9, 60


def run(device: torch.device, quick: bool, progress: Progress) -> dict[str, Any]:
    """Measure every model at every batch size.

    Args:
        device: a CUDA device of compute capability 8.9 or more.
        quick: one small model, two batch sizes and a tenth of the time.
        progress: called before each model and batch size.
    """
    if quick:
        return measure(device, QUICK_MODELS, QUICK_BATCHES, 0.2, progress)
    return measure(device, MODELS, BATCHES, 2.0, progress)


def measure(
    device: torch.device, models: Sequence[Model], batches: Sequence[int], seconds: float, progress: Progress
) -> dict[str, Any]:
    """As :func:`run`, of these models and batch sizes.

    Args:
        seconds: of replays at each batch size of a model; more where the minimum of rounds takes longer.
    """
    with torch.cuda.device(device):
        progress("copy bandwidth", 0.0)
        bandwidth = timing.copy_bandwidth(device)
        measured = []
        for number, model in enumerate(models):
            progress(f"{model.title}: weights", number / len(models))
            weights = weights_of(model, device)
            of_batches = []
            for place, batch in enumerate(batches):
                progress(f"{model.title}, batch {batch}", (number + place / len(batches)) / len(models))
                of_batches.append(_batch(model, weights, batch, device, seconds))
            measured.append(
                {
                    "model": model.name,
                    "tensor_parallel": model.tensor_parallel,
                    "sites": [as_dict(site) for site in model.sites],
                    "quantizations": len(model.step),
                    "weight_bytes": model.weight_nbytes,
                    "distinct_weights": sum(map(len, weights.values())),
                    "batches": of_batches,
                }
            )
            del weights
            torch.cuda.empty_cache()
        progress("done", 1.0)
    with ScalePool(device) as pool:
        about = {baseline.name: baseline.about for baseline in baselines(pool).values()}
    return {"baselines": about, "copy_bytes_per_second": round(bandwidth), "models": measured}


@dataclass(frozen=True, slots=True)
class _Weight:
    fp4: Tensor
    scales: Tensor


def weights_of(model: Model, device: torch.device) -> dict[Site, list[_Weight]]:
    """Random weights of each site: one per layer, or as many as fit."""
    free, _ = torch.cuda.mem_get_info(device)
    share = min(1.0, _WEIGHTS_SHARE * free / model.weight_nbytes)
    generator = torch.Generator(device).manual_seed(0)
    return {
        site: [_weight(site, generator) for _ in range(max(1, int(share * len(site.layers))))] for site in model.sites
    }


def _weight(site: Site, generator: torch.Generator) -> _Weight:
    def random(low: int, high: int, shape: tuple[int, int]) -> Tensor:
        return torch.randint(low, high, shape, dtype=torch.uint8, device=generator.device, generator=generator)

    # 0x28 to 0x3F are e4m3 from 0.25 to 1.875.
    shape = SfLayout.layout_128x4.padded_shape(site.n, site.k)
    return _Weight(random(0, 256, (site.n, site.k // 2)), random(0x28, 0x40, shape))


class Step:
    """A decode step at one batch size, in static memory."""

    def __init__(
        self, model: Model, weights: Mapping[Site, Sequence[_Weight]], batch: int, device: torch.device
    ) -> None:
        self._linears = [(site, weights[site][number % len(weights[site])]) for site, number in model.step]
        generator = torch.Generator(device).manual_seed(batch)
        self._x = {
            k: torch.randn(batch, k, dtype=torch.bfloat16, device=device, generator=generator)
            for k in {site.k: None for site in model.sites}
        }
        self._y = {n: torch.empty(batch, n, dtype=torch.bfloat16, device=device) for n in {s.n for s in model.sites}}
        self._one = torch.ones(1, device=device)
        self._quantized: dict[int, tuple[Tensor, Tensor]] = {}

    def run(self, baseline: Baseline) -> None:
        """Quantize and multiply at each site."""
        for site, weight in self._linears:
            self._linear(site, weight, baseline)

    def multiply(self, baseline: Baseline) -> None:
        """Multiply only; the baseline quantizes once, at the first call."""
        if not self._quantized:
            self._quantized = {k: baseline.quantize(x, self._one, _layout(baseline)) for k, x in self._x.items()}
        for site, weight in self._linears:
            self._multiply(site, weight, *self._quantized[site.k], _layout(baseline))

    def _linear(self, site: Site, weight: _Weight, baseline: Baseline) -> None:
        # A function of its own: its buffers are free again before the next site asks for one.
        layout = _layout(baseline)
        self._multiply(site, weight, *baseline.quantize(self._x[site.k], self._one, layout), layout)

    def _multiply(self, site: Site, weight: _Weight, x_fp4: Tensor, scales: Tensor, layout: SfLayout) -> None:
        triton_gemm.mm(x_fp4, weight.fp4, scales, weight.scales, self._one, self._y[site.n], layout)


def _layout(baseline: Baseline) -> SfLayout:
    return SfLayout.layout_128x4 if baseline.layout is None else baseline.layout


def _batch(
    model: Model, weights: Mapping[Site, Sequence[_Weight]], batch: int, device: torch.device, seconds: float
) -> dict[str, Any]:
    """Capture the step of each baseline and replay the graphs in turn."""
    step = Step(model, weights, batch, device)
    with ScalePool(device, growth_in_capture="error") as pool:
        by_name = baselines(pool)
        graphs = {
            name: timing.captured(functools.partial(step.run, baseline), pool) for name, baseline in by_name.items()
        }
        graphs[GEMM_ONLY] = timing.captured(functools.partial(step.multiply, by_name[ZEROS]), pool)
        rounds, replays = rounds_of(timing.interleaved(graphs, 1, 1), seconds)
        times = timing.interleaved(graphs, rounds, replays, seed=batch)
        segments = torch.cuda.memory_snapshot()
        reports = {name: pool.graph_report(graph) for name, graph in graphs.items()}
        found = baseline_results(times, len(model.step))
        for name, result in found.items():
            nodes = reports[name].nodes
            result["nodes"] = None if nodes is None else sum(nodes.values())
            result["graph_memory_bytes"] = private_nbytes(segments, graphs[name].pool())
            result["pool_bytes"] = reports[name].bytes
        pool.verify()
        graphs.clear()
        torch.cuda.synchronize()
    return {
        "batch": batch,
        "rounds": rounds,
        "replays": replays,
        "gemm_only": summary(times[GEMM_ONLY]),
        "baselines": found,
    }


def rounds_of(once: Mapping[str, Sequence[float]], seconds: float) -> tuple[int, int]:
    """Rounds, and replays per round, that take about so long.

    Args:
        once: microseconds of each graph, in one round of one replay.
        seconds: of all rounds together.
    """
    microseconds = [times[0] for times in once.values()]
    replays = min(max(round(_MICROSECONDS_PER_ROUND / max(microseconds)), 1), _MAX_REPLAYS)
    rounds = round(1e6 * seconds / (replays * sum(microseconds)))
    return min(max(rounds, _MIN_ROUNDS), _MAX_ROUNDS), replays


def baseline_results(times: Mapping[str, Sequence[float]], quantizations: int) -> dict[str, dict[str, Any]]:
    """The results of each baseline at one batch size; ratios and differences are taken within a round.

    Args:
        times: microseconds per step in each round, by name; the pool's among them.
        quantizations: per step.
    """
    pool = times[POOL]
    return {
        name: summary(ours)
        | {
            "ratio_to_pool": round(timing.ratio(ours, pool), 4),
            "over_pool_per_quantization": summary(
                [difference / quantizations for difference in timing.differences(ours, pool)]
            ),
        }
        for name, ours in times.items()
        if name != GEMM_ONLY
    }


def private_nbytes(segments: Sequence[Mapping[str, Any]], handle: tuple[int, int]) -> int:
    """Bytes of a graph's memory pool.

    Args:
        segments: ``torch.cuda.memory_snapshot()`` of all pools: with a pool as argument, torch 2.11 corrupts its heap.
        handle: the graph memory-pool handle.
    """
    return sum(segment["total_size"] for segment in segments if tuple(segment["segment_pool_id"]) == tuple(handle))

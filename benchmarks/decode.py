"""``safealloc bench decode``: a model's linear layers at decode, in CUDA graphs that differ in who cleans the padding.

A step quantizes and multiplies at each site of each layer, in the order of the layers, with nothing in between. Each layer
has weights of its own, as far as memory goes, so that a step finds none of them in the L2 cache; all baselines share them. One
graph a baseline and batch size; those of one batch size are replayed in turn.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks import timing
from benchmarks.models import MODELS, Model
from benchmarks.baselines import POOL, ZEROS, Baseline, baselines
from benchmarks.summary import summary
from safealloc.commands.models import Site
from safealloc.formats.layout import SfLayout
from safealloc.kernels import triton_gemm
from safealloc.pool.pool import ScalePool

BATCHES = (1, 2, 4, 8, 16, 32, 64)
QUICK_MODELS, QUICK_BATCHES = MODELS[1:2], (1, 16)
GEMM_ONLY = "gemm only"
"""In place of a baseline: no quantization at all, on data and scales that stay."""

_SHARE = 0.6  # of the free memory, for weights
_TURN = 3e3  # microseconds a graph replays at least in a round, where that takes few replays
_MOST_REPLAYS = 20  # in a round
_ROUNDS = (9, 60)  # at least and at most

Tell = Callable[[str, float], None]
"""Tells whoever waits what is being done, and the share of all that is done."""


def run(device: torch.device, quick: bool, progress: Tell) -> dict[str, Any]:
    """Measure every model at every batch size.

    Args:
        device: a CUDA device of compute capability 8.9 or more.
        quick: one small model, two batch sizes and a tenth of the time.
        progress: told where it is.
    """
    if quick:
        return measure(device, QUICK_MODELS, QUICK_BATCHES, 0.2, progress)
    return measure(device, MODELS, BATCHES, 2.0, progress)


def measure(
    device: torch.device, models: Sequence[Model], batches: Sequence[int], seconds: float, progress: Tell
) -> dict[str, Any]:
    """As :func:`run`, of these models and batch sizes.

    Args:
        seconds: of replays at each batch size of a model; where the fewest rounds take longer, longer.
    """
    with torch.cuda.device(device):
        progress("copy bandwidth", 0.0)
        bandwidth = timing.copy_bandwidth(device)
        measured = []
        for number, model in enumerate(models):
            progress(f"{model.title}: weights", number / len(models))
            weights = weights_of(model, device)
            several = []
            for place, batch in enumerate(batches):
                progress(f"{model.title}, batch {batch}", (number + place / len(batches)) / len(models))
                several.append(_batch(model, weights, batch, device, seconds))
            measured.append(
                {
                    "model": model.name,
                    "tensor_parallel": model.tensor_parallel,
                    "sites": [site.as_dict() for site in model.sites],
                    "quantizations": len(model.step),
                    "weight_bytes": model.weight_nbytes,
                    "distinct_weights": sum(map(len, weights.values())),
                    "batches": several,
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
    """Random weights of each site: one a layer, or as many as fit."""
    free, _ = torch.cuda.mem_get_info(device)
    share = min(1.0, _SHARE * free / model.weight_nbytes)
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
        """Multiply only: what the baseline quantizes once, at the first call."""
        if not self._quantized:
            self._quantized = {k: baseline.quantize(x, self._one, _layout(baseline)) for k, x in self._x.items()}
        for site, weight in self._linears:
            self._multiply(site, weight, *self._quantized[site.k], _layout(baseline))

    def _linear(self, site: Site, weight: _Weight, baseline: Baseline) -> None:
        # A call of its own: it forgets its buffers before the next site asks for one.
        layout = _layout(baseline)
        self._multiply(site, weight, *baseline.quantize(self._x[site.k], self._one, layout), layout)

    def _multiply(self, site: Site, weight: _Weight, x_fp4: Tensor, scales: Tensor, layout: SfLayout) -> None:
        triton_gemm.mm(x_fp4, weight.fp4, scales, weight.scales, self._one, self._y[site.n], layout)


def _layout(baseline: Baseline) -> SfLayout:
    return SfLayout.layout_128x4 if baseline.layout is None else baseline.layout


def _batch(
    model: Model, weights: Mapping[Site, Sequence[_Weight]], batch: int, device: torch.device, seconds: float
) -> dict[str, Any]:
    """Capture the step of each baseline, replay them in turn, and forget them."""
    step = Step(model, weights, batch, device)
    with ScalePool(device, growth_in_capture="error") as pool:
        by_name = baselines(pool)
        graphs = {name: timing.captured(functools.partial(step.run, baseline), pool) for name, baseline in by_name.items()}
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
    """Rounds, and replays in a round, that take about so long.

    Args:
        once: microseconds of each graph, of one round of one replay.
        seconds: of all.
    """
    turns = [several[0] for several in once.values()]
    replays = min(max(round(_TURN / max(turns)), 1), _MOST_REPLAYS)
    least, most = _ROUNDS
    return min(max(round(1e6 * seconds / (replays * sum(turns))), least), most), replays


def baseline_results(times: Mapping[str, Sequence[float]], quantizations: int) -> dict[str, dict[str, Any]]:
    """What the times of all graphs of one batch size say of each baseline; ratios and differences are of one round.

    Args:
        times: microseconds a step in each round; the pool's among them.
        quantizations: in a step.
    """
    pool = times[POOL]
    return {
        name: summary(ours)
        | {
            "ratio_to_pool": round(timing.ratio(ours, pool), 4),
            "over_pool_a_quantization": summary(
                [difference / quantizations for difference in timing.differences(ours, pool)]
            ),
        }
        for name, ours in times.items()
        if name != GEMM_ONLY
    }


def private_nbytes(segments: Sequence[Mapping[str, Any]], handle: tuple[int, int]) -> int:
    """Bytes of a graph's memory pool.

    Args:
        segments: ``torch.cuda.memory_snapshot()``, of all pools: given a pool, torch 2.11 spoils its heap.
        handle: the graph memory-pool handle.
    """
    return sum(segment["total_size"] for segment in segments if tuple(segment["segment_pool_id"]) == tuple(handle))

"""``python -m benchmarks decode``: a model's decode step, in CUDA graphs that differ in how padding is kept zero.

A step has every quantization, in layer order, with what writes its input and what reads its result: RMSNorm with the residual
before attention and before the MLP, SiLU and mul in the quantizer's launch before a down projection, the gathering of rows
before routed experts, and the GEMMs. Attention itself, rotary embeddings, routers, the sum over experts, all-reduces and the
language-model head are left out.

Each layer has its own weights as far as memory allows, so that a step finds none of them in the L2 cache; all baselines share
them. Routed experts have one layer's weights for all layers, of which each layer reads another part. Their grouped GEMM is a
stand-in: one GEMM that reads the weights of as many experts as the batch is routed to, with as many rows as an expert has on
average. There is one graph per baseline and batch size, and those of one batch size are replayed in turn.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks import moe, producers, timing
from benchmarks.baselines import LINEAR, POOL, ZEROS, Baseline, baselines
from benchmarks.models import MODELS, NORM, SILU, Model, producer
from benchmarks.summary import summary
from safealloc.commands.plan.architectures import ExpertSite, Site, as_dict
from safealloc.commands.report import Progress
from safealloc.formats.layout import SfLayout
from safealloc.kernels import triton_gemm
from safealloc.pool.pool import ScalePool

BATCHES = (1, 4, 16, 64)
QUICK_MODELS, QUICK_BATCHES = MODELS[1:2], (1, 16)
GEMM_ONLY = "gemm only"
"""In place of a baseline: no producer and no quantization, on data and scales that stay."""

COUNTS = "RMSNorm, SiLU and mul, gathered rows, quantizations and GEMMs; a stand-in for the grouped GEMM of experts"

_WEIGHTS_SHARE = 0.6  # of the free memory
_MICROSECONDS_PER_ROUND = 3e3  # that the slowest graph replays, if so few replays take that long
_MAX_REPLAYS = 20  # per round
_MIN_ROUNDS, _MAX_ROUNDS = 5, 60


def run(device: torch.device, quick: bool, progress: Progress) -> dict[str, Any]:
    """Measure every model at every batch size.

    Args:
        device: a CUDA device of compute capability 8.9 or more.
        quick: one small model, two batch sizes and a tenth of the time.
        progress: called before each model and batch size.
    """
    if quick:
        return measure(device, QUICK_MODELS, QUICK_BATCHES, 0.2, progress)
    return measure(device, MODELS, BATCHES, 0.6, progress)


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
                    "sites": [_about(site) for site in model.sites],
                    "quantizations": model.quantizations,
                    "weight_bytes": model.weight_nbytes,
                    "distinct_weights": sum(len(weights[site]) for site in model.linears),
                    "batches": of_batches,
                }
            )
            del weights
            torch.cuda.empty_cache()
        progress("done", 1.0)
    with ScalePool(device) as pool:
        about = {baseline.name: baseline.about for baseline in _baselines(pool).values()}
    return {"counts": COUNTS, "baselines": about, "copy_bytes_per_second": round(bandwidth), "models": measured}


def _about(site: Site | ExpertSite) -> dict[str, Any]:
    if isinstance(site, Site):
        return as_dict(site) | {"producer": producer(site)}
    return as_dict(site) | {"width": site.width, "experts": site.experts, "topk": site.topk}


def _baselines(pool: ScalePool) -> dict[str, Baseline]:
    """All but the linear layout, which is a floor for one kernel, and in which experts have no tiles."""
    return {name: baseline for name, baseline in baselines(pool).items() if name != LINEAR}


@dataclass(frozen=True, slots=True)
class _Weight:
    fp4: Tensor
    scales: Tensor


Weights = Mapping[Site | ExpertSite, Sequence[_Weight]]


def weights_of(model: Model, device: torch.device) -> Weights:
    """Random weights of each site: one per layer, or as many as fit; of experts w13 and w2, all of one layer."""
    generator = torch.Generator(device).manual_seed(0)
    found: dict[Site | ExpertSite, list[_Weight]] = {
        site: [_weight(site.experts * _rows(n), k, generator) for n, k in _products(site)]
        for site in model.sites
        if isinstance(site, ExpertSite)
    }
    free, _ = torch.cuda.mem_get_info(device)
    share = min(1.0, _WEIGHTS_SHARE * free / model.weight_nbytes)
    for site in model.linears:
        count = max(1, int(share * len(site.layers)))
        found[site] = [_weight(site.n, site.k, generator) for _ in range(count)]
    return found


def _products(site: ExpertSite) -> tuple[tuple[int, int], tuple[int, int]]:
    """Rows and columns of an expert's w13 and w2."""
    return (site.n, site.k), (site.k, site.width)


def _rows(n: int) -> int:
    """Rows of an expert's weight in a weight of all of them: scales of an expert begin at a tile."""
    return SfLayout.layout_128x4.round_up(n, 1)[0]


def _weight(n: int, k: int, generator: torch.Generator) -> _Weight:
    def random(low: int, high: int, shape: tuple[int, int]) -> Tensor:
        return torch.randint(low, high, shape, dtype=torch.uint8, device=generator.device, generator=generator)

    # 0x28 to 0x3F are e4m3 from 0.25 to 1.875.
    shape = SfLayout.layout_128x4.padded_shape(n, k)
    return _Weight(random(0, 256, (n, k // 2)), random(0x28, 0x40, shape))


class Step:
    """A decode step at one batch size, in static memory."""

    def __init__(self, model: Model, weights: Weights, batch: int, device: torch.device) -> None:
        generator = torch.Generator(device).manual_seed(batch)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, dtype=torch.bfloat16, device=device, generator=generator)

        linears = model.linears
        # RMSNorm writes its result beside its input; attention's result is an input that stays.
        self._x = {k: random(batch, k) for k in {site.k: None for site in model.sites}}
        self._residual = {k: random(batch, k) for k in self._x}
        self._norm_weight = {k: torch.ones(k, dtype=torch.bfloat16, device=device) for k in self._x}
        self._normed = {k: torch.empty_like(x) for k, x in self._x.items()}
        self._total = {k: torch.empty_like(x) for k, x in self._x.items()}
        self._y = {n: torch.empty(batch, n, dtype=torch.bfloat16, device=device) for n in {s.n for s in linears}}
        # What the projection before wrote, gate and up; made up where a model has none of that width.
        silu = {site.k for site in linears if producer(site) == SILU}
        self._gate_up = {k: self._y[2 * k] if 2 * k in self._y else random(batch, 2 * k) for k in silu}
        self._one = torch.ones(1, device=device)
        self._experts = {
            site: _Experts(site, weights[site], batch, device) for site in model.sites if isinstance(site, ExpertSite)
        }
        self._sites = [
            (site, site.layers[number], None if site in self._experts else weights[site][number % len(weights[site])])
            for site, number in model.step
        ]
        self._norms = norms(self._sites)
        self._quantized: dict[tuple[int, bool], tuple[Tensor, Tensor]] = {}

    @property
    def active_experts(self) -> int | None:
        """Experts that the batch is routed to in a layer; ``None`` where a model has none."""
        return max((experts.active for experts in self._experts.values()), default=None)

    def run(self, baseline: Baseline) -> None:
        """Produce, quantize and multiply at each site."""
        for place, (site, layer, weight) in enumerate(self._sites):
            if place in self._norms:
                self._norm(site, with_residual=self._norms[place])
            if isinstance(site, ExpertSite):
                self._experts[site].run(self._normed[site.k], baseline, layer)
            else:
                assert weight is not None
                self._linear(site, weight, baseline)

    def multiply(self, baseline: Baseline) -> None:
        """Multiply only; the baseline quantizes once, at the first call."""
        if not self._quantized:
            self._quantized = {
                (k, silu): baseline.quantize(x, self._one, _layout(baseline), silu_and_mul=silu)
                for silu, inputs in ((False, self._x), (True, self._gate_up))
                for k, x in inputs.items()
            }
        for site, layer, weight in self._sites:
            if isinstance(site, ExpertSite):
                self._experts[site].multiply(baseline, layer)
            else:
                assert weight is not None
                self._multiply(site, weight, *self._quantized[site.k, producer(site) == SILU], _layout(baseline))

    def _norm(self, site: Site | ExpertSite, with_residual: bool) -> None:
        k = site.k
        residual, total = (self._residual[k], self._total[k]) if with_residual else (None, None)
        producers.rms_norm(self._x[k], residual, self._norm_weight[k], self._normed[k], total)

    def _linear(self, site: Site, weight: _Weight, baseline: Baseline) -> None:
        # A function of its own: its buffers are free again before the next site asks for one.
        layout, of = _layout(baseline), producer(site)
        x = {SILU: self._gate_up, NORM: self._normed}.get(of, self._x)[site.k]
        self._multiply(site, weight, *baseline.quantize(x, self._one, layout, silu_and_mul=of == SILU), layout)

    def _multiply(self, site: Site, weight: _Weight, x_fp4: Tensor, scales: Tensor, layout: SfLayout) -> None:
        triton_gemm.mm(x_fp4, weight.fp4, scales, weight.scales, self._one, self._y[site.n], layout)


def norms(sites: Sequence[tuple[Site | ExpertSite, int, object]]) -> dict[int, bool]:
    """Places before which RMSNorm runs, and whether it adds the residual.

    The parts of a layer, attention and MLP, have one each, of the residual stream; a low-rank query has one more, without.
    """
    found: dict[int, bool] = {}
    seen: set[tuple[int, str, int]] = set()
    residual: set[tuple[int, str]] = set()
    for place, (site, layer, _) in enumerate(sites):
        part = site.name.partition(".")[0]
        if (isinstance(site, Site) and producer(site) != NORM) or (layer, part, site.k) in seen:
            continue
        found[place] = (layer, part) not in residual
        seen.add((layer, part, site.k))
        residual.add((layer, part))
    return found


class _Experts:
    """Routed experts at one batch size; every layer has the same routing, and reads other experts' weights."""

    def __init__(self, site: ExpertSite, weights: Sequence[_Weight], batch: int, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(batch)
        counts = moe.routed(batch, site.experts, site.topk, "uniform", generator)
        rows = batch * site.topk
        self.active = int((counts > 0).sum())
        self._site, self._weights = site, weights
        self._per_expert = -(-rows // self.active)
        self._token = torch.randint(batch, (rows,), generator=generator).to(device)
        offsets = moe.offsets(counts, device)
        ones, self._one = torch.ones(site.experts, device=device), torch.ones(1, device=device)
        self._out = [
            torch.zeros(self._per_expert, self.active * _rows(n), dtype=torch.bfloat16, device=device)
            for n, _ in _products(site)
        ]
        x = torch.zeros(rows, site.k, dtype=torch.bfloat16, device=device)
        gate_up = self._out[0].view(-1)[: 2 * rows * site.width].view(rows, 2 * site.width)
        self._steps = moe.Step(x, ones, offsets, site.k, False), moe.Step(gate_up, ones, offsets, site.width, True)
        self._quantized: list[tuple[Tensor, Tensor]] = []

    def run(self, x: Tensor, baseline: Baseline, layer: int) -> None:
        """Gather rows of ``x``, ``[batch, k]``, quantize, multiply by w13, then SiLU and mul, quantize, multiply by w2."""
        torch.index_select(x, 0, self._token, out=self._steps[0].x)
        for number, step in enumerate(self._steps):
            self._multiply(number, *baseline.experts(step), layer)

    def multiply(self, baseline: Baseline, layer: int) -> None:
        """Multiply only; the baseline quantizes once, at the first call."""
        if not self._quantized:
            self._quantized = [baseline.experts(step) for step in self._steps]
        for number, (x_fp4, scales) in enumerate(self._quantized):
            self._multiply(number, x_fp4, scales, layer)

    def _multiply(self, number: int, x_fp4: Tensor, scales: Tensor, layer: int) -> None:
        rows, weight = _rows(_products(self._site)[number][0]), self._weights[number]
        first = layer * self.active % (self._site.experts - self.active + 1) * rows
        part = slice(first, first + self.active * rows)
        given = x_fp4[: self._per_expert], weight.fp4[part], scales, weight.scales[part]
        triton_gemm.mm(*given, self._one, self._out[number], SfLayout.layout_128x4)


def _layout(baseline: Baseline) -> SfLayout:
    return SfLayout.layout_128x4 if baseline.layout is None else baseline.layout


def _batch(model: Model, weights: Weights, batch: int, device: torch.device, seconds: float) -> dict[str, Any]:
    """Capture the step of each baseline and replay the graphs in turn."""
    step = Step(model, weights, batch, device)
    with ScalePool(device, growth_in_capture="error") as pool:
        by_name = _baselines(pool)
        graphs = {
            name: timing.captured(functools.partial(step.run, baseline), pool) for name, baseline in by_name.items()
        }
        graphs[GEMM_ONLY] = timing.captured(functools.partial(step.multiply, by_name[ZEROS]), pool)
        rounds, replays = rounds_of(timing.interleaved(graphs, 1, 1), seconds)
        times = timing.interleaved(graphs, rounds, replays, seed=batch)
        segments = torch.cuda.memory_snapshot()
        reports = {name: pool.graph_report(graph) for name, graph in graphs.items()}
        found = baseline_results(times, model.quantizations)
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
        "active_experts": step.active_experts,
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

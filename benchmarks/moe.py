"""``python -m benchmarks moe``: latency of grouped quantization as a node of a CUDA graph, and the bytes of its scales.

The shapes are those of DeepSeek-R1's MoE layers: 256 experts, 8 per token. The calls in a graph alternate between two
routings, so that there is always something to clear. Before a shape is timed, the contents of the pool's buffer are compared
with the plain-torch reference. Baselines that are named stand-ins have our quantizer in place of vLLM's; vLLM's own is one
more baseline where it can run.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import timing, vendor_kernels
from benchmarks.summary import at_least, at_most, summary
from safealloc.commands.report import Progress
from safealloc.formats.format import BLOCK_SIZE
from safealloc.formats.layout import SfLayout
from safealloc.formats.spec import ScaleSpec
from safealloc.integrations.vllm.sizes import MAX_TOKENS_PER_EXPERT
from safealloc.kernels import reference_grouped, triton_grouped
from safealloc.ops.grouped import clean_grouped_scales, nvfp4_quantize_grouped, silu_and_mul_nvfp4_quantize_grouped
from safealloc.pool.pool import ScalePool

ALONE, POOL, POOL_VLLM = "quantization alone", "pool", "pool, vLLM's arithmetic"
VLLM_SIZE, RIGHT_SIZE = "vLLM's size, zeroed", "right-sized, zeroed"
VLLM, RIGHT_SIZED = f"{VLLM_SIZE} (stand-in)", f"{RIGHT_SIZE} (stand-in)"  # our quantizer in such a buffer
CLEANED = "pool, cleaned by a separate kernel"
ROUTINGS = ("uniform", "skewed")

LAYOUT = SfLayout.layout_128x4
_FEW_TOKENS = 64


@dataclass(frozen=True, slots=True)
class Extent:
    """What is measured.

    Attributes:
        batches: numbers of tokens.
        experts: of the model.
        topk: experts per token.
        ks: columns that are quantized, and whether ``silu_and_mul`` of twice as many comes first.
        calls: per graph.
        rounds: samples; odd, so that the median is one of them.
        replays: of each graph per round.
    """

    batches: tuple[int, ...]
    experts: int
    topk: int
    ks: tuple[tuple[int, bool], ...]
    calls: int
    rounds: int
    replays: int = 5

    @property
    def max_rows(self) -> int:
        """Rows of the largest batch."""
        return max(self.batches) * self.topk


FULL = Extent((1, 2, 4, 8, 16, 32, 64, 128, 256), 256, 8, ((7168, False), (2048, True)), calls=20, rounds=11)
QUICK = Extent((1, 16, 64, 256), 256, 8, ((7168, False), (2048, True)), calls=20, rounds=5)


def run(device: torch.device, quick: bool, progress: Progress) -> dict[str, Any]:
    """Measure everything.

    Args:
        device: a CUDA device of compute capability 8.9 or more.
        quick: fewer batches and rounds.
        progress: called before each shape.

    Returns:
        What was measured, as the JSON has it: ``calls``, ``rows``, ``memory``, ``not_measured`` and ``targets``.
    """
    return measure(device, QUICK if quick else FULL, progress)


def measure(device: torch.device, extent: Extent, progress: Progress) -> dict[str, Any]:
    """As :func:`run`, of this extent."""
    result: dict[str, Any] = {
        "experts": extent.experts,
        "topk": extent.topk,
        "calls": extent.calls,
        "rounds": extent.rounds,
        "replays": extent.replays,
        "rows": [],
        "memory": [memory(extent, k) for k, _ in extent.ks],
        "not_measured": {},
    }
    jobs = [(k, silu, batch, routing) for k, silu in extent.ks for batch in extent.batches for routing in ROUTINGS]
    with torch.cuda.device(device), ScalePool(device, growth_in_capture="error") as pool:
        refusals = {silu: vendor_refusal(pool, extent, silu) for _, silu in extent.ks}
        result["not_measured"] = {
            vendor_kernels.VLLM_EXPERTS + (", SiLU and mul" if silu else ""): reason
            for silu, reason in refusals.items()
            if reason is not None
        }
        for done, (k, silu, batch, routing) in enumerate(jobs):
            progress(f"{batch} tokens, k {k}, {routing}", done / len(jobs))
            result["rows"].append(_shape(pool, extent, k, silu, batch, routing, refusals[silu] is None))
        progress("done", 1.0)
    result["targets"] = targets(result)
    return result


def memory(extent: Extent, k: int) -> dict[str, Any]:
    """Bytes of scale buffers for all batches, by baseline: computed, since they follow from the shapes.

    Args:
        extent: its largest batch decides.
        k: columns.
    """
    spec = ScaleSpec.grouped(extent.max_rows, k, LAYOUT, extent.experts)
    padded_cols = spec.padded_shape[1]
    return {
        "k": k,
        "batch": max(extent.batches),
        VLLM_SIZE: MAX_TOKENS_PER_EXPERT * extent.topk * padded_cols,
        RIGHT_SIZE: right_sized_rows(extent.max_rows, extent.experts) * padded_cols,
        POOL: spec.scale_bytes,
        "pool's record": spec.nbytes - spec.scale_bytes,
    }


def right_sized_rows(rows: int, experts: int) -> int:
    """Scale rows for ``rows + 127 * experts`` rows, in whole tiles: the bound of vLLM's PR 37626."""
    return LAYOUT.round_up(rows + (LAYOUT.tile.rows - 1) * experts, 1)[0]


def targets(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The targets, and what was reached, each at its worst shape.

    Args:
        result: with ``rows`` and ``memory``.
    """
    few = [row for row in result["rows"] if row["batch"] <= _FEW_TOKENS]
    held = result["memory"]
    return [
        at_most(
            f"pool against the quantization alone, at most {_FEW_TOKENS} tokens: times",
            1.1,
            [row["baselines"][POOL]["ratio_to_alone"] for row in few],
        ),
        at_most(
            f"pool, vLLM's arithmetic against exact, median of at most {_FEW_TOKENS} tokens: times",
            1.0,
            [timing.median([row["baselines"][POOL_VLLM]["ratio_to_pool"] for row in few])] if few else [],
        ),
        at_least(
            "memory that vLLM allocates against the pool's: times", 10, [row[VLLM_SIZE] / row[POOL] for row in held]
        ),
        at_most(
            "the pool's scales against the right-sized bound: times",
            1.0,
            [row[POOL] / row[RIGHT_SIZE] for row in held],
        ),
    ]


@dataclass(frozen=True, slots=True)
class Step:
    """The operands of one call.

    Attributes:
        x: ``[rows, k]``, or ``[rows, 2 * k]`` of gate and up.
        global_scales: float32 ``[experts]``.
        offsets: ``expert_offsets`` and ``blockscale_offsets``.
        k: columns that are quantized.
        silu: whether ``silu_and_mul`` comes first.
    """

    x: Tensor
    global_scales: Tensor
    offsets: tuple[Tensor, Tensor]
    k: int
    silu: bool

    def quantize(self, scales: Tensor) -> Tensor:
        """Quantize without clearing, into scales of any number of rows; returns the FP4 data."""
        data = torch.empty((self.x.shape[0], self.k // 2), dtype=torch.uint8, device=self.x.device)
        triton_grouped.quantize(
            self.x,
            self.global_scales,
            data,
            scales,
            LAYOUT,
            None,
            *self.offsets,
            silu_and_mul=self.silu,
        )
        return data


def routed(tokens: int, experts: int, topk: int, routing: str, generator: torch.Generator) -> Tensor:
    """Rows of each expert, int64 ``[experts]`` on the CPU; each token chooses ``topk`` different experts.

    Args:
        tokens, experts, topk: how many.
        routing: "uniform", or "skewed": the probability of the expert of rank ``r`` is proportional to ``1 / r``.
        generator: of the CPU.
    """
    weights = torch.ones(experts)
    if routing == "skewed":
        weights = 1 / (1 + torch.randperm(experts, generator=generator).float())
    chosen = torch.multinomial(weights.expand(tokens, -1), topk, generator=generator)
    return torch.bincount(chosen.view(-1), minlength=experts)


def offsets(counts: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """``expert_offsets`` and ``blockscale_offsets`` of groups of so many rows, int32 ``[experts + 1]``."""

    def starts(sizes: Tensor) -> Tensor:
        return F.pad(sizes.cumsum(0), (1, 0)).to(torch.int32).to(device)

    tile = LAYOUT.tile.rows
    return starts(counts), starts((counts + tile - 1) // tile * tile)


def steps(extent: Extent, k: int, silu: bool, batch: int, routing: str, device: torch.device) -> list[Step]:
    """Two steps, with different routings and different x."""
    generator = torch.Generator().manual_seed(batch)
    rows = batch * extent.topk
    return [
        Step(
            torch.randn(rows, 2 * k if silu else k, generator=generator).to(torch.bfloat16).to(device),
            (1 + 100 * torch.rand(extent.experts, generator=generator)).to(device),
            offsets(routed(batch, extent.experts, extent.topk, routing, generator), device),
            k,
            silu,
        )
        for _ in range(2)
    ]


Call = Callable[[Step], tuple[Tensor, Tensor]]
"""Data and scales of a step."""


def baselines(pool: ScalePool, experts: int, rows: int, k: int, topk: int = 1) -> dict[str, Call]:
    """One call of each baseline with our quantizer, by name; the pool counts as one.

    Args:
        pool: of one of them.
        experts, rows, k: of the calls.
        topk: experts per token, for the buffer of vLLM's size.
    """
    padded_cols = LAYOUT.round_up(1, k // BLOCK_SIZE)[1]
    scratch = torch.empty(
        (right_sized_rows(rows, experts), padded_cols), dtype=torch.uint8, device=pool.device
    )  # its padding is not zero: the floor

    def zeroed(step: Step, scale_rows: int) -> tuple[Tensor, Tensor]:
        scales = torch.zeros((scale_rows, padded_cols), dtype=torch.uint8, device=pool.device)
        return step.quantize(scales), scales

    def from_pool(step: Step, arithmetic: str) -> tuple[Tensor, Tensor]:
        quantize = silu_and_mul_nvfp4_quantize_grouped if step.silu else nvfp4_quantize_grouped
        return quantize(
            step.x, step.global_scales, *step.offsets, layout=LAYOUT, pool=pool, backend="triton", arithmetic=arithmetic
        )

    def cleaned(step: Step) -> tuple[Tensor, Tensor]:
        scales = pool.acquire_grouped(rows, k, experts, LAYOUT)
        clean_grouped_scales(scales, *step.offsets, rows)
        return step.quantize(scales), scales

    return {
        ALONE: lambda step: (step.quantize(scratch), scratch),
        VLLM: functools.partial(zeroed, scale_rows=MAX_TOKENS_PER_EXPERT * topk),
        RIGHT_SIZED: functools.partial(zeroed, scale_rows=right_sized_rows(rows, experts)),
        POOL: functools.partial(from_pool, arithmetic="exact"),
        POOL_VLLM: functools.partial(from_pool, arithmetic="vllm"),
        CLEANED: cleaned,
    }


def vendor_baselines(pool: ScalePool, experts: int, rows: int, k: int, topk: int) -> dict[str, Call]:
    """One call of each baseline with vLLM's own quantizer; arguments as of :func:`baselines`."""
    padded_cols = LAYOUT.round_up(1, k // BLOCK_SIZE)[1]

    def quantize(step: Step, scales: Tensor) -> tuple[Tensor, Tensor]:
        given = step.x, step.global_scales, scales, step.offsets, step.silu
        return vendor_kernels.quantize_experts(*given), scales

    def own(step: Step) -> tuple[Tensor, Tensor]:
        shape = MAX_TOKENS_PER_EXPERT * topk, padded_cols
        return quantize(step, torch.empty(shape, dtype=torch.uint8, device=pool.device))

    def cleaned(step: Step) -> tuple[Tensor, Tensor]:
        scales = pool.acquire_grouped(rows, k, experts, LAYOUT)
        clean_grouped_scales(scales, *step.offsets, rows)
        return quantize(step, scales)

    return {vendor_kernels.VLLM_EXPERTS: own, vendor_kernels.VLLM_CLEANED: cleaned}


def vendor_refusal(pool: ScalePool, extent: Extent, silu: bool) -> str | None:
    """Why vLLM's own quantizer cannot be measured, or ``None``: where it can run, it is called once."""
    if reason := vendor_kernels.experts_refusal(pool.device, silu):
        return reason
    k = next(k for k, with_silu in extent.ks if with_silu is silu)
    step = steps(extent, k, silu, min(extent.batches), ROUTINGS[0], pool.device)[0]
    calls = vendor_baselines(pool, extent.experts, step.x.shape[0], k, extent.topk)
    return vendor_kernels.tried(lambda: [call(step) for call in calls.values()], pool.device)


def check(call: Call, pool: ScalePool, step: Step) -> None:
    """Make a call that takes the pool's buffer, and compare data and every byte of the buffer with the reference.

    Raises:
        RuntimeError: they differ.
    """
    data, scales = call(step)
    spec = pool.spec(scales)
    assert spec is not None
    padded_rows, padded_cols = spec.padded_shape
    whole = scales.as_strided((padded_rows, padded_cols), (padded_cols, 1))
    expected_data, expected = torch.empty_like(data), torch.zeros_like(whole)
    reference_grouped.quantize(
        step.x, step.global_scales, expected_data, expected, LAYOUT, None, *step.offsets, silu_and_mul=step.silu
    )
    if not (torch.equal(data, expected_data) and torch.equal(whole, expected)):
        raise RuntimeError(f"{len(data)} rows of {step.k} differ from the reference")


def _shape(
    pool: ScalePool, extent: Extent, k: int, silu: bool, batch: int, routing: str, vendor: bool
) -> dict[str, Any]:
    rows = batch * extent.topk
    copies = 4 if vendor else 3  # as many graphs take buffers of it
    pool.reserve(extent.max_rows, k, LAYOUT, copies=copies, experts=extent.experts)
    both = steps(extent, k, silu, batch, routing, pool.device)
    every = baselines(pool, extent.experts, rows, k, extent.topk)
    if vendor:
        every |= vendor_baselines(pool, extent.experts, rows, k, extent.topk)
    for name in (POOL, CLEANED):
        for step in both:
            check(every[name], pool, step)

    def calls(call: Call) -> None:
        for number in range(extent.calls):
            call(both[number % 2])

    graphs = {name: timing.captured(functools.partial(calls, call), pool) for name, call in every.items()}
    times = timing.interleaved(graphs, extent.rounds, extent.replays, seed=batch)
    found = {
        name: summary([time / extent.calls for time in samples])
        | {
            "ratio_to_alone": round(timing.ratio(samples, times[ALONE]), 4),
            "ratio_to_pool": round(timing.ratio(samples, times[POOL]), 4),
        }
        for name, samples in times.items()
    }
    graphs.clear()
    return {"batch": batch, "rows": rows, "k": k, "silu_and_mul": silu, "routing": routing, "baselines": found}

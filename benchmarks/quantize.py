"""``python -m benchmarks quantize``: latency of the kernels, each as a node of a CUDA graph.

Few rows, as at decode: one graph per baseline, 200 calls on one x, which is in the L2 cache as it is after the layer before.
Many rows and GEMM weights: more operands than any cache holds, compared with a copy. All graphs of a shape are captured
first, then replayed in turn, so that drift affects all of them alike; a ratio is the median of ratios within a round.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks import arithmetic, gemm, nodes, timing, vendor_kernels
from benchmarks.baselines import IN_KERNEL, LINEAR, POOL, Baseline, baselines
from benchmarks.summary import at_least, at_most, summary
from safealloc.commands.report import Progress
from safealloc.formats.layout import SfLayout, short
from safealloc.kernels import triton_quantize
from safealloc.kernels.triton_layout import dependent_launch
from safealloc.pool.pool import ScalePool

CALLS = 200
"""Calls per graph."""

EMPTY_NODE, DEPENDENT_NODE, STORE_NODE = (
    "empty kernel",
    "empty kernel, dependent launch",
    "one store from 132 programs",
)

_BEYOND_L2 = 512 << 20  # bytes of x in one graph, ten times the L2 cache of an H200


@dataclass(frozen=True, slots=True)
class Extent:
    """What is measured.

    Attributes:
        rows, ks: every pair, in both tiled layouts.
        large: pairs of rows and k whose x no L2 cache holds.
        gemm_rows: each m of a GEMM.
        gemm_weights: each n and k of a GEMM.
        rounds: samples; odd, so that the median is one of them.
        replays: of each graph per round.
    """

    rows: tuple[int, ...]
    ks: tuple[int, ...]
    large: tuple[tuple[int, int], ...]
    gemm_rows: tuple[int, ...]
    gemm_weights: tuple[tuple[int, int], ...]
    rounds: int
    replays: int = 5


FULL = Extent(
    rows=(1, 2, 4, 8, 16, 32),
    ks=(2048, 4096, 8192, 14336, 28672),
    large=((4096, 8192), (16384, 4096), (2048, 28672), (65536, 8192)),
    gemm_rows=(1, 2, 4, 8, 16, 32, 64),
    # Llama 3.3 70B's k, 8B's, its gate and up projection, its down projection, its qkv on 8 ranks.
    gemm_weights=((8192, 8192), (4096, 4096), (57344, 8192), (8192, 28672), (1280, 8192)),
    rounds=15,
)
QUICK = Extent(
    rows=(1, 8, 32),
    ks=(4096, 8192, 28672),
    large=((4096, 8192), (2048, 28672)),
    gemm_rows=(1, 16),
    gemm_weights=((8192, 8192), (4096, 4096)),
    rounds=5,
)


def run(device: torch.device, quick: bool, progress: Progress) -> dict[str, Any]:
    """Measure everything.

    Args:
        device: a CUDA device of compute capability 8.9 or more.
        quick: fewer shapes and rounds.
        progress: called before each shape.

    Returns:
        What was measured, as the JSON has it: ``few_rows``, ``arithmetic``, ``many_rows``, ``gemm``, ``baselines`` with a
        sentence about each, ``not_measured`` with reasons, and ``targets``.
    """
    return measure(device, QUICK if quick else FULL, progress)


def measure(device: torch.device, extent: Extent, progress: Progress) -> dict[str, Any]:
    """As :func:`run`, of this extent."""
    result: dict[str, Any] = {
        "calls": CALLS,
        "rounds": extent.rounds,
        "replays": extent.replays,
        "few_rows": [],
        "arithmetic": [],
        "many_rows": [],
        "gemm": [],
        "not_measured": {},
    }
    with torch.cuda.device(device), ScalePool(device, growth_in_capture="error") as pool:
        progress("launch floor", 0.0)
        floor = {name: timing.captured(_repeat(call, CALLS), pool) for name, call in _floor(device).items()}
        copy = timing.fastest_copy(pool)
        result["copy_bytes"] = copy.nbytes
        emulation = gemm.emulation(device, pool)
        if isinstance(emulation, str):
            result["not_measured"][gemm.EMULATION] = emulation
            emulation = None
        result["baselines"] = {name: baseline.about for name, baseline in baselines(pool).items()}
        result["baselines"] |= {name: kernel.about for name, kernel in vendor_kernels.DENSE.items()}
        not_run = []
        jobs: list[tuple[str, str, Callable[[], dict[str, Any]]]] = []
        for layout in (SfLayout.layout_128x4, SfLayout.layout_8x4):
            own, missing = vendor_kernels.dense(device, layout)
            own_silu, missing_silu = vendor_kernels.silu(device, layout)
            not_run += [missing, missing_silu]
            for k in extent.ks:
                for rows in extent.rows:
                    about = f"quantize {rows} x {k}, {short(layout)}"
                    jobs.append(
                        ("few_rows", about, functools.partial(_few_rows, pool, floor, extent, rows, k, layout, own))
                    )
                    shape = (rows, k, layout, CALLS, extent.rounds, extent.replays)
                    beside = functools.partial(arithmetic.measure, pool, *shape, own, own_silu)
                    jobs.append(("arithmetic", about, beside))
        result["not_measured"] |= vendor_kernels.reasons(not_run)
        for rows, k in extent.large:
            about = f"quantize {rows} x {k}"
            jobs.append(("many_rows", about, functools.partial(_many_rows, pool, copy, extent, rows, k)))
        for n, k in extent.gemm_weights:
            for m in extent.gemm_rows:
                job = functools.partial(gemm.measure, pool, copy, emulation, m, n, k, extent.rounds, extent.replays)
                jobs.append(("gemm", f"GEMM {m} x {n} x {k}", job))
        for done, (part, about, job) in enumerate(jobs):
            progress(about, done / len(jobs))
            result[part].append(job())
        progress("done", 1.0)
    result["targets"] = targets(result) + arithmetic.targets(result["arithmetic"], result["many_rows"])
    return result


def nbytes(rows: int, k: int) -> int:
    """Bytes that a quantization has to read and write: 2 + 1/2 + 1/16 per element."""
    return rows * k * 41 // 16


def targets(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The targets, and what was reached, each at its worst shape.

    Args:
        result: with the rows of ``few_rows``, ``many_rows`` and ``gemm``.
    """
    few, many, products = result["few_rows"], result["many_rows"], result["gemm"]

    def pool_to(baseline: str, chosen: Callable[[dict[str, Any]], bool], part: str = "baselines") -> list[float]:
        """The pool's time relative to that of ``baseline``, for the rows where it was measured."""
        return [1 / row[part][baseline]["ratio_to_pool"] for row in few if chosen(row) and baseline in row[part]]

    return [
        at_most(
            "pool against linear, rows <= 32, k >= 4096, 128x4 and 8x4: times",
            1.05,
            pool_to(LINEAR, lambda row: row["rows"] <= 32 and row["k"] >= 4096),
        ),
        at_most(
            "pool against an empty kernel's node, 1 row, k = 4096: times",
            2.2,
            pool_to(EMPTY_NODE, lambda row: row["rows"] == 1 and row["k"] == 4096, "floor"),
        ),
        at_most(
            "pool against padding in the kernel (stand-in), rows <= 8, k >= 8192, 128x4: times",
            0.70,
            pool_to(IN_KERNEL, lambda row: row["rows"] <= 8 and row["k"] >= 8192 and row["layout"] == "128x4"),
        ),
        at_least(
            "pool with rows * k >= 2**25: share of the bandwidth of a copy",
            0.70,
            [row["share_of_copy"] for row in many if row["rows"] * row["k"] >= 2**25],
        ),
        at_least(
            "GEMM, n = k = 8192, m <= 16: share of the bandwidth of a copy",
            0.50,
            [row["share_of_copy"] for row in products if row["n"] == row["k"] == 8192 and row["m"] <= 16],
        ),
    ]


def _floor(device: torch.device) -> dict[str, Callable[[], None]]:
    """The shortest nodes of a graph, by name."""
    floor: dict[str, Callable[[], None]] = {EMPTY_NODE: nodes.launch_empty}
    if dependent := dependent_launch(device):  # the quantizer is launched so too
        floor[DEPENDENT_NODE] = functools.partial(nodes.launch_empty, **dependent)
    out = torch.empty(132, dtype=torch.int32, device=device)
    return floor | {STORE_NODE: functools.partial(nodes.launch_store, out)}


def _few_rows(
    pool: ScalePool,
    floor: Mapping[str, torch.cuda.CUDAGraph],
    extent: Extent,
    rows: int,
    k: int,
    layout: SfLayout,
    own: Mapping[str, vendor_kernels.Quantize],
) -> dict[str, Any]:
    x, global_scale = _activation(rows, k, pool.device)
    pool.reserve(rows, k, layout)
    every = {name: _call(baseline, x, global_scale, layout) for name, baseline in baselines(pool).items()}
    every |= {name: functools.partial(quantize, x, global_scale, layout) for name, quantize in own.items()}
    graphs = {name: timing.captured(_repeat(call, CALLS), pool) for name, call in every.items()}
    replayed = timing.interleaved({**floor, **graphs}, extent.rounds, extent.replays)
    times = {name: [time / CALLS for time in samples] for name, samples in replayed.items()}

    def measured(name: str) -> dict[str, Any]:
        return summary(times[name]) | {"ratio_to_pool": round(timing.ratio(times[name], times[POOL]), 4)}

    return {
        "rows": rows,
        "k": k,
        "layout": short(layout),
        "baselines": {name: measured(name) for name in every},
        "floor": {name: measured(name) for name in floor},
    }


def _many_rows(pool: ScalePool, copy: timing.Copy, extent: Extent, rows: int, k: int) -> dict[str, Any]:
    layout = SfLayout.layout_128x4
    calls = -(-_BEYOND_L2 // (2 * rows * k))
    xs = [_activation(rows, k, pool.device) for _ in range(calls)]
    pool.reserve(rows, k, layout, 2 * calls)  # two graphs take buffers of it

    def quantize(x: Tensor, global_scale: Tensor, which: str) -> tuple[Tensor, Tensor]:
        data, scales = torch.empty((rows, k // 2), dtype=torch.uint8, device=x.device), pool.acquire(rows, k, layout)
        triton_quantize.quantize(x, global_scale, data, scales, layout, None, False, which)
        return data, scales

    def step(which: str) -> None:
        results = [quantize(x, global_scale, which) for x, global_scale in xs]
        del results  # held until here, so that each has its own memory

    found = {}
    for which in (arithmetic.EXACT, arithmetic.VENDORS[layout]):
        # One after the other: the results of both take a quarter of x each.
        graphs = {"copy": copy.graph, which: timing.captured(functools.partial(step, which), pool)}
        times = timing.interleaved(graphs, extent.rounds, extent.replays)
        us = summary([time / calls for time in times[which]])
        share = timing.ratio(times["copy"], times[which]) * calls * nbytes(rows, k) / copy.nbytes
        found[which] = {
            **us,
            "bytes_per_second": round(1e6 * nbytes(rows, k) / us["us"]),
            "copy_bytes_per_second": round(1e6 * copy.nbytes / timing.median(times["copy"])),
            "share_of_copy": round(share, 4),
        }
        graphs.clear()
    return {
        "rows": rows,
        "k": k,
        "layout": short(layout),
        "bytes": nbytes(rows, k),
        **found[arithmetic.EXACT],
        "by_arithmetic": found,
    }


def _activation(rows: int, k: int, device: torch.device) -> tuple[Tensor, Tensor]:
    x = torch.randn(rows, k, dtype=torch.bfloat16, device=device)
    return x, torch.tensor([448 * 6 / 5.0], device=device)


def _call(baseline: Baseline, x: Tensor, global_scale: Tensor, layout: SfLayout) -> Callable[[], object]:
    return functools.partial(baseline.quantize, x, global_scale, layout if baseline.layout is None else baseline.layout)


def _repeat(call: Callable[[], object], times: int) -> Callable[[], None]:
    def step() -> None:
        for _ in range(times):
            call()

    return step

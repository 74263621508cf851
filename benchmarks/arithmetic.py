"""Part of ``python -m benchmarks quantize``: a vendor's arithmetic beside the exact one, and SiLU and mul.

In 128x4 the vendor is vLLM, in 8x4 FlashInfer, whose kernel vLLM takes there. At each shape all are replayed in turn: the
pool and the linear layout, which has no padding, SiLU and mul and the quantization of as many columns, and the vendor's own
kernel where it can run.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks import timing, vendor_kernels
from benchmarks.summary import at_least, at_most, summary
from safealloc.formats.layout import SfLayout, short
from safealloc.kernels import triton_quantize
from safealloc.pool.pool import ScalePool

EXACT = "exact"
VENDORS = {SfLayout.layout_128x4: "vllm", SfLayout.layout_8x4: "flashinfer"}
OWN = {SfLayout.layout_128x4: vendor_kernels.VLLM, SfLayout.layout_8x4: vendor_kernels.FLASHINFER}
POOL, LINEAR, SILU = "pool", "linear", "SiLU and mul"

MOST_SILU = 65536
"""Values up to which SiLU and mul has a target."""

Nodes = Mapping[str, Mapping[str, Callable[[], object]]]
"""Calls by arithmetic and what they measure."""


Own = Mapping[str, vendor_kernels.Quantize]
"""Vendors' kernels that run, by name."""


def nodes(pool: ScalePool, rows: int, k: int, layout: SfLayout, own: Own, own_silu: Own) -> Nodes:
    """What is measured at a shape; makes the pool's buffers."""
    device, vendor = pool.device, VENDORS[layout]
    x, gate_up = (torch.randn(rows, width, dtype=torch.bfloat16, device=device) for width in (k, 2 * k))
    g = torch.tensor([448 * 6 / 5.0], device=device)
    pool.reserve(rows, k, layout, copies=6)  # as many graphs take buffers of it

    def quantize(layout: SfLayout, silu_and_mul: bool, arithmetic: str) -> tuple[Tensor, Tensor]:
        data = torch.empty((rows, k // 2), dtype=torch.uint8, device=device)
        if layout is SfLayout.layout_linear:
            scales = torch.empty((rows, k // 16), dtype=torch.uint8, device=device)
        else:
            scales = pool.acquire(rows, k, layout)
        given = gate_up if silu_and_mul else x
        triton_quantize.quantize(given, g, data, scales, layout, None, silu_and_mul, arithmetic)
        return data, scales

    found: dict[str, dict[str, Callable[[], object]]] = {
        arithmetic: {
            POOL: functools.partial(quantize, layout, False, arithmetic),
            LINEAR: functools.partial(quantize, SfLayout.layout_linear, False, arithmetic),
            SILU: functools.partial(quantize, layout, True, arithmetic),
        }
        for arithmetic in (EXACT, vendor)
    }
    # Of the vendor whose arithmetic it is: the others are beside the baselines.
    for name, theirs in own.items():
        if name == OWN[layout]:
            found[vendor][name] = functools.partial(theirs, x, g, layout)
    for name, theirs in own_silu.items():
        found[vendor][name] = functools.partial(theirs, gate_up, g, layout)
    return found


def measure(
    pool: ScalePool,
    rows: int,
    k: int,
    layout: SfLayout,
    calls: int,
    rounds: int,
    replays: int,
    own: Own,
    own_silu: Own,
) -> dict[str, Any]:
    """One shape: microseconds of each node, and ratios within a round.

    Args:
        pool: for every buffer.
        rows, k, layout: 128x4 or 8x4.
        calls: per graph.
        rounds, replays: as in :func:`benchmarks.timing.interleaved`.
        own, own_silu: vendors' kernels that run here, without and with SiLU and mul.
    """
    every = {
        (arithmetic, name): call
        for arithmetic, row in nodes(pool, rows, k, layout, own, own_silu).items()
        for name, call in row.items()
    }

    def repeat(call: Callable[[], object]) -> None:
        for _ in range(calls):
            call()

    graphs = {" ".join(key): timing.captured(functools.partial(repeat, call), pool) for key, call in every.items()}
    times = timing.interleaved(graphs, rounds, replays)
    by_arithmetic: dict[str, dict[str, Any]] = {EXACT: {}, VENDORS[layout]: {}}
    for arithmetic, name in every:
        samples, of_pool = times[f"{arithmetic} {name}"], times[f"{arithmetic} {POOL}"]
        by_arithmetic[arithmetic][name] = summary([time / calls for time in samples]) | {
            "ratio_to_pool": round(timing.ratio(samples, of_pool), 4),
            "ratio_to_exact": round(timing.ratio(samples, times[f"{EXACT} {name}"]), 4) if name in _OURS else None,
        }
    graphs.clear()
    return {"rows": rows, "k": k, "layout": short(layout), "by_arithmetic": by_arithmetic}


_OURS = (POOL, LINEAR, SILU)


def targets(found: Sequence[Mapping[str, Any]], many: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The targets, and what was reached.

    Args:
        found: rows of :func:`measure`.
        many: the benchmark's many rows, with the ``share_of_copy`` of each arithmetic.
    """
    results = []
    for arithmetic in (EXACT, *VENDORS.values()):
        rows = [row for row in found if arithmetic in row["by_arithmetic"]]
        linear = [
            1 / row["by_arithmetic"][arithmetic][LINEAR]["ratio_to_pool"]
            for row in rows
            if row["rows"] <= 32 and row["k"] >= 4096
        ]
        of_silu = [
            row["by_arithmetic"][arithmetic][SILU]["ratio_to_pool"]
            for row in rows
            if row["rows"] * row["k"] <= MOST_SILU
        ]
        about = "rows <= 32, k >= 4096: times"
        middle = [timing.median(linear)] if linear else []
        results += [
            at_most(f"{arithmetic}: pool against linear, median of {about}", 1.05, middle),
            at_most(f"{arithmetic}: pool against linear, {about}", 1.08, linear),
            at_most(
                f"{arithmetic}: SiLU and mul against the quantization, up to {MOST_SILU} values: times", 1.15, of_silu
            ),
        ]
        if arithmetic != EXACT:
            ratios = [row["by_arithmetic"][arithmetic][name]["ratio_to_exact"] for row in rows for name in _OURS]
            middle = [timing.median(ratios)] if ratios else []
            results.append(at_most(f"{arithmetic} against exact, median of all shapes: times", 1.0, middle))
    for arithmetic in (EXACT, "vllm"):
        shares = [row["by_arithmetic"][arithmetic]["share_of_copy"] for row in many]
        results.append(at_least(f"{arithmetic}: many rows: share of the bandwidth of a copy", 0.85, shares))
    return results

"""Draw docs/repro.png from what ``safealloc repro --json`` wrote.

python -m benchmarks.plot_repro [benchmarks/results/repro-cpu.json] [docs/repro.png]
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from benchmarks.figure import GRAY, GREEN, GRID, INK, ORANGE, RED, style, write

ROOT = Path(__file__).resolve().parents[1]


def draw(result: dict[str, Any]) -> plt.Figure:
    """The figure: on the left rows with NaN, on the right wrong numbers where the padding is finite."""
    style()
    published = [row for row in result["published"] if row["backend"] == "trtllm"]
    ours = [row for row in result["safealloc"] if row["section"] == "published" and row["backend"] == "trtllm"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.9))
    m = [row["m"] for row in published]
    ticks = range(len(m))

    share = [100 * row["nan_rows"] / row["m"] for row in published]
    shares_published = [100 * row["published_nan_rows"] / row["m"] for row in published]
    shares_through_pool = [100 * row["nan_rows"] / row["m"] for row in ours]
    red = left.bar(
        [x - 0.17 for x in ticks], share, 0.34, color=RED, label="computed: written in 128x4, read as vLLM reads"
    )
    (white,) = left.plot(
        [x - 0.17 for x in ticks], shares_published, "D", **_white(), label="published (vLLM issue 37563)"
    )
    (green,) = left.plot(
        [x + 0.2 for x in ticks], shares_through_pool, "o", **_green(), label="the same calls through safealloc"
    )
    for x, row in zip(ticks, published, strict=True):
        left.annotate(f"{row['nan_rows']}/{row['m']}", (x - 0.17, 100 * row["nan_rows"] / row["m"]), (0, 9), **_above())
    left.set_ylabel("rows with NaN (% of the m rows)")
    left.set_ylim(0, 118)
    left.set_title("Padding holds stale 0x7F: NaN", loc="left", fontweight="bold")
    _legend(left, [red, white, green])

    red = right.bar(
        [x - 0.3 for x in ticks],
        [row["max_diff_finite"] for row in published],
        0.3,
        color=RED,
        label="change by padding scales of 1.0 instead of 0",
    )
    orange = right.bar(
        ticks, [row["max_diff_zeroed"] for row in published], 0.3, color=ORANGE, label="error with the padding zeroed"
    )
    rounding = max(row["max_error"] for row in ours)
    (green,) = right.plot(
        [x + 0.3 for x in ticks],
        [row["max_error"] for row in ours],
        "o",
        **_green(),
        label=f"error through safealloc (at most {rounding:.2f}: bfloat16 rounding)",
    )
    (line,) = right.plot(
        ticks,
        [row["largest_correct"] for row in published],
        "_",
        **_mark(),
        label="for scale: the largest correct output",
    )
    right.set_ylabel("largest over all outputs (no unit)")
    right.set_ylim(bottom=0)
    right.set_title("Padding holds numbers: still wrong", loc="left", fontweight="bold")
    _legend(right, [red, orange, green, line])

    for axes in (left, right):
        axes.set_xticks(list(ticks), [str(rows) for rows in m])
        axes.set_xlabel("m (rows of the activation; trtllm reads 8x4 up to 32, 128x4 at 64)")
        axes.grid(axis="y", color=GRID)
        axes.set_axisbelow(True)
    versions = result["versions"]
    machine = (
        f"k = 512, n = 256, trtllm's layouts; {result['device_name']}, torch {versions['torch']}, seed {result['seed']}"
    )
    figure.text(0.995, 0.008, machine, ha="right", fontsize=7.5, color=GRAY)
    figure.tight_layout(rect=(0, 0.02, 1, 1))
    return figure


def _legend(axes: plt.Axes, handles: list[Any]) -> None:
    axes.legend(handles=handles, loc="upper left", bbox_to_anchor=(0, -0.16), frameon=False)


def _above() -> dict[str, Any]:
    return {"textcoords": "offset points", "ha": "center", "fontsize": 9}


def _white() -> dict[str, Any]:
    return {"color": INK, "markerfacecolor": "white", "markersize": 7, "clip_on": False, "zorder": 5}


def _green() -> dict[str, Any]:
    return {"color": GREEN, "markersize": 7, "clip_on": False, "zorder": 5}


def _mark() -> dict[str, Any]:
    return {"color": INK, "markersize": 26, "markeredgewidth": 2}


if __name__ == "__main__":
    write(__doc__, draw, ROOT / "benchmarks/results/repro-cpu.json", ROOT / "docs/repro.png")

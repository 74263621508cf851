"""Draw docs/vllm-decode.png from what benchmarks/vllm_decode.py wrote.

python -m benchmarks.plot_vllm_decode [benchmarks/results/vllm-decode-h200.json] [docs/vllm-decode.png]
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from benchmarks.figure import GRAY, GREEN, GRID, INK, RED, style, write

ROOT = Path(__file__).resolve().parents[1]

COLORS = {
    "vLLM's own": RED,
    "torch.empty": GRAY,
    "pool": GREEN,
}
LABELS = {"vLLM's own": "vLLM's own (torch.zeros)", "torch.empty": "torch.empty (unsafe)"}


def draw(result: dict[str, Any]) -> plt.Figure:
    """GPU time a step that the allocator adds to torch.empty, and time per output token relative to vLLM's own."""
    style()
    allocators = {name: found for name, found in result["allocators"].items() if name in COLORS}
    batches = [row["batch"] for row in allocators["pool"]["batches"]]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6))
    shown = [name for name in allocators if name != "torch.empty"]
    bars(left, batches, {name: values(allocators[name], "replay_over_empty_us") for name in shown})
    left.set_ylabel("GPU time a decode step over torch.empty (µs)")
    left.set_title("What the scale buffers cost a step", loc="left")
    right_shown = [name for name in allocators if name != "vLLM's own"]
    relative = {
        name: [100 * (ratio - 1) for ratio in values(allocators[name], "tpot_to_vllms_own")] for name in right_shown
    }
    bars(right, batches, relative)
    right.set_ylabel("time per output token against vLLM's own (%)")
    right.set_title("End to end", loc="left")
    versions = result["versions"]
    figure.suptitle(
        f"vLLM {versions['vllm']}, Llama 8B shape, NVFP4 on a Triton GEMM, {result['device']}",
        x=0.01,
        ha="left",
        fontsize=11,
    )
    handles = [plt.Rectangle((0, 0), 1, 1, color=COLORS[name]) for name in allocators]
    figure.legend(handles, [LABELS.get(name, name) for name in allocators], ncol=3, loc="lower center", frameon=False)
    figure.tight_layout(rect=(0, 0.07, 1, 0.98))
    return figure


def values(allocator: dict[str, Any], key: str) -> list[float]:
    return [row[key] for row in allocator["batches"]]


def bars(axes: plt.Axes, batches: list[int], series: dict[str, list[float]]) -> None:
    width = 0.8 / len(series)
    for number, (name, heights) in enumerate(series.items()):
        at = [x + (number - (len(series) - 1) / 2) * width for x in range(len(batches))]
        axes.bar(at, heights, width * 0.92, color=COLORS[name])
    axes.set_xticks(range(len(batches)), [str(batch) for batch in batches])
    axes.set_xlabel("batch size")
    axes.axhline(0, color=INK, linewidth=0.8)
    axes.grid(axis="y", color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)


if __name__ == "__main__":
    write(__doc__, draw, ROOT / "benchmarks/results/vllm-decode-h200.json", ROOT / "docs/vllm-decode.png")

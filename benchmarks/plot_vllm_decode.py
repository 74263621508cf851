"""Draw docs/vllm-decode.png from what benchmarks/vllm_decode.py wrote.

python -m benchmarks.plot_vllm_decode [benchmarks/results/vllm-decode-h200.json] [docs/vllm-decode.png]
"""

from __future__ import annotations

import statistics
from typing import Any

import matplotlib.pyplot as plt

from benchmarks.figure import INK, LOOKS, ROOT, WIDTH, finish, grid, style, write

WAYS = {"vLLM's own": "zeros", "torch.empty": "empty", "pool": "pool"}  # vLLM 0.25.1's own way is torch.zeros


def draw(result: dict[str, Any]) -> plt.Figure:
    """What the allocator adds to a decode step and to the time per output token.

    On the left are microseconds over torch.empty, on the right percent of vLLM's own. Differences are within a round: a
    marker is their median, a bar reaches from the least to the greatest.
    """
    style()
    figure, (left, right) = plt.subplots(1, 2, figsize=(WIDTH, 4.6))
    handles: dict[str, Any] = {}
    steps = {name: of_rounds(result, name, "replay") for name in WAYS}
    tokens = {name: of_rounds(result, name, "tpot") for name in WAYS}
    batches = list(steps["pool"])
    for name in ("vLLM's own", "pool"):
        pairs = [zip(steps[name][batch], steps["torch.empty"][batch], strict=True) for batch in batches]
        points(left, name, [[1e6 * (ours - empty) for ours, empty in pair] for pair in pairs], handles)
    for name in ("torch.empty", "pool"):
        pairs = [zip(tokens[name][batch], tokens["vLLM's own"][batch], strict=True) for batch in batches]
        points(right, name, [[100 * (ours / own - 1) for ours, own in pair] for pair in pairs], handles)
    left.set_title("GPU time of a decode step")
    left.set_ylabel("over torch.empty (µs)")
    right.set_title("Time per output token")
    right.set_ylabel("against torch.zeros (%)")
    for axes in (left, right):
        axes.axhline(0, color=INK, linewidth=0.8)
        axes.set_xticks(range(len(batches)), batches)
        axes.set_xlabel("batch size")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:+g}" if value else "0")
        grid(axes)
    versions = result["versions"]
    explained = (
        "Above 0: slower than torch.empty (left), than vLLM's own torch.zeros (right). Below 0: faster.\n"
        f"A marker is the median of {result['rounds']} rounds, a bar their spread. "
        "Where it crosses 0, the difference is noise."
    )
    title = f"In the engine: vLLM {versions['vllm']}, a Llama of 8B shape"
    source = f"NVFP4 on a Triton GEMM, {result['device']}, torch {versions['torch']}"
    return finish(figure, title, explained, handles, source)


def of_rounds(result: dict[str, Any], name: str, what: str) -> dict[str, list[float]]:
    """Batch size -> seconds in each round."""
    return dict(result["seconds"][name][what])


def points(axes: plt.Axes, name: str, found: list[list[float]], handles: dict[str, Any]) -> None:
    """The median of the rounds at each batch size, and a bar from the least to the greatest."""
    look = {"markersize": 7, **LOOKS[WAYS[name]], "linestyle": ""}
    shift = 0.12 if name == "pool" else -0.12
    at = [place + shift for place in range(len(found))]
    axes.vlines(at, [min(rounds) for rounds in found], [max(rounds) for rounds in found], color=look["color"])
    (handles[look["label"]],) = axes.plot(at, [statistics.median(rounds) for rounds in found], **look)


if __name__ == "__main__":
    write(__doc__, draw, ROOT / "benchmarks/results/vllm-decode-h200.json", ROOT / "docs/vllm-decode.png")

"""The pictures docs/bench-*.png, drawn from what ``python -m benchmarks --json`` wrote.

python -m benchmarks.plots [benchmarks/results/bench-h200.json] [docs]
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from benchmarks.figure import GRAY, GRID, INK, save, style

ROOT = Path(__file__).resolve().parents[1]

# Names are those of the JSON: the modules that measure need Triton, and this one does not import them.
LOOKS = {
    "pool": {"color": "#12946a", "marker": "o", "zorder": 3, "label": "pool"},
    "zeros": {"color": "#a8281e", "marker": "^", "zorder": 3, "label": "torch.zeros at each call"},
    "padding in the kernel": {"color": "#eba52e", "marker": "D", "zorder": 3, "label": "padding stored by the kernel"},
    "zeroing the returned buffer": {
        "color": "#3f5fc4",
        "marker": "v",
        "zorder": 3,
        "label": "zeroing the returned buffer",
    },
    # The two floors coincide with the pool: one is drawn around it, one over it.
    "empty": {
        "color": "#a3aab3",
        "marker": "s",
        "markersize": 10,
        "markerfacecolor": "none",
        "zorder": 2.5,
        "label": "torch.empty (unsafe)",
    },
    "linear": {
        "color": INK,
        "marker": "x",
        "markersize": 4.5,
        "linestyle": ":",
        "linewidth": 1.2,
        "zorder": 4,
        "label": "linear, without padding",
    },
}
"""How the pool and the baselines are drawn: colors that the color-blind can tell apart, and different markers."""

_MOE_LOOKS: dict[str, dict[str, Any]] = {
    "pool": LOOKS["pool"],
    "pool, cleaned by a separate kernel": {
        "color": "#3f5fc4",
        "marker": "v",
        "zorder": 3,
        "label": "pool, cleaned by a separate kernel",
    },
    "right-sized, zeroed": {"color": "#eba52e", "marker": "D", "zorder": 3, "label": "right-sized, torch.zeros"},
    "vLLM's size, zeroed": {"color": "#a8281e", "marker": "^", "zorder": 3, "label": "vLLM's size, torch.zeros"},
    "quantization alone": LOOKS["empty"] | {"label": "quantization alone (unsafe)"},
}
"""The same for grouped quantization."""

_OTHER_MARKERS = "P*<>h"  # for names that are not in LOOKS
_KS = (4096, 8192, 28672)
EMPTY_NODE = "empty kernel"
_MODELS_A_ROW = 4
_OURS = ("pool", "torch.ops.safealloc", "hook", "nvfp4", "triton_quantize")  # prefixes of our calls on the host


def draw(result: dict[str, Any], folder: Path) -> list[Path]:
    """Draw a picture of each part that was measured.

    Args:
        result: what ``python -m benchmarks --json`` writes; any of "quantize", "decode", "host", "moe" and "memory" may
            be missing.
        folder: where to write; made if it does not exist.

    Returns:
        The files.
    """
    pictures: dict[str, Callable[[dict[str, Any]], plt.Figure | None]] = {
        "bench-quantize.png": quantize,
        "bench-decode.png": decode,
        "bench-memory.png": memory,
        "bench-host.png": host,
        "bench-moe.png": moe,
    }
    written = []
    for name, drawn_by in pictures.items():
        figure = drawn_by(result)
        if figure is not None:
            save(figure, folder / name)
            written.append(folder / name)
    return written


def quantize(result: dict[str, Any]) -> plt.Figure | None:
    """Latency of a quantization against rows, one panel per k; ``None`` where it was not measured."""
    rows = [row for row in result.get("quantize", {}).get("few_rows", ()) if row["layout"] == "128x4"]
    ks = [k for k in _KS if any(row["k"] == k for row in rows)]
    if not ks:
        return None
    style()
    figure, panels = plt.subplots(1, len(ks), figsize=(11, 4.9), sharey=True, squeeze=False)
    baselines = _looks(row["baselines"] for row in rows)
    handles: dict[str, Any] = {}
    for axes, k in zip(panels[0], ks, strict=True):
        of_k = sorted((row for row in rows if row["k"] == k), key=lambda row: int(row["rows"]))
        for name, look in baselines.items():
            points = [(row["rows"], row["baselines"][name]) for row in of_k if name in row["baselines"]]
            handles[look["label"]] = _line(axes, points, look)
        nodes = [row["floor"][EMPTY_NODE]["us"] for row in of_k if EMPTY_NODE in row.get("floor", {})]
        if nodes:
            label = "node of an empty kernel"
            handles[label] = axes.axhline(statistics.median(nodes), color=GRAY, linestyle="--", linewidth=1.2)
        _log2(axes, [row["rows"] for row in of_k])
        axes.set_xlabel("rows")
        axes.set_title(f"k = {k}", loc="left")
    panels[0][0].set_ylabel("GPU time of a quantization (µs)")
    panels[0][0].set_ylim(bottom=0)
    return _finish(figure, "Quantizing an activation in 128x4, as a node of a CUDA graph", handles, result)


def decode(result: dict[str, Any]) -> plt.Figure | None:
    """GPU time of a decode step over the pool's, one panel per model; ``None`` where it was not measured."""
    models = result.get("decode", {}).get("models", ())
    if not models:
        return None
    style()
    lines = -(-len(models) // _MODELS_A_ROW)
    columns = -(-len(models) // lines)
    figure, panels = plt.subplots(lines, columns, figsize=(max(3.3 * columns, 7), 1.3 + 2.9 * lines), squeeze=False)
    baselines = _looks(batch["baselines"] for model in models for batch in model["batches"])
    zero = baselines.pop("pool", None)
    handles: dict[str, Any] = {}
    for axes, model in zip(panels.flat, models, strict=False):
        if zero is not None:
            handles["pool (zero)"] = axes.axhline(0, color=zero["color"], linewidth=2)
        for name, look in baselines.items():
            points = [
                (batch["batch"], _times(model["quantizations"], batch["baselines"][name]["over_pool_per_quantization"]))
                for batch in model["batches"]
                if name in batch["baselines"]
            ]
            handles[look["label"]] = _line(axes, points, look)
        _log2(axes, [batch["batch"] for batch in model["batches"]])
        axes.set_title(
            f"{model['model']}\nTP {model['tensor_parallel']}, {model['quantizations']} quantizations per step",
            loc="left",
            fontsize=10,
        )
        axes.set_xlabel("batch size")
    for axes in panels[:, 0]:
        axes.set_ylabel("GPU time of a step\nover the pool's (µs)")
    for axes in list(panels.flat)[len(models) :]:
        axes.set_visible(False)
    return _finish(figure, "What each baseline adds to a decode step, compared with the pool", handles, result)


def memory(result: dict[str, Any]) -> plt.Figure | None:
    """Bytes of scale buffers for vLLM's captured batch sizes; ``None`` where the result has none.

    ``result["memory"]`` is a list of ``{"sizes": count, "largest": batch, "bars": {label: bytes}}``.
    """
    groups = result.get("memory") or ()
    if not groups:
        return None
    style()
    labels = list(dict.fromkeys(label for group in groups for label in group["bars"]))
    colors = dict(zip(labels, ("#12946a", "#a3aab3", "#3f5fc4", "#eba52e", "#a8281e", INK), strict=False))
    figure, axes = plt.subplots(figsize=(7.5, 4.4))
    width = 0.8 / len(labels)
    handles: dict[str, Any] = {}
    for number, label in enumerate(labels):
        at = [place + (number - (len(labels) - 1) / 2) * width for place in range(len(groups))]
        heights = [group["bars"].get(label, 0) / 2**20 for group in groups]
        bars = axes.bar(at, heights, width * 0.92, color=colors.get(label, GRAY))
        axes.bar_label(bars, [f"{height:.1f}" if height >= 1 else f"{height:.2g}" for height in heights], padding=2)
        handles[label] = bars
    axes.set_xticks(
        range(len(groups)), [f"{group['sizes']} captured batch sizes\nup to {group['largest']}" for group in groups]
    )
    axes.tick_params(axis="x", length=0)
    axes.set_ylabel("scale buffers (MiB)")
    axes.margins(y=0.12)
    _grid(axes)
    return _finish(figure, "Memory for Llama 3.3 70B on one GPU", handles, result, machine=False)


def host(result: dict[str, Any]) -> plt.Figure | None:
    """Host time per call, one bar each; ``None`` where it was not measured."""
    part = result.get("host", {})
    calls = part.get("calls")
    if not calls:
        return None
    style()
    figure, axes = plt.subplots(figsize=(9, 1.9 + 0.36 * len(calls)))
    places = range(len(calls))
    times = [call["us"] for call in calls.values()]
    errors = [
        [max(call["us"] - call["quartiles"][0], 0) for call in calls.values()],
        [max(call["quartiles"][1] - call["us"], 0) for call in calls.values()],
    ]
    ours = [name.startswith(_OURS) for name in calls]
    kinds = {True: ("safealloc", "#12946a"), False: ("without safealloc", "#a3aab3")}
    bars = axes.barh(places, times, 0.68, color=[kinds[one][1] for one in ours])
    axes.errorbar(times, places, xerr=errors, fmt="none", ecolor=INK, elinewidth=1, capsize=2)
    edge = max(call["quartiles"][1] for call in calls.values())
    for place, call in zip(places, calls.values(), strict=True):
        end = max(call["us"], call["quartiles"][1]) + 0.012 * edge
        axes.text(end, place, f"{call['us']:.2f}", va="center", fontsize=9)
    axes.set_yticks(places, list(calls))
    axes.invert_yaxis()
    axes.set_xlim(0, 1.1 * edge)
    axes.set_xlabel("host time per call (µs)")
    axes.grid(axis="x", color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    handles = {kinds[one][0]: bars[ours.index(one)] for one in (True, False) if one in ours}
    return _finish(figure, "Host time per call", handles, result)


def moe(result: dict[str, Any]) -> plt.Figure | None:
    """Latency of grouped quantization against tokens, one panel per k; ``None`` where it was not measured."""
    rows = [row for row in result.get("moe", {}).get("rows", ()) if row["routing"] == "uniform"]
    ks = list(dict.fromkeys(row["k"] for row in rows))
    if not ks:
        return None
    style()
    figure, panels = plt.subplots(1, len(ks), figsize=(max(4.6 * len(ks), 7), 4.6), sharey=True, squeeze=False)
    baselines = {name: look for name, look in _MOE_LOOKS.items() if any(name in row["baselines"] for row in rows)}
    handles: dict[str, Any] = {}
    for axes, k in zip(panels[0], ks, strict=True):
        of_k = sorted((row for row in rows if row["k"] == k), key=lambda row: int(row["batch"]))
        for name, look in baselines.items():
            points = [(row["batch"], row["baselines"][name]) for row in of_k if name in row["baselines"]]
            handles[look["label"]] = _line(axes, points, look)
        _log2(axes, [row["batch"] for row in of_k])
        axes.set_yscale("log")
        axes.set_xlabel("tokens")
        fused = ", after SiLU and mul" if of_k[0]["silu_and_mul"] else ""
        axes.set_title(f"k = {k}{fused}", loc="left")
    panels[0][0].set_ylabel("GPU time of a quantization (µs)")
    panels[0][0].yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    title = f"MoE: grouped quantization, {result['moe']['experts']} experts, {result['moe']['topk']} per token"
    return _finish(figure, title, handles, result)


# --- parts of a picture -----------------------------------------------------------------------------------------------


def _looks(measurements: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """How each baseline of these mappings is drawn; the names in :data:`LOOKS` come first, in its order."""
    names = list(dict.fromkeys(name for measured in measurements for name in measured))
    looks: dict[str, dict[str, Any]] = {name: {**look} for name, look in LOOKS.items() if name in names}
    for number, name in enumerate(name for name in names if name not in LOOKS):
        looks[name] = {"color": f"C{number}", "marker": _OTHER_MARKERS[number % len(_OTHER_MARKERS)], "label": name}
    return looks


def _line(axes: plt.Axes, points: Sequence[tuple[int, Mapping[str, Any]]], look: Mapping[str, Any]) -> Any:
    """Draw medians, with quartiles as bars, of ``(x, {"us", "quartiles"})``; returns the line."""
    at = [x for x, _ in points]
    axes.vlines(at, *zip(*(y["quartiles"] for _, y in points), strict=True), color=look["color"], linewidth=1)
    (line,) = axes.plot(at, [y["us"] for _, y in points], **{"markersize": 6.5, "linewidth": 1.6, **look})
    return line


def _times(factor: int, found: Mapping[str, Any]) -> dict[str, Any]:
    return {"us": factor * found["us"], "quartiles": [factor * quartile for quartile in found["quartiles"]]}


def _log2(axes: plt.Axes, ticks: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    _grid(axes)


def _grid(axes: plt.Axes) -> None:
    axes.grid(axis="y", color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)


def _finish(
    figure: plt.Figure, title: str, handles: Mapping[str, Any], result: Mapping[str, Any], *, machine: bool = True
) -> plt.Figure:
    """Title above, legend and machine below the panels."""
    inches = figure.get_figheight()
    figure.text(0.01, 1 - 0.1 / inches, title, va="top", fontsize=12, fontweight="bold")
    for columns in range(min(4, len(handles)), 0, -1):
        legend = figure.legend(
            list(handles.values()),
            list(handles),
            ncol=columns,
            loc="lower center",
            bbox_to_anchor=(0.5, 0.22 / inches),
            frameon=False,
        )
        if legend.get_window_extent().width <= figure.bbox.width or columns == 1:
            break
        legend.remove()
    rows = -(-len(handles) // columns)
    if machine:
        versions = result.get("versions", {})
        known = [f"{name} {versions[name]}" for name in ("torch", "triton") if versions.get(name)]
        where = ", ".join([str(result.get("device_name") or result.get("device") or "unknown device"), *known])
        figure.text(0.995, 0.07 / inches, where, ha="right", fontsize=7.5, color=GRAY)
    figure.tight_layout(rect=(0, (0.3 + 0.24 * rows) / inches, 1, 1 - 0.33 / inches))
    return figure


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw from the JSON on the command line into the folder on the command line."""
    parser = argparse.ArgumentParser(description="Draw the pictures of what python -m benchmarks --json wrote.")
    parser.add_argument("result", nargs="?", type=Path, default=ROOT / "benchmarks/results/bench-h200.json")
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT / "docs")
    given = parser.parse_args(arguments)
    for picture in draw(json.loads(given.result.read_text()), given.folder):
        print(f"wrote {picture}")


if __name__ == "__main__":
    main()

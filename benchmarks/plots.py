"""The pictures docs/bench-*.png, drawn from what ``python -m benchmarks --json`` wrote.

python -m benchmarks.plots [FILE.json FOLDER]    # without them, those of docs/ from benchmarks/results/
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from benchmarks.figure import INK, LOOKS, ROOT, WIDTH, finish, grid, machine, save, style

SOURCES = {
    "bench-quantize.png": "bench-h200.json",
    "bench-decode.png": "bench-decode-h100.json",
    "bench-memory.png": "bench-h200.json",
    "bench-host.png": "bench-host-h100.json",
    "bench-moe.png": "bench-moe-h200.json",
}
"""Which result each picture of the docs is drawn from."""

# Names are those of the JSON: the modules that measure need Triton, and this one does not import them.
WAYS = {
    "pool": "pool",
    "zeros": "zeros",
    "padding in the kernel": "in kernel",
    "padding in the kernel, wide stores": "wide",
    "empty": "empty",
    "vLLM's own": "vllm",
    "FlashInfer's own": "flashinfer",
}
MOE_WAYS = {
    "pool": "pool",
    "pool, cleaned by a separate kernel": "pool and cleaner",
    "right-sized, zeroed": "zeros",
    "vLLM's size, zeroed": "large zeros",
    "quantization alone": "empty",
    "vLLM's own": "vllm",
    "vLLM's own, cleaned by our kernel": "vllm and cleaner",
}
STAND_IN = " (stand-in)"
"""Ends the names of baselines that have our kernel in place of a vendor's; results from before it was there lack it."""

STAND_INS = (
    "zeros",
    "padding in the kernel",
    "padding in the kernel, wide stores",
    "right-sized, zeroed",
    "vLLM's size, zeroed",
)
"""Those that are drawn."""

EMPTY_NODE = "empty kernel"
_MEMORY_WAYS = {"pool": "pool", "allocated and filled at each call": "zeros"}
_KS = (4096, 8192, 28672)
_BUFFER = "A scale buffer"
_VARIED = ", 1 to 1024 rows"
_OUTSIDE = f" outside captures{_VARIED}"
_HOST_PARTS = {  # panels, and what each call is
    _BUFFER: {
        "torch.empty": "empty",
        "torch.zeros": "zeros",
        "pool.acquire": "pool",
        "pool.acquire, side stream": "pool",
        "torch.ops.safealloc.acquire": "pool",
        "torch.empty as vLLM calls it (stand-in)": "empty",
        "torch.zeros as vLLM calls it (stand-in)": "zeros",
        "hook in vLLM": "pool",
    },
    f"vLLM{_OUTSIDE}": {
        f"what it calls there{_VARIED}": "empty",
        f"hook in vLLM{_OUTSIDE}": "pool",
        f"hook behind a fused producer{_OUTSIDE}": "pool",
    },
    "A quantization or a layer": {
        "bare Triton launch": "launch",
        "triton_quantize.quantize": "pool",
        "nvfp4_quantize": "pool",
        "nvfp4_quantize, default pool": "pool",
        "nvfp4_linear": "pool",
    },
}


def draw(result: dict[str, Any], folder: Path) -> list[Path]:
    """Draw a picture of each part that was measured.

    Args:
        result: what ``python -m benchmarks --json`` writes; any of "quantize", "decode", "host", "moe" and "memory" may
            be missing.
        folder: where to write; made if it does not exist.

    Returns:
        The files.
    """
    written = []
    for name, drawn_by in DRAWN_BY.items():
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
    figure, panels = plt.subplots(1, len(ks), figsize=(WIDTH, 4.3), sharey=True, squeeze=False)
    handles: dict[str, Any] = {}
    for axes, k in zip(panels[0], ks, strict=True):
        of_k = sorted((row for row in rows if row["k"] == k), key=lambda row: int(row["rows"]))
        _lines(axes, "rows", of_k, WAYS, handles)
        nodes = [row["floor"][EMPTY_NODE]["us"] for row in of_k if EMPTY_NODE in row.get("floor", {})]
        if nodes:
            look = LOOKS["empty kernel"]
            handles[look["label"]] = axes.axhline(statistics.median(nodes), **look)
        axes.set_xlabel("rows of the activation")
        axes.set_title(f"k = {k}")
    panels[0][0].set_ylabel("GPU time (µs)")
    panels[0][0].set_ylim(bottom=0)
    explained = "One quantization in 128x4 as a node of a CUDA graph. Lower is better."
    return finish(figure, "What clean padding costs a quantization", explained, handles, machine(result))


def decode(result: dict[str, Any]) -> plt.Figure | None:
    """What a decode step takes beyond the pool's, in percent, one line per model; ``None`` where it was not measured.

    A marker is the median over batch sizes. A bar reaches from the lowest to the highest quartile of any batch size.
    """
    models = result.get("decode", {}).get("models", ())
    if not models:
        return None
    style()
    figure, axes = plt.subplots(figsize=(WIDTH, 2.2 + 0.5 * len(models)))
    axes.axvline(0, color=LOOKS["pool"]["color"], linewidth=2.5)
    handles: dict[str, Any] = {"pool": axes.plot([], [], **LOOKS["pool"])[0]}
    ways = [name for name in WAYS if name != "pool" and any(_found(b, name) for m in models for b in m["batches"])]
    for place, model in enumerate(models):
        axes.plot([0], [place], **LOOKS["pool"])
        for name in ways:
            shares = [share for batch in model["batches"] for share in _share(model, batch, name)]
            if not shares:
                continue
            look = LOOKS[WAYS[name]]
            at = place + 0.2 * (ways.index(name) - (len(ways) - 1) / 2)
            middle = statistics.median(share[1] for share in shares)
            axes.hlines(at, min(share[0] for share in shares), max(share[2] for share in shares), color=look["color"])
            look = {**look, "label": label(name, WAYS[name]), "linestyle": "", "markersize": 6.5}
            (handles[look["label"]],) = axes.plot([middle], [at], **look)
    axes.set_yticks(range(len(models)), [f"{model['model']}, TP {model['tensor_parallel']}" for model in models])
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    axes.set_xlabel("GPU time of a decode step against the same step with the pool (%)")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:+g}" if value else "0")
    grid(axes, "x")
    batches = sorted({batch["batch"] for model in models for batch in model["batches"]})
    explained = (
        "Right of 0: slower than the pool. Left of 0: faster.\n"
        f"A marker is the median over batch sizes {batches[0]} to {batches[-1]}, a bar their spread."
    )
    # Results from before producers and experts were counted do not say what a step has.
    what = "a decode step" if "counts" in result["decode"] else "the linear layers of a decode step"
    return finish(figure, f"What clean padding costs {what}", explained, handles, machine(result))


def memory(result: dict[str, Any]) -> plt.Figure | None:
    """Bytes of scale buffers for vLLM's captured batch sizes; ``None`` where the result has none.

    ``result["memory"]`` is a list of ``{"sizes": count, "largest": batch, "bars": {name: bytes}}``.
    """
    groups = result.get("memory") or ()
    if not groups:
        return None
    style()
    figure, axes = plt.subplots(figsize=(WIDTH, 3.6))
    handles: dict[str, Any] = {}
    names = [name for name in _MEMORY_WAYS if any(name in group["bars"] for group in groups)]
    places = [len(names) * 1.3 * number for number in range(len(groups))]
    for number, name in enumerate(names):
        look = LOOKS[_MEMORY_WAYS[name]]
        sizes = [group["bars"].get(name, 0) / 2**20 for group in groups]
        bars = axes.barh([place + number for place in places], sizes, 0.8, color=look["color"])
        axes.bar_label(bars, [f"{size:.1f} MiB" for size in sizes], padding=4)
        handles[look["label"]] = bars
    middle = (len(names) - 1) / 2
    labels = [f"{group['sizes']} batch sizes\nup to {group['largest']}" for group in groups]
    axes.set_yticks([place + middle for place in places], labels)
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    axes.set_xlabel("scale buffers of all captured CUDA graphs (MiB)")
    axes.margins(x=0.12)
    grid(axes, "x")
    explained = (
        "Computed, not measured. Lower is better. Here the pool takes more: it keeps a buffer for each batch size."
    )
    return finish(figure, "Memory for Llama 3.3 70B on one GPU", explained, handles, "")


def host(result: dict[str, Any]) -> plt.Figure | None:
    """Host time per call, one bar each; ``None`` where it was not measured."""
    calls = result.get("host", {}).get("calls")
    if not calls:
        return None
    style()
    looks = {name: look for known in _HOST_PARTS.values() for name, look in known.items()}
    parts = {title: [name for name in known if name in calls] for title, known in _HOST_PARTS.items()}
    parts[_BUFFER] += [name for name in calls if name not in looks]  # an installed vLLM's own function
    parts = {title: names for title, names in parts.items() if names}
    lengths = [len(names) for names in parts.values()]
    figure, panels = plt.subplots(
        len(parts), 1, figsize=(WIDTH, 2.2 + 0.3 * sum(lengths)), height_ratios=lengths, squeeze=False
    )
    handles: dict[str, Any] = {}
    for axes, (title, names) in zip(panels[:, 0], parts.items(), strict=True):
        edge = max(calls[name]["quartiles"][1] for name in names)
        for place, name in enumerate(names):
            look, call = LOOKS[looks.get(name, "vllm")], calls[name]
            handles.setdefault(look["label"], axes.barh(place, call["us"], 0.68, color=look["color"]))
            low, high = call["quartiles"]
            spread = [[max(call["us"] - low, 0)], [max(high - call["us"], 0)]]
            axes.errorbar([call["us"]], [place], xerr=spread, fmt="none", ecolor=INK, elinewidth=1, capsize=2)
            axes.text(max(call["us"], high) + 0.012 * edge, place, f"{call['us']:.2f}", va="center", fontsize=9)
        axes.set_yticks(range(len(names)), [name.removesuffix(_OUTSIDE).removesuffix(_VARIED) for name in names])
        axes.invert_yaxis()
        axes.set_xlim(0, 1.1 * edge)
        axes.set_title(title)
        grid(axes, "x")
    panels[-1, 0].set_xlabel("host time per call (µs)")
    explained = "Lower is better. Error bars are quartiles. The scales differ."
    return finish(figure, "What a call costs the host", explained, handles, machine(result))


def moe(result: dict[str, Any]) -> plt.Figure | None:
    """Latency of grouped quantization against tokens, one panel per k; ``None`` where it was not measured."""
    rows = [row for row in result.get("moe", {}).get("rows", ()) if row["routing"] == "uniform"]
    ks = list(dict.fromkeys(row["k"] for row in rows))
    if not ks:
        return None
    style()
    figure, panels = plt.subplots(1, len(ks), figsize=(WIDTH, 4.6), sharey=True, squeeze=False)
    handles: dict[str, Any] = {}
    for axes, k in zip(panels[0], ks, strict=True):
        of_k = sorted((row for row in rows if row["k"] == k), key=lambda row: int(row["batch"]))
        _lines(axes, "batch", of_k, MOE_WAYS, handles)
        axes.set_yscale("log")
        axes.set_xlabel("tokens")
        axes.set_title(f"k = {k}" + (", after SiLU and mul" if of_k[0]["silu_and_mul"] else ""))
    panels[0][0].set_ylabel("GPU time (µs, log scale)")
    panels[0][0].yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    explained = f"{result['moe']['experts']} experts, {result['moe']['topk']} per token. Lower is better."
    return finish(figure, "MoE: quantizing rows grouped by expert", explained, handles, machine(result))


DRAWN_BY: dict[str, Callable[[dict[str, Any]], plt.Figure | None]] = {
    "bench-quantize.png": quantize,
    "bench-decode.png": decode,
    "bench-memory.png": memory,
    "bench-host.png": host,
    "bench-moe.png": moe,
}
"""Each picture, and the function that draws it from a result."""


# --- parts of a picture -----------------------------------------------------------------------------------------------


def label(name: str, way: str) -> str:
    """What a legend calls a baseline: whether it is a stand-in is said there too."""
    return f"{LOOKS[way]['label']}{STAND_IN if name in STAND_INS else ''}"


def _found(row: Mapping[str, Any], name: str) -> Mapping[str, Any] | None:
    """A baseline of a row, by its name without the end that marks a stand-in."""
    found: Mapping[str, Any] | None = row["baselines"].get(name + STAND_IN, row["baselines"].get(name))
    return found


def _lines(
    axes: plt.Axes, x: str, rows: Sequence[Mapping[str, Any]], ways: Mapping[str, str], handles: dict[str, Any]
) -> None:
    """A line of medians per baseline, with quartiles as bars, over ``row[x]``."""
    for name, way in ways.items():
        points = [(row[x], found) for row in rows if (found := _found(row, name))]
        if not points:
            continue
        look = {"markersize": 6, "linewidth": 1.6, **LOOKS[way], "label": label(name, way)}
        at = [place for place, _ in points]
        axes.vlines(
            at, *zip(*(found["quartiles"] for _, found in points), strict=True), color=look["color"], linewidth=1
        )
        (handles[look["label"]],) = axes.plot(at, [found["us"] for _, found in points], **look)
    ticks = [row[x] for row in rows]
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    grid(axes)


def _share(model: Mapping[str, Any], batch: Mapping[str, Any], name: str) -> list[tuple[float, float, float]]:
    """Lower quartile, median and upper quartile of what a baseline adds to the pool's step, in percent of that step."""
    found = _found(batch, name)
    if found is None:
        return []
    over = found["over_pool_per_quantization"]
    percent = 100 * model["quantizations"] / batch["baselines"]["pool"]["us"]
    low, high = over["quartiles"]
    return [(low * percent, over["us"] * percent, high * percent)]


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw from the JSON on the command line into its folder; without them, the pictures of the docs."""
    parser = argparse.ArgumentParser(description="Draw the pictures of what python -m benchmarks --json wrote.")
    parser.add_argument("result", nargs="?", type=Path, help="default: those of docs/, each from its committed result")
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT / "docs")
    given = parser.parse_args(arguments)
    if given.result:
        written = draw(json.loads(given.result.read_text()), given.folder)
    else:
        written = [given.folder / name for name in SOURCES]
        for picture in written:
            result = json.loads((ROOT / "benchmarks/results" / SOURCES[picture.name]).read_text())
            save(DRAWN_BY[picture.name](result), picture)  # type: ignore[arg-type]
    for picture in written:
        print(f"wrote {picture}")


if __name__ == "__main__":
    main()

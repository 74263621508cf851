"""What the pictures share: how each thing is drawn, in every picture, and what a file says about itself.

A color is a way to keep padding clean. A variant of a way has the same color, an open marker and a dashed line.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.colors import to_hex

ROOT = Path(__file__).resolve().parents[1]
WIDTH, PIXELS = 8.3, 1660  # a page shows a picture about 830 pixels wide: 10 points are 14 pixels there
PAPER, INK, MUTED, GRID = "#ffffff", "#20252b", "#5f6872", "#d5d9df"
_GREEN, _GRAY, _RED, _ORANGE, _BLUE = "#12946a", "#9ba3ad", "#a8281e", "#eba52e", "#5bb8e8"
_VARIANT = {"markerfacecolor": PAPER, "linestyle": "--"}

LOOKS: dict[str, dict[str, Any]] = {
    "pool": {"color": _GREEN, "marker": "o", "zorder": 4, "label": "pool"},
    "pool and cleaner": {"color": _GREEN, "marker": "o", **_VARIANT, "label": "pool, cleaned by a second kernel"},
    # It coincides with the pool, and is drawn around it.
    "empty": {
        "color": _GRAY,
        "marker": "s",
        "markersize": 10,
        "markerfacecolor": "none",
        "label": "torch.empty (unsafe)",
    },
    "zeros": {"color": _RED, "marker": "^", "label": "torch.zeros at each call"},
    "large zeros": {"color": _RED, "marker": "^", **_VARIANT, "label": "torch.zeros of vLLM's size"},
    "in kernel": {"color": _ORANGE, "marker": "D", "label": "padding in the kernel, row by row"},
    "wide": {"color": _ORANGE, "marker": "D", **_VARIANT, "label": "padding in the kernel, wide stores"},
    "vllm": {"color": "#6b4fa0", "marker": "X", "label": "vLLM's own"},
    "vllm and cleaner": {
        "color": "#6b4fa0",
        "marker": "X",
        **_VARIANT,
        "label": "vLLM's own, cleaned by our kernel",
    },
    "flashinfer": {"color": _BLUE, "marker": "P", "label": "FlashInfer's own"},
    "empty kernel": {"color": MUTED, "marker": "", "linestyle": ":", "label": "a kernel that does nothing"},
    "launch": {"color": MUTED, "marker": "", "label": "a bare Triton launch"},
    "published": {"color": INK, "marker": "*", "markerfacecolor": PAPER, "label": "published in vLLM issue 37563"},
    "correct": {"color": INK, "marker": "_", "label": "the largest correct output, to compare"},
}
"""How each thing is drawn in every picture: arguments of ``plot``; bars take the color alone."""

BYTES = {"valid scales": "#3f5fc4", "padding columns": "#c79be0", "padding rows": "#c3c9d1", "stale bytes": INK}
"""Colors of what a byte of a buffer is."""


def style() -> None:
    """Text, axes and spines of every picture."""
    plt.rcParams.update(
        {
            "font.size": 10,
            "text.color": INK,
            "axes.labelcolor": INK,
            "axes.edgecolor": INK,
            "axes.titlelocation": "left",
            "axes.titlesize": 10.5,
            "xtick.color": INK,
            "ytick.color": INK,
            "axes.facecolor": PAPER,
            "axes.spines.top": False,
            "axes.spines.right": False,
        }
    )


def grid(axes: plt.Axes, axis: str = "y") -> None:
    """Faint lines behind the data."""
    axes.grid(axis=axis, color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)


def finish(figure: plt.Figure, title: str, explained: str, handles: Mapping[str, Any], source: str) -> plt.Figure:
    """Title and what better means above the panels; legend and machine below them.

    Args:
        figure: with its panels drawn.
        title: what is shown.
        explained: how to read it, in plain words: which side is better, what a bar or a sign means.
        handles: label -> artist.
        source: machine and versions.
    """
    inches = figure.get_figheight()
    figure.text(0.015, 1 - 0.12 / inches, title, va="top", fontsize=12, fontweight="bold")
    lines = explained.count("\n") + 1
    figure.text(0.015, 1 - 0.4 / inches, explained, va="top", fontsize=10, color=MUTED)
    rows = 0
    for columns in range(min(4, len(handles)), 0, -1):
        legend = figure.legend(
            handles.values(),
            handles.keys(),
            ncols=columns,
            loc="lower center",
            bbox_to_anchor=(0.5, 0.24 / inches),
            frameon=False,
            columnspacing=1.4,
            handletextpad=0.6,
        )
        rows = -(-len(handles) // columns)
        if legend.get_window_extent().width <= 0.98 * figure.bbox.width or columns == 1:
            break
        legend.remove()
    figure.text(0.985, 0.09 / inches, source, ha="right", fontsize=8, color=MUTED)
    figure.tight_layout(rect=(0.005, (0.36 + 0.22 * rows) / inches, 0.995, 1 - (0.45 + 0.2 * lines) / inches))
    return figure


def machine(result: Mapping[str, Any]) -> str:
    """Device and versions of a result."""
    versions = result.get("versions", {})
    known = [f"{name} {versions[name]}" for name in ("torch", "triton") if versions.get(name)]
    return ", ".join([str(result.get("device_name") or result.get("device") or "unknown device"), *known])


def description(figure: plt.Figure) -> str:
    """All that a figure shows, in words: texts, and points and bars with their colors. A picture's file carries it."""
    shown: list[Any] = [text.get_text() for text in figure.texts]
    for legend in figure.legends:
        shown += [text.get_text() for text in legend.get_texts()]
    for axes in figure.axes:
        shown += [axes.get_title(loc="left"), axes.get_xlabel(), axes.get_ylabel()]
        shown += [text.get_text() for text in axes.texts]
        shown += [
            [to_hex(line.get_color()), str(line.get_marker()), _rounded(line.get_xydata().ravel())]
            for line in axes.get_lines()
        ]
        shown += [
            [to_hex(patch.get_facecolor()), _rounded(patch.get_extents().transformed(axes.transData.inverted()).bounds)]
            for patch in axes.patches
        ]
        for several in axes.collections:
            shown.append([_rounded(point for path in several.get_paths() for point in path.vertices.ravel())])
    return json.dumps(shown)


def _rounded(numbers: Any) -> list[float]:
    return [float(f"{float(number):.4g}") for number in numbers]


def save(figure: plt.Figure, picture: Path, about: str | None = None) -> None:
    """Write a figure as PNG of 1660 pixels in width, with ``about`` or its :func:`description` in the file, and close it."""
    picture.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"Description": about or description(figure)}
    figure.savefig(picture, dpi=PIXELS / figure.get_figwidth(), facecolor=PAPER, metadata=metadata)
    plt.close(figure)


def write(about: str, draw: Callable[[dict[str, Any]], plt.Figure], result: Path, picture: Path) -> None:
    """A script: read the JSON and write the picture, by default from ``result`` to ``picture``."""
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("result", nargs="?", type=Path, default=result)
    parser.add_argument("picture", nargs="?", type=Path, default=picture)
    given = parser.parse_args()
    save(draw(json.loads(given.result.read_text())), given.picture)
    print(f"wrote {given.picture}")

"""What the pictures share: a light background, readable on white and on dark pages."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PANEL, INK, GRID = "#f6f7f9", "#20252b", "#d5d9df"
RED, ORANGE, GREEN, GRAY = "#c8372d", "#e08a1e", "#1f8a5b", "#7a828c"


def style() -> None:
    """Text, axes and spines of every picture."""
    plt.rcParams.update(
        {
            "font.size": 10,
            "text.color": INK,
            "axes.labelcolor": INK,
            "axes.edgecolor": INK,
            "xtick.color": INK,
            "ytick.color": INK,
            "axes.facecolor": "white",
            "axes.spines.top": False,
            "axes.spines.right": False,
        }
    )


def save(figure: plt.Figure, picture: Path) -> None:
    """Write a figure as PNG, and close it."""
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=150, facecolor=PANEL)
    plt.close(figure)


def write(about: str, draw: Callable[[dict[str, Any]], plt.Figure], result: Path, picture: Path) -> None:
    """A script: read the JSON and write the picture, by default from ``result`` to ``picture``."""
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("result", nargs="?", type=Path, default=result)
    parser.add_argument("picture", nargs="?", type=Path, default=picture)
    given = parser.parse_args()
    save(draw(json.loads(given.result.read_text())), given.picture)
    print(f"wrote {given.picture}")

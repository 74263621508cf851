"""What the pictures share: a light panel of their own, readable on white and on dark pages."""

from __future__ import annotations

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PANEL, INK, GRID = "#f6f7f9", "#20252b", "#d5d9df"
RED, ORANGE, GREEN, GREY = "#c8372d", "#e08a1e", "#1f8a5b", "#7a828c"


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

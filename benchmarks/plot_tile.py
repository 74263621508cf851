"""Draw docs/tile.png: the scales of a [5, 80] matrix in 128x4, their padding, and where stale bytes come from.

python -m benchmarks.plot_tile [docs/tile.png]

Every color and every number in the picture comes from ``safealloc.formats.layout``. The text chunk ``Description`` of the
file has them too (:func:`description`), so that a test can detect a picture of another layout.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch, Rectangle

from benchmarks.figure import BYTES, INK, PAPER, ROOT, save, style
from safealloc.formats.format import BLOCK_SIZE
from safealloc.formats.layout import SfLayout

LAYOUT, ROWS, K = SfLayout.layout_128x4, 5, 80
VALID, PADDING_ROW, PADDING_COLUMN = 0, 1, 2
COLORS = (BYTES["valid scales"], BYTES["padding rows"], BYTES["padding columns"])
STALE = BYTES["stale bytes"]
TEXT = ("white", INK, INK)
TILE_BYTES = LAYOUT.tile.rows * LAYOUT.tile.cols
LINE = LAYOUT.tile.outer_rows * LAYOUT.tile.cols  # bytes of a tile between two inner rows
GAP = 0.6  # height of a break, in cells
BETWEEN = 2.6  # room between two tiles, in cells
BOX = 1.55  # height of a box beside the strip
BOX_WIDTH = 316  # in bytes of the strip


def kinds() -> np.ndarray:
    """What each byte of the buffer is, in matrix order: ``[padded_rows, padded_cols]`` of the numbers above."""
    padding = LAYOUT.padding_mask(ROWS, K)
    logical = LAYOUT.logical(padding.view(torch.uint8), ROWS, K)
    found = torch.where(logical.bool(), PADDING_ROW, VALID)
    found[:ROWS][logical[:ROWS].bool()] = PADDING_COLUMN
    return found.numpy()


def offsets() -> np.ndarray:
    """Where each byte lies in memory, in matrix order; padding included."""
    padded_rows, padded_cols = LAYOUT.padded_shape(ROWS, K)
    return LAYOUT.offsets(padded_rows, padded_cols * BLOCK_SIZE).numpy()


def in_memory() -> np.ndarray:
    """What each byte of the buffer is, in memory order."""
    found = np.empty(LAYOUT.nbytes(ROWS, K), dtype=np.int64)
    found[offsets().ravel()] = kinds().ravel()
    return found


def description() -> str:
    """What the picture shows: the matrix, and where its valid scales and its padding columns lie."""
    what, where = kinds(), offsets()
    real, columns = (" ".join(map(str, where[what == kind])) for kind in (VALID, PADDING_COLUMN))
    return f"{LAYOUT.name} [{ROWS}, {K}] in {what.size} bytes: valid scales at {real}; padding columns at {columns}"


def draw() -> plt.Figure:
    """The figure: the matrix, the tiles as they lie in memory, and the whole buffer as one strip."""
    style()
    plt.rcParams["font.size"] = 12  # the figure is wide, and shown at the width of the others
    figure = plt.figure(figsize=(12, 10))
    _matrix(figure.add_axes((0.055, 0.43, 0.285, 0.42)))
    _tiles(figure.add_axes((0.37, 0.43, 0.615, 0.42)))
    _strip(figure.add_axes((0.03, 0.015, 0.955, 0.385)))
    titles = (
        (0.03, "(a) the matrix of scales: what each byte\nis, and where it lies in memory"),
        (
            0.395,
            "(b) the same bytes in memory, tile after tile, as tensor cores read them:\n"
            f"a line is {LINE} bytes, {LAYOUT.tile.cols} columns of each of four rows",
        ),
    )
    for x, title in titles:
        figure.text(x, 0.95, title, va="top", fontsize=12, fontweight="bold")
    counts = np.bincount(kinds().ravel())
    names = (
        f"valid scales: {ROWS} rows x {K // BLOCK_SIZE} columns = {counts[VALID]} bytes",
        f"padding rows: {counts[PADDING_ROW]} bytes",
        f"padding columns: {counts[PADDING_COLUMN]} bytes",
    )
    order = (VALID, PADDING_COLUMN, PADDING_ROW)
    figure.legend(
        handles=[Patch(color=COLORS[kind], label=names[kind]) for kind in order],
        loc="upper center",
        ncols=3,
        frameon=False,
        fontsize=11.5,
        bbox_to_anchor=(0.5, 1.0),
    )
    return figure


def _matrix(axes: plt.Axes) -> None:
    """(a): the first rows and the last one, each cell with its offset in memory."""
    what, where = kinds(), offsets()
    last, cols = what.shape[0] - 1, what.shape[1]
    shown = [*range(9), last]
    places = [*range(9), 9 + GAP]
    for row, y in zip(shown, places, strict=True):
        for column in range(cols):
            _cell(axes, column, y, what[row, column], str(where[row, column]), 10)
    _break(axes, 0, cols, 9, GAP)
    _frame(axes, cols, 10 + GAP)
    axes.plot([LAYOUT.tile.cols] * 2, [0, 10 + GAP], color=INK, lw=2)
    axes.set_yticks([y + 0.5 for y in places], [str(row) for row in shown])
    axes.set_xticks([column + 0.5 for column in range(cols)], [str(column) for column in range(cols)])
    axes.set_ylabel("row")
    axes.text(cols / 2, -0.75, "scale column", ha="center", va="bottom")


def _tiles(axes: plt.Axes) -> None:
    """(b): the two tiles, a line of 16 bytes for each inner row."""
    what = in_memory()
    tiles = len(what) // TILE_BYTES
    inner = LAYOUT.tile.inner_rows
    shown = [*range(9), inner - 1]
    places = [*range(9), 9 + GAP]
    row_at = np.empty(len(what), dtype=np.int64)
    row_at[offsets()] = np.arange(LAYOUT.padded_shape(ROWS, K)[0])[:, None]
    for tile in range(tiles):
        left = tile * (LINE + BETWEEN)
        for line, y in zip(shown, places, strict=True):
            for byte in range(LINE):
                _cell(axes, left + byte, y, what[tile * TILE_BYTES + line * LINE + byte], "", 8)
        _break(axes, left, LINE, 9, GAP)
        for group in range(LAYOUT.tile.outer_rows):
            x = left + group * LAYOUT.tile.cols
            first = row_at[tile * TILE_BYTES + group * LAYOUT.tile.cols]
            axes.text(x + 2, -0.15, f"{first} + i" if first else "row i", ha="center", va="bottom", fontsize=11)
            axes.plot([x, x], [0, 10 + GAP], color=INK, lw=2 if group == 0 else 1.2)
        axes.plot([left + LINE] * 2, [0, 10 + GAP], color=INK, lw=2)
        for y in (0, 10 + GAP):
            axes.plot([left, left + LINE], [y, y], color=INK, lw=2)
        columns = f"scale columns {tile * LAYOUT.tile.cols} to {(tile + 1) * LAYOUT.tile.cols - 1}"
        axes.text(left + LINE / 2, -0.75, f"tile {tile}: {columns}", ha="center", va="bottom", fontweight="bold")
        labels = [tile * TILE_BYTES + line * LINE for line in shown]
        for label, y in zip(labels, places, strict=True):
            axes.text(left - 0.15, y + 0.5, str(label), ha="right", va="center", fontsize=11)
    _frame(axes, tiles * (LINE + BETWEEN) - BETWEEN, 10 + GAP, border=False)
    axes.set_xticks([])
    axes.set_yticks([])


def _strip(axes: plt.Axes) -> None:
    """(c): all bytes in a line, what was there before, and who reads it."""
    what = in_memory()
    total = len(what)
    top, bottom = 3.7, 4.7
    axes.imshow(
        what[None, :],
        cmap=ListedColormap(COLORS),
        vmin=0,
        vmax=len(COLORS) - 1,
        aspect="auto",
        interpolation="nearest",
        extent=(0, total, bottom, top),
    )
    axes.add_patch(Rectangle((0, top), total, bottom - top, fill=False, edgecolor=INK, lw=1.5))
    for offset, side in ((0, "left"), (TILE_BYTES, "right"), (total - 1, "right")):
        axes.plot([offset] * 2, [bottom, bottom + 0.15], color=INK)
        axes.text(offset, bottom + 0.22, f"byte {offset}", ha=side, va="top", fontsize=11.5)
    valid = int((what == VALID).sum())
    title = f"(c) the whole buffer: a quantizer that skips padding writes {valid} of {total} bytes. What do the others hold?"
    axes.text(0, -0.15, title, va="top", fontsize=12, fontweight="bold")
    between = (total - 3 * BOX_WIDTH) / 2
    lefts = [number * (BOX_WIDTH + between) for number in range(3)]
    origins = (
        ("allocator", "torch.empty gives memory\nas a dead tensor left it"),
        ("CUDA graph", "the same address at each replay,\nafter other nodes wrote there"),
        ("another producer", "a larger batch was written there,\nthe next writes its own rows only"),
    )
    for left, (name, text) in zip(lefts, origins, strict=True):
        _box(axes, left, 0.95, name, text, STALE)
        _arrow(axes, left + BOX_WIDTH / 2, 0.95 + BOX, top - 0.05, STALE)
        if left:
            axes.text(left - between / 2, 3.1, "stale bytes", ha="center", va="center", color=STALE, fontsize=11)
    valid, columns = (int(np.median(np.flatnonzero(what == kind))) for kind in (VALID, PADDING_COLUMN))
    readers = (
        (valid, COLORS[VALID], "valid scales", "the quantizer writes them at each step,\nthe GEMM reads them"),
        (
            columns,
            COLORS[PADDING_COLUMN],
            "padding columns",
            "read with the valid ones, as whole tiles:\nNaN * 0 = NaN, and the row is lost",
        ),
        (
            lefts[2] + BOX_WIDTH / 2,
            COLORS[PADDING_ROW],
            "padding rows",
            "GEMMs may read them, and so does\none that reads another layout",
        ),
    )
    for left, (byte, color, name, text) in zip(lefts, readers, strict=True):
        _box(axes, left, 6.1, name, text, color)
        _arrow(axes, byte, bottom + 0.05, 6.1, INK)
    axes.set_xlim(-2, total + 2)
    axes.set_ylim(7.75, -0.25)
    axes.axis("off")


def _box(axes: plt.Axes, left: float, top: float, name: str, text: str, color: str) -> None:
    axes.add_patch(Rectangle((left, top), BOX_WIDTH, BOX, facecolor="white", edgecolor=color, lw=2))
    axes.text(left + BOX_WIDTH / 2, top + 0.16, name, ha="center", va="top", fontsize=12.5, fontweight="bold")
    axes.text(left + BOX_WIDTH / 2, top + 0.58, text, ha="center", va="top", fontsize=12, linespacing=1.2)


def _arrow(axes: plt.Axes, x: float, start: float, end: float, color: str) -> None:
    axes.annotate("", (x, end), (x, start), arrowprops={"arrowstyle": "-|>", "color": color, "lw": 2})


def _cell(axes: plt.Axes, x: float, y: float, kind: int, text: str, size: float) -> None:
    axes.add_patch(Rectangle((x, y), 1, 1, facecolor=COLORS[kind], edgecolor="white", lw=1))
    if text:
        axes.text(x + 0.5, y + 0.5, text, ha="center", va="center", fontsize=size, color=TEXT[kind])


def _break(axes: plt.Axes, left: float, width: float, y: float, height: float) -> None:
    axes.add_patch(Rectangle((left, y + 0.02), width, height - 0.04, facecolor=PAPER, zorder=3))
    axes.text(
        left + width / 2, y + height / 2, ". . .", zorder=4, ha="center", va="center", fontsize=12, fontweight="bold"
    )


def _frame(axes: plt.Axes, width: float, height: float, *, border: bool = True) -> None:
    axes.set_xlim(-0.1 if border else -1.7, width + 0.1)
    axes.set_ylim(height + 0.1, -0.1)
    axes.set_facecolor("none")
    axes.tick_params(length=0, labeltop=True, labelbottom=False)
    for spine in axes.spines.values():
        spine.set_visible(False)
    if border:
        axes.add_patch(Rectangle((0, 0), width, height, fill=False, edgecolor=INK, lw=2))


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the picture: the file on the command line, or docs/tile.png."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("picture", nargs="?", type=Path, default=ROOT / "docs/tile.png")
    given = parser.parse_args(arguments)
    figure = draw()
    save(figure, given.picture, description())
    print(f"wrote {given.picture}")


if __name__ == "__main__":
    main()

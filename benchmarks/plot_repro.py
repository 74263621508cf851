"""Draw docs/repro.png from what ``safealloc repro --json`` wrote.

python -m benchmarks.plot_repro [benchmarks/results/repro-cpu.json] [docs/repro.png]
"""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt

from benchmarks.figure import LOOKS, ROOT, WIDTH, finish, grid, style, write

BAR = 0.28


def draw(result: dict[str, Any]) -> plt.Figure:
    """The figure: on the left rows with NaN, on the right wrong numbers where the padding is finite."""
    style()
    published = [row for row in result["published"] if row["backend"] == "trtllm"]
    ours = [row for row in result["safealloc"] if row["section"] == "published" and row["backend"] == "trtllm"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(WIDTH, 5.2))
    places = range(len(published))
    beside = [place + BAR for place in places]

    shares = [100 * row["nan_rows"] / row["m"] for row in published]
    stale = left.bar(places, shares, BAR, color=LOOKS["empty"]["color"])
    (issue,) = left.plot(
        places,
        [100 * row["published_nan_rows"] / row["m"] for row in published],
        **mark("published", 9),
    )
    left.plot(beside, [100 * row["nan_rows"] / row["m"] for row in ours], **mark("pool", 7))
    for place, row, share in zip(places, published, shares, strict=True):
        text = f"{row['nan_rows']}/{row['m']}"
        left.annotate(text, (place, share), (0, 8), textcoords="offset points", ha="center", fontsize=9)
    left.set_ylabel("rows with NaN (%)")
    left.set_ylim(0, 118)
    left.set_title("Stale scales are NaN")

    right.bar(
        [place - BAR for place in places],
        [row["max_diff_finite"] for row in published],
        BAR,
        color=LOOKS["empty"]["color"],
    )
    zeroed = right.bar(places, [row["max_diff_zeroed"] for row in published], BAR, color=LOOKS["zeros"]["color"])
    (pool,) = right.plot(beside, [row["max_error"] for row in ours], **mark("pool", 7))
    (correct,) = right.plot(
        places, [row["largest_correct"] for row in published], **mark("correct", 22), markeredgewidth=2
    )
    right.set_ylabel("largest over all outputs")
    right.set_ylim(bottom=0)
    right.set_title("Stale scales are 1.0")

    for axes in (left, right):
        axes.set_xticks(list(places), [str(row["m"]) for row in published])
        axes.set_xlabel("m, rows of the activation")
        grid(axes)
    handles = {
        "written in 128x4, read in 8x4: stale padding": stale,
        "the same, padding zeroed": zeroed,
        "the same calls through a pool": pool,
        LOOKS["published"]["label"]: issue,
        LOOKS["correct"]["label"]: correct,
    }
    worst = max(row["max_error"] for row in ours)
    explained = (
        "Lower is better. trtllm reads 8x4 up to 32 rows, and 128x4 at 64. Zeroing ends the NaN, but the\n"
        "result stays wrong. Right: gray is the change against zeroed padding, the rest are errors. Through\n"
        f"a pool only the rounding to bfloat16 is left, {worst:.2f} at most."
    )
    versions = result["versions"]
    source = f"k = 512, n = 256, {result['device_name']}, torch {versions['torch']}, seed {result['seed']}"
    return finish(figure, "vLLM issue 37563, computed again", explained, handles, source)


def mark(name: str, size: int) -> dict[str, Any]:
    return {**LOOKS[name], "linestyle": "", "markersize": size, "clip_on": False, "zorder": 5}


if __name__ == "__main__":
    write(__doc__, draw, ROOT / "benchmarks/results/repro-cpu.json", ROOT / "docs/repro.png")

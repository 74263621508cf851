"""The committed pictures: each is what its JSON gives, and the same thing looks the same in all of them."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("matplotlib", reason="the pictures need matplotlib")
from matplotlib import pyplot
from matplotlib.colors import to_hex, to_rgb
from matplotlib.text import Text
from PIL import Image

from benchmarks import figure, plot_repro, plot_vllm_decode, plots

ROOT = Path(__file__).resolve().parents[2]
PICTURES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    **{name: (plots.DRAWN_BY[name], source) for name, source in plots.SOURCES.items()},
    "repro.png": (plot_repro.draw, "repro-cpu.json"),
    "vllm-decode.png": (plot_vllm_decode.draw, "vllm-decode-h200.json"),
}
each_picture = pytest.mark.parametrize("name", PICTURES)


@pytest.fixture(autouse=True)
def closed():
    yield
    pyplot.close("all")


def read(source: str) -> dict[str, Any]:
    return json.loads((ROOT / "benchmarks/results" / source).read_text())


def drawn(name: str) -> Any:
    draw, source = PICTURES[name]
    return draw(read(source))


def test_every_picture_has_a_source_and_a_page():
    pictures = {*PICTURES, "tile.png"}  # whose source is the package: tests/unit/test_docs.py
    assert {path.name for path in (ROOT / "docs").glob("*.png")} == pictures
    pages = "".join(page.read_text() for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")))
    assert {Path(found).name for found in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", pages)} == pictures


@each_picture
def test_a_committed_picture_shows_what_its_json_gives(name, tmp_path):
    """Texts, numbers, colors, markers and size; not pixels, which depend on the version of matplotlib."""
    figure.save(drawn(name), tmp_path / name)
    with Image.open(tmp_path / name) as fresh, Image.open(ROOT / "docs" / name) as kept:
        assert json.loads(kept.text["Description"]) == json.loads(fresh.text["Description"])
        assert kept.size == fresh.size


def test_another_number_color_marker_or_word_changes_what_a_picture_says_of_itself(monkeypatch):
    result = read("bench-h200.json")
    before = figure.description(plots.quantize(result))
    assert figure.description(plots.quantize(result)) == before
    for change in ({"color": "#000000"}, {"marker": "8"}, {"label": "a pool"}):
        with monkeypatch.context() as patch:
            patch.setitem(figure.LOOKS, "pool", figure.LOOKS["pool"] | change)
            assert figure.description(plots.quantize(result)) != before
    next(row for row in result["quantize"]["few_rows"] if row["k"] == 4096)["baselines"]["pool"]["us"] *= 1.01
    assert figure.description(plots.quantize(result)) != before


def test_one_label_is_one_look_and_one_look_is_one_label():
    looks = figure.LOOKS.values()
    assert len({look["label"] for look in looks}) == len(looks)
    seen = [(look["color"], look["marker"], look.get("markerfacecolor"), look.get("linestyle")) for look in looks]
    assert len(set(seen)) == len(seen)


@each_picture
def test_a_label_has_the_color_and_marker_of_the_table_in_every_picture(name):
    by_label = {look["label"]: look for look in figure.LOOKS.values()}
    picture, seen = drawn(name), set()
    for line in (line for axes in picture.axes for line in axes.get_lines()):
        if (label := line.get_label()) in by_label:
            assert (to_hex(line.get_color()), line.get_marker()) == (
                by_label[label]["color"],
                by_label[label]["marker"],
            )
            seen.add(label)
    for legend in picture.legends:
        for text, handle in zip(legend.get_texts(), legend.legend_handles, strict=True):
            if (label := text.get_text()) in by_label:
                color = handle.get_color() if hasattr(handle, "get_color") else handle.get_facecolor()
                assert to_hex(color) == by_label[label]["color"], label
                seen.add(label)
    assert len(seen) >= 2


def test_colors_are_written_in_the_style_module_alone():
    scripts = list((ROOT / "benchmarks").glob("plot*.py"))
    assert len(scripts) == 4
    assert [path.name for path in scripts if re.search(r'"#[0-9a-fA-F]{6}"|"C\d"|"tab:', path.read_text())] == []


@each_picture
def test_a_picture_says_which_side_is_better(name):
    text = " ".join(found.get_text() for found in drawn(name).texts)
    assert re.search(r"Lower is better|(Right of|Above) 0: slower than .*(Left of|Below) 0: faster", text)


@each_picture
def test_no_text_of_a_picture_is_clipped_or_overlaps_another(name):
    """Nor does the legend overlap a panel."""
    picture = drawn(name)
    picture.canvas.draw()
    (legend,) = picture.legends
    texts = [*picture.texts, *legend.get_texts(), *(text for axes in picture.axes for text in words(axes))]
    boxes = {text: text.get_window_extent() for text in texts if text.get_text()}
    assert len(boxes) > 10
    for text, box in boxes.items():
        assert 0 <= box.x0 < box.x1 <= picture.bbox.width, text
        assert 0 <= box.y0 < box.y1 <= picture.bbox.height, text
    for (one, box), (other, other_box) in itertools.combinations(boxes.items(), 2):
        assert not box.overlaps(other_box), (one, other)
    for axes in picture.axes:
        assert not legend.get_window_extent().overlaps(axes.get_tightbbox())


def test_the_color_blind_can_tell_the_colors_apart():
    """At least 20 apart in CIELAB, where 2 is just visible; simulated as in Machado, Oliveira and Fernandes (2009)."""
    sees = {
        "all": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
        "no red": [[0.1523, 1.0526, -0.2049], [0.1145, 0.7863, 0.0992], [-0.0039, -0.0481, 1.0520]],
        "no green": [[0.3673, 0.8606, -0.2280], [0.2801, 0.6725, 0.0474], [-0.0118, 0.0429, 0.9690]],
        "no blue": [[1.2555, -0.0767, -0.1788], [-0.0784, 0.9308, 0.1476], [0.0047, 0.6914, 0.3039]],
    }
    to_xyz = torch.tensor([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    ways = [figure.LOOKS[way]["color"] for way in ("pool", "empty", "zeros", "in kernel", "vllm", "flashinfer")]
    for together in (ways, list(figure.BYTES.values())):
        colors = torch.tensor([to_rgb(color) for color in together])
        linear = torch.where(colors <= 0.04045, colors / 12.92, ((colors + 0.055) / 1.055) ** 2.4)
        for who, matrix in sees.items():
            xyz = (linear @ torch.tensor(matrix, dtype=torch.float32).T).clamp(0, 1) @ to_xyz.T
            xyz /= torch.tensor([0.9505, 1.0, 1.089])
            root = torch.where(xyz > 0.008856, xyz.clamp(min=1e-9) ** (1 / 3), 7.787 * xyz + 16 / 116)
            x, y, z = root.T
            lab = torch.stack((116 * y - 16, 500 * (x - y), 200 * (y - z)), 1)
            assert torch.pdist(lab).min() > 20, (who, torch.pdist(lab).min())


def words(axes: Any) -> list[Text]:
    """All visible text of a panel."""
    title = axes.get_title(loc="left")
    found = [axes.xaxis.label, axes.yaxis.label, *axes.texts]
    found += [text for text in axes.findobj(Text) if text.get_text() == title]
    for axis, limits in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
        for tick in axis.get_major_ticks():
            if tick.label1.get_visible() and min(limits) <= tick.get_loc() <= max(limits):
                found.append(tick.label1)
    return found

"""The pictures of the benchmarks, drawn from made-up numbers; no GPU is needed."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
PICTURES = ["bench-quantize.png", "bench-decode.png", "bench-memory.png", "bench-host.png", "bench-moe.png"]
ROWS, KS = (1, 2, 4, 8, 16, 32), (2048, 4096, 8192, 28672)
BATCHES = (1, 4, 64)
MODELS = ("DeepSeek-R1 without routed experts", "Llama 3.1 8B", "Llama 3.3 70B", "Qwen3 32B", "5th", "6th", "7th")
OVER_POOL = {
    "pool": 0.0,
    "empty": 0.01,
    "zeros": 1.0,
    "padding in the kernel": 0.8,
    "zeroing the returned buffer": 0.9,
    "linear": -0.01,
}
HOST = {
    "torch.empty": 3.5,
    "torch.zeros": 8.9,
    "pool.acquire": 0.9,
    "torch.ops.safealloc.acquire": 5.2,
    "hook in vLLM": 4.4,
    "torch.zeros as vLLM calls it (stand-in)": 9.3,
    "bare Triton launch": 10.1,
    "nvfp4_linear": 41.5,
}


def spread(us: float) -> dict:
    return {"us": us, "quartiles": sorted((us * 0.98, us * 1.03))}


def quantization(rows: int, k: int, layout: str) -> dict:
    pool = 1.2 + rows * k / 500_000
    times = {name: pool + over for name, over in OVER_POOL.items()}
    floor = {"empty kernel": 0.55, "one store from 132 programs": 0.87}
    found = {"rows": rows, "k": k, "layout": layout}
    for part, microseconds in (("baselines", times), ("floor", floor)):
        found[part] = {name: spread(us) | {"ratio_to_pool": us / pool} for name, us in microseconds.items()}
    return found


def step(batch: int) -> dict:
    baselines = {name: spread(9e3) | {"over_pool_per_quantization": spread(over)} for name, over in OVER_POOL.items()}
    return {"batch": batch, "baselines": baselines}


def routed(batch: int, k: int, routing: str) -> dict:
    alone = 1.3 + batch / 15
    over = {"pool": 1.05, "right-sized, zeroed": 2, "vLLM's size, zeroed": 90, "quantization alone": 1}
    baselines = {name: spread(factor * alone) | {"ratio_to_alone": factor} for name, factor in over.items()}
    baselines["pool, cleaned by a separate kernel"] = spread(1.4 * alone) | {"ratio_to_alone": 1.4}
    return {"batch": batch, "k": k, "silu_and_mul": k == 2048, "routing": routing, "baselines": baselines}


RESULT = {
    "device": "cuda:0",
    "device_name": "NVIDIA H200",
    "versions": {"torch": "2.11.0+cu130", "triton": "3.6.0"},
    "quantize": {"few_rows": [quantization(*shape) for shape in itertools.product(ROWS, KS, ("128x4", "8x4"))]},
    "decode": {
        "models": [
            {"model": name, "tensor_parallel": 8, "quantizations": 128, "batches": [step(batch) for batch in BATCHES]}
            for name in MODELS
        ]
    },
    "host": {"calls": {name: spread(us) for name, us in HOST.items()}},
    "moe": {
        "experts": 256,
        "topk": 8,
        "rows": [
            routed(2**exponent, k, routing)
            for k, exponent, routing in itertools.product((7168, 2048), range(9), ("uniform", "skewed"))
        ],
    },
    "memory": [
        {"sizes": 51, "largest": 512, "bars": {"pool": 30 << 20, "per call": 900_000}},
        {"sizes": 83, "largest": 1024, "bars": {"pool": 88 << 20, "per call": 1 << 21}},
    ],
}


@pytest.fixture
def plots():
    pytest.importorskip("matplotlib", reason="the pictures need matplotlib")
    from matplotlib import pyplot

    from benchmarks import plots

    yield plots
    pyplot.close("all")


class TestPictures:
    def test_all_are_written_and_closed(self, plots, tmp_path):
        folder = tmp_path / "some" / "folder"
        assert plots.draw(RESULT, folder) == [folder / name for name in PICTURES]
        assert sorted(path.name for path in folder.iterdir()) == sorted(PICTURES)
        for path in folder.iterdir():
            assert path.read_bytes().startswith(b"\x89PNG")
            width, height = plots.plt.imread(path).shape[1::-1]
            assert 1000 < width < 2200
            assert 500 < height < 1300
        assert plots.plt.get_fignums() == []

    @pytest.mark.parametrize("part", ["quantize", "decode", "memory", "host", "moe"])
    def test_a_part_alone_has_one_picture(self, plots, tmp_path, part):
        assert plots.draw({part: RESULT[part]}, tmp_path) == [tmp_path / f"bench-{part}.png"]

    def test_parts_without_numbers_are_not_drawn(self, plots, tmp_path):
        empty = {
            "quantize": {"few_rows": [quantization(1, 4096, "8x4"), quantization(1, 2048, "128x4")]},
            "decode": {"models": []},
            "host": {"calls": {}},
            "moe": {"rows": []},
            "memory": [],
        }
        assert plots.draw(empty, tmp_path) == []
        assert plots.draw({}, tmp_path) == []

    @pytest.mark.parametrize(
        ("picture", "models"),
        [
            ("quantize", 0),
            ("memory", 0),
            ("host", 0),
            ("moe", 0),
            ("decode", 1),
            ("decode", 2),
            ("decode", 5),
            ("decode", 7),
        ],
    )
    def test_no_text_is_clipped_or_overlaps_another(self, plots, picture, models):
        """Nor does the legend overlap a panel."""
        figure = getattr(plots, picture)({**RESULT, "decode": {"models": RESULT["decode"]["models"][:models]}})
        figure.set_dpi(150)
        figure.canvas.draw()
        panels = [axes for axes in figure.axes if axes.get_visible()]
        texts = [text for axes in panels for text in labels(axes)]
        (legend,) = figure.legends
        texts += [*figure.texts, *legend.get_texts()]
        boxes = {text: text.get_window_extent() for text in texts if text.get_text()}
        assert len(boxes) > 10
        for text, box in boxes.items():
            assert 0 <= box.x0 < box.x1 <= figure.bbox.width, text
            assert 0 <= box.y0 < box.y1 <= figure.bbox.height, text
        for (one, box), (other, other_box) in itertools.combinations(boxes.items(), 2):
            assert not box.overlaps(other_box), (one, other)
        for axes in panels:
            assert not legend.get_window_extent().overlaps(axes.get_tightbbox())

    def test_quantize_has_one_panel_per_k_and_one_line_per_baseline(self, plots):
        figure = plots.quantize(RESULT)
        assert [axes.get_title(loc="left") for axes in figure.axes] == ["k = 4096", "k = 8192", "k = 28672"]
        assert "µs" in figure.axes[0].get_ylabel()
        for axes, k in zip(figure.axes, (4096, 8192, 28672), strict=True):
            assert axes.get_xlabel() == "rows"
            assert axes.get_xscale() == "log"
            assert [tick.get_text() for tick in axes.get_xticklabels()] == [str(rows) for rows in ROWS]
            lines = {line.get_label(): line for line in axes.get_lines()}
            for name, over in OVER_POOL.items():
                line = lines[plots.LOOKS[name]["label"]]
                assert tuple(line.get_xdata()) == ROWS
                assert list(line.get_ydata()) == pytest.approx([1.2 + rows * k / 500_000 + over for rows in ROWS])
            (dashed,) = (line for line in axes.get_lines() if line.get_linestyle() == "--")
            assert set(dashed.get_ydata()) == {0.55}
            assert axes.get_ylim()[0] == 0
        named = [text.get_text() for text in figure.legends[0].get_texts()]
        assert sorted(named) == sorted([*(look["label"] for look in plots.LOOKS.values()), "node of an empty kernel"])

    def test_decode_shows_whole_steps(self, plots):
        figure = plots.decode(RESULT)
        shown = [axes for axes in figure.axes if axes.get_visible()]
        assert [axes.get_title(loc="left").split("\n")[0] for axes in shown] == list(MODELS)
        for axes in shown:
            assert "128 quantizations per step" in axes.get_title(loc="left")
            assert axes.get_xlabel() == "batch size"
            lines = {line.get_label(): line for line in axes.get_lines()}
            zeros = lines["torch.zeros at each call"]
            assert tuple(zeros.get_xdata()) == BATCHES
            assert list(zeros.get_ydata()) == [128.0] * 3
            assert plots.LOOKS["pool"]["label"] not in lines  # it is the zero
        assert "µs" in figure.axes[0].get_ylabel()

    def test_an_unknown_baseline_is_drawn_too(self, plots):
        rows = [quantization(rows, 4096, "128x4") for rows in ROWS]
        for row in rows:
            row["baselines"] |= {"a new way": row["baselines"]["zeros"], "another": row["baselines"]["zeros"]}
        figure = plots.quantize({"quantize": {"few_rows": rows}})
        lines = {line.get_label(): line for line in figure.axes[0].get_lines()}
        new, another = lines["a new way"], lines["another"]
        assert new.get_marker() != another.get_marker()
        assert new.get_color() != another.get_color()

    def test_memory_is_in_mebibytes(self, plots):
        axes = plots.memory(RESULT).axes[0]
        heights = [[bar.get_height() for bar in bars] for bars in axes.containers]
        assert heights == [[30, 88], [900_000 / 2**20, 2]]
        assert "MiB" in axes.get_ylabel()
        assert [tick.get_text().split("\n")[1] for tick in axes.get_xticklabels()] == ["up to 512", "up to 1024"]

    def test_host_has_one_bar_per_call_and_two_colors(self, plots):
        axes = plots.host(RESULT).axes[0]
        bars = axes.patches
        assert [bar.get_width() for bar in bars] == list(HOST.values())
        assert [tick.get_text() for tick in axes.get_yticklabels()] == list(HOST)
        ours = {name for name, bar in zip(HOST, bars, strict=True) if bar.get_facecolor() == bars[2].get_facecolor()}
        assert ours == {"pool.acquire", "torch.ops.safealloc.acquire", "hook in vLLM", "nvfp4_linear"}
        assert "µs" in axes.get_xlabel()

    def test_names_are_those_that_the_benchmarks_measure(self, plots):
        pytest.importorskip("triton", reason="the benchmarks import the kernels")
        from benchmarks import baselines, quantize

        names = {
            baselines.POOL,
            baselines.EMPTY,
            baselines.ZEROS,
            baselines.IN_KERNEL,
            baselines.RETURNED,
            baselines.LINEAR,
        }
        assert names == plots.LOOKS.keys()
        assert quantize.EMPTY_NODE == plots.EMPTY_NODE

    def test_the_color_blind_can_tell_the_colors_apart_and_all_markers_differ(self, plots):
        """At least 20 apart in CIELAB, where 2 is just visible; simulated as in Machado, Oliveira and Fernandes (2009)."""
        from matplotlib.colors import to_rgb

        sees = {
            "all": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
            "no red": [[0.1523, 1.0526, -0.2049], [0.1145, 0.7863, 0.0992], [-0.0039, -0.0481, 1.0520]],
            "no green": [[0.3673, 0.8606, -0.2280], [0.2801, 0.6725, 0.0474], [-0.0118, 0.0429, 0.9690]],
            "no blue": [[1.2555, -0.0767, -0.1788], [-0.0784, 0.9308, 0.1476], [0.0047, 0.6914, 0.3039]],
        }
        colors = torch.tensor([to_rgb(look["color"]) for look in plots.LOOKS.values()])
        linear = torch.where(colors <= 0.04045, colors / 12.92, ((colors + 0.055) / 1.055) ** 2.4)
        to_xyz = torch.tensor([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
        for who, matrix in sees.items():
            xyz = (linear @ torch.tensor(matrix, dtype=torch.float32).T).clamp(0, 1) @ to_xyz.T
            xyz /= torch.tensor([0.9505, 1.0, 1.089])
            root = torch.where(xyz > 0.008856, xyz.clamp(min=1e-9) ** (1 / 3), 7.787 * xyz + 16 / 116)
            x, y, z = root.T
            lab = torch.stack((116 * y - 16, 500 * (x - y), 200 * (y - z)), 1)
            apart = torch.pdist(lab).min()
            assert apart > 20, (who, apart)
        assert len({look["marker"] for look in plots.LOOKS.values()}) == len(plots.LOOKS)

    def test_the_script_draws_from_a_file(self, plots, tmp_path, capsys):
        (tmp_path / "result.json").write_text(json.dumps({"host": RESULT["host"]}))
        plots.main([str(tmp_path / "result.json"), str(tmp_path / "pictures")])
        assert [path.name for path in (tmp_path / "pictures").iterdir()] == ["bench-host.png"]
        assert capsys.readouterr().out == f"wrote {tmp_path / 'pictures' / 'bench-host.png'}\n"

    def test_committed_results_have_every_picture_of_the_docs(self, plots, tmp_path):
        written = []
        for name in ("bench-h200", "bench-moe-h200"):
            written += plots.draw(json.loads((ROOT / f"benchmarks/results/{name}.json").read_text()), tmp_path)
        assert {path.name for path in written} == {path.name for path in (ROOT / "docs").glob("bench-*.png")}

    def test_write_takes_its_files_from_the_command_line(self, plots, tmp_path, monkeypatch):
        from benchmarks import figure

        def draw(result):
            drawn, axes = plots.plt.subplots(figsize=(result["inches"], 1))
            axes.plot([0, 1])
            return drawn

        for name, inches in (("usual", 2), ("other", 3)):
            (tmp_path / f"{name}.json").write_text(json.dumps({"inches": inches}))
        usual = tmp_path / "usual.json", tmp_path / "usual.png"
        monkeypatch.setattr(sys, "argv", ["plot"])
        figure.write("About.\nMore.", draw, *usual)
        assert plots.plt.imread(usual[1]).shape[1] == 300
        monkeypatch.setattr(sys, "argv", ["plot", str(tmp_path / "other.json"), str(tmp_path / "new" / "other.png")])
        figure.write("About.\nMore.", draw, *usual)
        assert plots.plt.imread(tmp_path / "new" / "other.png").shape[1] == 450


def labels(axes) -> list:
    """All visible text of a panel."""
    from matplotlib.text import Text

    title = axes.get_title(loc="left")
    found = [axes.xaxis.label, axes.yaxis.label, *axes.texts]
    found += [text for text in axes.findobj(Text) if text.get_text() == title]
    for axis, limits in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
        for tick in axis.get_major_ticks():
            if tick.label1.get_visible() and min(limits) <= tick.get_loc() <= max(limits):
                found.append(tick.label1)
    return found

"""The pictures of the benchmarks, drawn from made-up numbers; no GPU is needed."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

import pytest

from safealloc.pool.pool import ScalePool

ROOT = Path(__file__).resolve().parents[2]
PICTURES = ["bench-quantize.png", "bench-decode.png", "bench-memory.png", "bench-host.png", "bench-moe.png"]
ROWS, KS = (1, 2, 4, 8, 16, 32), (2048, 4096, 8192, 28672)
BATCHES = (1, 4, 64)
MODELS = ("DeepSeek-R1 without routed experts", "Llama 3.1 8B", "Llama 3.3 70B", "Qwen3 32B", "5th", "6th", "7th")
OVER_POOL = {
    "pool": 0.0,
    "empty": 0.01,
    "zeros (stand-in)": 1.0,
    "padding in the kernel (stand-in)": 0.8,
    "padding in the kernel, wide stores (stand-in)": 0.2,
    "zeroing the returned buffer (stand-in)": 0.9,
    "linear": -0.01,
    "vLLM's own": 0.7,
    "FlashInfer's own": 0.75,
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

PER_CALL = "allocated and filled at each call"


def spread(us: float) -> dict:
    return {"us": us, "quartiles": sorted((us * 0.98, us * 1.03))}


def over_pool(name: str) -> float:
    """By the name without the end that marks a stand-in."""
    return OVER_POOL.get(f"{name} (stand-in)", OVER_POOL.get(name, 0.0))


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
    over = {"pool": 1.05, "right-sized, zeroed (stand-in)": 2, "vLLM's size, zeroed (stand-in)": 90}
    over |= {"quantization alone": 1, "vLLM's own": 3}
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
        {"sizes": 51, "largest": 512, "bars": {"pool": 30 << 20, PER_CALL: 900_000}},
        {"sizes": 83, "largest": 1024, "bars": {"pool": 88 << 20, PER_CALL: 1 << 21}},
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
            assert width == 1660
            assert 500 < height < 1700
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

    def test_quantize_has_one_panel_per_k_and_one_line_per_baseline(self, plots):
        figure = plots.quantize(RESULT)
        assert [axes.get_title(loc="left") for axes in figure.axes] == ["k = 4096", "k = 8192", "k = 28672"]
        assert "µs" in figure.axes[0].get_ylabel()
        for axes, k in zip(figure.axes, (4096, 8192, 28672), strict=True):
            assert axes.get_xlabel() == "rows of the activation"
            assert axes.get_xscale() == "log"
            assert [tick.get_text() for tick in axes.get_xticklabels()] == [str(rows) for rows in ROWS]
            lines = {line.get_label(): line for line in axes.get_lines()}
            for name, way in plots.WAYS.items():
                line = lines[plots.label(name, way)]
                assert tuple(line.get_xdata()) == ROWS
                expected = [1.2 + rows * k / 500_000 + over_pool(name) for rows in ROWS]
                assert list(line.get_ydata()) == pytest.approx(expected)
            assert set(lines[plots.LOOKS["empty kernel"]["label"]].get_ydata()) == {0.55}
            assert axes.get_ylim()[0] == 0
        named = [text.get_text() for text in figure.legends[0].get_texts()]
        labels = [plots.label(name, way) for name, way in plots.WAYS.items()]
        assert sorted(named) == sorted([*labels, plots.LOOKS["empty kernel"]["label"]])

    def test_decode_is_one_chart_of_what_each_way_adds_to_a_step_in_percent(self, plots):
        (axes,) = plots.decode(RESULT).axes
        assert [tick.get_text() for tick in axes.get_yticklabels()] == [f"{name}, TP 8" for name in MODELS]
        percent = 100 * 128 / 9e3  # of a quantization's microseconds; a step has 128, and the pool's takes 9 ms
        for name, way in plots.WAYS.items():
            found = [line.get_xdata() for line in axes.get_lines() if line.get_label() == plots.label(name, way)]
            assert [x for xs in found for x in xs] == pytest.approx([over_pool(name) * percent] * len(MODELS)), name
        bars = [path.vertices[:, 0] for several in axes.collections for path in several.get_paths()]
        assert [pytest.approx([0.98 * percent, 1.03 * percent])] * len(MODELS) == [
            bar for bar in bars if bar[0] == pytest.approx(0.98 * percent)
        ]
        assert "%" in axes.get_xlabel()

    def test_a_bar_of_decode_reaches_over_all_batch_sizes(self, plots):
        batches = [step(batch) for batch in BATCHES]
        for batch, over in zip(batches, (-3.0, 1.0, 2.0), strict=True):
            batch["baselines"] = {name: batch["baselines"][name] for name in ("pool", "zeros (stand-in)")}
            batch["baselines"]["zeros (stand-in)"]["over_pool_per_quantization"] = {
                "us": over,
                "quartiles": [over - 1, over + 1],
            }
        model = {"model": "A", "tensor_parallel": 1, "quantizations": 90, "batches": batches}
        (axes,) = plots.decode({"decode": {"models": [model]}}).axes
        (bar,) = (path.vertices[:, 0] for several in axes.collections for path in several.get_paths())
        assert list(bar) == pytest.approx([-4, 3])
        assert [list(line.get_xdata()) for line in axes.get_lines()][-1] == pytest.approx([1])

    def test_memory_is_in_mebibytes(self, plots):
        axes = plots.memory(RESULT).axes[0]
        widths = [[bar.get_width() for bar in bars] for bars in axes.containers]
        assert widths == [[30, 88], [900_000 / 2**20, 2]]
        assert "MiB" in axes.get_xlabel()
        assert [tick.get_text().split("\n")[1] for tick in axes.get_yticklabels()] == ["up to 512", "up to 1024"]

    def test_host_has_one_bar_per_call_in_the_color_of_what_it_is(self, plots):
        from matplotlib.colors import to_hex

        figure = plots.host(RESULT)
        found = {}
        for axes in figure.axes:
            assert len(axes.patches) == len(axes.get_yticklabels())
            for tick, bar in zip(axes.get_yticklabels(), axes.patches, strict=True):
                found[tick.get_text()] = (bar.get_width(), to_hex(bar.get_facecolor()))
        assert {name: width for name, (width, _) in found.items()} == HOST
        color = {way: look["color"] for way, look in plots.LOOKS.items()}
        ours = {name for name, (_, of) in found.items() if of == color["pool"]}
        assert ours == {"pool.acquire", "torch.ops.safealloc.acquire", "hook in vLLM", "nvfp4_linear"}
        assert found["torch.zeros"][1] == found["torch.zeros as vLLM calls it (stand-in)"][1] == color["zeros"]
        assert "µs" in figure.axes[-1].get_xlabel()

    def test_what_an_installed_vllm_allocates_is_drawn_as_its_own(self, plots):
        from matplotlib.colors import to_hex

        figure = plots.host({"host": {"calls": {name: spread(3.0) for name in ("torch.empty", "vLLM 0.33.0's own")}}})
        (axes,) = figure.axes
        assert [tick.get_text() for tick in axes.get_yticklabels()] == ["torch.empty", "vLLM 0.33.0's own"]
        assert to_hex(axes.patches[1].get_facecolor()) == plots.LOOKS["vllm"]["color"]

    def test_names_are_those_that_the_benchmarks_measure(self, plots):
        pytest.importorskip("triton", reason="the benchmarks import the kernels")
        from benchmarks import baselines, moe, quantize, vendor_kernels

        with ScalePool("cpu") as pool:
            every = [*baselines.baselines(pool), *vendor_kernels.DENSE]
        grouped = (moe.POOL, moe.CLEANED, moe.RIGHT_SIZED, moe.VLLM, moe.ALONE)
        of_experts = (*grouped, vendor_kernels.VLLM_EXPERTS, vendor_kernels.VLLM_CLEANED)
        not_drawn = {baselines.RETURNED, baselines.LINEAR, vendor_kernels.VLLM_SILU}
        for names, ways in ((set(every) - not_drawn, plots.WAYS), (set(of_experts), plots.MOE_WAYS)):
            assert {name.removesuffix(plots.STAND_IN) for name in names} == ways.keys()
            stand_ins = {name for name in names if name.endswith(plots.STAND_IN)}
            assert stand_ins == {name + plots.STAND_IN for name in ways if name in plots.STAND_INS}
        assert quantize.EMPTY_NODE == plots.EMPTY_NODE

    def test_a_stand_in_is_called_so_though_its_result_is_from_before(self, plots):
        for end in ("", plots.STAND_IN):
            row = {"rows": 1, "k": 4096, "layout": "128x4", "baselines": {f"zeros{end}": spread(2), "pool": spread(1)}}
            (legend,) = plots.quantize({"quantize": {"few_rows": [row]}}).legends
            assert [text.get_text() for text in legend.get_texts()] == ["pool", "torch.zeros at each call (stand-in)"]

    def test_the_title_says_whether_a_step_is_whole(self, plots):
        models = RESULT["decode"]["models"]
        old, new = (plots.decode({"decode": found}) for found in ({"models": models}, {"counts": "", "models": models}))
        assert old.texts[0].get_text() == "What clean padding costs the linear layers of a decode step"
        assert new.texts[0].get_text() == "What clean padding costs a decode step"

    def test_the_script_draws_from_a_file(self, plots, tmp_path, capsys):
        (tmp_path / "result.json").write_text(json.dumps({"host": RESULT["host"]}))
        plots.main([str(tmp_path / "result.json"), str(tmp_path / "pictures")])
        assert [path.name for path in (tmp_path / "pictures").iterdir()] == ["bench-host.png"]
        assert capsys.readouterr().out == f"wrote {tmp_path / 'pictures' / 'bench-host.png'}\n"

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
        assert plots.plt.imread(usual[1]).shape[:2] == (830, 1660)
        monkeypatch.setattr(sys, "argv", ["plot", str(tmp_path / "other.json"), str(tmp_path / "new" / "other.png")])
        figure.write("About.\nMore.", draw, *usual)
        assert plots.plt.imread(tmp_path / "new" / "other.png").shape[:2] == (553, 1660)

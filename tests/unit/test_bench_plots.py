"""What ``safealloc bench`` draws and computes from its numbers: pictures, targets, bytes; no GPU is needed."""

from __future__ import annotations

import itertools
import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

import safealloc
from benchmarks import summary
from safealloc.integrations.vllm.allocator import allocator
from safealloc.pool.default import default_pool

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
    for part, several in (("baselines", times), ("floor", floor)):
        found[part] = {name: spread(us) | {"ratio_to_pool": us / pool} for name, us in several.items()}
    return found


def step(batch: int) -> dict:
    baselines = {name: spread(9e3) | {"over_pool_per_quantization": spread(over)} for name, over in OVER_POOL.items()}
    return {"batch": batch, "baselines": baselines}


def routed(batch: int, k: int, routing: str) -> dict:
    alone = 1.3 + batch / 15
    over = {"pool": 1.05, "right-sized, zeroed": 2, "vLLM's size, zeroed": 90, "quantization alone": 1}
    baselines = {name: spread(factor * alone) | {"ratio_to_alone": factor} for name, factor in over.items()}
    baselines["pool, cleaned by a kernel of its own"] = spread(1.4 * alone) | {"ratio_to_alone": 1.4}
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
        {"sizes": 51, "largest": 512, "bars": {"pool": 30 << 20, "pool, compact": 3 << 20, "per call": 900_000}},
        {"sizes": 83, "largest": 1024, "bars": {"pool": 88 << 20, "pool, compact": 10 << 20, "per call": 1 << 21}},
    ],
}


@pytest.fixture
def plots():
    pytest.importorskip("matplotlib", reason="the pictures need matplotlib")
    from matplotlib import pyplot

    from benchmarks import plots

    yield plots
    pyplot.close("all")


@pytest.fixture
def kernels():
    """``benchmarks.quantize`` and ``.gemm``."""
    pytest.importorskip("triton", reason="they import the kernels")
    from benchmarks import gemm, quantize

    return quantize, gemm


class TestPictures:
    def test_all_are_written_and_forgotten(self, plots, tmp_path):
        folder = tmp_path / "some" / "folder"
        assert plots.draw(RESULT, folder) == [folder / name for name in PICTURES]
        assert sorted(path.name for path in folder.iterdir()) == sorted(PICTURES)
        for path in folder.iterdir():
            assert path.read_bytes().startswith(b"\x89PNG")
            width, height = plots.plt.imread(path).shape[1::-1]
            assert 1000 < width < 2200
            assert 500 < height < 1300
        assert plots.plt.get_fignums() == []

    @pytest.mark.parametrize("missing", ["quantize", "decode", "memory", "host", "moe"])
    def test_a_part_that_is_missing_is_left_out(self, plots, tmp_path, missing):
        written = plots.draw({part: found for part, found in RESULT.items() if part != missing}, tmp_path)
        assert [path.name for path in written] == [name for name in PICTURES if name != f"bench-{missing}.png"]

    def test_nothing_is_drawn_of_nothing(self, plots, tmp_path):
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
    def test_no_text_is_clipped_and_none_lies_on_another(self, plots, picture, models):
        """Nor does the legend lie on a panel."""
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

    def test_quantize_has_a_panel_a_k_and_a_line_a_baseline(self, plots):
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

    def test_decode_counts_a_whole_step(self, plots):
        figure = plots.decode(RESULT)
        shown = [axes for axes in figure.axes if axes.get_visible()]
        assert [axes.get_title(loc="left").split("\n")[0] for axes in shown] == list(MODELS)
        for axes in shown:
            assert "128 quantizations" in axes.get_title(loc="left")
            assert axes.get_xlabel() == "batch size"
            lines = {line.get_label(): line for line in axes.get_lines()}
            zeros = lines["torch.zeros at each call"]
            assert tuple(zeros.get_xdata()) == BATCHES
            assert list(zeros.get_ydata()) == [128.0] * 3
            assert plots.LOOKS["pool"]["label"] not in lines  # it is the zero
        assert "µs" in figure.axes[0].get_ylabel()

    def test_a_baseline_that_nobody_knows_is_drawn_too(self, plots):
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
        assert heights == [[30, 88], [3, 10], [900_000 / 2**20, 2]]
        assert "MiB" in axes.get_ylabel()
        assert [tick.get_text().split("\n")[1] for tick in axes.get_xticklabels()] == ["up to 512", "up to 1024"]

    def test_host_has_a_bar_a_call_and_tells_ours_apart(self, plots):
        axes = plots.host(RESULT).axes[0]
        bars = axes.patches
        assert [bar.get_width() for bar in bars] == list(HOST.values())
        assert [tick.get_text() for tick in axes.get_yticklabels()] == list(HOST)
        ours = {name for name, bar in zip(HOST, bars, strict=True) if bar.get_facecolor() == bars[2].get_facecolor()}
        assert ours == {"pool.acquire", "torch.ops.safealloc.acquire", "hook in vLLM", "nvfp4_linear"}
        assert "µs" in axes.get_xlabel()

    def test_what_measures_and_what_draws_agree_on_names(self, plots, kernels):
        quantize, _ = kernels
        from benchmarks import baselines

        names = {baselines.POOL, baselines.EMPTY, baselines.ZEROS, baselines.IN_KERNEL, baselines.RETURNED, baselines.LINEAR}
        assert names == plots.LOOKS.keys()
        assert quantize.EMPTY_NODE == plots._EMPTY_NODE

    def test_colors_differ_for_the_color_blind_and_markers_for_all(self, plots):
        """At least 20 apart in CIELAB, of which 2 are just seen; simulated as Machado, Oliveira and Fernandes (2009) do."""
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

    def test_the_script_draws_from_a_file(self, plots, tmp_path, monkeypatch, capsys):
        script = Path(safealloc.__file__).parents[1] / "benchmarks" / "plot_bench.py"
        if not script.exists():
            pytest.skip("benchmarks/ is not in the package")
        (tmp_path / "result.json").write_text(json.dumps({"host": RESULT["host"]}))
        monkeypatch.setattr(sys, "argv", [str(script), str(tmp_path / "result.json"), str(tmp_path / "pictures")])
        runpy.run_path(str(script), run_name="__main__")
        assert [path.name for path in (tmp_path / "pictures").iterdir()] == ["bench-host.png"]
        assert capsys.readouterr().out == f"wrote {tmp_path / 'pictures' / 'bench-host.png'}\n"

    def test_write_reads_and_writes_the_files_it_is_told(self, plots, tmp_path, monkeypatch):
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
    """All text of a panel that is drawn."""
    found = [axes.xaxis.label, axes.yaxis.label, axes._left_title, *axes.texts]
    for axis, limits in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
        for tick in axis.get_major_ticks():
            if tick.label1.get_visible() and min(limits) <= tick.get_loc() <= max(limits):
                found.append(tick.label1)
    return found


class TestSummary:
    def test_median_and_quartiles(self):
        assert summary.summary([5.0, 1.0, 2.0, 4.0, 3.0]) == {"us": 3.0, "quartiles": [2.0, 4.0]}
        assert summary.summary([1.0, 2.0]) == {"us": 1.5, "quartiles": [1.25, 1.75]}
        assert summary.summary([7.0]) == {"us": 7.0, "quartiles": [7.0, 7.0]}

    def test_a_target_is_met_by_its_worst_value(self):
        assert summary.at_most("x", 1.05, [0.9, 1.05]) == {"name": "x", "target": 1.05, "reached": 1.05, "met": True}
        assert summary.at_most("x", 1.05, [0.9, 1.0501])["met"] is False
        assert summary.at_least("x", 0.7, [0.9, 0.7]) == {"name": "x", "target": 0.7, "reached": 0.7, "met": True}
        assert summary.at_least("x", 0.7, [0.9, 0.699])["met"] is False
        for target in (summary.at_most, summary.at_least):
            assert target("x", 1.0, []) == {"name": "x", "target": 1.0, "reached": None, "met": False}


class TestQuantizeTargets:
    @staticmethod
    def row(rows, k, layout, *, linear=1.0, in_kernel=2.0, empty_node=0.5, compact=1.0):
        """With times relative to the pool's."""
        baselines = {"pool": 1.0, "pool, compact": compact, "linear": linear, "padding in the kernel": in_kernel}
        return {
            "rows": rows,
            "k": k,
            "layout": layout,
            "baselines": {name: {"ratio_to_pool": ratio} for name, ratio in baselines.items()},
            "floor": {"empty kernel": {"ratio_to_pool": empty_node}},
        }

    def result(self, **extra):
        few = [self.row(*shape) for shape in itertools.product((1, 8, 32), (4096, 8192), ("128x4", "8x4"))]
        many = [{"rows": 4096, "k": 8192, "share_of_copy": 0.8}, {"rows": 65536, "k": 8192, "share_of_copy": 0.75}]
        gemm = [{"m": m, "n": 8192, "k": 8192, "share_of_copy": 0.6} for m in (1, 16)]
        found = {"few_rows": few, "many_rows": many, "gemm": gemm}
        return {part: rows + extra.get(part, []) for part, rows in found.items()}

    def test_all_met(self, kernels):
        targets = kernels[0].targets(self.result())
        assert [target["reached"] for target in targets] == [1.0, 2.0, 0.5, 0.75, 0.6, 1.0]
        assert [target["target"] for target in targets] == [1.05, 2.2, 0.70, 0.70, 0.50, 1.03]
        assert all(target["met"] for target in targets)
        assert len({target["name"] for target in targets}) == 6

    @pytest.mark.parametrize(
        ("part", "row", "missed", "reached"),
        [
            ("few_rows", ((32, 4096, "8x4"), {"linear": 0.9}), 0, 1.1111),
            ("few_rows", ((1, 4096, "128x4"), {"empty_node": 0.4}), 1, 2.5),
            ("few_rows", ((8, 28672, "128x4"), {"in_kernel": 1.25}), 2, 0.8),
            ("many_rows", {"rows": 2048, "k": 28672, "share_of_copy": 0.69}, 3, 0.69),
            ("gemm", {"m": 2, "n": 8192, "k": 8192, "share_of_copy": 0.3}, 4, 0.3),
            ("few_rows", ((32, 2048, "8x4"), {"compact": 1.04}), 5, 1.04),
        ],
    )
    def test_the_worst_shape_decides(self, kernels, part, row, missed, reached):
        if isinstance(row, tuple):
            row = self.row(*row[0], **row[1])
        targets = kernels[0].targets(self.result(**{part: [row]}))
        assert [number for number, target in enumerate(targets) if not target["met"]] == [missed]
        assert targets[missed]["reached"] == reached

    def test_other_shapes_do_not_count(self, kernels):
        others = {
            "few_rows": [
                self.row(64, 4096, "8x4", linear=0.5, compact=1.5),
                self.row(8, 2048, "8x4", linear=0.5, empty_node=0.1),
                self.row(2, 4096, "128x4", empty_node=0.1),
                self.row(16, 8192, "128x4", in_kernel=1.0),
                self.row(8, 8192, "8x4", in_kernel=1.0),
                self.row(8, 4096, "128x4", in_kernel=1.0),
            ],
            "many_rows": [{"rows": 2048, "k": 8192, "share_of_copy": 0.1}],
            "gemm": [
                {"m": 32, "n": 8192, "k": 8192, "share_of_copy": 0.1},
                {"m": 1, "n": 4096, "k": 4096, "share_of_copy": 0.1},
                {"m": 1, "n": 1280, "k": 8192, "share_of_copy": 0.1},
            ],
        }
        assert all(target["met"] for target in kernels[0].targets(self.result(**others)))

    def test_what_was_not_measured_is_not_met(self, kernels):
        result = self.result()
        for row in result["few_rows"]:
            del row["baselines"]["padding in the kernel"], row["baselines"]["pool, compact"]
        targets = kernels[0].targets(result | {"gemm": []})
        assert [target["met"] for target in targets] == [True, True, False, True, False, False]
        assert [targets[missed]["reached"] for missed in (2, 4, 5)] == [None, None, None]


class TestBytes:
    def test_a_quantization_reads_bfloat16_and_writes_codes_and_scales(self, kernels):
        rows, k = 48, 4096
        x = torch.empty(rows, k, dtype=torch.bfloat16)
        assert kernels[0].nbytes(rows, k) == x.nbytes + rows * k // 2 + rows * k // 16

    def test_a_gemm_reads_both_operands_and_writes_bfloat16(self, kernels):
        m, n, k = 16, 384, 512
        assert kernels[1].bytes_read(m, n, k) == (m + n) * (k // 2 + k // 16)
        assert kernels[1].bytes_written(m, n) == torch.empty(m, n, dtype=torch.bfloat16).nbytes

    def test_weights_exceed_what_a_cache_holds_and_are_what_is_counted(self, kernels):
        quantize, gemm = kernels
        for n, k in (*quantize.FULL.gemm_weights, *quantize.QUICK.gemm_weights):
            copies = gemm.copies(n, k)
            assert copies * gemm.bytes_read(0, n, k) > 200_000_000
            assert (copies - 1) * gemm.bytes_read(0, n, k) <= 200_000_000
        ((weight, scales),) = gemm._weights(1280, 512, 1, torch.device("cpu"))
        assert weight.nbytes + scales.nbytes == gemm.bytes_read(0, 1280, 512)
        values = scales.view(torch.float8_e4m3fn).float()
        assert values.min() == 0.5
        assert values.max() < 2

    def test_what_is_measured_has_what_the_targets_need(self, kernels):
        quantize, _ = kernels
        for extent in (quantize.FULL, quantize.QUICK):
            assert extent.rounds % 2 == 1
            assert 1 in extent.rows
            assert {4096, 8192} <= {*extent.ks}
            assert all(rows * k >= 2**25 for rows, k in extent.large)
            assert (8192, 8192) in extent.gemm_weights


class TestHost:
    """On a CPU, where nothing is launched."""

    @pytest.fixture
    def host(self):
        from benchmarks import host

        return host

    def test_all_that_launches_nothing_is_measured_and_the_allocator_is_left_as_it_was(self, host):
        before, modules = dict(vars(allocator)), dict(sys.modules)
        told = []
        result = host.run(torch.device("cpu"), True, lambda what, done: told.append(done))
        assert vars(allocator) == before
        assert sys.modules.get("vllm.forward_context") is modules.get("vllm.forward_context")
        assert told == sorted(told)
        assert (told[0], told[-1]) == (0.0, 1.0)
        calls = result["calls"]
        launched = {host.LAUNCH, host.LAUNCHER, host.QUANTIZE, host.QUANTIZE_DEFAULT, host.LINEAR}
        assert {host.EMPTY, host.ZEROS, host.ACQUIRE, host.OP, host.HOOK} < calls.keys()
        assert len(calls) > 5  # vLLM's own, or what stands in for it
        assert not launched & calls.keys()
        assert result["not_measured"].keys() == launched
        for found in calls.values():
            lower, upper = found["quartiles"]
            assert 0.05 < lower <= found["us"] <= upper < 1000
        assert [target["reached"] is None for target in result["targets"]] == [False, False, False, True]

    def test_the_hook_is_served_by_the_pool(self, host):
        """Not by vLLM's own allocation, to which the allocator turns where it has no reason to serve."""
        device = torch.device("cpu")
        pool = default_pool(device)
        with host.vllm_step(device):
            tensor = host.vllm_scales(host.ROWS, host.K, device, None)
            assert pool.spec(tensor) == safealloc.ScaleSpec(host.ROWS, host.K, host.LAYOUT)
        assert pool.spec(host.vllm_scales(host.ROWS, host.K, device, None)) is None

    @pytest.mark.parametrize("allocate", [torch.empty, torch.zeros])
    def test_stand_ins_allocate_what_the_pool_does(self, host, allocate):
        device = torch.device("cpu")
        for rows, k in ((1, 16), (8, 4096), (129, 1008)):
            tensor = host._create_fp4_scale_tensor(allocate, rows, k, device, True)
            assert tensor.view(torch.uint8).shape == host.LAYOUT.padded_shape(rows, k)

    def test_batches_take_turns(self, host):
        log = []
        every = [host.Candidate(name, lambda name=name: log.append(name)) for name in "ab"]
        times = host.alternate(every, 3, 4, torch.device("cpu"), lambda what, done: None)
        assert {name: len(several) for name, several in times.items()} == {"a": 3, "b": 3}
        runs = [name + str(len(list(run))) for name, run in itertools.groupby(log)]
        assert runs == ["a20", "b20"] + 3 * ["a4", "b4"]

    def test_targets(self, host):
        times = {
            host.EMPTY: [3.0, 30.0, 3.0],
            host.ACQUIRE: [0.9, 9.0, 0.9],
            host.HOOK: [5.9, 59.0, 5.9],
            host.LAUNCH: [10.0, 100.0, 10.0],
            host.QUANTIZE: [19.0, 190.0, 19.0],
        }
        targets = host.targets(times)
        assert [target["target"] for target in targets] == [1.0, 0.3333, 2.0, 2.0]
        assert [target["reached"] for target in targets] == [0.9, 0.3, 1.9667, 1.9]
        assert all(target["met"] for target in targets)
        slower = {name: [2 * time for time in several] for name, several in times.items()}
        slower[host.EMPTY], slower[host.LAUNCH] = times[host.EMPTY], times[host.LAUNCH]
        assert not any(target["met"] for target in host.targets(slower))
        few = {name: times[name] for name in (host.EMPTY, host.ACQUIRE)}
        assert [target["met"] for target in host.targets(few)] == [True, True, False, False]

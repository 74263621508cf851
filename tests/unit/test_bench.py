"""``safealloc bench``: the models it measures, its arithmetic, and the command; no GPU is needed."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from benchmarks import __main__, timing
from benchmarks.models import MODELS, Model, weight_nbytes
from safealloc.cli import main
from safealloc.commands.models import Site
from safealloc.commands.repro import replay
from safealloc.formats.layout import SfLayout
from safealloc.kernels import reference
from safealloc.pool.pool import ScalePool

SHAPES = {
    # model, ranks: (site, k, n, layers), from the published config.json by hand
    ("Llama 3.1 8B", 1): [
        ("qkv_proj", 4096, 6144, 32),
        ("o_proj", 4096, 4096, 32),
        ("mlp.gate_up_proj", 4096, 28672, 32),
        ("mlp.down_proj", 14336, 4096, 32),
    ],
    ("Llama 3.1 8B", 8): [
        ("qkv_proj", 4096, 768, 32),
        ("o_proj", 512, 4096, 32),
        ("mlp.gate_up_proj", 4096, 3584, 32),
        ("mlp.down_proj", 1792, 4096, 32),
    ],
    ("Llama 3.3 70B", 1): [
        ("qkv_proj", 8192, 10240, 80),
        ("o_proj", 8192, 8192, 80),
        ("mlp.gate_up_proj", 8192, 57344, 80),
        ("mlp.down_proj", 28672, 8192, 80),
    ],
    ("Llama 3.3 70B", 8): [
        ("qkv_proj", 8192, 1280, 80),
        ("o_proj", 1024, 8192, 80),
        ("mlp.gate_up_proj", 8192, 7168, 80),
        ("mlp.down_proj", 3584, 8192, 80),
    ],
    ("Qwen3 32B", 1): [
        ("qkv_proj", 5120, 10240, 64),
        ("o_proj", 8192, 5120, 64),
        ("mlp.gate_up_proj", 5120, 51200, 64),
        ("mlp.down_proj", 25600, 5120, 64),
    ],
    ("Qwen3 32B", 8): [
        ("qkv_proj", 5120, 1280, 64),
        ("o_proj", 1024, 5120, 64),
        ("mlp.gate_up_proj", 5120, 6400, 64),
        ("mlp.down_proj", 3200, 5120, 64),
    ],
    ("DeepSeek-R1 without routed experts", 8): [
        ("fused_qkv_a_proj", 7168, 2112, 61),
        ("q_b_proj", 1536, 3072, 61),
        ("o_proj", 2048, 7168, 61),
        ("mlp.gate_up_proj", 7168, 4608, 3),
        ("mlp.down_proj", 2304, 7168, 3),
        ("shared_experts.gate_up_proj", 7168, 512, 58),
        ("shared_experts.down_proj", 256, 7168, 58),
    ],
}
BY_KEY = {(model.name, model.tensor_parallel): model for model in MODELS}


class TestModels:
    def test_every_model_is_in_the_table(self):
        assert BY_KEY.keys() == SHAPES.keys()

    @pytest.mark.parametrize(("key", "shapes"), SHAPES.items(), ids=[f"{name} {ranks}" for name, ranks in SHAPES])
    def test_sites(self, key, shapes):
        model = BY_KEY[key]
        assert [(site.name, site.k, site.n, len(site.layers)) for site in model.sites] == shapes
        assert len(model.step) == sum(layers for *_, layers in shapes)

    def test_a_weight_is_its_codes_and_its_scales(self):
        assert weight_nbytes(Site("qkv_proj", 4096, 768, (0,))) == 768 * 2048 + 768 * 256
        assert weight_nbytes(Site("short", 48, 3, (0,))) == 3 * 24 + 128 * 4  # padding is read too
        whole = BY_KEY["Llama 3.3 70B", 1].weight_nbytes
        assert whole == 80 * 8192 * (10240 + 8192 + 57344 + 28672) * 9 // 16

    def test_a_step_goes_layer_by_layer(self):
        steps = [(site.name, number) for site, number in BY_KEY["DeepSeek-R1 without routed experts", 8].step]
        attention = ["fused_qkv_a_proj", "q_b_proj", "o_proj"]
        assert steps[:5] == [(name, 0) for name in (*attention, "mlp.gate_up_proj", "mlp.down_proj")]
        shared = ["shared_experts.gate_up_proj", "shared_experts.down_proj"]
        assert steps[15:20] == [(name, 3) for name in attention] + [(name, 0) for name in shared]
        assert steps[-5:] == [(name, 60) for name in attention] + [(name, 57) for name in shared]


class Clock:
    """A device of its own: each replay of a graph takes as long as the graph says, and a first replay longer."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.log = 0.0, []
        clock = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.time = clock.now
                clock.log.append("|")

            def elapsed_time(self, end: Event) -> float:
                return end.time - self.time

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: self.log.append("."))

    def graph(self, name: str, milliseconds: float) -> SimpleNamespace:
        def replay() -> None:
            first = name not in self.log
            self.log.append(name)
            self.now += milliseconds + (100 if first else 0)

        return SimpleNamespace(replay=replay)


class TestTiming:
    def test_each_round_replays_every_graph_and_the_first_does_not_count(self, monkeypatch):
        clock = Clock(monkeypatch)
        graphs = {name: clock.graph(name, time) for name, time in (("a", 1.0), ("b", 0.25), ("c", 8.0))}
        times = timing.interleaved(graphs, rounds=4, replays=2)
        assert times == {"a": [1e3] * 4, "b": [250.0] * 4, "c": [8e3] * 4}
        rounds = "".join(clock.log).split(".")[:-1]
        assert len(rounds) == 5
        for one in rounds:
            lead, *turns = one.split("|")
            turns = [turn for turn in turns if turn]
            assert sorted(turns) == ["aa", "bb", "cc"]
            assert lead == turns[0][0]  # keeps the device busy while the host queues the rest

    def test_no_graph_is_always_first_and_the_order_repeats_itself(self, monkeypatch):
        logs = []
        for seed in (0, 0, 1):
            clock = Clock(monkeypatch)
            graphs = {name: clock.graph(name, 1.0) for name in "abc"}
            timing.interleaved(graphs, rounds=30, replays=1, seed=seed)
            logs.append("".join(clock.log))
        assert {one[0] for one in logs[0].split(".")[:-1]} == {"a", "b", "c"}
        assert logs[0] == logs[1] != logs[2]

    def test_ratios_and_differences_are_of_one_round(self):
        """A device that slows down to a third meets both alike."""
        ours, theirs = [10.0, 20.0, 33.0], [20.0, 40.0, 60.0]
        assert timing.ratio(ours, theirs) == 0.5
        assert timing.differences(ours, theirs) == [-10.0, -20.0, -27.0]
        assert timing.median(ours) == 20.0
        with pytest.raises(ValueError, match="shorter"):
            timing.ratio(ours, theirs[:2])


@pytest.fixture
def decode():
    """It imports the kernels."""
    pytest.importorskip("triton", reason="the kernels need triton")
    from benchmarks import decode

    return decode


class TestDecode:
    def test_results_of_a_baseline(self, decode):
        times = {
            "pool": [100.0, 110.0, 120.0],
            "zeros": [104.0, 116.0, 124.0],
            decode.GEMM_ONLY: [90.0, 91.0, 92.0],
        }
        assert decode.baseline_results(times, quantizations=4) == {
            "pool": {
                "us": 110.0,
                "quartiles": [105.0, 115.0],
                "ratio_to_pool": 1.0,
                "over_pool_per_quantization": {"us": 0.0, "quartiles": [0.0, 0.0]},
            },
            "zeros": {
                "us": 116.0,
                "quartiles": [110.0, 120.0],
                "ratio_to_pool": 1.04,
                "over_pool_per_quantization": {"us": 1.0, "quartiles": [1.0, 1.25]},
            },
        }

    @pytest.mark.parametrize(
        ("microseconds", "seconds", "rounds", "replays"),
        [
            ([100.0, 150.0], 2.0, 60, 20),  # a short step: as often as is useful
            ([1000.0, 1500.0], 0.2, 40, 2),  # so many rounds take 200 ms
            ([1e5, 1e5], 2.0, 10, 1),
            ([1e5, 1e5], 0.2, 9, 1),  # not fewer, however long they take
        ],
    )
    def test_rounds_fill_the_time(self, decode, microseconds, seconds, rounds, replays):
        once = {str(number): [time] for number, time in enumerate(microseconds)}
        assert decode.rounds_of(once, seconds) == (rounds, replays)

    def test_a_graphs_memory_is_that_of_its_own_pool(self, decode):
        segments = [
            {"segment_pool_id": (0, 0), "total_size": 7},
            {"segment_pool_id": [0, 3], "total_size": 2 << 20},
            {"segment_pool_id": (0, 3), "total_size": 1 << 20},
            {"segment_pool_id": (3, 0), "total_size": 11},
        ]
        assert decode.private_nbytes(segments, (0, 3)) == 3 << 20

    def test_weights_that_do_not_fit_take_turns(self, decode, monkeypatch):
        sites = (Site("large", 64, 128, (0, 1, 2, 3)), Site("once", 64, 32, (2,)))
        model = Model("small", 1, sites)

        def weights(free):
            monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, free))
            return decode.weights_of(model, torch.device("cpu"))

        made = weights(1 << 30)
        assert [len(made[site]) for site in sites] == [4, 1]
        assert len({weight.fp4.data_ptr() for several in made.values() for weight in several}) == 5
        for several, site in zip(made.values(), sites, strict=True):
            for weight in several:
                assert weight.fp4.shape == (site.n, site.k // 2)
                assert weight.scales.shape == (128, 4)
                values = weight.scales.view(torch.float8_e4m3fn).float()
                assert values.min() >= 0.25
                assert values.max() <= 1.875
        few = weights(model.weight_nbytes)
        assert [len(few[site]) for site in sites] == [2, 1]  # 60 % of what is free
        assert [len(weights(1)[site]) for site in sites] == [1, 1]

    @pytest.mark.parametrize("layout", [None, SfLayout.layout_linear])
    def test_a_step_multiplies_each_layers_weight_and_needs_one_buffer_a_width(self, decode, monkeypatch, layout):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 30, 1 << 30))
        products = []

        def mm(a, b, a_scales, b_scales, alpha, out, layout):
            reference.mm(a, b, a_scales, b_scales, alpha, out, layout)
            products.append((layout, b.data_ptr(), out.clone()))

        monkeypatch.setattr(decode.triton_gemm, "mm", mm)
        model = Model(
            "small", 1, (Site("up", 80, 48, (0, 1)), Site("gate", 80, 32, (0, 1)), Site("down", 32, 80, (1,)))
        )
        device = torch.device("cpu")
        weights = decode.weights_of(model, device)
        with ScalePool(device) as pool:

            def quantize(x, global_scale, layout):
                x_fp4 = torch.empty(x.shape[0], x.shape[1] // 2, dtype=torch.uint8)
                scales = pool.acquire(*x.shape, layout)
                reference.quantize(x, global_scale, x_fp4, scales, layout)
                return x_fp4, scales

            baseline = decode.Baseline("pool", "", quantize, layout)
            step = decode.Step(model, weights, 3, device)
            step.run(baseline)
            assert pool.stats().buffers == 2  # for 80 and 32 columns, though two layers of 80 follow each other
            step.multiply(baseline)
            step.multiply(baseline)
            assert pool.stats().hits + pool.stats().misses == 5 + 2  # the GEMMs alone quantize once
        names = [("up", 0), ("gate", 0), ("up", 1), ("gate", 1), ("down", 0)]
        by_name = {site.name: several for site, several in weights.items()}
        read = [by_name[name][number].fp4.data_ptr() for name, number in names]
        assert [address for _, address, _ in products] == 3 * read
        assert {used for used, _, _ in products} == {layout or SfLayout.layout_128x4}
        for (_, _, ours), (_, _, again), (_, _, fixed) in zip(products[:5], products[5:10], products[10:], strict=True):
            assert ours.isfinite().all()
            assert ours.count_nonzero() > ours.numel() / 2
            assert torch.equal(ours, again)
            assert torch.equal(ours, fixed)


DECODE = {
    "baselines": {"pool": "a buffer of a pool", "zeros": "torch.zeros at each call"},
    "copy_bytes_per_second": 4_000_000_000_000,
    "models": [
        {
            "model": "Llama 3.1 8B",
            "tensor_parallel": 8,
            "sites": [{"name": "qkv_proj", "k": 4096, "n": 768, "layers": 32}],
            "quantizations": 32,
            "weight_bytes": 56_623_104,
            "distinct_weights": 32,
            "batches": [
                {
                    "batch": batch,
                    "rounds": 9,
                    "replays": 2,
                    "gemm_only": {"us": 200.0, "quartiles": [199.0, 201.0]},
                    "baselines": {
                        "pool": {
                            "us": 260.0,
                            "quartiles": [259.0, 261.0],
                            "ratio_to_pool": 1.0,
                            "over_pool_per_quantization": {"us": 0.0, "quartiles": [0.0, 0.0]},
                            "nodes": 64,
                            "graph_memory_bytes": 2 << 20,
                            "pool_bytes": 32 << 10,
                        },
                        "zeros": {
                            "us": 292.0,
                            "quartiles": [290.0, 293.0],
                            "ratio_to_pool": 1.1231,
                            "over_pool_per_quantization": {"us": 1.004, "quartiles": [0.9, 1.1]},
                            "nodes": None,
                            "graph_memory_bytes": 4 << 20,
                            "pool_bytes": 0,
                        },
                    },
                }
                for batch in (1, 16)
            ],
        }
    ],
}
FAST, SLOW = ({"us": us, "quartiles": [us, us], "ratio_to_pool": us / 2.5} for us in (2.5, 3.75))
BANDWIDTH = {"us": 9.25, "quartiles": [9.0, 10.0], "bytes_per_second": 3_000_000_000_000, "share_of_copy": 0.751}
TARGETS = [
    {"name": "first: times", "target": 1.05, "reached": 1.0312, "met": True},
    {"name": "second: times", "target": 2.2, "reached": None, "met": False},
]
QUANTIZE = {
    "few_rows": [
        {
            "rows": 1,
            "k": 4096,
            "layout": layout,
            "baselines": {"pool": FAST, "zeros": SLOW},
            "floor": {"empty kernel": FAST},
        }
        for layout in ("128x4", "8x4")
    ]
    + [{"rows": 1, "k": 8192, "layout": "8x4", "baselines": {"pool": SLOW}, "floor": {"empty kernel": SLOW}}],
    "many_rows": [{"rows": 4096, "k": 8192, "layout": "128x4", **BANDWIDTH}],
    "gemm": [{"m": 1, "n": 2048, "k": 8192, "layout": "8x4", **BANDWIDTH, "baselines": {}}],
    "not_measured": {"vLLM's emulation": "vllm is not installed"},
    "targets": TARGETS,
}
HOST = {
    "calls": {
        "torch.empty": {"us": 2.504, "quartiles": [2.4, 2.611]},
        "pool.acquire": {"us": 0.8, "quartiles": [0.7, 0.9]},
    },
    "not_measured": {"nvfp4_linear": "triton is not installed"},
    "targets": TARGETS,
}
MOE = {
    "experts": 256,
    "topk": 8,
    "rows": [
        {
            "batch": 16,
            "rows": 128,
            "k": k,
            "silu_and_mul": silu,
            "routing": "uniform",
            "baselines": {
                "quantization alone": {"us": 2.0, "quartiles": [2.0, 2.0], "ratio_to_alone": 1.0},
                "pool": {"us": 2.14, "quartiles": [2.0, 2.2], "ratio_to_alone": 1.07},
            },
        }
        for k, silu in ((7168, False), (2048, True))
    ],
    "memory": [{"k": 7168, "batch": 16, "vLLM's size, zeroed": 1 << 29, "pool": 1 << 23, "pool's record": 2048}],
    "not_measured": {},
    "targets": TARGETS,
}
GUARD = {
    "steps": [
        {"model": "Llama 3.1 8B", "tensor_parallel": 8, "batch": 16, "buffers": 3, "bytes": 4096, "off": {"us": 200.0}}
        | {"counts": {"over_off": {"us": 0.75}}, "looks": {"over_off": {"us": -1.5}}}
    ],
    "nodes": [
        {"model": "Llama 3.1 8B", "tensor_parallel": 8, "sizes": 51, "buffers": 153, "bytes": 2048}
        | {"counts": {"us": 0.5}, "looks": {"us": 9.25}}
    ],
    "host": {"calls": {"pool.acquire, no SAFEALLOC_VERIFY": {"us": 0.75, "quartiles": [0.5, 1.0]}}},
    "not_measured": {},
    "targets": [],
}

MADE_UP = {"quantize": QUANTIZE, "decode": DECODE, "host": HOST, "moe": MOE, "guard": GUARD}


def printed_lines(capsys: pytest.CaptureFixture[str]) -> list[list[str]]:
    return [line.split() for line in capsys.readouterr().out.splitlines()]


class TestCommand:
    @pytest.fixture
    def measurable(self, monkeypatch, tmp_path):
        """Parts that return made-up results, on a machine where everything runs."""
        monkeypatch.setattr(replay, "refusal", lambda device: None)
        monkeypatch.setattr(__main__, "checked_device", lambda device: torch.device("cpu"))
        calls = []

        def part(name):
            def run(device, quick, progress):
                progress("half of it", 0.5)
                calls.append((name, quick))
                return MADE_UP[name]

            return SimpleNamespace(run=run)

        for name in __main__.PARTS:
            monkeypatch.setitem(sys.modules, f"benchmarks.{name}", part(name))
        monkeypatch.chdir(tmp_path)
        return calls

    @pytest.mark.parametrize(
        ("arguments", "parts"),
        [([], __main__.PARTS), (["all"], __main__.PARTS), (["decode"], ("decode",)), (["host", "--quick"], ("host",))],
    )
    def test_json_has_the_parts_that_ran(self, measurable, arguments, parts, capsys):
        assert main(["bench", *arguments, "--json", "result.json"]) == 0
        result = json.loads(Path("result.json").read_text())
        assert measurable == [(part, "--quick" in arguments) for part in parts]
        assert {name: result[name] for name in __main__.PARTS if name in result} == {
            name: MADE_UP[name] for name in parts
        }
        assert result["command"] == "safealloc bench"
        assert result["device"] == "cpu"
        assert result["quick"] is ("--quick" in arguments)
        assert {"torch", "cuda_runtime", "cuda_driver"} <= result["versions"].keys()

    def test_decode_is_printed(self, measurable, capsys):
        assert main(["bench", "decode"]) == 0
        lines = printed_lines(capsys)
        assert ["1", "200.0", "260.0", "+1.00"] in lines
        assert ["Llama", "3.1", "8B,", "TP", "8", "16", "64", "-"] in lines  # nodes; without cuda.bindings none
        assert ["Llama", "3.1", "8B,", "TP", "8", "16", "2048", "4096", "32"] in lines

    def test_quantize_is_printed(self, measurable, capsys):
        assert main(["bench", "quantize"]) == 0
        lines = printed_lines(capsys)
        assert ["1", "4096", "2.50", "3.75"] in lines
        assert ["1", "8192", "3.75", "-"] in lines
        assert ["empty", "kernel", "2.50", "to", "3.75"] in lines
        assert ["4096", "8192", "128x4", "9.25", "3000", "75%"] in lines
        assert ["1", "2048", "8192", "8x4", "9.25", "3000", "75%"] in lines
        assert ["first:", "times", "1.05", "1.0312", "yes"] in lines
        assert ["second:", "times", "2.2", "-", "NO"] in lines
        assert ["vLLM's", "emulation:", "not", "measured,", "vllm", "is", "not", "installed"] in lines

    def test_guard_is_printed(self, measurable, capsys):
        assert main(["bench", "guard"]) == 0
        lines = printed_lines(capsys)
        assert ["Llama", "3.1", "8B,", "TP", "8", "16", "3", "200.0", "+0.75", "-1.50"] in lines
        assert ["Llama", "3.1", "8B,", "TP", "8", "153", "2", "0.50", "9.25"] in lines
        assert ["pool.acquire,", "no", "SAFEALLOC_VERIFY", "0.75", "0.50", "to", "1.00"] in lines
        assert ["Targets"] not in lines

    def test_moe_is_printed(self, measurable, capsys):
        assert main(["bench", "moe"]) == 0
        out = capsys.readouterr().out
        lines = [line.split() for line in out.splitlines()]
        assert lines.count(["16", "uniform", "2.00", "2.14", "1.07"]) == 2
        assert ["7168", "16", "524288", "8192", "2"] in lines
        assert "Quantization of 8 rows a token, routed to 256 experts, k 7168" in out
        assert "SiLU, mul and quantization" in out

    def test_host_is_printed(self, measurable, capsys):
        assert main(["bench", "host"]) == 0
        lines = printed_lines(capsys)
        assert ["torch.empty", "2.50", "2.40", "to", "2.61"] in lines
        assert ["nvfp4_linear:", "not", "measured,", "triton", "is", "not", "installed"] in lines

    def test_pictures_go_to_a_new_folder(self, measurable, monkeypatch, capsys):
        def draw(result, folder):
            (folder / "decode.png").write_text(result["command"])
            return [folder / "decode.png"]

        monkeypatch.setattr("benchmarks.plots", SimpleNamespace(draw=draw), raising=False)
        monkeypatch.setattr(__main__.optional, "missing", lambda name: None)
        assert main(["bench", "decode", "--plot", "some/folder"]) == 0
        assert Path("some/folder/decode.png").read_text() == "safealloc bench"
        assert ["wrote", "some/folder/decode.png"] in printed_lines(capsys)

    def test_a_picture_that_cannot_be_written_leaves_the_json(self, measurable, monkeypatch, capsys):
        def draw(result, folder):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("benchmarks.plots", SimpleNamespace(draw=draw), raising=False)
        monkeypatch.setattr(__main__.optional, "missing", lambda name: None)
        with pytest.raises(SystemExit) as exit_:
            main(["bench", "decode", "--plot", "folder", "--json", "result.json"])
        assert exit_.value.code == 2
        assert "No space left on device" in capsys.readouterr().err
        assert json.loads(Path("result.json").read_text())["decode"] == DECODE

    @pytest.mark.parametrize(
        ("arguments", "says"),
        [
            (["--json", "no/such/folder/result.json"], "no/such/folder"),
            (["--plot", "pictures"], "pip install safealloc[plot]"),
            (["no-such-part"], "no-such-part"),
            (["--quick=yes"], "--quick"),
        ],
    )
    def test_what_cannot_work_is_said_before_anything_runs(self, measurable, arguments, says, monkeypatch, capsys):
        monkeypatch.setattr(__main__.optional, "missing", lambda name: f"{name} is not installed")
        with pytest.raises(SystemExit) as exit_:
            main(["bench", *arguments])
        assert exit_.value.code == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        assert says in printed.err
        assert printed.err.count("\n") == 1
        assert measurable == []

    def test_a_folder_that_is_a_file_is_said_before_anything_runs(self, measurable, monkeypatch, capsys):
        monkeypatch.setattr(__main__.optional, "missing", lambda name: None)
        Path("file").write_text("")
        for folder in ("file", "file/below"):
            with pytest.raises(SystemExit) as exit_:
                main(["bench", "--plot", folder])
            assert exit_.value.code == 2
            assert "no directory" in capsys.readouterr().err
        assert measurable == []

    def test_without_a_gpu_it_says_what_it_needs(self, monkeypatch, capsys):
        monkeypatch.setattr(__main__, "checked_device", lambda device: torch.device("cpu"))
        for part in ("all", *__main__.PARTS):
            with pytest.raises(SystemExit) as exit_:
                main(["bench", part])
            assert exit_.value.code == 2
            said = capsys.readouterr().err
            assert "needs a CUDA device of compute capability 8.9 or more" in said
            assert said.count("\n") == 1

    def test_progress_is_for_terminals(self, monkeypatch, capsys):
        with __main__.progress() as tell:
            tell("decode", "batch 1", 0.5)
        assert capsys.readouterr().err == ""
        monkeypatch.setattr(__main__, "Console", lambda **options: Console(force_terminal=True, width=120, **options))
        with __main__.progress() as tell:
            tell("decode", "batch 1", 0.5)
        said = capsys.readouterr().err
        assert "decode: batch 1" in said
        assert "50%" in said
        assert "host" not in said

    def test_on_a_terminal_no_cell_is_cut(self, capsys):
        baselines = ("pool", "empty", "zeros", "padding in the kernel", "zeroing the returned buffer", "linear")
        wide = copy.deepcopy(MADE_UP)
        for row in (*wide["quantize"]["few_rows"], *wide["decode"]["models"][0]["batches"]):
            row["baselines"] = {name: {**row["baselines"]["pool"], "us": 1234.567} for name in baselines}
        wide["decode"]["baselines"] = dict.fromkeys(baselines, "")
        result = __main__.Result("cuda:0", "a GPU", "9.0", {"torch": "2"}, False, wide)
        __main__.show(result, Console(force_terminal=True, width=80, markup=False, highlight=False))
        said = capsys.readouterr().out
        assert said.count("returned") == 5  # as often as baselines are columns
        assert "…" not in said

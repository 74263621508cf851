"""``python -m benchmarks``: arguments, JSON, tables and errors, with made-up measurements; no GPU is needed."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from benchmarks import command, tables
from benchmarks.command import main
from benchmarks.memory import memory
from safealloc.commands import report

DECODE = {
    "counts": "producers, quantizations and GEMMs",
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
        | {"counts": {"over_off": {"us": 0.75}}, "checks": {"over_off": {"us": -1.5}}}
        | {
            "nan": {"rounds": 5, "off": {"us": 201.0}}
            | {"a node beside each quantizer": {"over_off": {"us": 12.0}, "ratio_to_off": 1.06}}
        }
    ],
    "nodes": [
        {"model": "Llama 3.1 8B", "tensor_parallel": 8, "sizes": 51, "buffers": 153, "bytes": 2048}
        | {"counts": {"us": 0.5}, "checks": {"us": 9.25}}
    ],
    "host": {"calls": {"pool.acquire, verify_every=0": {"us": 0.75, "quartiles": [0.5, 1.0]}}},
    "not_measured": {},
    "targets": [],
}

MADE_UP = {"quantize": QUANTIZE, "decode": DECODE, "host": HOST, "moe": MOE, "guard": GUARD}


def printed_lines(capsys: pytest.CaptureFixture[str]) -> list[list[str]]:
    return [line.split() for line in capsys.readouterr().out.splitlines()]


def usage_error(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The last line on standard error of a call that ends with code 2 and prints nothing else."""
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    return printed.err.splitlines()[-1]


class TestCommand:
    @pytest.fixture
    def measurable(self, monkeypatch, tmp_path):
        """Parts that return made-up results, on a machine that can measure; the list has the parts that ran."""
        pytest.importorskip("matplotlib", reason="--plot needs it")
        monkeypatch.setattr(command, "checked_device", lambda: torch.device("cpu"))
        calls = []

        def part(name):
            def run(device, quick, progress):
                progress("half of it", 0.5)
                calls.append((name, quick))
                return MADE_UP[name]

            return SimpleNamespace(run=run)

        for name in command.PARTS:
            monkeypatch.setitem(sys.modules, f"benchmarks.{name}", part(name))
        monkeypatch.chdir(tmp_path)
        return calls

    @pytest.mark.parametrize(
        ("arguments", "parts"),
        [([], command.PARTS), (["all"], command.PARTS), (["decode"], ("decode",)), (["host", "--quick"], ("host",))],
    )
    def test_json_has_the_parts_that_ran(self, measurable, arguments, parts, capsys):
        assert main([*arguments, "--json", "result.json"]) == 0
        result = json.loads(Path("result.json").read_text())
        assert measurable == [(part, "--quick" in arguments) for part in parts]
        assert {name: result[name] for name in command.PARTS if name in result} == {
            name: MADE_UP[name] for name in parts
        }
        assert result["command"] == "python -m benchmarks"
        assert result["device"] == "cpu"
        assert result["quick"] is ("--quick" in arguments)
        assert {"torch", "CUDA", "CUDA driver"} <= result["versions"].keys()

    def test_decode_is_printed(self, measurable, capsys):
        assert main(["decode"]) == 0
        lines = printed_lines(capsys)
        assert ["A", "decode", "step", "has", "producers,", "quantizations", "and", "GEMMs."] in lines
        assert ["1", "200.0", "260.0", "+1.00"] in lines
        assert ["Llama", "3.1", "8B,", "TP", "8", "16", "64", "-"] in lines  # nodes; without cuda.bindings none
        assert ["Llama", "3.1", "8B,", "TP", "8", "16", "2048", "4096", "32"] in lines

    def test_quantize_is_printed(self, measurable, capsys):
        assert main(["quantize"]) == 0
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
        assert main(["guard"]) == 0
        lines = printed_lines(capsys)
        assert ["Llama", "3.1", "8B,", "TP", "8", "16", "3", "200.0", "+0.75", "-1.50"] in lines
        assert ["Llama", "3.1", "8B,", "TP", "8", "153", "2", "0.50", "9.25"] in lines
        assert ["pool.acquire,", "verify_every=0", "0.75", "0.50", "to", "1.00"] in lines
        assert ["Targets"] not in lines

    def test_moe_is_printed(self, measurable, capsys):
        assert main(["moe"]) == 0
        out = capsys.readouterr().out
        lines = [line.split() for line in out.splitlines()]
        assert lines.count(["16", "uniform", "2.00", "2.14", "1.07"]) == 2
        assert ["7168", "16", "524288", "8192", "2"] in lines
        assert "\nGrouped quantization, 256 experts, 8 per token, k 7168: microseconds per call" in out
        assert "\nSiLU, mul and grouped quantization, 256 experts, 8 per token, k 2048: microseconds per call" in out

    def test_host_is_printed(self, measurable, capsys):
        assert main(["host"]) == 0
        lines = printed_lines(capsys)
        assert ["torch.empty", "2.50", "2.40", "to", "2.61"] in lines
        assert ["nvfp4_linear:", "not", "measured,", "triton", "is", "not", "installed"] in lines

    def test_pictures_go_to_a_new_folder(self, measurable, monkeypatch, capsys):
        def draw(result, folder):
            (folder / "decode.png").write_text(result["command"])
            return [folder / "decode.png"]

        monkeypatch.setattr("benchmarks.plots", SimpleNamespace(draw=draw), raising=False)
        assert main(["decode", "--plot", "some/folder"]) == 0
        assert Path("some/folder/decode.png").read_text() == "python -m benchmarks"
        assert ["wrote", "some/folder/decode.png"] in printed_lines(capsys)

    def test_json_is_printed_instead_of_tables(self, measurable, monkeypatch, capsys):
        monkeypatch.setattr("benchmarks.plots", SimpleNamespace(draw=lambda result, folder: [folder]), raising=False)
        assert main(["host", "--json", "-", "--plot", "folder"]) == 0
        printed = capsys.readouterr()
        assert json.loads(printed.out)["host"] == HOST
        assert printed.err == "wrote folder\n"

    def test_a_picture_that_cannot_be_written_leaves_the_json(self, measurable, monkeypatch, capsys):
        def draw(result, folder):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("benchmarks.plots", SimpleNamespace(draw=draw), raising=False)
        with pytest.raises(SystemExit) as exit_:
            main(["decode", "--plot", "folder", "--json", "result.json"])
        assert exit_.value.code == 2
        assert "No space left on device" in capsys.readouterr().err
        assert json.loads(Path("result.json").read_text())["decode"] == DECODE

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--json", "no/such/folder/result.json"], "no/such/folder"),
            (["no-such-part"], "no-such-part"),
            (["--quick=yes"], "--quick"),
            (["--plot", "file"], "--plot file: File exists"),
            (["--plot", "file/below"], "--plot file/below: Not a directory"),
        ],
    )
    def test_mistakes_are_reported_before_anything_runs(self, measurable, arguments, message, capsys):
        Path("file").write_text("")
        assert message in usage_error(arguments, capsys)
        assert measurable == []

    def test_pictures_need_matplotlib(self, measurable, monkeypatch, capsys):
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        assert "pip install safealloc[plot]" in usage_error(["--plot", "pictures"], capsys)
        assert measurable == []
        assert not Path("pictures").exists()

    def test_a_setting_without_meaning_is_reported(self, measurable, monkeypatch, capsys):
        monkeypatch.setenv("SAFEALLOC_VERIFY", "often")
        assert "SAFEALLOC_VERIFY" in usage_error(["host"], capsys)
        assert measurable == []

    @pytest.mark.parametrize("part", ["all", *command.PARTS])
    def test_without_a_gpu_it_names_what_it_needs(self, part, monkeypatch, capsys):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert "needs a CUDA device of compute capability 8.9 or more" in usage_error([part], capsys)

    def test_an_old_gpu_is_refused_with_its_compute_capability(self, monkeypatch, capsys):
        pytest.importorskip("triton", reason="without it, that is the reason")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 63)  # capabilities are remembered by device
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
        assert "cuda:63 has 8.0" in usage_error(["host"], capsys)

    def test_progress_counts_all_parts(self, measurable):
        calls = []
        command.run(command.PARTS, torch.device("cpu"), True, lambda what, done: calls.append((what, done)))
        shares = [0.1, 0.3, 0.5, 0.7, 0.9]
        assert [what for what, _ in calls] == [f"{part}: half of it" for part in command.PARTS]
        assert [done for _, done in calls] == pytest.approx(shares)


class TestTables:
    def test_on_a_terminal_no_cell_is_cut(self, capsys):
        baselines = ("pool", "empty", "zeros", "padding in the kernel", "zeroing the returned buffer", "linear")
        wide = copy.deepcopy(MADE_UP)
        for row in (*wide["quantize"]["few_rows"], *wide["decode"]["models"][0]["batches"]):
            row["baselines"] = {name: {**row["baselines"]["pool"], "us": 1234.567} for name in baselines}
        wide["decode"]["baselines"] = dict.fromkeys(baselines, "")
        result = {"device": "cuda:0", "device_name": "a GPU", "versions": {"torch": "2"}, **wide}
        tables.show(result, Console(force_terminal=True, width=80, markup=False, highlight=False))
        printed = capsys.readouterr().out
        assert printed.count("returned") == 5  # as often as baselines are columns
        assert "…" not in printed

    @pytest.mark.parametrize("name", ["bench-h200", "bench-emulation-h200", "bench-moe-h200", "bench-guard-h200"])
    def test_committed_results_can_be_printed(self, name, capsys):
        path = Path(__file__).parents[2] / f"benchmarks/results/{name}.json"
        result = json.loads(path.read_text())
        tables.show(result, report.console())
        printed = capsys.readouterr().out
        assert printed.startswith("cuda:0 (NVIDIA H200), ")
        for part in command.PARTS:
            for target in result.get(part, {}).get("targets", ()):
                assert target["name"] in printed


class TestMemory:
    def test_llama_70b_at_vllms_captured_batch_sizes(self):
        """For k of 8192 and 28672: a buffer per batch size in the pool, and one for the largest batch otherwise."""
        small, large = memory()
        assert (small["sizes"], small["largest"], large["sizes"], large["largest"]) == (51, 512, 83, 1024)
        per_row = (8192 + 28672) // 16
        tiles = sum(-(-size // 128) for size in (1, 2, 4, *range(8, 256, 8), *range(256, 513, 16)))
        assert small["bars"]["pool"] == tiles * 128 * per_row
        assert small["bars"]["allocated and filled at each call"] == 512 * 28672 // 16
        assert large["bars"]["allocated and filled at each call"] == 1024 * 28672 // 16
        assert round(large["bars"]["pool"] / 2**20, 1) == 88.6

"""The models that the benchmarks measure, their timing, and a decode step; no GPU is needed."""

from __future__ import annotations

import ast
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import timing
from benchmarks.models import MODELS, Model, producer, weight_nbytes
from safealloc.commands.plan.architectures import ExpertSite, Site

SHAPES = {
    # model, ranks: (site, k, n, layers), from the published config.json by hand
    ("Llama 3.1 8B", 1): [
        ("self_attn.qkv_proj", 4096, 6144, 32),
        ("self_attn.o_proj", 4096, 4096, 32),
        ("mlp.gate_up_proj", 4096, 28672, 32),
        ("mlp.down_proj", 14336, 4096, 32),
    ],
    ("Llama 3.1 8B", 8): [
        ("self_attn.qkv_proj", 4096, 768, 32),
        ("self_attn.o_proj", 512, 4096, 32),
        ("mlp.gate_up_proj", 4096, 3584, 32),
        ("mlp.down_proj", 1792, 4096, 32),
    ],
    ("Llama 3.3 70B", 1): [
        ("self_attn.qkv_proj", 8192, 10240, 80),
        ("self_attn.o_proj", 8192, 8192, 80),
        ("mlp.gate_up_proj", 8192, 57344, 80),
        ("mlp.down_proj", 28672, 8192, 80),
    ],
    ("Llama 3.3 70B", 8): [
        ("self_attn.qkv_proj", 8192, 1280, 80),
        ("self_attn.o_proj", 1024, 8192, 80),
        ("mlp.gate_up_proj", 8192, 7168, 80),
        ("mlp.down_proj", 3584, 8192, 80),
    ],
    ("Qwen3 32B", 1): [
        ("self_attn.qkv_proj", 5120, 10240, 64),
        ("self_attn.o_proj", 8192, 5120, 64),
        ("mlp.gate_up_proj", 5120, 51200, 64),
        ("mlp.down_proj", 25600, 5120, 64),
    ],
    ("Qwen3 32B", 8): [
        ("self_attn.qkv_proj", 5120, 1280, 64),
        ("self_attn.o_proj", 1024, 5120, 64),
        ("mlp.gate_up_proj", 5120, 6400, 64),
        ("mlp.down_proj", 3200, 5120, 64),
    ],
    ("DeepSeek-R1", 1): [
        ("self_attn.fused_qkv_a_proj", 7168, 2112, 61),
        ("self_attn.q_b_proj", 1536, 24576, 61),
        ("self_attn.o_proj", 16384, 7168, 61),
        ("mlp.gate_up_proj", 7168, 36864, 3),
        ("mlp.down_proj", 18432, 7168, 3),
        ("mlp.shared_experts.gate_up_proj", 7168, 4096, 58),
        ("mlp.shared_experts.down_proj", 2048, 7168, 58),
        ("mlp.experts", 7168, 4096, 58),
    ],
    ("DeepSeek-R1", 8): [
        ("self_attn.fused_qkv_a_proj", 7168, 2112, 61),
        ("self_attn.q_b_proj", 1536, 3072, 61),
        ("self_attn.o_proj", 2048, 7168, 61),
        ("mlp.gate_up_proj", 7168, 4608, 3),
        ("mlp.down_proj", 2304, 7168, 3),
        ("mlp.shared_experts.gate_up_proj", 7168, 512, 58),
        ("mlp.shared_experts.down_proj", 256, 7168, 58),
        ("mlp.experts", 7168, 512, 58),
    ],
}


def name_of(site: Site | ExpertSite) -> str:
    return site.name.rpartition(".")[2]


BY_KEY = {(model.name, model.tensor_parallel): model for model in MODELS}


class TestModels:
    def test_every_model_is_in_the_table(self):
        assert BY_KEY.keys() == SHAPES.keys()

    @pytest.mark.parametrize(("key", "shapes"), SHAPES.items(), ids=[f"{name} {ranks}" for name, ranks in SHAPES])
    def test_sites(self, key, shapes):
        model = BY_KEY[key]
        assert [(site.name, site.k, site.n, len(site.layers)) for site in model.sites] == shapes
        assert len(model.step) == sum(layers for *_, layers in shapes)
        twice = sum(layers for name, *_, layers in shapes if name.endswith("experts"))
        assert model.quantizations == len(model.step) + twice  # before w13 and before w2
        assert [(site.experts, site.topk) for site in model.sites if name_of(site) == "experts"] == [(256, 8)] * bool(
            twice
        )

    def test_a_weights_bytes_are_its_codes_and_its_scales(self):
        assert weight_nbytes(Site("self_attn.qkv_proj", 4096, 768, (0,))) == 768 * 2048 + 768 * 256
        assert weight_nbytes(Site("short", 48, 3, (0,))) == 3 * 24 + 128 * 4  # padding is read too
        whole = BY_KEY["Llama 3.3 70B", 1].weight_nbytes
        assert whole == 80 * 8192 * (10240 + 8192 + 57344 + 28672) * 9 // 16

    def test_a_step_runs_layer_by_layer(self):
        steps = [(site.name, number) for site, number in BY_KEY["DeepSeek-R1", 8].step]
        attention = [f"self_attn.{name}" for name in ("fused_qkv_a_proj", "q_b_proj", "o_proj")]
        assert steps[:5] == [(name, 0) for name in (*attention, "mlp.gate_up_proj", "mlp.down_proj")]
        shared = ["mlp.shared_experts.gate_up_proj", "mlp.shared_experts.down_proj"]
        assert steps[15:21] == [(name, 3) for name in attention] + [(name, 0) for name in (*shared, "mlp.experts")]
        assert steps[-6:] == [(name, 60) for name in attention] + [(name, 57) for name in (*shared, "mlp.experts")]

    def test_what_writes_the_input_of_a_layer(self):
        model = BY_KEY["DeepSeek-R1", 1]
        assert {name_of(site): producer(site) for site in model.linears} == {
            "fused_qkv_a_proj": "RMSNorm",
            "q_b_proj": "RMSNorm",
            "o_proj": "attention",
            "gate_up_proj": "RMSNorm",
            "down_proj": "SiLU and mul",
        }


class Clock:
    """A simulated device: each graph has its own replay time, and its first replay takes longer."""

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
    def test_each_round_replays_every_graph_and_the_first_round_is_discarded(self, monkeypatch):
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

    def test_the_order_changes_with_the_round_and_is_reproducible(self, monkeypatch):
        logs = []
        for seed in (0, 0, 1):
            clock = Clock(monkeypatch)
            graphs = {name: clock.graph(name, 1.0) for name in "abc"}
            timing.interleaved(graphs, rounds=30, replays=1, seed=seed)
            logs.append("".join(clock.log))
        assert {one[0] for one in logs[0].split(".")[:-1]} == {"a", "b", "c"}
        assert logs[0] == logs[1] != logs[2]

    def test_ratios_and_differences_are_taken_within_a_round(self):
        """A device that slows down to a third affects both alike."""
        ours, theirs = [10.0, 20.0, 33.0], [20.0, 40.0, 60.0]
        assert timing.ratio(ours, theirs) == 0.5
        assert timing.differences(ours, theirs) == [-10.0, -20.0, -27.0]
        assert timing.median(ours) == 20.0
        with pytest.raises(ValueError, match="shorter"):
            timing.ratio(ours, theirs[:2])


@pytest.fixture
def decode():
    """``benchmarks.decode``, which imports the kernels."""
    pytest.importorskip("triton", reason="the kernels need triton")
    from benchmarks import decode

    return decode


class TestDecode:
    def test_results_are_relative_to_the_pool(self, decode):
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
            ([100.0, 150.0], 2.0, 60, 20),  # a short step: the maximum of rounds and replays
            ([1000.0, 1500.0], 0.2, 40, 2),  # 40 rounds take 200 ms
            ([1e5, 1e5], 2.0, 10, 1),
            ([1e5, 1e5], 0.2, 5, 1),  # the minimum, however long it takes
        ],
    )
    def test_rounds_and_replays_fill_the_requested_time(self, decode, microseconds, seconds, rounds, replays):
        once = {str(number): [time] for number, time in enumerate(microseconds)}
        assert decode.rounds_of(once, seconds) == (rounds, replays)

    def test_a_graphs_memory_is_that_of_its_own_memory_pool(self, decode):
        segments = [
            {"segment_pool_id": (0, 0), "total_size": 7},
            {"segment_pool_id": [0, 3], "total_size": 2 << 20},
            {"segment_pool_id": (0, 3), "total_size": 1 << 20},
            {"segment_pool_id": (3, 0), "total_size": 11},
        ]
        assert decode.private_nbytes(segments, (0, 3)) == 3 << 20

    def test_layers_share_weights_that_do_not_all_fit(self, decode, monkeypatch):
        sites = (Site("large", 64, 128, (0, 1, 2, 3)), Site("once", 64, 32, (2,)))
        model = Model("small", 1, sites)

        def weights(free):
            monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, free))
            return decode.weights_of(model, torch.device("cpu"))

        made = weights(1 << 30)
        assert [len(made[site]) for site in sites] == [4, 1]
        assert len({weight.fp4.data_ptr() for of_site in made.values() for weight in of_site}) == 5
        for of_site, site in zip(made.values(), sites, strict=True):
            for weight in of_site:
                assert weight.fp4.shape == (site.n, site.k // 2)
                assert weight.scales.shape == (128, 4)
                values = weight.scales.view(torch.float8_e4m3fn).float()
                assert values.min() >= 0.25
                assert values.max() <= 1.875
        few = weights(model.weight_nbytes)
        assert [len(few[site]) for site in sites] == [2, 1]  # 60 % of what is free
        assert [len(weights(1)[site]) for site in sites] == [1, 1]


def test_the_benchmarks_use_no_private_names_of_the_package():
    private = []
    for file in sorted((Path(__file__).parents[2] / "benchmarks").glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("safealloc"):
                names = [*node.module.split("."), *(alias.name for alias in node.names)]
            elif isinstance(node, ast.Attribute) and not (isinstance(node.value, ast.Name) and node.value.id == "self"):
                names = [node.attr] if node.attr != "_C" else []  # vLLM's namespace of ops
            else:
                continue
            private += [(file.name, name) for name in names if name.startswith("_") and not name.startswith("__")]
    assert private == []

"""``python -m benchmarks decode`` on a GPU: properties that do not depend on the times."""

from __future__ import annotations

import statistics

import pytest
import torch

from benchmarks import timing
from benchmarks.models import Model
from safealloc import ScalePool
from safealloc.commands.plan.architectures import ExpertSite, Site
from safealloc.formats.layout import SfLayout
from safealloc.formats.spec import ScaleSpec

pytestmark = pytest.mark.gpu

EXPERTS = ExpertSite("mlp.experts", 256, 192, 16, 2, ("gate_proj", "up_proj", "down_proj"), (1, 2))
MODEL = Model(
    "small",
    1,
    (
        Site("self_attn.qkv_proj", 256, 384, (0, 1, 2)),
        Site("self_attn.o_proj", 512, 256, (0, 1, 2)),
        Site("mlp.gate_up_proj", 256, 256, (0,)),
        Site("mlp.down_proj", 128, 256, (0,)),
        EXPERTS,
    ),
)
BATCHES = (1, 16)
KEYS = {"us", "quartiles", "ratio_to_pool", "over_pool_per_quantization", "nodes", "graph_memory_bytes", "pool_bytes"}


@pytest.fixture(scope="module")
def result():
    pytest.importorskip("triton", reason="the kernels need triton")
    from benchmarks import decode

    told = []
    measured = decode.measure(torch.device("cuda", 0), [MODEL], BATCHES, 0.05, lambda what, done: told.append(done))
    assert told == sorted(told)
    assert (told[0], told[-1]) == (0.0, 1.0)
    return measured


def test_the_result_has_every_baseline_at_every_batch_size(result):
    from benchmarks.baselines import LINEAR, baselines

    with ScalePool("cuda") as pool:
        names = [name for name in baselines(pool) if name != LINEAR]
    assert list(result["baselines"]) == names
    assert 1e11 < result["copy_bytes_per_second"] < 1e14
    (model,) = result["models"]
    assert (model["model"], model["tensor_parallel"], model["quantizations"]) == ("small", 1, 12)
    assert model["distinct_weights"] == 8
    assert tuple(row["batch"] for row in model["batches"]) == BATCHES
    for row in model["batches"]:
        assert 2 <= row["active_experts"] <= min(16, 2 * row["batch"])
        assert list(row["baselines"]) == names
        assert row["gemm_only"]["us"] > 0
        for found in row["baselines"].values():
            assert found.keys() == KEYS
            assert found["us"] > row["gemm_only"]["us"] / 2
            assert found["graph_memory_bytes"] > 0  # the codes


def test_only_the_pool_has_buffers_one_per_k_and_one_per_k_of_experts(result):
    layout = SfLayout.layout_128x4
    for row in result["models"][0]["batches"]:
        held = {name: found["pool_bytes"] for name, found in row["baselines"].items() if found["pool_bytes"]}
        dense = [ScaleSpec(row["batch"], k, layout) for k in (256, 512, 128)]
        rows = row["batch"] * EXPERTS.topk
        grouped = [ScaleSpec.grouped(rows, k, layout, EXPERTS.experts) for k in (EXPERTS.k, EXPERTS.width)]
        assert held == {"pool": sum(spec.nbytes for spec in (*dense, *grouped))}


def test_the_pool_has_as_many_nodes_as_empty_and_zeroing_has_one_more_per_quantization(result):
    pytest.importorskip("cuda.bindings.driver", reason="node counts come from cuda.bindings")
    model = result["models"][0]
    for row in model["batches"]:
        nodes = {name: found["nodes"] for name, found in row["baselines"].items()}
        assert nodes["pool"] == nodes["empty"] >= 2 * model["quantizations"]  # a GEMM may be two kernels
        assert nodes["zeros (stand-in)"] == nodes["pool"] + model["quantizations"]
        assert nodes["zeroing the returned buffer (stand-in)"] == nodes["pool"] + model["quantizations"]


def test_a_longer_graph_takes_longer():
    """In any order, the events are around the graph whose time they give."""
    short, long = (torch.zeros(size, device="cuda") for size in (1 << 20, 1 << 28))
    with ScalePool("cuda") as pool:
        graphs = {
            "short": timing.captured(lambda: short.add_(1), pool),
            "long": timing.captured(lambda: long.add_(1), pool),
        }
        times = timing.interleaved(graphs, rounds=10, replays=3)
        graphs.clear()
    assert [len(samples) for samples in times.values()] == [10, 10]
    assert statistics.median(times["long"]) > 10 * statistics.median(times["short"])

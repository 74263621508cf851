"""``python -m benchmarks guard`` on a GPU, with a small model; the times themselves are not judged."""

from __future__ import annotations

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9),
        reason="needs a CUDA device of compute capability 8.9 or more",
    ),
]


def test_every_step_and_node_is_measured():
    pytest.importorskip("triton", reason="it launches the kernels")
    from benchmarks import guard
    from benchmarks.models import model

    sizes = {"hidden_size": 512, "intermediate_size": 1040, "num_attention_heads": 4, "num_hidden_layers": 2}
    fields = {"architectures": ["LlamaForCausalLM"], **sizes}
    small = model("small", fields, 1)
    told = []
    extent = guard.Extent((small,), (1, 5), (1, 2, 130), seconds=0.01, calls=20)
    result = guard.measure(torch.device("cuda", 0), extent, lambda what, done: told.append(done))
    assert told == sorted(told)
    assert (told[0], told[-1]) == (0.0, 1.0)
    assert [(row["model"], row["batch"]) for row in result["steps"]] == [("small", 1), ("small", 5)]
    for row in result["steps"]:
        assert row["buffers"] == len({site.k for site in small.sites})
        for what in (guard.OFF, guard.COUNTS, guard.CHECKS):
            assert 1 < row[what]["quartiles"][0] <= row[what]["us"] < 10_000
    (node,) = result["nodes"]
    assert node["buffers"] == 3 * len({site.k for site in small.sites})
    for what in (guard.COUNTS, guard.CHECKS):
        assert 0.3 < node[what]["us"] < 1000
    calls = result["host"]["calls"]
    assert len(calls) == 5
    assert all(call["us"] > 0.01 for call in calls.values())

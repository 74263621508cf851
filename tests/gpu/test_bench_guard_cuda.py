"""``safealloc bench guard`` on a GPU, over a small model; nothing is asserted of how long anything takes."""

from __future__ import annotations

import os

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9),
        reason="needs a CUDA device of compute capability 8.9 or more",
    ),
]


def test_every_step_and_node_is_measured(monkeypatch):
    pytest.importorskip("triton", reason="it launches the kernels")
    from benchmarks import guard
    from benchmarks.models import model

    monkeypatch.setenv("SAFEALLOC_VERIFY", "7")
    monkeypatch.setenv("SAFEALLOC_VERIFY_REPAIR", "1")
    fields = {"hidden_size": 512, "intermediate_size": 1040, "num_attention_heads": 4, "num_hidden_layers": 2}
    small = model("small", fields, 1)
    told = []
    extent = guard.Extent((small,), (1, 5), (1, 2, 130), seconds=0.01, calls=20)
    result = guard.measure(torch.device("cuda", 0), extent, lambda what, done: told.append(done))
    assert told == sorted(told)
    assert (told[0], told[-1]) == (0.0, 1.0)
    assert [(row["model"], row["batch"]) for row in result["steps"]] == [("small", 1), ("small", 5)]
    for row in result["steps"]:
        assert row["buffers"] == len({site.k for site in small.sites})
        for what in (guard.OFF, guard.COUNTS, guard.LOOKS):
            assert 1 < row[what]["quartiles"][0] <= row[what]["us"] < 10_000
    (node,) = result["nodes"]
    assert node["buffers"] == 3 * len({site.k for site in small.sites})
    for what in (guard.COUNTS, guard.LOOKS):
        assert 0.3 < node[what]["us"] < 1000
    calls = result["host"]["calls"]
    assert len(calls) == 5
    assert all(call["us"] > 0.01 for call in calls.values())
    assert (os.environ["SAFEALLOC_VERIFY"], os.environ["SAFEALLOC_VERIFY_REPAIR"]) == ("7", "1")

"""``python -m benchmarks moe`` on a GPU, with few shapes; the times themselves are not judged."""

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


def test_every_baseline_is_measured_at_every_shape():
    pytest.importorskip("triton", reason="it launches the kernels")
    from benchmarks import moe, vendor_kernels

    extent = moe.Extent((1, 5), 16, 4, ((528, False), (272, True)), calls=4, rounds=3, replays=1)
    told = []
    result = moe.measure(torch.device("cuda", 0), extent, lambda what, done: told.append(done))
    assert told == sorted(told)
    assert (told[0], told[-1]) == (0.0, 1.0)
    shapes = [(row["k"], row["batch"], row["routing"]) for row in result["rows"]]
    assert shapes == [(k, batch, routing) for k in (528, 272) for batch in (1, 5) for routing in moe.ROUTINGS]
    for row in result["rows"]:
        vendors = {vendor_kernels.VLLM_EXPERTS, vendor_kernels.VLLM_CLEANED} & row["baselines"].keys()
        reason = "vLLM's own, SiLU and mul" if row["silu_and_mul"] else "vLLM's own"
        assert bool(vendors) is not (reason in result["not_measured"])
        assert row["baselines"].keys() - vendors == {
            moe.ALONE,
            moe.VLLM,
            moe.RIGHT_SIZED,
            moe.POOL,
            moe.POOL_VLLM,
            moe.CLEANED,
        }
        for found in row["baselines"].values():
            assert 0.05 < found["quartiles"][0] <= found["us"] <= found["quartiles"][1] < 10_000
        assert row["baselines"][moe.ALONE]["ratio_to_alone"] == 1
    assert len(result["targets"]) == 4
    assert all(target["reached"] is not None for target in result["targets"])

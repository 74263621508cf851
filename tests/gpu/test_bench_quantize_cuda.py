"""``python -m benchmarks quantize`` on a GPU, with few shapes; the times themselves are not judged."""

from __future__ import annotations

import pytest
import torch

pytestmark = pytest.mark.gpu


def test_every_part_is_measured():
    pytest.importorskip("triton", reason="it launches the kernels")
    from benchmarks import arithmetic, quantize

    extent = quantize.Extent((1, 16), (4096,), ((512, 4096),), (1,), ((1280, 1024),), rounds=3, replays=1)
    result = quantize.measure(torch.device("cuda", 0), extent, lambda what, done: None)
    shapes = [(rows, layout) for layout in ("128x4", "8x4") for rows in (1, 16)]
    for part in ("few_rows", "arithmetic"):
        assert [(row["rows"], row["layout"]) for row in result[part]] == shapes
    for row in result["arithmetic"]:
        vendor = "vllm" if row["layout"] == "128x4" else "flashinfer"
        assert list(row["by_arithmetic"]) == ["exact", vendor]
        for name, found in row["by_arithmetic"].items():
            assert {arithmetic.POOL, arithmetic.LINEAR, arithmetic.SILU} <= found.keys()
            assert found[arithmetic.POOL]["ratio_to_pool"] == 1
            for measured in found.values():
                assert 0.05 < measured["quartiles"][0] <= measured["us"] <= measured["quartiles"][1] < 10_000
            if name == "exact":
                assert found[arithmetic.SILU]["ratio_to_exact"] == 1
    (many,) = result["many_rows"]
    assert many["by_arithmetic"].keys() == {"exact", "vllm"}
    assert many["us"] == many["by_arithmetic"]["exact"]["us"]
    of_these = {target["name"] for target in arithmetic.targets(result["arithmetic"], result["many_rows"])}
    assert of_these <= {target["name"] for target in result["targets"]}
    assert all(target["reached"] is not None for target in result["targets"] if target["name"] in of_these)

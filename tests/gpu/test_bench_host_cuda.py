"""``python -m benchmarks quantize`` and ``host`` on a GPU: properties that do not depend on the times."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from safealloc import ScalePool, SfLayout
from safealloc.integrations.vllm import ops

pytestmark = pytest.mark.gpu


@pytest.fixture
def host():
    pytest.importorskip("triton", reason="it launches the kernels")
    from benchmarks import host

    return host


@pytest.fixture(scope="module")
def quantize():
    pytest.importorskip("triton", reason="it launches the kernels")
    from benchmarks import quantize

    return quantize


@pytest.fixture(scope="module")
def result(quantize):
    extent = dataclasses.replace(
        quantize.QUICK,
        rows=(1, 32),
        ks=(1024, 8192),
        large=((2048, 4096),),
        gemm_rows=(1, 48),
        gemm_weights=((1024, 2048),),
        rounds=3,
        replays=1,
    )
    told = []
    measured = quantize.measure(torch.device("cuda", 0), extent, lambda what, done: told.append(done))
    assert told == sorted(told)
    assert (told[0], told[-1]) == (0.0, 1.0)
    return measured


def test_every_baseline_is_measured_at_every_shape(quantize, result):
    from benchmarks import vendor_kernels
    from benchmarks.baselines import baselines

    with ScalePool("cuda") as pool:
        names = list(baselines(pool))
    vendors = (vendor_kernels.VLLM, vendor_kernels.FLASHINFER)
    shapes = [(row["rows"], row["k"], row["layout"]) for row in result["few_rows"]]
    assert shapes == [(rows, k, layout) for layout in ("128x4", "8x4") for k in (1024, 8192) for rows in (1, 32)]
    for row in result["few_rows"]:
        assert [name for name in row["baselines"] if name not in vendors] == names
        for name in vendors if row["layout"] == "128x4" else vendors[1:]:
            assert (name in row["baselines"]) is not (name in result["not_measured"])
        assert {quantize.EMPTY_NODE, quantize.STORE_NODE} <= row["floor"].keys()
        for found in (*row["baselines"].values(), *row["floor"].values()):
            assert 0.05 < found["quartiles"][0] <= found["us"] <= found["quartiles"][1] < 1000
        assert row["baselines"]["pool"]["ratio_to_pool"] == 1
        assert row["baselines"]["zeros (stand-in)"]["ratio_to_pool"] > 1  # one more node


def test_bandwidths_are_plausible_and_relative_to_a_copy(result):
    (many,) = result["many_rows"]
    assert [(row["m"], row["layout"]) for row in result["gemm"]] == [(1, "8x4"), (48, "128x4")]
    for row in (many, *result["gemm"]):
        assert 1e11 < row["copy_bytes_per_second"] < 1e14
        assert 0 < row["share_of_copy"] < 1.5
        share = row["bytes_per_second"] / row["copy_bytes_per_second"]
        assert row["share_of_copy"] == pytest.approx(share, rel=0.5)  # the medians are of different samples
    for row in result["gemm"]:
        assert bool(row["baselines"]) is not ("vLLM's emulation" in result["not_measured"])


def test_the_bare_launch_writes_what_quantize_writes(host):
    rows, k, layout = 8, 4096, SfLayout.layout_128x4
    x = torch.randn(rows, k, dtype=torch.bfloat16, device="cuda")
    global_scale = torch.tensor([448 * 6 / 5.0], device="cuda")
    ours, theirs = (
        (
            torch.zeros(rows, k // 2, dtype=torch.uint8, device="cuda"),
            torch.zeros(layout.padded_shape(rows, k), dtype=torch.uint8, device="cuda"),
        )
        for _ in range(2)
    )
    launch = host.bare_launch(x, global_scale, *ours)
    assert not ours[0].any()  # recorded, not launched
    launch()
    from safealloc.kernels import triton_quantize

    triton_quantize.quantize(x, global_scale, *theirs, layout)
    for one, other in zip(ours, theirs, strict=True):
        assert one.any()
        assert torch.equal(one, other)


def test_every_call_is_measured_and_vllms_state_is_restored(host):
    before, state = ops.allocator, dict(vars(ops.allocator))
    result = host.run(torch.device("cuda", 0), True, lambda what, done: None)
    assert ops.allocator is before
    assert vars(before) == state
    assert result["not_measured"] == {}
    named = {host.EMPTY, host.ZEROS, host.ACQUIRE, host.SIDE_STREAM, host.OP, host.HOOK}
    named |= {host.LAUNCH, host.LAUNCHER, host.QUANTIZE, host.QUANTIZE_DEFAULT, host.LINEAR}
    assert named < result["calls"].keys()
    assert all(0.05 < found["us"] < 1000 for found in result["calls"].values())
    assert all(target["reached"] is not None for target in result["targets"])


def test_an_acquire_is_a_hit_on_either_stream(host):
    """A miss takes another path, with another time."""
    device = torch.device("cuda", 0)
    with ScalePool(device) as pool:
        acquires = [one for one in host.allocations(device, pool) if one.name in (host.ACQUIRE, host.SIDE_STREAM)]
        assert len(acquires) == 2
        host.alternate(acquires, 2, 10, device, lambda what, done: None)
        stats = pool.stats()
        assert (stats.misses, stats.buffers) == (2, 2)
        assert stats.hits == 2 * (20 + 2 * 10) - 2

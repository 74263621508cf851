"""``python -m benchmarks moe``: routings, targets, and its calls in Triton's interpreter; no GPU is needed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.interpreted import printed_lines

from safealloc.formats.layout import SfLayout

pytest.importorskip("triton", reason="the benchmark launches the kernels")
from benchmarks import moe


@given(
    tokens=st.integers(1, 40),
    experts=st.integers(1, 40),
    topk=st.integers(1, 8),
    routing=st.sampled_from(moe.ROUTINGS),
    seed=st.integers(0, 9),
)
def test_each_token_goes_to_different_experts(tokens: int, experts: int, topk: int, routing: str, seed: int) -> None:
    topk = min(topk, experts)
    counts = moe.routed(tokens, experts, topk, routing, torch.Generator().manual_seed(seed))
    assert counts.shape == (experts,)
    assert int(counts.sum()) == tokens * topk
    assert int(counts.max()) <= tokens


def test_skewed_routing_has_larger_groups_than_uniform_routing() -> None:
    largest = [
        int(moe.routed(64, 256, 8, routing, torch.Generator().manual_seed(0)).max())
        for routing in ("uniform", "skewed")
    ]
    assert largest[0] < 16 < 32 < largest[1]


@given(counts=st.lists(st.integers(0, 300), min_size=1, max_size=9))
def test_offsets_are_those_of_vllm(counts: list[int]) -> None:
    expert, scale = moe.offsets(torch.tensor(counts), torch.device("cpu"))
    assert expert.dtype == scale.dtype == torch.int32
    assert expert.tolist() == [sum(counts[:end]) for end in range(len(counts) + 1)]
    rounded = [-(-count // 128) * 128 for count in counts]
    assert scale.tolist() == [sum(rounded[:end]) for end in range(len(counts) + 1)]
    rows = sum(counts)
    if rows:
        assert rounded == [] or sum(rounded) <= moe.right_sized_rows(rows, len(counts))


def test_bytes_of_scales_for_deepseek_r1() -> None:
    held = moe.memory(moe.FULL, 7168)
    assert held[moe.VLLM_SIZE] == 587_202_560
    assert held[moe.POOL] == held[moe.RIGHT_SIZE] == (2048 + 127 * 256) * 448
    assert held["pool's record"] == 4 * 2048
    assert held["batch"] == 256


def row(batch: int, ratio: float) -> dict:
    return {
        "batch": batch,
        "baselines": {moe.POOL: {"ratio_to_alone": ratio}, moe.POOL_VLLM: {"ratio_to_pool": 0.98}},
    }


@pytest.mark.parametrize(
    ("rows", "held", "met"),
    [
        ([row(1, 1.02), row(64, 1.1), row(128, 1.5)], {}, [True, True, True, True]),
        ([row(1, 1.02), row(64, 1.11)], {}, [False, True, True, True]),
        ([row(1, 1.0)], {moe.VLLM_SIZE: 900}, [True, True, False, True]),
        ([row(1, 1.0)], {moe.RIGHT_SIZE: 99}, [True, True, True, False]),
        ([], {}, [False, False, True, True]),
    ],
)
def test_targets_are_met_by_their_worst_shape(rows: list[dict], held: dict, met: list[bool]) -> None:
    memory = {moe.VLLM_SIZE: 1000, moe.RIGHT_SIZE: 100, moe.POOL: 100} | held
    found = moe.targets({"rows": rows, "memory": [memory]})
    assert [target["met"] for target in found] == met
    assert [target["target"] for target in found] == [1.1, 1.0, 10, 1.0]


PROGRAM = """
import torch
from safealloc import ScalePool
from benchmarks import moe

extent = moe.Extent((3,), 5, 2, ((80, False), (48, True)), calls=2, rounds=1)
with ScalePool("cpu") as pool:
    for (k, silu), routing in zip(extent.ks, moe.ROUTINGS):
        pool.reserve(extent.max_rows, k, moe.LAYOUT, experts=extent.experts)
        both = moe.steps(extent, k, silu, 3, routing, pool.device)
        for name, call in moe.baselines(pool, extent.experts, 6, k, extent.topk).items():
            for step in both:
                call(step)
            if name in (moe.POOL, moe.CLEANED):
                for step in both:
                    moe.check(call, pool, step)
        def without_clearing(step):
            scales = pool.acquire_grouped(6, k, extent.experts, moe.LAYOUT)
            return step.quantize(scales), scales
        scales = pool.acquire_grouped(6, k, extent.experts, moe.LAYOUT)
        scales[-1] = 1
        del scales
        try:
            for step in both:
                moe.check(without_clearing, pool, step)
        except RuntimeError as error:
            print(error)
        pool.verify(repair=True)
    print(pool.verify(), "buffers")
"""


def test_baselines_run_and_the_check_detects_dirty_scales() -> None:
    """Each baseline runs. Pool buffers equal the reference; a call that leaves old scales is detected."""
    lines = printed_lines(PROGRAM)
    assert lines[-1].endswith("buffers")
    assert lines[:-1] == [f"6 rows of {k} differ from the reference" for k in (80, 48)]


def test_the_layout_is_that_of_vllms_experts() -> None:
    assert moe.LAYOUT is SfLayout.layout_128x4

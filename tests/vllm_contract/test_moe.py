"""vLLM's two expert quantizers and its NVFP4 mixture of experts on CPU tensors: the same bits, and no stale bytes."""

from __future__ import annotations

import inspect
import logging
from typing import Any

import pytest
import torch
import vllm._custom_ops as ops
from support import vllm_cpu_moe_ops
from support.vllm_cpu_moe_ops import Layer, grouped, offsets_of, quantized, quantizers_fail, scale_bytes
from support.vllm_cpu_ops import (
    FP8,
    activation,
    capturing,
    metadata,
    padding_is_written,
)
from support.vllm_registration import with_source
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from safealloc import PoolClosedError, ScalePool, SfLayout
from safealloc.integrations import vllm as integration
from safealloc.integrations.vllm import plugin, targets
from safealloc.integrations.vllm.serve import allocator

EXPERTS, TOPK, K = 6, 2, 80  # 80 columns are 5 of scales, so that 3 of padding follow
PLAIN, SILU = "scaled_fp4_experts_quant", "silu_and_mul_scaled_fp4_experts_quant"

GROUPINGS = (
    (4, 3, 2, 1, 0, 0),
    (0, 0, 0, 0, 0, 2),  # one token
    (0, 10, 0, 0, 0, 0),
    (140, 0, 0, 3, 1, 0),  # skewed: two tiles of one expert
    (1, 1, 1, 1, 1, 1),
    (24, 24, 24, 24, 24, 24),
    (0, 2, 0, 2, 0, 2),
    (128, 1, 0, 127, 0, 0),
    (2, 0, 0, 0, 0, 0),
)

both = pytest.mark.parametrize("name", [PLAIN, SILU])


@pytest.fixture(autouse=True)
def nothing_recorded() -> None:
    quantized.clear()
    vllm_cpu_moe_ops.stale.clear()


def inputs(name: str, counts: tuple[int, ...], k: int = K, dtype: torch.dtype = torch.bfloat16) -> tuple[Any, ...]:
    """Arguments of one of vLLM's quantizers, for so many rows per expert."""
    x = activation(sum(counts), 2 * k if name == SILU else k, sum(counts[::2])).to(dtype)
    return x, torch.linspace(10, 30, len(counts)), *offsets_of(counts), TOPK


def quantize(name: str, *given: Any) -> tuple[Tensor, Tensor]:
    """Called as vLLM's layers call it."""
    result: tuple[Tensor, Tensor] = getattr(ops, name)(*given)
    return result


def valid(counts: tuple[int, ...], k: int = K) -> Tensor:
    """Offsets of the valid scales of a grouping, flat."""
    expert_offsets, blockscale_offsets = offsets_of(counts)
    return scale_bytes(grouped(sum(counts), expert_offsets, blockscale_offsets)[1], k).flatten()


def others(scales: Tensor, counts: tuple[int, ...], k: int = K) -> Tensor:
    """All bytes of a tensor that are not scales of a grouping."""
    kept = torch.ones(scales.numel(), dtype=torch.bool)
    kept[valid(counts, k)] = False
    return scales.view(torch.uint8).flatten()[kept]


# --- results ----------------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("k", [64, K, 208])
def test_the_bits_of_vllms_for_every_grouping(pool: ScalePool, name: str, dtype: torch.dtype, k: int) -> None:
    """In one buffer, in which each call zeroes the scales of the last one."""
    calls = [(counts, inputs(name, counts, k, dtype)) for counts in (*GROUPINGS, *GROUPINGS[::-1], *GROUPINGS[::2])]
    plain = [quantize(name, *given) for _, given in calls]
    assert set(quantized) == {None}
    quantized.clear()
    integration.register()
    pool.reserve(max(map(sum, GROUPINGS)), k, experts=EXPERTS)
    for (counts, given), (data, scales) in zip(calls, plain, strict=True):
        our_data, our_scales = quantize(name, *given)
        assert torch.equal(our_data, data)
        assert (our_scales.dtype, our_scales.stride()) == (scales.dtype, scales.stride())
        assert our_scales.shape == (SfLayout.layout_128x4.grouped_rows(sum(counts), EXPERTS), scales.shape[1])
        where = valid(counts, k)
        assert torch.equal(our_scales.view(torch.uint8).flatten()[where], scales.view(torch.uint8).flatten()[where])
        assert not others(our_scales, counts, k).any()
        assert pool.verify() == 1
        del our_scales
    assert {spec and spec.experts for spec in quantized} == {EXPERTS}
    assert (pool.misses, pool.stats().live) == (0, 0)


@both
def test_stale_bytes_are_in_vllms_result_and_not_in_ours(pool: ScalePool, name: str, stale: None) -> None:
    for counts in GROUPINGS:
        _, scales = quantize(name, *inputs(name, counts))
        assert (others(scales, counts) & 0x7F == 0x7F).all()  # NaN, since nobody zeroed the memory
    integration.register()
    for counts in GROUPINGS * 2:
        _, scales = quantize(name, *inputs(name, counts))
        assert not others(scales, counts).any()
        assert scales.view(torch.uint8).flatten()[valid(counts)].all()
    assert pool.verify() == pool.stats().buffers


LAYERS = pytest.mark.parametrize(
    ("n", "k", "activation_name"),
    [(64, 64, "silu"), (80, 208, "silu"), (208, 80, "silu_no_mul"), (144, 80, "relu2_no_mul")],
)


def steps() -> list[tuple[Tensor, Tensor]]:
    """Seeds and experts of tokens for several steps: even, one token, all to two experts, few, many to one, few."""
    generator = torch.Generator().manual_seed(5)

    def drawn(tokens: int, weights: list[float]) -> Tensor:
        return torch.multinomial(torch.tensor(weights).expand(tokens, -1), TOPK, generator=generator).int()

    even, skewed = [1.0] * EXPERTS, [100.0, 1, 1, 0, 0, 1]
    some = [drawn(48, even), drawn(1, even), torch.tensor([[3, 5]] * 70).int(), drawn(2, skewed), drawn(150, skewed)]
    return [(torch.tensor(seed), topk_ids) for seed, topk_ids in enumerate([*some, drawn(3, even)])]


@LAYERS
def test_a_moe_layer_gives_the_bits_of_vllms(
    pool: ScalePool, n: int, k: int, activation_name: str, stale: None
) -> None:
    """Also where producers do not write padding; without the plugin the GEMM then reads stale bytes."""
    layer = Layer(EXPERTS, n, k, activation_name)
    calls = [(activation(len(topk_ids), k, int(seed)), topk_ids) for seed, topk_ids in steps()]
    with padding_is_written():
        expected = [layer.run(x, topk_ids) for x, topk_ids in calls]
    assert set(vllm_cpu_moe_ops.stale) == {0}
    assert all(y.isfinite().all() for y in expected)
    vllm_cpu_moe_ops.stale.clear()
    for x, topk_ids in calls:
        y = layer.run(x, topk_ids)
        assert y.isnan().all() == ((n, k) != (64, 64))  # which has padding rows only
    assert min(vllm_cpu_moe_ops.stale) > 0
    vllm_cpu_moe_ops.stale.clear()
    quantized.clear()
    integration.register()
    for _ in range(2):
        for (x, topk_ids), y in zip(calls, expected, strict=True):
            assert torch.equal(layer.run(x, topk_ids), y)
            assert pool.stats().live == 0
            pool.verify()
    assert set(vllm_cpu_moe_ops.stale) == {0}
    assert {(spec.k, spec.experts) for spec in quantized if spec} == {(k, EXPERTS), (n, EXPERTS)}
    assert None not in quantized


@both
def test_rows_of_experts_on_other_ranks(pool: ScalePool, name: str, stale: None) -> None:
    """With expert parallelism some rows belong to no expert here; vLLM's kernel writes them to the first scale row."""
    local = (0, 3, 0, 2, 0, 0)
    x, global_scales, expert_offsets, blockscale_offsets, topk = inputs(name, (3, 3, 3, 3, 3, 3))
    nobody, *_ = offsets_of((0,) * EXPERTS)
    given = x, global_scales, *offsets_of(local), topk
    data, scales = quantize(name, *given)
    integration.register()
    for _ in range(2):
        our_data, our_scales = quantize(name, *given)
        assert torch.equal(our_data, data)
        where = valid(local)
        assert torch.equal(our_scales.view(torch.uint8).flatten()[where], scales.view(torch.uint8).flatten()[where])
        assert not others(our_scales, local).any()
        del our_scales
        quantize(name, x, global_scales, nobody, nobody, topk)  # a step without a row for this rank
        quantize(name, x, global_scales, expert_offsets, blockscale_offsets, topk)


# --- memory -----------------------------------------------------------------------------------------------------------


def test_the_scales_of_a_large_layer_are_smaller_than_vllms(pool: ScalePool) -> None:
    """DeepSeek-R1's first quantizer with a batch of 64."""
    experts, topk, k, tokens = 256, 8, 7168, 64
    counts = (tokens * topk // experts,) * experts
    given = *inputs(PLAIN, counts, k)[:-1], topk
    _, scales = quantize(PLAIN, *given)
    assert scales.shape == (163840 * topk, k // 16)
    assert scales.nbytes == 587_202_560
    integration.register()
    _, ours = quantize(PLAIN, *given)
    assert ours.shape == (SfLayout.layout_128x4.grouped_rows(tokens * topk, experts), k // 16)
    assert ours.nbytes <= (tokens * topk + 127 * experts) * k // 16
    assert scales.nbytes >= 10 * pool.stats().bytes
    assert pool.stats().bytes >= ours.nbytes


# --- which calls are served -------------------------------------------------------------------------------------------


@both
def test_rows_above_the_largest_batch_get_zeroed_scales(pool: ScalePool, plugin: None, name: str, stale: None) -> None:
    """As large as needed; rows are counted as tokens."""
    with capturing(pool, 8):
        for counts, served in (((8, 8, 0, 0, 0, 0), True), ((8, 8, 1, 0, 0, 0), False), (GROUPINGS[3], False)):
            _, scales = quantize(name, *inputs(name, counts))
            assert (quantized.pop() is not None) is served
            assert scales.shape == (SfLayout.layout_128x4.grouped_rows(sum(counts), EXPERTS), 8)
            assert not others(scales, counts).any()
            assert scales.view(torch.uint8).flatten()[valid(counts)].all()
    assert pool.stats().buffers == 1


@both
def test_calls_outside_captures_get_zeroed_scales(pool: ScalePool, plugin: None, name: str, stale: None) -> None:
    allocator.engine = None
    _, scales = quantize(name, *inputs(name, GROUPINGS[0]))
    assert quantized == [None]
    assert scales.shape == (SfLayout.layout_128x4.grouped_rows(10, EXPERTS), 8)
    assert not others(scales, GROUPINGS[0]).any()
    assert pool.stats().buffers == 0


@both
def test_calls_without_rows_are_vllms(pool: ScalePool, plugin: None, name: str) -> None:
    data, scales = quantize(name, *inputs(name, (0,) * EXPERTS))
    assert (data.shape, scales.shape) == ((0, K // 2), (163840 * TOPK, 8))
    assert pool.stats().buffers == 0


@both
@pytest.mark.parametrize(("shape", "message"), [((2, 3, 96), "ndim needs to be"), ((4, 98), "multiple of 16")])
def test_vllm_still_refuses_wrong_shapes_itself(
    pool: ScalePool, plugin: None, log: list[logging.LogRecord], name: str, shape: tuple[int, ...], message: str
) -> None:
    """The pool is not used, and no error of ours comes first."""
    with pytest.raises((AssertionError, RuntimeError), match=message):
        quantize(name, torch.ones(shape).bfloat16(), torch.ones(EXPERTS), *offsets_of((1, 1, 1, 1, 0, 0)), TOPK)
    assert pool.stats().misses == 0
    assert log == []


# --- errors -----------------------------------------------------------------------------------------------------------


@both
def test_a_pool_error_is_logged_once_and_the_scales_are_zeroed(
    pool: ScalePool, plugin: None, name: str, log: list[logging.LogRecord], stale: None
) -> None:
    pool.close()
    for counts in GROUPINGS[:3]:
        _, scales = quantize(name, *inputs(name, counts))
        assert scales.shape == (SfLayout.layout_128x4.grouped_rows(sum(counts), EXPERTS), 8)
        assert not others(scales, counts).any()
    assert set(quantized) == {None}
    (record,) = log
    assert record.levelno == logging.ERROR
    assert "PoolClosedError" in record.getMessage()


@both
def test_strict_raises_pool_errors(pool: ScalePool, plugin: None, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAFEALLOC_STRICT", "1")
    pool.close()
    with pytest.raises(PoolClosedError):
        quantize(name, *inputs(name, GROUPINGS[0]))
    assert quantized == []


@both
def test_bytes_of_a_producer_that_failed_are_zeroed_by_the_next_call(pool: ScalePool, plugin: None, name: str) -> None:
    """The next call has its rows elsewhere."""
    pool.reserve(200, K, experts=EXPERTS)
    quantize(name, *inputs(name, GROUPINGS[0]))
    with quantizers_fail(), pytest.raises(RuntimeError, match="the producer failed"):
        quantize(name, *inputs(name, GROUPINGS[3]))
    assert pool.stats().live == 0
    assert pool.verify() == 1
    _, scales = quantize(name, *inputs(name, GROUPINGS[6]))
    assert not others(scales, GROUPINGS[6]).any()
    assert pool.verify() == pool.stats().buffers == 1


# --- traced code ------------------------------------------------------------------------------------------------------


@both
def test_results_on_fake_tensors_are_vllms(pool: ScalePool, name: str) -> None:
    def fake() -> list[tuple[Any, ...]]:
        with FakeTensorMode() as mode:
            *given, topk = inputs(name, GROUPINGS[0])
            return list(map(metadata, quantize(name, *map(mode.from_tensor, given), topk)))

    plain = fake()
    assert plain[1][:2] == ((163840 * TOPK, 8), FP8)
    integration.register()
    assert fake() == plain
    assert pool.stats().misses == 0


@both
def test_a_compiled_quantizer_is_vllms(pool: ScalePool, name: str) -> None:
    """MoE layers of vLLM are opaque to the compiler, so only a direct call is compiled."""
    given = inputs(name, GROUPINGS[0])
    data, scales = quantize(name, *given)
    integration.register()
    torch._dynamo.reset()
    compiled = torch.compile(lambda *given: getattr(ops, name)(*given), backend="eager", fullgraph=True)
    our_data, our_scales = compiled(*given)
    assert torch.equal(our_data, data)
    where = valid(GROUPINGS[0])
    assert torch.equal(our_scales.view(torch.uint8).flatten()[where], scales.view(torch.uint8).flatten()[where])
    assert our_scales.shape == scales.shape
    assert pool.stats().misses == 0


# --- what is replaced -------------------------------------------------------------------------------------------------


@both
def test_unregistering_restores_the_quantizers(pool: ScalePool, name: str) -> None:
    before = getattr(ops, name)
    signature = inspect.signature(before)
    integration.register()
    hooked = getattr(ops, name)
    assert hooked is not before
    assert (hooked.__name__, hooked.__module__) == (name, "safealloc.integrations.vllm.hooks")
    found = inspect.signature(hooked)
    assert [(p.name, p.default) for p in found.parameters.values()] == [
        (p.name, p.default) for p in signature.parameters.values()
    ]
    integration.unregister()
    assert getattr(ops, name) is before
    _, scales = hooked(*inputs(name, GROUPINGS[0]))  # somebody may still hold it
    assert scales.shape == (163840 * TOPK, 8)
    assert pool.stats().buffers == 0


CHANGES = {
    "another parameter": (
        "blockscale_offsets: torch.Tensor,\n    topk: int,",
        "offsets: torch.Tensor,\n    topk: int,",
    ),
    "another body": ("padded_k = (scales_k + (4 - 1)) // 4", "padded_k = (scales_k + (8 - 1)) // 8 * 2"),
    "another op": (f"torch.ops._C.{PLAIN}(", f"torch.ops._C.{PLAIN}_v2("),
}


@pytest.mark.parametrize("change", list(CHANGES))
def test_a_quantizer_that_vllm_has_changed_is_not_hooked(
    pool: ScalePool, monkeypatch: pytest.MonkeyPatch, log: list[logging.LogRecord], change: str
) -> None:
    before = {name: getattr(ops, name) for name in (PLAIN, SILU)}
    with_source(monkeypatch, targets.EXPERTS.module, *CHANGES[change])
    integration.register()
    hooked = plugin.registered()
    assert hooked is not None
    changed = {PLAIN} if change == "another op" else {PLAIN, SILU}
    for name, original in before.items():
        assert (getattr(ops, name) is original) == (name in changed) == (name not in hooked)
    (warning,) = [record for record in log if record.levelno >= logging.WARNING]
    assert f"{PLAIN} (its " in warning.getMessage()
    quantize(PLAIN, *inputs(PLAIN, GROUPINGS[0]))
    assert quantized == [None]

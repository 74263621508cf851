"""vLLM's two MXFP4 expert quantizers and its MXFP4 mixture of experts on CPU tensors: the same bits, and no stale bytes."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import vllm._custom_ops as ops
from support import vllm_cpu_moe_ops
from support.vllm_cpu_moe_ops import Layer, grouped, offsets_of, quantized, quantizers_fail, scale_bytes
from support.vllm_cpu_ops import activation, capturing, metadata, padding_is_written
from support.vllm_registration import with_source
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from safealloc import PoolClosedError, ScaleFormat, ScalePool, ScaleSpec, SfLayout
from safealloc.integrations import vllm as integration
from safealloc.integrations.startup import Steps
from safealloc.integrations.vllm import plugin, quantization, targets
from safealloc.integrations.vllm.engine import Engine
from safealloc.integrations.vllm.serve import allocator

EXPERTS, TOPK, K = 6, 2, 96  # 96 columns are 3 of scales, so that 1 of padding follows
PLAIN, SILU = "mxfp4_experts_quant", "silu_and_mul_mxfp4_experts_quant"
ROUTINGS = ((140, 0, 0, 3, 1, 0), (0, 2, 0, 2, 0, 2), (0, 0, 0, 0, 0, 2), (24, 24, 24, 24, 24, 24))

both = pytest.mark.parametrize("name", [PLAIN, SILU])


@pytest.fixture(autouse=True)
def nothing_recorded() -> Iterator[None]:
    quantized.clear()
    vllm_cpu_moe_ops.stale.clear()
    yield
    torch._dynamo.reset()


def inputs(name: str, counts: tuple[int, ...], k: int = K) -> tuple[Any, ...]:
    """Arguments of one of vLLM's quantizers, for so many rows per expert."""
    x = activation(sum(counts), 2 * k if name == SILU else k, sum(counts[::2]))
    return x, *offsets_of(counts), len(counts), TOPK


def quantize(name: str, *given: Any) -> tuple[Tensor, Tensor]:
    """Called as vLLM's layers call it."""
    result: tuple[Tensor, Tensor] = getattr(ops, name)(*given)
    return result


def split(scales: Tensor, counts: tuple[int, ...], k: int = K) -> tuple[Tensor, Tensor]:
    """The valid scales of a grouping, and all other bytes, flat."""
    where = scale_bytes(grouped(sum(counts), *offsets_of(counts))[1], k, 32).flatten()
    others = torch.ones(scales.numel(), dtype=torch.bool)
    others[where] = False
    return scales.flatten()[where], scales.flatten()[others]


def rows_for(counts: tuple[int, ...]) -> int:
    return SfLayout.layout_128x4.grouped_rows(sum(counts), EXPERTS)


# --- results ----------------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("k", [K, 2880])  # gpt-oss: 90 columns of scales in 92
def test_the_bits_of_vllms_and_no_stale_bytes(pool: ScalePool, stale: None, name: str, k: int) -> None:
    """In one buffer, in which each call zeroes the scales of the last one."""
    routings = (*ROUTINGS, *ROUTINGS[::-1]) if k == K else ROUTINGS[:3]
    calls = [(counts, inputs(name, counts, k)) for counts in routings]
    plain = []
    for counts, given in calls:
        data, scales = quantize(name, *given)
        valid, others = split(scales, counts, k)
        assert (others >= 0x7F).all()  # nobody zeroed the memory
        plain.append((data, scales, valid))
    quantized.clear()
    integration.register()
    pool.reserve(144, k, experts=EXPERTS, format=ScaleFormat.mxfp4)
    for (counts, given), (data, scales, valid) in zip(calls, plain, strict=True):
        our_data, our_scales = quantize(name, *given)
        assert torch.equal(our_data, data)
        assert (our_scales.dtype, our_scales.stride()) == (torch.uint8, scales.stride())
        assert our_scales.shape == (rows_for(counts), scales.shape[1])
        our_valid, others = split(our_scales, counts, k)
        assert torch.equal(our_valid, valid)
        assert not others.any()
        assert pool.verify() == 1
        del our_scales
    assert set(quantized) == {ScaleSpec.grouped(144, k, SfLayout.layout_128x4, EXPERTS, ScaleFormat.mxfp4)}
    assert (pool.misses, pool.stats().live) == (0, 0)


@pytest.mark.parametrize(("n", "k", "act"), [(128, 128, "silu"), (96, 160, "silu"), (160, 96, "silu_no_mul")])
def test_a_moe_layer_gives_the_bits_of_vllms(pool: ScalePool, stale: None, n: int, k: int, act: str) -> None:
    """Also where producers do not write padding; without the plugin the GEMM then reads stale bytes."""
    layer = Layer(EXPERTS, n, k, act, ScaleFormat.mxfp4)
    ids = torch.tensor([[0, 1]] * 140), torch.tensor([[2, 5]]), torch.tensor([[1, 3], [4, 3], [0, 5]])
    calls = [(activation(len(topk_ids), k, len(topk_ids)), topk_ids.int()) for topk_ids in ids]
    with padding_is_written():
        expected = [layer.run(x, topk_ids) for x, topk_ids in calls]
    assert set(vllm_cpu_moe_ops.stale) == {0}
    assert all(y.isfinite().all() for y in expected)
    vllm_cpu_moe_ops.stale.clear()
    for x, topk_ids in calls:
        layer.run(x, topk_ids)
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
    assert {spec and (spec.k, spec.format) for spec in quantized} == {(k, ScaleFormat.mxfp4), (n, ScaleFormat.mxfp4)}


@both
def test_rows_of_experts_on_other_ranks(pool: ScalePool, plugin: None, name: str, stale: None) -> None:
    """With expert parallelism some rows belong to no expert here; vLLM's kernel writes them to the first scale row."""
    local = (0, 3, 0, 2, 0, 0)
    x, *_ = inputs(name, (3, 3, 3, 3, 3, 3))
    for _ in range(2):
        _, scales = quantize(name, x, *offsets_of(local), EXPERTS, TOPK)
        assert not split(scales, local)[1].any()
        del scales
        quantize(name, *inputs(name, ROUTINGS[3]))


# --- memory, and which calls are served -------------------------------------------------------------------------------


def test_the_scales_of_gpt_oss_are_smaller_than_vllms(pool: ScalePool) -> None:
    """gpt-oss-120b's first quantizer with a batch of 64: 128 experts, 4 per token."""
    counts = (2,) * 128
    given = *inputs(PLAIN, counts, 2880)[:-1], 4
    _, scales = quantize(PLAIN, *given)
    assert (scales.shape, scales.nbytes) == ((163840 * 4, 92), 60_293_120)
    integration.register()
    _, ours = quantize(PLAIN, *given)
    assert ours.shape == (SfLayout.layout_128x4.grouped_rows(256, 128), 92)
    assert ours.nbytes <= pool.stats().bytes <= scales.nbytes / 30


@both
def test_an_engine_reserves_what_its_profile_run_asks_for(plugin: None, name: str, stale: None) -> None:
    """Beside an NVFP4 quantizer of the same k and experts, whose buffer is another."""
    engine = Engine(Steps({8: 1}), torch.device("cpu"))
    with allocator.working(engine):
        quantize(name, *inputs(name, ROUTINGS[1]))
        ops.scaled_fp4_experts_quant(activation(4, K), torch.ones(6), *offsets_of((4, 0, 0, 0, 0, 0)), TOPK)
    engine.reserve()
    assert engine.pool is not None
    expected = {ScaleSpec.grouped(16, K, SfLayout.layout_128x4, EXPERTS, format) for format in list(ScaleFormat)[::2]}
    quantized.clear()
    with allocator.working(engine):
        for counts, served in (((8, 8, 0, 0, 0, 0), True), (ROUTINGS[1], True), ((8, 8, 1, 0, 0, 0), False)):
            _, scales = quantize(name, *inputs(name, counts))
            assert (quantized[-1] is not None) is served
            assert scales.shape == (rows_for(counts), 4)
            valid, others = split(scales, counts)
            assert valid.all()
            assert not others.any()
            del scales
        ops.scaled_fp4_experts_quant(activation(4, K), torch.ones(6), *offsets_of((4, 0, 0, 0, 0, 0)), TOPK)
    assert {spec for spec in quantized if spec} == expected
    assert (engine.pool.stats().buffers, engine.pool.misses) == (2, 0)
    engine.close()


@both
def test_calls_outside_captures_get_zeroed_scales(pool: ScalePool, plugin: None, name: str, stale: None) -> None:
    allocator.engine = None
    _, scales = quantize(name, *inputs(name, ROUTINGS[0]))
    assert quantized == [None]
    assert scales.shape == (rows_for(ROUTINGS[0]), 4)
    assert not split(scales, ROUTINGS[0])[1].any()
    assert pool.stats().buffers == 0


@both
def test_our_own_nvfp4_kernels_leave_the_cleaning_to_the_pool(
    pool: ScalePool, plugin: None, name: str, stale: None
) -> None:
    with capturing(pool) as engine:
        engine.op_cleans = True  # that of NVFP4 experts, whose op is replaced
        for counts in ROUTINGS:
            _, scales = quantize(name, *inputs(name, counts))
            assert not split(scales, counts)[1].any()
            del scales


@both
def test_what_vllm_refuses_it_refuses_itself(
    pool: ScalePool, plugin: None, name: str, log: list[logging.LogRecord]
) -> None:
    offsets = offsets_of((1, 1, 1, 1, 0, 0))
    with pytest.raises(AssertionError):
        quantize(name, torch.ones(2, 3, 96).bfloat16(), *offsets, EXPERTS, TOPK)
    with pytest.raises(RuntimeError, match="multiple of 32"):
        quantize(name, torch.ones(4, 96 if name == SILU else 80).bfloat16(), *offsets, EXPERTS, TOPK)
    with pytest.raises(AssertionError):
        quantize(name, torch.ones(4, 128).bfloat16(), *offsets, EXPERTS + 1, TOPK)
    data, scales = quantize(name, *inputs(name, (0,) * EXPERTS))
    assert (data.shape, scales.shape) == ((0, K // 2), (163840 * TOPK, 4))
    assert (pool.stats().misses, log) == (0, [])


# --- errors -----------------------------------------------------------------------------------------------------------


@both
def test_a_pool_error_is_logged_or_raised(
    pool: ScalePool, plugin: None, name: str, log: list[logging.LogRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    pool.close()
    for counts in ROUTINGS[:2]:
        _, scales = quantize(name, *inputs(name, counts))
        assert not split(scales, counts)[1].any()
    (record,) = log
    assert "PoolClosedError" in record.getMessage()
    monkeypatch.setenv("SAFEALLOC_STRICT", "1")
    with pytest.raises(PoolClosedError):
        quantize(name, *inputs(name, ROUTINGS[0]))


@both
def test_bytes_of_a_producer_that_failed_are_zeroed_by_the_next_call(pool: ScalePool, plugin: None, name: str) -> None:
    pool.reserve(200, K, experts=EXPERTS, format=ScaleFormat.mxfp4)
    with quantizers_fail(), pytest.raises(RuntimeError, match="the producer failed"):
        quantize(name, *inputs(name, ROUTINGS[0]))
    _, scales = quantize(name, *inputs(name, ROUTINGS[1]))
    assert not split(scales, ROUTINGS[1])[1].any()
    assert pool.verify() == pool.stats().buffers == 1


# --- traced code, and what is replaced --------------------------------------------------------------------------------


@both
def test_traced_code_is_vllms(pool: ScalePool, name: str) -> None:
    """MoE layers of vLLM are opaque to the compiler, so only a direct call is compiled."""
    given = inputs(name, ROUTINGS[1])

    def fake() -> list[tuple[Any, ...]]:
        with FakeTensorMode() as mode:
            *tensors, experts, topk = given
            return list(map(metadata, quantize(name, *map(mode.from_tensor, tensors), experts, topk)))

    plain, (data, scales) = fake(), quantize(name, *given)
    integration.register()
    assert fake() == plain
    compiled = torch.compile(lambda *given: getattr(ops, name)(*given), backend="eager", fullgraph=True)
    our_data, our_scales = compiled(*given)
    assert torch.equal(our_data, data)
    assert torch.equal(split(our_scales, ROUTINGS[1])[0], split(scales, ROUTINGS[1])[0])
    assert our_scales.shape == scales.shape
    assert pool.stats().misses == 0


@both
def test_unregistering_restores_the_quantizers(pool: ScalePool, name: str) -> None:
    before = getattr(ops, name)
    integration.register()
    hooked = getattr(ops, name)
    assert (hooked.__name__, hooked.__module__) == (name, "safealloc.integrations.vllm.hooks")
    assert list(inspect.signature(hooked).parameters) == list(inspect.signature(before).parameters)
    integration.unregister()
    assert getattr(ops, name) is before
    assert hooked(*inputs(name, ROUTINGS[0]))[1].shape == (163840 * TOPK, 4)  # somebody may still hold it
    assert pool.stats().buffers == 0


def test_a_quantizer_that_vllm_has_changed_is_not_hooked(
    pool: ScalePool, monkeypatch: pytest.MonkeyPatch, log: list[logging.LogRecord]
) -> None:
    before = {name: getattr(ops, name) for name in (PLAIN, SILU)}
    with_source(monkeypatch, targets.MX_EXPERTS.module, f"torch.ops._C.{PLAIN}(", f"torch.ops._C.{PLAIN}_v2(")
    integration.register()
    hooked = plugin.registered()
    assert hooked is not None
    assert (PLAIN in hooked, SILU in hooked) == (False, True)
    assert [getattr(ops, name) is original for name, original in before.items()] == [True, False]
    (warning,) = [record for record in log if record.levelno >= logging.WARNING]
    assert f"{PLAIN} (its " in warning.getMessage()


@pytest.mark.parametrize("method", ["mxfp4", "gpt_oss_mxfp4", "inc", "compressed-tensors", "online"])
def test_the_plugin_is_there_for_models_with_such_experts(method: str) -> None:
    """The quantization methods of vLLM that reach the two functions."""
    written = {"config_groups": {"group_0": {"weights": {"num_bits": 4, "type": "float", "group_size": 32}}}}
    model = SimpleNamespace(quantization=method, hf_config=SimpleNamespace(quantization_config=written))
    assert quantization.may_have_fp4(SimpleNamespace(model_config=model))

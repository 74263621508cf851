"""Which calls the pool serves, which vLLM does, and what a pool error leads to."""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import vllm._custom_ops as ops
import vllm.model_executor.model_loader.utils as loader_utils
from support.vllm_cpu_ops import (
    CPU,
    FP8,
    GLOBAL_SCALE,
    activation,
    engine_config,
    in_forward_context,
    padding_is_written,
)
from support.vllm_cpu_ops import vllm_quantize as quantize
from torch import Tensor, nn
from vllm.forward_context import override_forward_context
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

from safealloc import PoolClosedError, ScalePool, use_pool
from safealloc.integrations import vllm as integration
from safealloc.integrations.vllm.serve import allocator

K = 80


def served(pool: ScalePool, rows: int = 5, k: int = K) -> bool:
    """Whether the allocations of a step come from the pool: all do, or none."""
    producers: list[Callable[[], Tensor]] = [
        lambda: ops.create_fp4_scale_tensor(rows, k, CPU, True),
        lambda: ops.create_fp4_output_tensors(rows, k, CPU, True, padded_n=k + 16)[1],
        lambda: quantize(activation(rows, k))[1],
        lambda: ops.flashinfer_quant_nvfp4_8x4_sf_layout(activation(rows, k), GLOBAL_SCALE)[1],
        lambda: torch.ops.safealloc.vllm_scales(rows, k, CPU, None),
        lambda: torch.ops.safealloc.vllm_quantize_8x4(activation(rows, k), GLOBAL_SCALE)[1],
    ]
    answers = {pool.spec(producer()) is not None for producer in producers}
    assert len(answers) == 1
    return answers.pop()


def test_rows_above_the_largest_batch_are_vllms(pool: ScalePool, plugin: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert served(pool, 4096)  # before an engine starts there is no limit
    allocator.begin(engine_config((1, 2, 4, 8), max_num_seqs=6), CPU)
    with in_forward_context():
        assert served(pool, 8)
        assert not served(pool, 9)
    allocator.begin(engine_config((), max_num_seqs=6, mode=0), CPU)
    with in_forward_context():
        assert served(pool, 6)
        assert not served(pool, 7)


def test_safealloc_max_rows_sets_the_limit(pool: ScalePool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before an engine starts and after; a value that is not a number is ignored."""
    monkeypatch.setenv("SAFEALLOC_MAX_ROWS", "4")
    allocator.reset()
    integration.register()
    assert served(pool, 4)
    assert not served(pool, 5)
    allocator.begin(engine_config((1, 2, 4, 8)), CPU)
    with in_forward_context():
        assert served(pool, 4)
        assert not served(pool, 5)
    monkeypatch.setenv("SAFEALLOC_MAX_ROWS", "many")
    allocator.begin(engine_config((1, 2, 4, 8)), CPU)
    with in_forward_context():
        assert served(pool, 8)


def test_calls_outside_a_step_are_vllms_once_an_engine_has_started(pool: ScalePool, plugin: None) -> None:
    """For example weights that are loaded again while the engine serves."""
    assert served(pool)
    allocator.begin(engine_config(), CPU)
    assert not served(pool)
    with in_forward_context():
        assert served(pool)
        with override_forward_context(None):
            assert not served(pool)
    assert not served(pool)


MODEL_CONFIG = SimpleNamespace(quantization=None, word_embeddings_untied_by_checkpoint=False)


class QuantizesAtLoad(QuantizeMethodBase):
    """Like vLLM's online quantization: the scales live as long as the model."""

    def __init__(self, swizzled: bool) -> None:
        self.swizzled = swizzled

    def create_weights(self, layer: nn.Module, *given: Any, **named: Any) -> None: ...

    def apply(self, layer: nn.Module, *given: Any, **named: Any) -> Tensor:
        raise NotImplementedError

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        _, scales = quantize(layer.weight.data, is_sf_swizzled_layout=self.swizzled)
        layer.weight_scale = nn.Parameter(scales, requires_grad=False)


@pytest.mark.parametrize("swizzled", [True, False])
def test_weights_at_load_time_are_vllms(pool: ScalePool, plugin: None, swizzled: bool) -> None:
    layer = nn.Linear(K, 16, bias=False, dtype=torch.bfloat16)
    layer.quant_method = QuantizesAtLoad(swizzled)
    loader_utils.process_weights_after_loading(nn.Sequential(layer), MODEL_CONFIG, CPU)
    assert layer.weight_scale.dtype == FP8
    assert pool.spec(layer.weight_scale.data) is None
    assert pool.stats().misses == 0
    assert served(pool)  # the load is over


def test_a_load_that_fails_ends_too(pool: ScalePool, plugin: None) -> None:
    layer = nn.Linear(K, 16, bias=False)  # float32, which vLLM refuses
    layer.quant_method = QuantizesAtLoad(True)
    with pytest.raises(AssertionError, match="fp16 or bf16"):
        loader_utils.process_weights_after_loading(nn.Sequential(layer), MODEL_CONFIG, CPU)
    assert served(pool)


# --- errors -----------------------------------------------------------------------------------------------------------


def test_a_pool_error_is_logged_once_and_vllm_allocates(
    pool: ScalePool, plugin: None, log: list[logging.LogRecord]
) -> None:
    pool.close()
    x = activation(5, K)
    with padding_is_written():
        first, again = quantize(x), quantize(x)
    assert torch.equal(first[1].view(torch.uint8), again[1].view(torch.uint8))
    assert first[1].shape == (128, 8)
    data, scales = ops.flashinfer_quant_nvfp4_8x4_sf_layout(x, GLOBAL_SCALE)
    assert torch.equal(data, first[0])
    assert scales.shape == (8, 8)
    (record,) = log
    assert record.levelno == logging.ERROR
    assert "PoolClosedError" in record.getMessage()


def test_strict_raises_pool_errors(pool: ScalePool, plugin: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAFEALLOC_STRICT", "1")
    pool.close()
    with pytest.raises(PoolClosedError):
        quantize(activation(5, K))
    with pytest.raises(PoolClosedError):
        ops.flashinfer_quant_nvfp4_8x4_sf_layout(activation(5, K), GLOBAL_SCALE)


def test_a_full_pool_is_a_pool_error(plugin: None, log: list[logging.LogRecord]) -> None:
    with ScalePool("cpu", max_bytes=1024) as small, use_pool(small):
        _, fits = quantize(activation(5, 64))
        _, second = quantize(activation(5, 64))
        _, third = quantize(activation(5, 64))
        assert [small.spec(scales) is not None for scales in (fits, second, third)] == [True, True, False]
    assert [record.levelno for record in log] == [logging.ERROR]
    assert "PoolExhaustedError" in log[0].getMessage()

"""Which calls the pool serves, which vLLM does, and what a pool error leads to."""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import vllm._custom_ops as ops
from support.vllm_cpu_ops import (
    CPU,
    GLOBAL_SCALE,
    activation,
    padding_is_written,
)
from support.vllm_cpu_ops import vllm_quantize as quantize
from torch import Tensor, nn
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

from safealloc import PoolClosedError, ScalePool, use_pool

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

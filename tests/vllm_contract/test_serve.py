"""Which calls the pool serves, which vLLM does, and what a pool error leads to."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch
import vllm._custom_ops as ops
from support.vllm_cpu_ops import (
    CPU,
    GLOBAL_SCALE,
    activation,
    capturing,
    padding_is_written,
)
from support.vllm_cpu_ops import vllm_quantize as quantize
from torch import Tensor

from safealloc import PoolClosedError, ScalePool
from safealloc.integrations.vllm.serve import allocator

K = 80


def served(pool: ScalePool, rows: int = 5, k: int = K) -> bool:
    """Whether the allocations of a step come from the pool: all do, or none."""
    producers: list[Callable[[], Tensor]] = [
        lambda: ops.create_fp4_scale_tensor(rows, k, CPU, True),
        lambda: ops.create_fp4_output_tensors(rows, k, CPU, True, padded_n=k + 16)[1],
        lambda: quantize(activation(rows, k))[1],
        lambda: torch.ops.safealloc.vllm_scales(rows, k, CPU, None),
        lambda: torch.ops.safealloc.vllm_fused_scales(rows, k, CPU, None),
    ]
    answers = {pool.spec(producer()) is not None for producer in producers}
    assert len(answers) == 1
    return answers.pop()


def test_only_calls_of_captured_sizes_are_served(pool: ScalePool, plugin: None) -> None:
    with capturing(pool, 8):
        assert served(pool, 8)
        assert not served(pool, 9)
    allocator.engine = None
    assert not served(pool, 8)
    assert pool.stats().bytes > 0


def test_8x4_scales_are_flashinfers(pool: ScalePool, plugin: None) -> None:
    assert pool.spec(ops.flashinfer_quant_nvfp4_8x4_sf_layout(activation(5, K), GLOBAL_SCALE)[1]) is None


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


def test_a_full_pool_is_a_pool_error(plugin: None, log: list[logging.LogRecord]) -> None:
    with ScalePool("cpu", max_bytes=1024) as small, capturing(small):
        _, fits = quantize(activation(5, 64))
        _, second = quantize(activation(5, 64))
        _, third = quantize(activation(5, 64))
        assert [small.spec(scales) is not None for scales in (fits, second, third)] == [True, True, False]
    assert [record.levelno for record in log] == [logging.ERROR]
    assert "PoolExhaustedError" in log[0].getMessage()

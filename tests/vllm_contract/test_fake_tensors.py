"""The plugin's ops on fake tensors, and in processes that are not hooked."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import vllm._custom_ops as ops
from support.vllm_cpu_ops import CPU, GLOBAL_SCALE, activation, metadata
from torch._subclasses.fake_tensor import FakeTensorMode

from safealloc import ScalePool
from safealloc.integrations import vllm as integration

K = 80


def test_fake_quantization_is_as_vllms_and_does_not_use_the_pool(pool: ScalePool) -> None:
    def fake() -> list[tuple[Any, ...]]:
        with FakeTensorMode() as mode:
            x = mode.from_tensor(activation(5, K))
            swizzled = torch.ops._C.scaled_fp4_quant(x, mode.from_tensor(GLOBAL_SCALE), True)
            linear = torch.ops._C.scaled_fp4_quant(x, mode.from_tensor(GLOBAL_SCALE), False)
            whole = ops.scaled_fp4_quant(x, mode.from_tensor(GLOBAL_SCALE), padded_n=96)
            few = ops.scaled_fp4_quant(x, mode.from_tensor(GLOBAL_SCALE), backend="flashinfer-trtllm")
        return [metadata(tensor) for tensor in (*swizzled, *linear, *whole, *few)]

    plain = fake()
    integration.register()
    assert fake() == plain
    assert pool.stats().misses == 0


@pytest.mark.parametrize("op", ["vllm_scales", "vllm_fused_scales", "vllm_zero_scales"])
def test_ops_and_their_fakes_agree(pool: ScalePool, plugin: None, op: str) -> None:
    function = getattr(torch.ops.safealloc, op)
    for rows in (1, 5, 130):
        for padded_n in (None, K, 96, 192):
            arguments = (rows, K, CPU, padded_n)
            real = function(*arguments)
            with FakeTensorMode():
                fake = function(*arguments)
            assert metadata(fake) == metadata(real)
            torch.library.opcheck(function.default, arguments, test_utils=("test_schema", "test_faketensor"))


def test_vllm_zero_scales_are_zero_at_each_call(pool: ScalePool, plugin: None, stale: None) -> None:
    """For attention that writes NVFP4: every byte is zero, and no pool buffer is used."""
    for padded_n in (None, 96, 192):
        scales = torch.ops.safealloc.vllm_zero_scales(5, K, CPU, padded_n)
        assert not scales.any()
        assert pool.spec(scales) is None


def test_a_graph_with_our_ops_runs_in_a_process_that_is_not_hooked(pool: ScalePool) -> None:
    """The compile cache may load one: the ops return zeroed memory of their own."""
    scales = torch.ops.safealloc.vllm_scales(5, K, CPU, None)
    assert metadata(scales)[:2] == ((128, 2), torch.int32)
    assert not scales.any()
    assert pool.spec(scales) is None

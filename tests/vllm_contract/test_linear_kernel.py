"""Our linear kernel in vLLM's registry: its place, and what it computes."""

from __future__ import annotations

import pytest
import torch
from support.vllm_cpu_ops import (
    ALPHA,
    GLOBAL_SCALE,
    activation,
    as_on_cuda,
    kernel_and_layer,
    linear_layer,
)
from vllm.model_executor.kernels import linear
from vllm.platforms.interface import PlatformEnum

from safealloc import ScalePool, nvfp4_linear
from safealloc.integrations import vllm as integration

N, K = 24, 80


@pytest.mark.parametrize(("setting", "index"), [(None, -1), ("0", -1), ("1", 0)])
def test_the_linear_kernel_is_last_or_with_safealloc_linear_first(
    pool: ScalePool, monkeypatch: pytest.MonkeyPatch, setting: str | None, index: int
) -> None:
    """Last is behind Emulation, where "auto" does not reach it."""
    if setting is not None:
        monkeypatch.setenv("SAFEALLOC_LINEAR", setting)
    kernels = linear._POSSIBLE_NVFP4_KERNELS[PlatformEnum.CUDA]
    before = list(kernels)
    integration.register()
    assert kernels[index].__name__ == "SafeallocNvFp4LinearKernel"
    assert issubclass(kernels[index], linear.NvFp4LinearKernel)
    others = list(kernels)
    del others[index]
    assert others == before
    integration.unregister()
    assert kernels == before


def our_kernel() -> type:
    (kernel,) = [
        kernel
        for kernel in linear._POSSIBLE_NVFP4_KERNELS[PlatformEnum.CUDA]
        if kernel.__name__.startswith("Safealloc")
    ]
    return kernel


def test_the_linear_kernel_computes_what_vllms_kernels_compute(pool: ScalePool, plugin: None) -> None:
    """On a CPU, with the reference backend."""
    kernel = our_kernel().__new__(our_kernel())  # __init__ asks for a GPU
    layer = linear_layer(N, K)
    kernel.process_weights_after_loading(layer)
    assert kernel.backend == "reference"
    theirs, their_layer = kernel_and_layer("cutlass", N, K)
    bias = activation(1, N)[0]
    for rows in (1, 5, 32, 33, 130):
        x = activation(rows, K)
        y = kernel.apply_weights(layer, x)
        expected = nvfp4_linear(x, layer.weight, layer.weight_scale, GLOBAL_SCALE, ALPHA, backend="reference")
        assert torch.equal(y, expected)
        assert torch.equal(y, theirs.apply_weights(their_layer, x))
        assert torch.equal(kernel.apply_weights(layer, x, bias), y + bias)
    x = activation(6, 2 * K).view(2, 3, 2 * K)[..., :K]
    assert torch.equal(kernel.apply_weights(layer, x), kernel.apply_weights(layer, x.contiguous()))
    assert kernel.apply_weights(layer, x.half()).dtype == torch.float16
    assert pool.verify() == pool.stats().buffers
    assert pool.stats().live == 0


def test_the_linear_kernel_says_where_it_can_run(plugin: None) -> None:
    kernel = our_kernel()
    assert kernel.can_implement(None) == (True, None)
    assert kernel.is_supported(100) == (True, None)  # FlashInfer is installed
    supported, reason = kernel.is_supported(80)
    assert not supported
    assert reason
    assert kernel.is_supported() == (False, "it needs a CUDA device")


def test_vllm_selects_the_first_kernel(pool: ScalePool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAFEALLOC_LINEAR", "1")
    integration.register()
    kernel = our_kernel()
    monkeypatch.setattr(kernel, "is_supported", classmethod(lambda cls, compute_capability=None: (True, None)))
    with as_on_cuda():
        assert type(linear.init_nvfp4_linear_kernel()) is kernel

"""Which GEMM our kernel for vLLM's linear layers runs on, with stand-ins for GPUs and FlashInfer; vLLM is not needed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from safealloc import ScalePool, SfLayout, _optional, mm_fp4, use_pool
from safealloc.integrations.vllm import kernel
from safealloc.kernels import reference
from safealloc.ops import backends

GPU, K = torch.device("cuda", 0), 96
ONE = torch.ones(1)


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """Sets the compute capability of the GPU for the table of backends, to which all packages seem installed."""
    monkeypatch.setattr(_optional, "missing", lambda name: None)
    return lambda *capability: monkeypatch.setattr(backends, "capability", lambda device: capability)


@pytest.fixture
def logged() -> Iterator[list[str]]:
    """What the plugin logs, as in a process that has not logged anything yet."""
    kernel.log_triton.cache_clear()
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    level = kernel.logger.level
    kernel.logger.addHandler(handler)
    kernel.logger.setLevel(logging.DEBUG)
    yield lines
    kernel.logger.removeHandler(handler)
    kernel.logger.setLevel(level)
    kernel.log_triton.cache_clear()


@pytest.mark.parametrize("capability", [(10, 0), (10, 3), (10, 7)])
def test_trtllm_takes_weights_of_whole_tiles_of_rows(
    on: Callable[[int, int], None], logged: list[str], capability: tuple[int, int]
) -> None:
    """Others run on Triton, and the reason is logged once."""
    on(*capability)
    for rows in (128, 5632, 1024):
        assert kernel.backend_for(GPU, rows) == "trtllm"
    assert logged == []
    for rows in (5664, 64, 5664):
        assert kernel.backend_for(GPU, rows) == "triton"
    assert [line.partition("trtllm cannot run: ")[2] for line in logged] == [
        "it takes weights of a multiple of 128 rows, one has 5664",
        "it takes weights of a multiple of 128 rows, one has 64",
    ]
    assert kernel.trtllm_refusal(GPU) is None


@pytest.mark.parametrize("capability", [(9, 0), (11, 0), (12, 0), (12, 1)])
def test_triton_runs_where_trtllm_has_no_kernels(
    on: Callable[[int, int], None], logged: list[str], capability: tuple[int, int]
) -> None:
    on(*capability)
    assert {kernel.backend_for(GPU, rows) for rows in (64, 128, 5664, 1024)} == {"triton"}
    reason = "it runs on compute capability 10.0, 10.3, 10.7 only, cuda:0 has {}.{}".format(*capability)
    assert [line.partition("trtllm cannot run: ")[2] for line in logged] == [reason]
    assert kernel.trtllm_refusal(GPU, 64) == reason
    assert kernel.refusal(10 * capability[0] + capability[1]) is None


def test_triton_is_needed_on_every_compute_capability(monkeypatch: pytest.MonkeyPatch) -> None:
    """In any model a layer may have a number of rows that trtllm does not take."""
    monkeypatch.setattr(_optional, "missing", lambda name: "it is not installed" if name == "triton" else None)
    assert kernel.refusal(100) == "what trtllm cannot take needs Triton, and it is not installed"
    monkeypatch.setattr(_optional, "missing", lambda name: "it is not installed" if name == "flashinfer" else None)
    assert kernel.refusal(100) is None


@pytest.mark.parametrize(("rows", "shuffled"), [(256, True), (96, False)])
def test_weights_are_shuffled_for_trtllm_only(
    monkeypatch: pytest.MonkeyPatch, on: Callable[[int, int], None], rows: int, shuffled: bool
) -> None:
    """The product is right in either case."""
    on(10, 0)
    on_cpu = torch.device("cpu")
    real = kernel.backend_for
    monkeypatch.setattr(kernel, "backend_for", lambda device, rows: real(GPU, rows))
    called: list[str] = []
    order = torch.arange(rows).flip(0)  # a shuffle that shows in the result

    def shuffle_matrix_a(weight: Tensor, tile: int) -> Tensor:
        called.append(f"a{tile}")
        return weight[order]

    def shuffle_matrix_sf_a(scales: Tensor, tile: int) -> Tensor:
        assert len(scales) % 128 == 0  # as FlashInfer's
        called.append(f"sf_a{tile}")
        return SfLayout.layout_128x4.swizzle(scales[order]).view(-1)

    flashinfer = SimpleNamespace(shuffle_matrix_a=shuffle_matrix_a, shuffle_matrix_sf_a=shuffle_matrix_sf_a)
    load = _optional.load
    monkeypatch.setattr(_optional, "load", lambda name: flashinfer if name == "flashinfer" else load(name))
    weight = torch.empty(rows, K // 2, dtype=torch.uint8)
    scales = torch.empty(rows, K // 16, dtype=torch.uint8)
    reference.quantize(torch.randn(rows, K).bfloat16(), ONE, weight, scales, SfLayout.layout_linear)
    layer = nn.Module()
    layer.weight = nn.Parameter(weight, requires_grad=False)
    layer.weight_scale = nn.Parameter(scales.view(torch.float8_e4m3fn), requires_grad=False)
    layer.input_global_scale_inv = layer.alpha = ONE
    ours = kernel.make(object)()
    ours.process_weights_after_loading(layer)
    assert ours.backend == ("trtllm" if shuffled else "triton")
    assert sorted(called) == (["a128", "sf_a128"] if shuffled else [])

    ours.backend = "reference"  # which takes either, and does not shuffle back
    x = torch.randn(5, K).bfloat16()
    with ScalePool(on_cpu) as pool, use_pool(pool):
        y = ours.apply_weights(layer, x)
        x_fp4 = torch.empty(5, K // 2, dtype=torch.uint8)
        x_scales = pool.acquire(5, K, SfLayout.layout_128x4)
        reference.quantize(x, ONE, x_fp4, x_scales, SfLayout.layout_128x4)
        plain = SfLayout.layout_128x4.swizzle(scales)
        right = mm_fp4(x_fp4, weight.T, x_scales, plain.T, ONE, backend="reference")
    assert torch.equal(y, right[:, order] if shuffled else right)

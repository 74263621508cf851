"""vLLM's allocations and linear layers on CPU tensors, with the plugin and without: the same shapes and the same bits."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
import vllm._custom_ops as ops
from support import vllm_cpu_ops
from support.vllm_cpu_ops import (
    CPU,
    GLOBAL_SCALE,
    KERNELS,
    activation,
    fused_act_quant,
    kernel_and_layer,
    metadata,
    mm_calls,
    padding_is_written,
)
from support.vllm_cpu_ops import vllm_quantize as quantize
from torch import Tensor, nn
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.fusion.quant_activation import expose_input_quant_key

from safealloc import ScalePool, ScaleSpec, SfLayout
from safealloc.integrations import vllm as integration

N, K = 24, 80  # 80 columns are 5 of scales, so that 3 of padding follow
ROWS = (1, 5, 32, 33, 40, 130)

kernels = pytest.mark.parametrize("name", list(KERNELS))


# --- allocations ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("k", "padded_n"), [(64, None), (80, None), (80, 80), (80, 96), (80, 192), (4096, None)])
def test_outputs_have_the_shapes_of_vllms(pool: ScalePool, k: int, padded_n: int | None) -> None:
    def allocate(rows: int) -> list[Tensor]:
        scales = ops.create_fp4_scale_tensor(rows, k, CPU, True)
        return [scales, *ops.create_fp4_output_tensors(rows, k, CPU, True, padded_n=padded_n)]

    plain = {rows: allocate(rows) for rows in ROWS}
    assert {pool.spec(tensor) for tensors in plain.values() for tensor in tensors} == {None}
    integration.register()
    wider = None if padded_n == k else padded_n
    for rows in ROWS:
        ours = allocate(rows)
        assert list(map(metadata, ours)) == list(map(metadata, plain[rows]))
        specs = [pool.spec(tensor) for tensor in ours]
        assert specs == [
            ScaleSpec(rows, k, SfLayout.layout_128x4),
            None,
            ScaleSpec(rows, k, SfLayout.layout_128x4, wider),
        ]
    assert pool.verify() == 2 * len(ROWS)


def test_8x4_outputs_are_the_vendors(pool: ScalePool) -> None:
    cases = [(rows, k, dtype) for rows in (1, 5, 32) for k in (64, 80) for dtype in (torch.bfloat16, torch.float16)]

    def run(rows: int, k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        # By the name that another module of vLLM has imported.
        return ops.flashinfer_quant_nvfp4_8x4_sf_layout(activation(rows, k).to(dtype), GLOBAL_SCALE)

    plain = [run(*case) for case in cases]
    integration.register()
    for (rows, k, dtype), expected in zip(cases, plain, strict=True):
        ours = run(rows, k, dtype)
        assert list(map(metadata, ours)) == list(map(metadata, expected))
        assert all(map(torch.equal, ours, expected))
        assert pool.spec(ours[1]) is None


@pytest.mark.parametrize("padded_n", [None, 96])
def test_scales_in_linear_layout_are_vllms(pool: ScalePool, plugin: None, padded_n: int | None) -> None:
    """They have no padding rows or columns."""
    data, scales = ops.create_fp4_output_tensors(5, K, CPU, False, padded_n=padded_n)
    assert data.shape == (5, (padded_n or K) // 2)
    assert (scales.shape, scales.dtype) == ((5, (padded_n or K) // 16), torch.uint8)
    assert pool.spec(scales) is None
    assert pool.spec(ops.create_fp4_scale_tensor(5, K, CPU, False)) is None
    _, scales = quantize(activation(5, K), is_sf_swizzled_layout=False)
    assert torch.isfinite(scales.float()).all()
    assert pool.stats().misses == 0


def test_two_live_tensors_do_not_share_a_buffer_and_free_theirs(pool: ScalePool, plugin: None) -> None:
    first, second = quantize(activation(5, K))[1], quantize(activation(5, K))[1]
    assert first.data_ptr() != second.data_ptr()
    addresses = {first.data_ptr(), second.data_ptr()}
    del first, second
    assert quantize(activation(5, K))[1].data_ptr() in addresses
    stats = pool.stats()
    assert (stats.buffers, stats.live, stats.misses) == (2, 0, 2)


def test_zero_rows_are_not_an_error(pool: ScalePool, plugin: None, log: list[logging.LogRecord]) -> None:
    """A rank of a data-parallel or expert-parallel group may have none."""
    data, scales = ops.create_fp4_output_tensors(0, K, CPU, True)
    assert (data.shape, scales.shape, scales.dtype) == ((0, K // 2), (0, 2), torch.int32)
    assert log == []


# --- results ----------------------------------------------------------------------------------------------------------


@kernels
def test_linear_kernels_give_the_bits_of_vllms(pool: ScalePool, name: str) -> None:
    """Without the plugin the quantizer writes padding; with it the results are the same where it does not."""
    for k in (64, 80, 272):
        kernel, layer = kernel_and_layer(name, N, k)
        mm_calls.clear()
        with padding_is_written():
            plain = {rows: kernel.apply_weights(layer, activation(rows, k)) for rows in ROWS}
        assert {call.spec for call in mm_calls} == {None}
        integration.register()
        for rows, expected in plain.items():
            mm_calls.clear()
            assert torch.isfinite(expected).all()
            ours = kernel.apply_weights(layer, activation(rows, k))
            assert (ours.dtype, ours.shape) == (torch.bfloat16, (rows, N))
            assert torch.equal(ours, expected)
            with padding_is_written():
                assert torch.equal(kernel.apply_weights(layer, activation(rows, k)), expected)
            is_8x4 = name == "trtllm" and rows <= 32
            padded = layer.weight.shape[1] * 2
            takes_padded_n = padded != k and name not in ("cute-dsl", "b12x")  # they pad the data afterwards
            spec = ScaleSpec(rows, k, SfLayout.layout_128x4, padded if takes_padded_n else None)
            assert [call.spec for call in mm_calls] == [None if is_8x4 else spec] * 2
            assert {call.use_8x4_sf_layout for call in mm_calls} == {is_8x4}
        assert pool.verify() == pool.stats().buffers
        integration.unregister()
    swizzled = [rows for rows in ROWS if name != "trtllm" or rows > 32]
    assert pool.stats().buffers == 3 * len(swizzled)


@kernels
def test_linear_kernels_take_a_bias_and_leading_dimensions(pool: ScalePool, name: str) -> None:
    kernel, layer = kernel_and_layer(name, N, K)
    x, bias = activation(6, K).view(2, 3, K), activation(1, N)[0]
    with padding_is_written():
        plain = kernel.apply_weights(layer, x, bias)
    integration.register()
    assert torch.equal(kernel.apply_weights(layer, x, bias), plain)
    assert plain.shape == (2, 3, N)


@kernels
def test_a_producer_that_writes_no_padding_is_right_on_stale_memory(pool: ScalePool, name: str, stale: None) -> None:
    """Without the plugin it gives NaN."""
    kernel, layer = kernel_and_layer(name, N, K)
    expected = {}
    for rows in (5, 40):
        with padding_is_written():
            expected[rows] = kernel.apply_weights(layer, activation(rows, K))
        assert torch.isfinite(expected[rows]).all()
        without = kernel.apply_weights(layer, activation(rows, K))
        if name == "trtllm" and rows <= 32:
            assert torch.equal(without, expected[rows])  # FlashInfer's 8x4 quantizer writes padding itself
        else:
            assert without.isnan().all()  # one padding column of NaN spoils each row: NaN * 0 = NaN
    integration.register()
    for rows in (5, 40) * 3:  # the same buffer each time
        assert torch.equal(kernel.apply_weights(layer, activation(rows, K)), expected[rows])
        kernel.apply_weights(layer, activation(rows, K, seed=1))
    served = 1 if name == "trtllm" else 2  # its 8x4 scales are FlashInfer's
    assert pool.verify() == served
    assert pool.stats().misses == served


@pytest.mark.parametrize("rows", [5, 40])
def test_padding_rows_are_zero_where_there_are_no_padding_columns(pool: ScalePool, rows: int, stale: None) -> None:
    """The GEMM here does not read padding rows, so the bytes are compared."""
    scales = quantize(activation(rows, 64))[1].view(torch.uint8).view(-1)
    mask = SfLayout.layout_128x4.padding_mask(rows, 64)
    assert (scales[mask] & 0x7F == 0x7F).all()
    integration.register()
    scales = quantize(activation(rows, 64))[1].view(torch.uint8).view(-1)
    assert (scales[mask] == 0).all()


def test_columns_up_to_padded_n_are_padding(pool: ScalePool, plugin: None, stale: None) -> None:
    """A fused producer never writes them."""
    x = activation(40, K)
    data, scales = ops.create_fp4_output_tensors(40, K, CPU, True, padded_n=192)
    vllm_cpu_ops.quantize_rows(x, GLOBAL_SCALE, data, scales)
    assert pool.spec(scales) == ScaleSpec(40, K, SfLayout.layout_128x4, 192)
    linear = SfLayout.layout_128x4.unswizzle(scales.view(torch.uint8), 40, 192)
    assert (linear[:, K // 16 :] == 0).all()
    assert (linear[:, : K // 16] != 0).all()
    assert pool.verify() == 1


@pytest.mark.parametrize(
    ("rows", "layout"),
    [
        (1, SfLayout.layout_8x4),
        (5, SfLayout.layout_8x4),
        (32, SfLayout.layout_8x4),
        (33, SfLayout.layout_128x4),
        (40, SfLayout.layout_128x4),
    ],
)
def test_trtllm_gets_8x4_scales_up_to_32_rows(pool: ScalePool, plugin: None, rows: int, layout: SfLayout) -> None:
    kernel, layer = kernel_and_layer("trtllm", N, K)
    kernel.apply_weights(layer, activation(rows, K))
    (call,) = mm_calls
    assert (call.backend, call.use_8x4_sf_layout) == ("trtllm", layout is SfLayout.layout_8x4)
    assert call.spec == (None if layout is SfLayout.layout_8x4 else ScaleSpec(rows, K, layout))


# --- SiLU, multiplication and quantization as one op ------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5, 2 * K), (40, 2 * K), (2, 3, 2 * K)], ids=str)
def test_fused_silu_and_mul_gives_the_bits_of_vllms(pool: ScalePool, shape: tuple[int, ...], stale: None) -> None:
    """Called through vLLM's table, as its models call it; a linear kernel takes the quantized result."""
    kernel, layer = kernel_and_layer("cutlass", N, K)
    expose_input_quant_key(layer, kernel)
    act = SiluAndMul.__new__(SiluAndMul)  # __init__ needs an engine's configuration
    nn.Module.__init__(act)
    x = activation(int(torch.tensor(shape[:-1]).prod()), shape[-1]).view(shape)

    def run() -> tuple[Any, Tensor]:
        activated = fused_act_quant.maybe_fused_act_quant(act, x, layer)
        return activated, kernel.apply_weights(layer, activated)

    with padding_is_written():
        plain, expected = run()
    _, without = run()
    assert without.isnan().all()
    integration.register()
    ours, result = run()
    assert torch.equal(result, expected)
    assert result.shape == (*shape[:-1], N)
    assert torch.equal(ours.data, plain.data)
    assert torch.equal(ours.scale.view(torch.uint8), plain.scale.view(torch.uint8))
    assert (metadata(ours.data), metadata(ours.scale)) == (metadata(plain.data), metadata(plain.scale))
    for name in ("orig_dtype", "orig_shape", "quant_key"):
        assert getattr(ours, name) == getattr(plain, name)
    assert type(ours) is type(plain)
    assert pool.spec(ours.scale) == ScaleSpec(x.numel() // (2 * K), K, SfLayout.layout_128x4)
    assert pool.verify() == 1


def test_unregistering_restores_the_table_of_fused_producers(pool: ScalePool) -> None:
    before = dict(fused_act_quant._FUSED_ACT_QUANT)
    original = fused_act_quant._silu_and_mul_nvfp4_dynamic
    assert original in before.values()
    integration.register()
    during = dict(fused_act_quant._FUSED_ACT_QUANT)
    assert during.keys() == before.keys()
    assert [key for key in before if during[key] is not before[key]] == [
        key for key, value in before.items() if value is original
    ]
    integration.unregister()
    assert dict(fused_act_quant._FUSED_ACT_QUANT) == before

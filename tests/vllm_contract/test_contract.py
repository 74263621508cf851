"""vLLM's own Python on CPU tensors, with the plugin and without: the same results, in buffers of the pool."""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import stand_ins
import torch
import vllm._custom_ops as ops
import vllm.model_executor.model_loader.utils as loader_utils
from stand_ins import (
    ALPHA,
    CPU,
    FP8,
    GLOBAL_SCALE,
    KERNELS,
    L8,
    L128,
    activation,
    engine_config,
    fused_act_quant,
    kernel_and_layer,
    mm_calls,
    padding_is_written,
    vllm_flashinfer,
)
from stand_ins import vllm_quantize as quantize
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from vllm.forward_context import override_forward_context
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.fusion.quant_activation import expose_input_quant_key
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.v1.worker.gpu_worker import Worker

from safealloc import LayoutMismatchError, PoolClosedError, ScalePool, ScaleSpec, SfLayout, default_pool
from safealloc.integrations import vllm as integration
from safealloc.integrations.vllm import allocator as allocator_module
from safealloc.integrations.vllm.allocator import Steps, allocator
from safealloc.kernels import reference

N, K = 24, 80  # 80 columns are 5 of scales, so that 3 of padding follow
ROWS = (1, 5, 32, 33, 40, 130)

kernels = pytest.mark.parametrize("name", list(KERNELS))


def metadata(tensor: Tensor) -> tuple[Any, ...]:
    return tuple(tensor.shape), tensor.dtype, tensor.stride(), tensor.storage_offset(), tensor.device


def weight() -> tuple[Tensor, Tensor]:
    _, layer = kernel_and_layer("trtllm", N, K)
    return layer.weight.data, layer.weight_scale.data


def context() -> Any:
    """A forward context, which vLLM sets while a model runs."""
    return override_forward_context(SimpleNamespace())


# --- what is allocated ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("k", "padded_n"), [(64, None), (80, None), (80, 80), (80, 96), (80, 192), (4096, None)])
def test_outputs_are_shaped_as_vllms(pool: ScalePool, k: int, padded_n: int | None) -> None:
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
        assert specs == [ScaleSpec(rows, k, L128), None, ScaleSpec(rows, k, L128, wider)]
    assert pool.verify() == 2 * len(ROWS)


def test_8x4_outputs_are_shaped_and_valued_as_vllms(pool: ScalePool) -> None:
    cases = [(rows, k, dtype) for rows in (1, 5, 32) for k in (64, 80) for dtype in (torch.bfloat16, torch.float16)]

    def run(rows: int, k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        # By the name that vLLM's module has bound.
        return ops.flashinfer_quant_nvfp4_8x4_sf_layout(activation(rows, k).to(dtype), GLOBAL_SCALE)

    plain = [run(*case) for case in cases]
    integration.register()
    for (rows, k, dtype), expected in zip(cases, plain, strict=True):
        ours = run(rows, k, dtype)
        assert list(map(metadata, ours)) == list(map(metadata, expected))
        assert all(map(torch.equal, ours, expected))
        assert (pool.spec(ours[1]), pool.spec(expected[1])) == (ScaleSpec(rows, k, L8), None)


def test_8x4_takes_what_vllm_may_hand_over(pool: ScalePool, plugin: None) -> None:
    """A global scale without dimensions, and rows that are not contiguous."""
    x = activation(5, 2 * K)[:, :K]
    x_fp4, scales = quantize(x, backend="flashinfer-trtllm")
    expected = quantize(x.contiguous(), backend="flashinfer-trtllm")
    assert torch.equal(x_fp4, expected[0])
    other = ops.flashinfer_quant_nvfp4_8x4_sf_layout(x, GLOBAL_SCALE.reshape(()))
    assert torch.equal(scales.view(torch.uint8), other[1])


@pytest.mark.parametrize("padded_n", [None, 96])
def test_linear_scales_are_left_to_vllm(pool: ScalePool, plugin: None, padded_n: int | None) -> None:
    """They have no padding rows or columns."""
    data, scales = ops.create_fp4_output_tensors(5, K, CPU, False, padded_n=padded_n)
    assert data.shape == (5, (padded_n or K) // 2)
    assert (scales.shape, scales.dtype) == ((5, (padded_n or K) // 16), torch.uint8)
    assert pool.spec(scales) is None
    assert pool.spec(ops.create_fp4_scale_tensor(5, K, CPU, False)) is None
    _, scales = quantize(activation(5, K), is_sf_swizzled_layout=False)
    assert torch.isfinite(scales.float()).all()
    assert pool.stats().misses == 0


def test_two_live_scales_share_nothing_and_are_free_afterwards(pool: ScalePool, plugin: None) -> None:
    first, second = quantize(activation(5, K))[1], quantize(activation(5, K))[1]
    assert first.data_ptr() != second.data_ptr()
    addresses = {first.data_ptr(), second.data_ptr()}
    del first, second
    assert quantize(activation(5, K))[1].data_ptr() in addresses
    stats = pool.stats()
    assert (stats.buffers, stats.live, stats.misses) == (2, 0, 2)


def test_no_rows_are_no_error(pool: ScalePool, plugin: None, log: list[logging.LogRecord]) -> None:
    """As a rank of a data-parallel or expert-parallel group may have none."""
    data, scales = ops.create_fp4_output_tensors(0, K, CPU, True)
    assert (data.shape, scales.shape, scales.dtype) == ((0, K // 2), (0, 2), torch.int32)
    assert log == []


# --- results ----------------------------------------------------------------------------------------------------------


@kernels
def test_linear_kernels_give_the_same_bits(pool: ScalePool, name: str) -> None:
    """The quantizer of vLLM writes padding; with the plugin its results are the same where nobody does."""
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
            spec = ScaleSpec(rows, k, L8 if is_8x4 else L128, padded if takes_padded_n else None)
            assert [call.spec for call in mm_calls] == [spec, spec]
            assert {call.use_8x4_sf_layout for call in mm_calls} == {is_8x4}
        assert pool.verify() == pool.stats().buffers
        integration.unregister()
    assert pool.stats().buffers == 3 * len(ROWS)


@kernels
def test_bias_and_leading_dimensions(pool: ScalePool, name: str) -> None:
    kernel, layer = kernel_and_layer(name, N, K)
    x, bias = activation(6, K).view(2, 3, K), activation(1, N)[0]
    with padding_is_written():
        plain = kernel.apply_weights(layer, x, bias)
    integration.register()
    assert torch.equal(kernel.apply_weights(layer, x, bias), plain)
    assert plain.shape == (2, 3, N)


@kernels
def test_real_rows_only_on_stale_memory(pool: ScalePool, name: str, stale: None) -> None:
    """A producer that writes real rows only gives NaN without the plugin, and none with it."""
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
    assert pool.verify() == 2
    assert pool.stats().misses == 2


@pytest.mark.parametrize("rows", [5, 40])
def test_without_padding_columns_the_rows_alone_are_padding(pool: ScalePool, rows: int, stale: None) -> None:
    """Which the GEMM here does not read: whether it is zero is seen in the bytes."""
    scales = quantize(activation(rows, 64))[1].view(torch.uint8).view(-1)
    mask = L128.padding_mask(rows, 64)
    assert (scales[mask] & 0x7F == 0x7F).all()
    integration.register()
    scales = quantize(activation(rows, 64))[1].view(torch.uint8).view(-1)
    assert (scales[mask] == 0).all()


def test_a_producer_that_does_not_know_padded_n(pool: ScalePool, plugin: None, stale: None) -> None:
    """The buffer knows the true k: columns up to ``padded_n`` are padding, which a fused producer never writes."""
    x = activation(40, K)
    data, scales = ops.create_fp4_output_tensors(40, K, CPU, True, padded_n=192)
    stand_ins.quantize_rows(x, GLOBAL_SCALE, data, scales)
    assert pool.spec(scales) == ScaleSpec(40, K, L128, 192)
    linear = L128.unswizzle(scales.view(torch.uint8), 40, 192)
    assert (linear[:, K // 16 :] == 0).all()
    assert (linear[:, : K // 16] != 0).all()
    assert pool.verify() == 1


@pytest.mark.parametrize(("rows", "layout"), [(1, L8), (5, L8), (32, L8), (33, L128), (40, L128)])
def test_trtllm_takes_8x4_up_to_32_rows(pool: ScalePool, plugin: None, rows: int, layout: SfLayout) -> None:
    kernel, layer = kernel_and_layer("trtllm", N, K)
    kernel.apply_weights(layer, activation(rows, K))
    (call,) = mm_calls
    assert (call.backend, call.use_8x4_sf_layout) == ("trtllm", layout is L8)
    assert call.spec == ScaleSpec(rows, K, layout)


# --- the layout is bound to the buffer --------------------------------------------------------------------------------


def scaled_mm(x_fp4: Tensor, scales: Tensor, backend: str, alpha: Tensor | None = ALPHA, **options: Any) -> Tensor:
    weight_fp4, weight_scale = weight()
    return vllm_flashinfer.flashinfer_scaled_fp4_mm(
        x_fp4, weight_fp4, scales, weight_scale, alpha, torch.bfloat16, backend, **options
    )


def mm_op(x_fp4: Tensor, scales: Tensor, use_8x4_sf_layout: bool, backend: str, **options: Any) -> Tensor:
    weight_fp4, weight_scale = weight()
    return torch.ops.vllm.flashinfer_mm_fp4(
        x_fp4, weight_fp4.T, scales, weight_scale.T, ALPHA, torch.bfloat16, use_8x4_sf_layout, backend, **options
    )


@pytest.mark.parametrize("alpha", [ALPHA, None], ids=["alpha", "no alpha"])
@pytest.mark.parametrize("rows", [5, 32])
def test_a_128x4_buffer_of_few_rows_is_read_as_128x4(pool: ScalePool, plugin: None, rows: int, alpha: Tensor) -> None:
    """By itself vLLM looks at the rows alone: issue 37563."""
    x_fp4, scales = quantize(activation(rows, K))
    expected = scaled_mm(x_fp4, scales, "cutlass", alpha)
    assert torch.equal(scaled_mm(x_fp4, scales, "trtllm", alpha), expected)
    assert [(call.backend, call.use_8x4_sf_layout) for call in mm_calls] == [("cutlass", False), ("trtllm", False)]
    integration.unregister()
    wrong = scaled_mm(x_fp4, scales, "trtllm", alpha)
    assert mm_calls[-1].use_8x4_sf_layout
    assert not torch.equal(wrong, expected)


def test_an_8x4_buffer_for_another_backend_is_refused(pool: ScalePool, plugin: None) -> None:
    x_fp4, scales = quantize(activation(5, K), backend="flashinfer-trtllm")
    for backend in ("cutlass", "cudnn", "cute-dsl"):
        with pytest.raises(LayoutMismatchError, match=r"layout_8x4.*does not read"):
            scaled_mm(x_fp4, scales, backend)
    assert mm_calls == []


@pytest.mark.parametrize("backend", ["trtllm", "cutlass"])
def test_other_rows_are_refused(pool: ScalePool, plugin: None, backend: str) -> None:
    """Rows sliced off or padded after the quantization."""
    for rows, wrong in ((5, 4), (40, 33), (40, 5)):
        x_fp4, scales = quantize(activation(rows, K), backend=f"flashinfer-{backend}")
        with pytest.raises(LayoutMismatchError):
            scaled_mm(x_fp4[:wrong], scales, backend)
    assert mm_calls == []


def test_other_columns_are_refused(pool: ScalePool, plugin: None) -> None:
    _, scales = quantize(activation(40, 144))
    with pytest.raises(LayoutMismatchError, match="columns"):
        scaled_mm(quantize(activation(40, K))[0], scales, "cutlass")
    assert mm_calls == []


@pytest.mark.parametrize("rows", [5, 40])
def test_a_wrong_flag_is_refused_by_the_op(pool: ScalePool, plugin: None, rows: int) -> None:
    """Also where vLLM's wrapper was not asked, as in compiled code."""
    x_fp4, scales = quantize(activation(rows, K))
    mm_op(x_fp4, scales, False, "trtllm")
    for given in (scales, scales.view(torch.uint8)):
        with pytest.raises(LayoutMismatchError, match="written in layout_128x4"):
            mm_op(x_fp4, given, True, "trtllm")
    x_fp4, scales = ops.flashinfer_quant_nvfp4_8x4_sf_layout(activation(rows, K), GLOBAL_SCALE)
    mm_op(x_fp4, scales, True, "trtllm")
    with pytest.raises(LayoutMismatchError, match="written in layout_8x4"):
        mm_op(x_fp4, scales, False, "trtllm")
    with pytest.raises(LayoutMismatchError, match="does not read"):
        mm_op(x_fp4, scales, True, "cutlass")
    assert len(mm_calls) == 2


def test_scales_from_elsewhere_are_vllms_business(pool: ScalePool, plugin: None) -> None:
    """No pool made them, so nothing is known that a call could contradict."""
    x_fp4, scales = quantize(activation(5, K))
    scaled_mm(x_fp4, scales.clone(), "trtllm")
    assert (mm_calls[-1].use_8x4_sf_layout, mm_calls[-1].spec) == (True, None)
    mm_op(x_fp4[:4], scales.clone(), True, "cutlass")
    assert len(mm_calls) == 2


def test_mxfp4_passes_through(pool: ScalePool, plugin: None) -> None:
    """Its scales have 32 columns a byte; a buffer that contradicts the call is no concern of ours."""
    x_fp4, scales = quantize(activation(40, K))
    scaled_mm(x_fp4[:5], scales, "trtllm", block_size=32, use_nvfp4=False)
    assert (mm_calls[-1].use_8x4_sf_layout, mm_calls[-1].block_size) == (True, 32)
    mm_op(x_fp4[:5], scales, True, "cutlass", block_size=32, use_nvfp4=False)
    assert len(mm_calls) == 2


# --- SiLU, multiplication and quantization as one op -------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5, 2 * K), (40, 2 * K), (2, 3, 2 * K)], ids=str)
def test_fused_silu_and_mul(pool: ScalePool, shape: tuple[int, ...], stale: None) -> None:
    """Through vLLM's table, as its models reach it, and into the linear kernel that takes quantized input."""
    kernel, layer = kernel_and_layer("cutlass", N, K)
    expose_input_quant_key(layer, kernel)
    act = SiluAndMul.__new__(SiluAndMul)  # __init__ wants an engine's configuration
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
    assert pool.spec(ours.scale) == ScaleSpec(x.numel() // (2 * K), K, L128)
    assert pool.verify() == 1


def test_the_table_of_fused_producers_is_restored(pool: ScalePool) -> None:
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


# --- what is left to vLLM ---------------------------------------------------------------------------------------------


def served(pool: ScalePool, rows: int = 5, k: int = K) -> bool:
    """Whether all allocations of a step come from the pool; all or none."""
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


def test_rows_above_the_largest_batch(pool: ScalePool, plugin: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert served(pool, 4096)  # no engine has said how many rows its steps have
    allocator.begin(engine_config((1, 2, 4, 8), max_num_seqs=6), CPU)
    with context():
        assert served(pool, 8)
        assert not served(pool, 9)
    allocator.begin(engine_config((), max_num_seqs=6, mode=0), CPU)
    with context():
        assert served(pool, 6)
        assert not served(pool, 7)


def test_max_rows_by_the_environment(pool: ScalePool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before an engine begins and after; what is no number is ignored."""
    monkeypatch.setenv("SAFEALLOC_MAX_ROWS", "4")
    allocator.reset()
    integration.register()
    assert served(pool, 4)
    assert not served(pool, 5)
    allocator.begin(engine_config((1, 2, 4, 8)), CPU)
    with context():
        assert served(pool, 4)
        assert not served(pool, 5)
    monkeypatch.setenv("SAFEALLOC_MAX_ROWS", "many")
    allocator.begin(engine_config((1, 2, 4, 8)), CPU)
    with context():
        assert served(pool, 8)


def test_outside_a_step_once_an_engine_has_begun(pool: ScalePool, plugin: None) -> None:
    """Weights that are loaded again while the engine serves, for one."""
    assert served(pool)
    allocator.begin(engine_config(), CPU)
    assert not served(pool)
    with context():
        assert served(pool)
        with override_forward_context(None):
            assert not served(pool)
    assert not served(pool)


MODEL_CONFIG = SimpleNamespace(quantization=None, word_embeddings_untied_by_checkpoint=False)


class QuantizesAtLoad(QuantizeMethodBase):
    """As vLLM's online quantization: what it makes of a weight lives as long as the model."""

    def __init__(self, swizzled: bool) -> None:
        self.swizzled = swizzled

    def create_weights(self, layer: nn.Module, *given: Any, **named: Any) -> None: ...

    def apply(self, layer: nn.Module, *given: Any, **named: Any) -> Tensor:
        raise NotImplementedError

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        _, scales = quantize(layer.weight.data, is_sf_swizzled_layout=self.swizzled)
        layer.weight_scale = nn.Parameter(scales, requires_grad=False)


@pytest.mark.parametrize("swizzled", [True, False])
def test_weights_at_load_are_left_to_vllm(pool: ScalePool, plugin: None, swizzled: bool) -> None:
    layer = nn.Linear(K, 16, bias=False, dtype=torch.bfloat16)
    layer.quant_method = QuantizesAtLoad(swizzled)
    loader_utils.process_weights_after_loading(nn.Sequential(layer), MODEL_CONFIG, CPU)
    assert layer.weight_scale.dtype == FP8
    assert pool.spec(layer.weight_scale.data) is None
    assert pool.stats().misses == 0
    assert served(pool)  # the load is over


def test_a_load_that_fails_is_over_too(pool: ScalePool, plugin: None) -> None:
    layer = nn.Linear(K, 16, bias=False)  # float32, which vLLM refuses
    layer.quant_method = QuantizesAtLoad(True)
    with pytest.raises(AssertionError, match="fp16 or bf16"):
        loader_utils.process_weights_after_loading(nn.Sequential(layer), MODEL_CONFIG, CPU)
    assert served(pool)


# --- errors -----------------------------------------------------------------------------------------------------------


def test_a_pool_error_is_said_once_and_vllm_goes_on(
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
    from safealloc import use_pool

    with ScalePool("cpu", max_bytes=1024) as small, use_pool(small):
        _, fits = quantize(activation(5, 64))
        _, second = quantize(activation(5, 64))
        _, third = quantize(activation(5, 64))
        assert [small.spec(scales) is not None for scales in (fits, second, third)] == [True, True, False]
    assert [record.levelno for record in log] == [logging.ERROR]
    assert "PoolExhaustedError" in log[0].getMessage()


# --- fake tensors -----------------------------------------------------------------------------------------------------


def test_vllms_fake_quantization_does_not_touch_the_pool(pool: ScalePool) -> None:
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
    allocator.begin(engine_config(), CPU)
    assert fake() == plain  # no step is running where shapes are propagated


@pytest.mark.parametrize("op", ["vllm_scales", "vllm_zero_scales"])
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


def test_the_8x4_op_and_its_fake_agree(pool: ScalePool, plugin: None) -> None:
    function = torch.ops.safealloc.vllm_quantize_8x4
    for rows in (1, 5, 32, 40):
        arguments = (activation(rows, K), GLOBAL_SCALE)
        real = function(*arguments)
        with FakeTensorMode() as mode:
            fake = function(*map(mode.from_tensor, arguments))
        assert list(map(metadata, fake)) == list(map(metadata, real))
        torch.library.opcheck(function.default, arguments, test_utils=("test_schema", "test_faketensor"))


def test_zeroed_scales_are_zero_at_each_call(pool: ScalePool, plugin: None, stale: None) -> None:
    """For attention that writes NVFP4: real rows are zero too, and no pool buffer is used."""
    for padded_n in (None, 96, 192):
        scales = torch.ops.safealloc.vllm_zero_scales(5, K, CPU, padded_n)
        assert not scales.any()
        assert pool.spec(scales) is None


def test_a_hooked_graph_runs_in_a_process_that_is_not_hooked(pool: ScalePool) -> None:
    """The compile cache may bring one: the ops answer with zeroed memory of their own."""
    scales = torch.ops.safealloc.vllm_scales(5, K, CPU, None)
    assert metadata(scales)[:2] == ((128, 2), torch.int32)
    assert not scales.any()
    assert pool.spec(scales) is None
    with pytest.raises(RuntimeError, match="not registered"):
        torch.ops.safealloc.vllm_quantize_8x4(activation(5, K), GLOBAL_SCALE)


# --- the worker's start-up --------------------------------------------------------------------------------------------


def test_steps_of_a_configuration() -> None:
    assert Steps.of(engine_config((4, 1, 2), max_num_seqs=3)) == Steps((1, 2, 4), 4)
    assert Steps.of(engine_config((1, 2), max_num_seqs=16)) == Steps((1, 2), 16)
    assert Steps.of(engine_config((1, 2), max_num_seqs=16, mode=0)) == Steps((), 16)
    assert Steps.of(engine_config((1, 5, 8), use_ubatching=True)) == Steps((1, 2, 3, 4, 5, 8), 8, copies=2)
    assert Steps.of(engine_config((8,), enable_dbo=True)) == Steps((4, 8), 8, copies=2)
    eager = engine_config()
    eager.model_config.enforce_eager = True
    assert Steps.of(eager) == Steps((), 8)


def test_steps_of_a_real_configuration() -> None:
    from vllm.config import CompilationConfig, CUDAGraphMode, SchedulerConfig, VllmConfig

    fields = {
        CompilationConfig: ("cudagraph_mode", "cudagraph_capture_sizes"),
        SchedulerConfig: ("max_num_seqs",),
        VllmConfig: ("compilation_config", "model_config", "parallel_config", "scheduler_config"),
    }
    for config, names in fields.items():
        assert set(names) <= set(config.__dataclass_fields__)
    assert CUDAGraphMode.NONE.value == 0


def worker(config: SimpleNamespace) -> SimpleNamespace:
    return SimpleNamespace(vllm_config=config, device=CPU, rank=3)


def test_the_worker_tells_what_it_is_configured_for(pool: ScalePool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before it measures memory, and its own methods run and return what they return."""
    seen: list[Steps | None] = []

    def determine_available_memory(self: Any) -> int:
        seen.append(allocator.steps)
        return 4711

    monkeypatch.setattr(Worker, "determine_available_memory", determine_available_memory)
    integration.register()
    assert Worker.determine_available_memory(worker(engine_config((1, 2), max_num_seqs=2))) == 4711
    assert seen == [Steps((1, 2), 2)]


def warmed_up(monkeypatch: pytest.MonkeyPatch, warm_up: Callable[[], None]) -> Callable[[], Any]:
    """A worker's start with ``warm_up`` in the place of vLLM's; the plugin is registered."""

    def compile_or_warm_up_model(self: Any) -> float:
        warm_up()
        return 1.5

    monkeypatch.setattr(Worker, "determine_available_memory", lambda self: 4711)
    monkeypatch.setattr(Worker, "compile_or_warm_up_model", compile_or_warm_up_model)
    integration.register()
    started = worker(engine_config())

    def start() -> Any:
        Worker.determine_available_memory(started)
        return Worker.compile_or_warm_up_model(started)

    return start


def in_a_step(*rows: int) -> None:
    with context():
        for count in rows:
            quantize(activation(count, K))


def test_the_worker_says_what_is_served(
    pool: ScalePool, monkeypatch: pytest.MonkeyPatch, log: list[logging.LogRecord]
) -> None:
    """One line a rank. Sites are counted in CUDA graph captures, of which a CPU has none."""
    start = warmed_up(monkeypatch, lambda: in_a_step(5, 4))
    log.clear()
    assert start() == 1.5
    (record,) = log
    assert record.levelno == logging.INFO
    assert record.getMessage().startswith("safealloc: rank 3: serves 0 of 0 NVFP4 scale sites a step")
    assert "2 buffers" in record.getMessage()


def test_growth_after_the_warm_up_is_said_once(
    pool: ScalePool, monkeypatch: pytest.MonkeyPatch, log: list[logging.LogRecord]
) -> None:
    warmed_up(monkeypatch, lambda: in_a_step(5))()
    monkeypatch.setattr(allocator_module, "_workspace_locked", lambda: True)
    log.clear()
    in_a_step(5)
    assert log == []
    in_a_step(6, 7)
    (record,) = log
    assert record.levelno == logging.WARNING
    assert "6 rows, k=80, layout_128x4" in record.getMessage()


@pytest.mark.parametrize("strict", [False, True])
def test_a_worker_starts_whatever_happens_to_us(
    pool: ScalePool, monkeypatch: pytest.MonkeyPatch, log: list[logging.LogRecord], strict: bool
) -> None:
    monkeypatch.setenv("SAFEALLOC_STRICT", "1" if strict else "0")
    monkeypatch.setattr(Worker, "determine_available_memory", lambda self: 4711)
    integration.register()
    log.clear()
    broken = SimpleNamespace(vllm_config=None, device=CPU)
    if strict:
        with pytest.raises(AttributeError):
            Worker.determine_available_memory(broken)
        return
    assert Worker.determine_available_memory(broken) == 4711
    assert [record.levelno for record in log] == [logging.ERROR]


def test_the_default_pool_serves_where_none_is_chosen(plugin: None) -> None:
    _, scales = quantize(activation(5, K))
    assert default_pool("cpu").spec(scales) == ScaleSpec(5, K, L128)
    x_fp4, scales = quantize(activation(40, K))
    rows = reference.dequantize(x_fp4, scales.view(torch.uint8), L128, GLOBAL_SCALE)
    torch.testing.assert_close(rows, activation(40, K).float(), rtol=0.3, atol=0.3)

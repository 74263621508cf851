"""vLLM's quantization and GEMMs in code that Inductor generates, with the options that vLLM sets."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
import torch._dynamo as dynamo
import vllm._custom_ops as ops
from support.vllm_cpu_ops import (
    ALPHA,
    GLOBAL_SCALE,
    KERNELS,
    activation,
    capturing,
    fused_act_quant,
    kernel_and_layer,
    mm_calls,
    padding_is_written,
    vllm_flashinfer,
)
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor import config
from torch._inductor.utils import run_and_get_code
from vllm.model_executor.layers.activation import SiluAndMul

from safealloc import LayoutMismatchError, SafeAllocError, ScalePool, ScaleSpec, SfLayout
from safealloc.integrations import vllm as integration
from safealloc.integrations.vllm import ops as our_ops
from safealloc.integrations.vllm.serve import allocator

N, K = 24, 80
ROWS = (5, 32, 33, 140)

pytestmark = pytest.mark.filterwarnings("ignore:dynamo_pgo force disabled")
modes = pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])


@pytest.fixture(autouse=True)
def as_vllm_sets_it() -> Iterator[None]:
    """Nothing compiled before or after, in memory or on disk."""
    dynamo.reset()
    with config.patch({"enable_auto_functionalized_v2": False, "force_disable_caches": True}):
        yield
    dynamo.reset()


def body(sources: list[str]) -> str:
    """The generated wrapper's function."""
    (source,) = sources
    return source[source.index("def call(") : source.index("runner = Runner")]


def compiled_code(function: Callable[..., Any], *arguments: Any, **options: Any) -> tuple[Any, str]:
    """The result, and the body of the generated wrapper."""
    result, sources = run_and_get_code(torch.compile(function, fullgraph=True, **options), *arguments)
    return result, body(sources)


def buffers_of(code: str, op: str) -> list[str]:
    """Names of the outputs of an op in generated code, and of views of them."""
    names = re.findall(rf"(\w+) = torch\.ops\.safealloc\.{op}\.default\(", code)
    for target, value in re.findall(r"^\s+(\w+) = (.+)$", code, flags=re.MULTILINE):
        views = (rf"{name}(\[\d\])?|(torch\.ops\.aten\.view\.dtype|reinterpret_tensor)\({name}, .*" for name in names)
        if any(re.fullmatch(view, value) for view in views):
            names.append(target)
    return names


def check_not_reused(code: str, op: str, sites: int) -> None:
    """There are as many calls as sites, and no output is copied or reused for a temporary."""
    assert code.count(f"torch.ops.safealloc.{op}.default(") == sites
    found = buffers_of(code, op)
    assert len(found) >= sites
    for name in found:
        assert not re.search(rf"= {name}; +del {name}  # reuse", code), code
        assert not re.search(rf"\b{name}\b.*clone|clone.*\b{name}\b|copy_\({name}\b", code), code


# --- linear layers ----------------------------------------------------------------------------------------------------


INFERENCE = [(name, torch.inference_mode) for name in KERNELS]


@pytest.mark.parametrize(("name", "mode"), [*INFERENCE, ("trtllm", torch.no_grad), ("cutlass", torch.no_grad)])
def test_compiled_linear_kernels_give_the_results_of_eager_ones(
    pool: ScalePool, plugin: None, name: str, mode: Callable[[], AbstractContextManager[None]]
) -> None:
    """With a dynamic number of rows, in buffers of the pool.

    For trtllm it compiles twice, since vLLM's rule for 8x4 depends on the rows.
    """
    kernel, layer = kernel_and_layer(name, N, K)

    def model(x: Tensor) -> Tensor:
        return kernel.apply_weights(layer, x * 2) + 1

    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for rows in ROWS:
        x = activation(rows, K)
        with mode():
            expected = model(x)
            dynamo.mark_dynamic(x, 0)
            assert torch.equal(compiled(x), expected)
        is_8x4 = name == "trtllm" and rows <= 32
        wider = 96 if name in ("cutlass", "cudnn", "vllm-cutlass") else None
        spec = None if is_8x4 else ScaleSpec(rows, K, SfLayout.layout_128x4, wider)  # 8x4 is FlashInfer's
        assert [call.spec for call in mm_calls[-2:]] == [spec, spec]
    assert counter.frame_count == (2 if name == "trtllm" else 1)
    assert pool.verify() == pool.stats().buffers
    assert pool.stats().live == 0


@modes
def test_compiled_linear_kernels_give_the_bits_of_vllms(
    pool: ScalePool, mode: Callable[[], AbstractContextManager[None]]
) -> None:
    """With the plugin nobody writes padding; without it vLLM's quantizer does."""
    kernel, layer = kernel_and_layer("cutlass", N, K)

    def model(x: Tensor) -> Tensor:
        return kernel.apply_weights(layer, x * 2) + 1

    with padding_is_written():
        plain = {rows: model(activation(rows, K)) for rows in ROWS}
    integration.register()
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    with mode():
        for rows, expected in plain.items():
            assert torch.equal(compiled(activation(rows, K)), expected)


@pytest.mark.parametrize("dynamic", [True, False])
def test_compiled_code_reads_no_stale_memory(pool: ScalePool, plugin: None, stale: None, dynamic: bool) -> None:
    kernel, layer = kernel_and_layer("cutlass", N, K)
    compiled = torch.compile(lambda x: kernel.apply_weights(layer, x), fullgraph=True, dynamic=dynamic)
    with torch.inference_mode():
        for _ in range(3):
            assert torch.isfinite(compiled(activation(5, K))).all()
    assert pool.verify() == 1


# --- the generated code -----------------------------------------------------------------------------------------------


def quantize_and_multiply(x: Tensor) -> Tensor:
    x_fp4, scales = ops.scaled_fp4_quant(x, GLOBAL_SCALE)
    return vllm_flashinfer.flashinfer_scaled_fp4_mm(
        x_fp4, WEIGHT, scales, WEIGHT_SCALE, ALPHA, torch.bfloat16, "cutlass"
    )


_, _square = kernel_and_layer("trtllm", K, K)
WEIGHT, WEIGHT_SCALE = _square.weight.data, _square.weight_scale.data


def six_layers(x: Tensor) -> Tensor:
    """Sites with equal arguments, in sequence."""
    for _ in range(6):
        x = quantize_and_multiply(x) * 0.125
    return x


def twice_the_same(x: Tensor) -> tuple[Tensor, Tensor]:
    """Equal calls whose results are alive at the same time."""
    first, second = ops.scaled_fp4_quant(x, GLOBAL_SCALE), ops.scaled_fp4_quant(x * 2, GLOBAL_SCALE)
    return tuple(
        vllm_flashinfer.flashinfer_scaled_fp4_mm(a, WEIGHT, scales, WEIGHT_SCALE, ALPHA, torch.bfloat16, "cutlass")
        for a, scales in (first, second)
    )


@pytest.mark.parametrize(("dynamic", "mode"), [(True, torch.inference_mode), (False, torch.no_grad)])
@pytest.mark.parametrize(("model", "sites"), [(quantize_and_multiply, 1), (six_layers, 6), (twice_the_same, 2)])
def test_inductor_neither_clones_merges_nor_reuses_buffers(
    pool: ScalePool,
    plugin: None,
    model: Callable[[Tensor], Any],
    sites: int,
    dynamic: bool,
    mode: Callable[[], AbstractContextManager[None]],
) -> None:
    x = activation(5, K)
    with mode():
        expected = model(x)
        mm_calls.clear()
        result, code = compiled_code(model, x, dynamic=dynamic)
    check_not_reused(code, "vllm_scales", sites)
    for got, wanted in zip(
        torch.utils._pytree.tree_leaves(result), torch.utils._pytree.tree_leaves(expected), strict=True
    ):
        assert torch.equal(got, wanted)
    assert [call.spec for call in mm_calls] == [ScaleSpec(5, K, SfLayout.layout_128x4)] * sites
    assert pool.stats().buffers <= 2
    assert pool.stats().live == 0


def test_a_temporary_of_the_same_size_does_not_reuse_a_buffer(pool: ScalePool, plugin: None) -> None:
    """The graph has no inputs, which Inductor takes for unaligned on a CPU, and then reuses nothing."""

    def model() -> Tensor:
        x = torch.full((5, 64), 1.5, dtype=torch.bfloat16)
        _, scales = ops.scaled_fp4_quant(x, torch.full((1,), 20.0))
        first = total(scales.view(torch.int32))
        temporary = torch.full((128, 1), 0x7F7F7F7F, dtype=torch.int32) + (first > 1e30).to(torch.int32)
        return first + total(temporary)

    with torch.inference_mode():
        _, code = compiled_code(model)
        check_not_reused(code, "vllm_scales", 1)
        compiled = torch.compile(model, fullgraph=True)
        assert torch.equal(compiled(), compiled())
    assert pool.verify() == 1


library = torch.library.Library("safealloc_vllm_tests", "FRAGMENT")
library.define("total(Tensor t) -> Tensor")  # opaque, so that its argument is in memory
library.impl("total", lambda t: t.view(torch.uint8).float().sum().reshape(1), "CPU")
torch.library.register_fake(
    "safealloc_vllm_tests::total", lambda t: t.new_empty((1,), dtype=torch.float32), lib=library
)
total = torch.ops.safealloc_vllm_tests.total


def test_layers_alternate_between_two_buffers(pool: ScalePool, plugin: None) -> None:
    """A buffer is free after its last use in the compiled code, not when the code returns.

    There are two, since Inductor moves the next allocation, which depends on no tensor, before the GEMM of this layer.
    """
    with torch.inference_mode():
        torch.compile(six_layers, fullgraph=True)(activation(5, K))
    stats = pool.stats()
    assert stats.buffers == stats.misses <= 2
    assert stats.hits == 6 - stats.misses


def test_fused_silu_and_mul_in_compiled_code(pool: ScalePool, plugin: None) -> None:
    kernel, layer = kernel_and_layer("cutlass", N, K)
    producer = fused_act_quant._FUSED_ACT_QUANT[SiluAndMul, kernel.input_quant_key()]

    def model(x: Tensor) -> Tensor:
        return kernel.apply_weights(layer, producer(x * 2, layer))

    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    with torch.inference_mode():
        for rows in (5, 40):
            x = activation(rows, 2 * K)
            assert torch.equal(compiled(x), model(x))
            assert mm_calls[-1].spec == mm_calls[-2].spec == ScaleSpec(rows, K, SfLayout.layout_128x4)
        _, code = compiled_code(model, x)
    check_not_reused(code, "vllm_fused_scales", 1)
    assert pool.verify() == 2


# --- decisions at run time --------------------------------------------------------------------------------------------


def test_one_compilation_serves_decode_and_prefill(pool: ScalePool, plugin: None) -> None:
    """In the same compiled code, vLLM allocates above the largest batch and outside captures."""
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(quantize_and_multiply, backend=counter, fullgraph=True, dynamic=True)
    with torch.inference_mode(), padding_is_written():
        allocator.engine = None
        for captured, rows, served in ((True, 6, True), (True, 7, False), (False, 6, False), (True, 5, True)):
            with capturing(pool, 6) if captured else contextlib.nullcontext():
                expected = quantize_and_multiply(activation(rows, K))
                assert torch.equal(compiled(activation(rows, K)), expected)
            assert (mm_calls[-1].spec is not None) is served
    assert counter.frame_count == 1


def test_compiled_code_refuses_a_wrong_layout_at_run_time(pool: ScalePool, plugin: None) -> None:
    """In compiled code vLLM's rule sets the flag by the rows, and the hooked op compares it with the buffer."""

    def model(x: Tensor) -> Tensor:
        x_fp4, scales = ops.scaled_fp4_quant(x, GLOBAL_SCALE)  # 128x4
        return vllm_flashinfer.flashinfer_scaled_fp4_mm(
            x_fp4, WEIGHT, scales, WEIGHT_SCALE, ALPHA, torch.bfloat16, "trtllm"
        )

    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    with torch.inference_mode():
        assert torch.equal(compiled(activation(40, K)), model(activation(40, K)))
        mm_calls.clear()
        with pytest.raises(LayoutMismatchError, match="written in layout_128x4"):
            compiled(activation(5, K))
    assert mm_calls == []


def test_compiled_code_without_guards_is_right_after_unregistering(pool: ScalePool, stale: None) -> None:
    """VLLM compiles without guards. The op then returns zeros, and nobody writes padding."""
    integration.register()
    counter = CompileCounterWithBackend("inductor")
    no_guards = {"guard_filter_fn": torch.compiler.skip_all_guards_unsafe}
    compiled = torch.compile(quantize_and_multiply, backend=counter, fullgraph=True, dynamic=True, options=no_guards)
    with torch.inference_mode():
        expected = compiled(activation(5, K))
        integration.unregister()
        assert torch.equal(compiled(activation(5, K)), expected)
    assert counter.frame_count == 1
    assert mm_calls[-1].spec is None


def test_compiled_code_with_guards_is_compiled_again_after_unregistering(pool: ScalePool, stale: None) -> None:
    """With vLLM's own memory, whose padding vLLM's own kernel writes."""
    integration.register()
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(quantize_and_multiply, backend=counter, fullgraph=True, dynamic=True)
    with torch.inference_mode(), padding_is_written():
        expected = compiled(activation(5, K))
        assert mm_calls[-1].spec is not None
        integration.unregister()
        assert torch.equal(compiled(activation(5, K)), expected)
    assert counter.frame_count == 2
    assert mm_calls[-1].spec is None


def test_compiled_code_gets_vllms_memory_where_inductor_may_reuse_ours(
    pool: ScalePool, plugin: None, log: list[logging.LogRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a PyTorch without the private parts we need: vLLM starts nevertheless, and eager code uses the pool."""

    def refuse(op: object) -> None:
        raise SafeAllocError("it has changed")

    monkeypatch.setattr(our_ops, "forbid_reuse", refuse)
    our_ops.bypassed_in_compiled_code.cache_clear()
    try:
        kernel, layer = kernel_and_layer("cutlass", N, K)
        with padding_is_written(), torch.inference_mode():
            expected = kernel.apply_weights(layer, activation(5, K))
            asked = pool.stats().misses
            compiled = torch.compile(lambda x: kernel.apply_weights(layer, x), fullgraph=True)
            for _ in range(2):
                assert torch.equal(compiled(activation(5, K)), expected)
        assert pool.stats().misses == asked == 1
        assert pool.stats().hits == 0
        (error,) = [record for record in log if record.levelno >= logging.WARNING]
        assert "in compiled code vLLM allocates its own scales: it has changed" in error.getMessage()
    finally:
        our_ops.bypassed_in_compiled_code.cache_clear()


def test_without_the_plugin_no_op_of_ours_is_traced(pool: ScalePool) -> None:
    with torch.inference_mode(), padding_is_written():
        result, code = compiled_code(quantize_and_multiply, activation(5, K))
        assert torch.equal(result, quantize_and_multiply(activation(5, K)))
    assert "safealloc" not in code
    assert pool.stats().misses == 0

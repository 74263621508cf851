"""vLLM's quantization and GEMMs in code that Inductor generates, with the options that vLLM sets."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest
import stand_ins
import torch
import torch._dynamo as dynamo
import vllm._custom_ops as ops
from stand_ins import (
    ALPHA,
    CPU,
    GLOBAL_SCALE,
    KERNELS,
    L8,
    L128,
    activation,
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
from vllm.forward_context import override_forward_context
from vllm.model_executor.layers.activation import SiluAndMul

from safealloc import LayoutMismatchError, SafeAllocError, ScalePool, ScaleSpec
from safealloc.integrations import vllm as integration
from safealloc.integrations.vllm import ops as our_ops
from safealloc.integrations.vllm.allocator import allocator

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
    """Names that the outputs of an op have in generated code: themselves, and views of them."""
    names = re.findall(rf"(\w+) = torch\.ops\.safealloc\.{op}\.default\(", code)
    for target, value in re.findall(r"^\s+(\w+) = (.+)$", code, flags=re.MULTILINE):
        views = (rf"{name}(\[\d\])?|(torch\.ops\.aten\.view\.dtype|reinterpret_tensor)\({name}, .*" for name in names)
        if any(re.fullmatch(view, value) for view in views):
            names.append(target)
    return names


def check_left_alone(code: str, op: str, sites: int) -> None:
    """As many calls as sites, and no output copied, or given to a temporary."""
    assert code.count(f"torch.ops.safealloc.{op}.default(") == sites
    found = buffers_of(code, op)
    assert len(found) >= sites
    for name in found:
        assert not re.search(rf"= {name}; +del {name}  # reuse", code), code
        assert not re.search(rf"\b{name}\b.*clone|clone.*\b{name}\b|copy_\({name}\b", code), code


# --- linear layers ----------------------------------------------------------------------------------------------------


INFERENCE = [(name, torch.inference_mode) for name in KERNELS]


@pytest.mark.parametrize(("name", "mode"), [*INFERENCE, ("trtllm", torch.no_grad), ("cutlass", torch.no_grad)])
def test_linear_kernels_with_dynamic_rows(
    pool: ScalePool, plugin: None, name: str, mode: Callable[[], AbstractContextManager[None]]
) -> None:
    """Results as in eager code, in buffers of the pool; the batch size is decided on at the call.

    Trtllm compiles twice, since vLLM's rule for 8x4 looks at the rows.
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
        assert mm_calls[-1].spec == mm_calls[-2].spec == ScaleSpec(rows, K, L8 if is_8x4 else L128, wider)
    assert counter.frame_count == (2 if name == "trtllm" else 1)
    assert pool.verify() == pool.stats().buffers
    assert pool.stats().live == 0


@modes
def test_compiled_code_is_bitwise_vllms(pool: ScalePool, mode: Callable[[], AbstractContextManager[None]]) -> None:
    """Compiled with the plugin, where nobody writes padding, against plain vLLM, whose quantizer does."""
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
def test_stale_memory_is_not_seen(pool: ScalePool, plugin: None, stale: None, dynamic: bool) -> None:
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
    """Sites with equal arguments, one after the other."""
    for _ in range(6):
        x = quantize_and_multiply(x) * 0.125
    return x


def twice_the_same(x: Tensor) -> tuple[Tensor, Tensor]:
    """Equal calls whose results live at once."""
    first, second = ops.scaled_fp4_quant(x, GLOBAL_SCALE), ops.scaled_fp4_quant(x * 2, GLOBAL_SCALE)
    return tuple(
        vllm_flashinfer.flashinfer_scaled_fp4_mm(a, WEIGHT, scales, WEIGHT_SCALE, ALPHA, torch.bfloat16, "cutlass")
        for a, scales in (first, second)
    )


@pytest.mark.parametrize(("dynamic", "mode"), [(True, torch.inference_mode), (False, torch.no_grad)])
@pytest.mark.parametrize(("model", "sites"), [(quantize_and_multiply, 1), (six_layers, 6), (twice_the_same, 2)])
def test_the_buffer_is_left_alone(
    pool: ScalePool,
    plugin: None,
    model: Callable[[Tensor], Any],
    sites: int,
    dynamic: bool,
    mode: Callable[[], AbstractContextManager[None]],
) -> None:
    """Neither cloned, nor merged with an equal one, nor given to a temporary."""
    x = activation(5, K)
    with mode():
        expected = model(x)
        mm_calls.clear()
        result, code = compiled_code(model, x, dynamic=dynamic)
    check_left_alone(code, "vllm_scales", sites)
    for got, wanted in zip(
        torch.utils._pytree.tree_leaves(result), torch.utils._pytree.tree_leaves(expected), strict=True
    ):
        assert torch.equal(got, wanted)
    assert [call.spec for call in mm_calls] == [ScaleSpec(5, K, L128)] * sites
    assert pool.stats().buffers <= 2
    assert pool.stats().live == 0


def test_temporaries_of_its_size_do_not_get_it(pool: ScalePool, plugin: None) -> None:
    """A CPU shows Inductor's reuse where no tensor comes into the graph: inputs count as unaligned there."""

    def model() -> Tensor:
        x = torch.full((5, 64), 1.5, dtype=torch.bfloat16)
        _, scales = ops.scaled_fp4_quant(x, torch.full((1,), 20.0))
        first = total(scales.view(torch.int32))
        temporary = torch.full((128, 1), 0x7F7F7F7F, dtype=torch.int32) + (first > 1e30).to(torch.int32)
        return first + total(temporary)

    with torch.inference_mode():
        _, code = compiled_code(model)
        check_left_alone(code, "vllm_scales", 1)
        compiled = torch.compile(model, fullgraph=True)
        assert torch.equal(compiled(), compiled())
    assert pool.verify() == 1


library = torch.library.Library("safealloc_vllm_tests", "FRAGMENT")
library.define("total(Tensor t) -> Tensor")  # opaque: its argument has to be in memory
library.impl("total", lambda t: t.view(torch.uint8).float().sum().reshape(1), "CPU")
torch.library.register_fake(
    "safealloc_vllm_tests::total", lambda t: t.new_empty((1,), dtype=torch.float32), lib=library
)
total = torch.ops.safealloc_vllm_tests.total


def test_layers_take_two_buffers_in_turn(pool: ScalePool, plugin: None) -> None:
    """A buffer is free after its last use in the compiled code, not when the code returns.

    Two and not one, since Inductor puts the next site's allocation, which depends on no tensor, before this site's GEMM.
    """
    with torch.inference_mode():
        torch.compile(six_layers, fullgraph=True)(activation(5, K))
    stats = pool.stats()
    assert stats.buffers == stats.misses <= 2
    assert stats.hits == 6 - stats.misses


def test_8x4_in_compiled_code(pool: ScalePool, plugin: None) -> None:
    """The quantization is one op there: the buffer is its second output."""
    kernel, layer = kernel_and_layer("trtllm", K, K)

    def model(x: Tensor) -> Tensor:
        for _ in range(2):
            x = kernel.apply_weights(layer, x) * 0.125
        return x

    x = activation(5, K)
    with torch.inference_mode():
        expected = model(x)
        result, code = compiled_code(model, x)
    assert torch.equal(result, expected)
    check_left_alone(code, "vllm_quantize_8x4", 2)
    assert mm_calls[-1].spec == ScaleSpec(5, K, L8)
    assert pool.stats().buffers == 1


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
            assert mm_calls[-1].spec == mm_calls[-2].spec == ScaleSpec(rows, K, L128)
        _, code = compiled_code(model, x)
    check_left_alone(code, "vllm_scales", 1)
    assert pool.verify() == 2


# --- what is decided at the call --------------------------------------------------------------------------------------


def test_one_compilation_serves_decode_and_prefill(pool: ScalePool, plugin: None) -> None:
    """Above the largest batch vLLM allocates, in the same compiled code; outside of a step too."""
    allocator.begin(stand_ins.engine_config((), max_num_seqs=6, mode=0), CPU)
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(quantize_and_multiply, backend=counter, fullgraph=True, dynamic=True)
    with torch.inference_mode(), padding_is_written():
        for in_a_step, rows, served in ((True, 6, True), (True, 7, False), (False, 6, False), (True, 5, True)):
            with override_forward_context(object() if in_a_step else None):
                expected = quantize_and_multiply(activation(rows, K))
                assert torch.equal(compiled(activation(rows, K)), expected)
            assert (mm_calls[-1].spec is not None) is served
    assert counter.frame_count == 1


def test_a_contradiction_is_refused_at_the_call(pool: ScalePool, plugin: None) -> None:
    """In compiled code vLLM's rule decides the flag from the rows, and its op compares that with the buffer."""

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


def test_compiled_before_it_was_unregistered(pool: ScalePool, stale: None) -> None:
    """Code without guards, as vLLM compiles it, stays right: its op then answers with zeros, and nobody writes padding."""
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


def test_guards_notice_that_it_was_unregistered(pool: ScalePool, stale: None) -> None:
    """Code with guards is compiled anew, with vLLM's own memory, whose padding vLLM's own kernel writes."""
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


def test_an_inductor_that_cannot_be_told_gets_vllms_own_memory(
    pool: ScalePool, plugin: None, log: list[logging.LogRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A PyTorch without the private parts: vLLM starts all the same, and eager code has the pool."""

    def refuse(op: object) -> None:
        raise SafeAllocError("it has changed")

    monkeypatch.setattr(our_ops, "forbid_reuse", refuse)
    our_ops._distrust.cache_clear()
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
        assert "vLLM allocates by itself in compiled code: it has changed" in error.getMessage()
    finally:
        our_ops._distrust.cache_clear()


def test_without_the_plugin_nothing_of_ours_is_traced(pool: ScalePool) -> None:
    with torch.inference_mode(), padding_is_written():
        result, code = compiled_code(quantize_and_multiply, activation(5, K))
        assert torch.equal(result, quantize_and_multiply(activation(5, K)))
    assert "safealloc" not in code
    assert pool.stats().misses == 0

"""vLLM's trtllm linear kernel with our 8x4 quantizer behind FlashInfer's op; both quantizers are stand-ins on a CPU."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch._dynamo as dynamo
from support import quantizer_ops
from support.vllm_cpu_ops import CPU, activation, kernel_and_layer, mm_calls, vllm_flashinfer
from torch import Tensor
from torch._inductor import config
from torch._inductor.utils import run_and_get_code

from safealloc import ScaleSpec, SfLayout
from safealloc.integrations import vllm as integration
from safealloc.integrations.startup import Launch, Site, Steps
from safealloc.integrations.vllm import proof, replace
from safealloc.integrations.vllm.engine import Engine
from safealloc.integrations.vllm.replace import TRTLLM
from safealloc.integrations.vllm.serve import allocator
from safealloc.kernels import reference
from safealloc.ops.backends import QUANTIZERS, Backend

K = 80
LAUNCH = Launch(TRTLLM.name, K, torch.bfloat16)


@pytest.mark.parametrize("name", ["trtllm", "cudnn"])
@pytest.mark.parametrize("case", ["equal", "differs", "slow"])
def test_trtllm_gets_ours_in_captures_where_it_is_equal_and_faster(
    plugin: None, monkeypatch: pytest.MonkeyPatch, name: str, case: str
) -> None:
    ours: list[int] = []

    def quantize(x: Tensor, g: Tensor, data: Tensor, scales: Tensor, layout: SfLayout, *rest: Any) -> None:
        reference.quantize(x, g, data, scales, layout, *rest)
        if layout is SfLayout.layout_8x4:
            assert rest[-1] == "flashinfer"
            ours.append(len(x))
            data[0, 0] ^= case == "differs"

    monkeypatch.setenv("SAFEALLOC_QUANTIZER", "safealloc")
    quantizer_ops.our_kernels(monkeypatch)
    monkeypatch.setitem(QUANTIZERS, "triton", Backend("triton", lambda call: None, quantize))
    kernel, layer = kernel_and_layer(name, 24, K)
    expected = kernel.apply_weights(layer, activation(5, K))
    engine = Engine(Steps({5: 1, 40: 1}), CPU)
    functions = vllm_flashinfer.flashinfer_nvfp4_quantize._backend_fns
    before = functions["cpu"]
    with allocator.working(engine), replace.observed(engine):
        kernel.apply_weights(layer, activation(64, K))
    engine.reserve()
    assert engine.pool is not None
    try:
        is_trtllm = name == "trtllm"
        assert (LAUNCH in engine.launches) == is_trtllm
        assert engine.rows_of(LAUNCH) == [5]
        times = (4.0, 1.0) if case == "slow" else (1.0, 4.0)
        proof.prove_for(engine, lambda *calls: tuple([time] * 4 for time in times))
        assert (engine.saved(LAUNCH, 5) == 3.0) == (is_trtllm and case == "equal")
        ours.clear()
        mm_calls.clear()
        with allocator.working(engine), replace.served(engine):
            assert (functions["cpu"] is not before) == is_trtllm
            assert torch.equal(kernel.apply_weights(layer, activation(5, K)), expected)
        assert functions["cpu"] is before
        served = is_trtllm and case == "equal"
        assert ours == ([5] if served else [])
        if is_trtllm:
            assert mm_calls[-1].spec == (ScaleSpec(5, K, SfLayout.layout_8x4) if served else None)
        assert engine.pool.verify() == engine.pool.stats().buffers
        assert torch.equal(kernel.apply_weights(layer, activation(5, K)), expected)
        assert ours == ([5] if served else [])
    finally:
        engine.close()
    integration.unregister()


def test_compiled_code_keeps_off_the_scales_that_the_op_returns(plugin: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """They may be a pool buffer: a temporary of the same size and dtype gets memory of its own."""
    monkeypatch.setenv("SAFEALLOC_QUANTIZER", "safealloc")
    quantizer_ops.our_kernels(monkeypatch)
    monkeypatch.setitem(QUANTIZERS, "triton", Backend("triton", lambda call: None, reference.quantize))
    assert replace.keep_from_reuse()
    kernel, layer = kernel_and_layer("trtllm", 24, K)
    rows = 8
    padded = SfLayout.layout_8x4.padded_shape(rows, K)

    def model(x: Tensor, seed: Tensor) -> tuple[Tensor, Tensor]:
        y = kernel.apply_weights(layer, x * 2) + 1
        temporary = torch.flip(seed + 1, (0,)) | seed  # as large as the scales
        return y, torch.flip(temporary, (0,)).to(torch.int32).sum()

    x, seed = activation(rows, K), torch.full(padded, 3, dtype=torch.uint8)
    expected = model(x, seed)
    engine = Engine(Steps({rows: 1}), CPU)
    engine.launches.add(LAUNCH)
    engine.observe(Site(K, SfLayout.layout_128x4, None), torch.empty(0))
    engine.reserve()
    assert engine.pool is not None
    engine.saved = lambda launch, number: 1.0
    dynamo.reset()
    mm_calls.clear()
    try:
        with (
            config.patch({"enable_auto_functionalized_v2": False, "force_disable_caches": True}),
            allocator.working(engine),
            replace.served(engine),
            torch.inference_mode(),
        ):
            found, (source,) = run_and_get_code(torch.compile(model, fullgraph=True), x, seed)
        assert all(map(torch.equal, found, expected))
        assert mm_calls[-1].spec == ScaleSpec(rows, K, SfLayout.layout_8x4)
        assert "flashinfer_nvfp4_quantize" in source
        (op,) = re.findall(r"(\w+) = torch\.ops\.vllm\.flashinfer_nvfp4_quantize\.default\(", source)
        outputs = re.findall(rf"(\w+) = {op}\[\d\]", source)
        assert len(outputs) == 2
        assert not [name for name in outputs if re.search(rf"= {name}; +del {name}  # reuse", source)]
        assert engine.pool.verify() == engine.pool.stats().buffers
    finally:
        engine.close()
        dynamo.reset()

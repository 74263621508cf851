"""vLLM's own code with our kernels behind its quantization ops, and without: what matches, the bits, and what stays.

Ops and kernels are stand-ins on a CPU, so that this tests which ops are replaced, matched and restored.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch._dynamo as dynamo
from support import quantizer_ops, vllm_cpu_moe_ops, vllm_cpu_ops
from support.quantizer_ops import registrations
from support.vllm_cpu_moe_ops import Layer
from support.vllm_cpu_ops import CPU, activation, kernel_and_layer, mm_calls, ops
from support.vllm_fusion import (
    ARGUMENTS,
    ROWS,
    K,
    calls,
    op_named,
    pattern_pass,
    quantize_and_multiply,
    silu_mul,
    trace,
)
from torch import Tensor
from vllm.config import CompilationConfig, CUDAGraphMode
from vllm.v1.worker.gpu_worker import Worker

from safealloc import ScalePool, ScaleSpec, SfLayout
from safealloc.integrations import startup
from safealloc.integrations import vllm as integration
from safealloc.integrations.serve import engine_of
from safealloc.integrations.startup import Launch
from safealloc.integrations.vllm import proof, replace
from safealloc.integrations.vllm.engine import Engine
from safealloc.integrations.vllm.replace import DENSE, OPS, SILU
from safealloc.integrations.vllm.serve import allocator
from safealloc.kernels import reference, reference_grouped

WHOLE_K = 128  # which vLLM does not pad
PATTERN = "SiluMulNvfp4QuantPattern"

pytestmark = pytest.mark.filterwarnings("ignore:dynamo_pgo force disabled")


@pytest.fixture(autouse=True)
def ours(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Ours is the reference, with the SiLU of the stand-ins; the calls of it, which starts with none."""
    for module in (reference, reference_grouped):
        monkeypatch.setattr(module, "multiply", vllm_cpu_ops.silu_and_mul)
    monkeypatch.setenv("SAFEALLOC_QUANTIZER", "safealloc")
    quantizer_ops.our_kernels(monkeypatch)
    dynamo.reset()
    yield quantizer_ops.ours
    dynamo.reset()


@pytest.fixture
def engine(pool: ScalePool, plugin: None) -> Engine:
    """In its captures; ours is faster for each launch."""
    assert allocator.engine is not None
    allocator.engine.launches = {Launch(DENSE.name, K, torch.bfloat16)}
    allocator.engine.saved = lambda launch, rows: 1.0
    return allocator.engine


def test_the_ops_have_the_schemas_that_are_known() -> None:
    assert [op.changed() for op in OPS] == [None] * 4
    assert all(op.overload() is not None for op in OPS)


def test_the_fusion_pass_matches_as_before_and_the_fused_op_runs_ours(engine: Engine, ours: list[str]) -> None:
    fusion = pattern_pass(PATTERN)
    off = trace(silu_mul, fusion, *ARGUMENTS)
    expected = off.run(*ARGUMENTS)
    assert (fusion.matches, ours) == (1, [])
    dynamo.reset()
    mm_calls.clear()
    with replace.served(engine):
        on = trace(silu_mul, fusion, *ARGUMENTS)
        assert torch.equal(on.run(*ARGUMENTS)[0], expected[0])
    assert fusion.matches == 2
    assert ours == ["dense"] * 2
    for traced in (off, on):
        assert len(calls(traced.final, op_named(f"_C.{SILU.name}"))) == 1
        assert calls(traced.final, torch.ops._C.scaled_fp4_quant.out) == []
    assert [call.spec for call in mm_calls] == [ScaleSpec(ROWS, K, SfLayout.layout_128x4)] * 2


def test_code_that_was_traced_without_it_runs_ours_in_a_capture_and_the_original_after_it(
    engine: Engine, ours: list[str]
) -> None:
    def model(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        return quantize_and_multiply(x), *silu_mul(x, residual, weight)

    traced = trace(model, pattern_pass(PATTERN), *ARGUMENTS)
    expected = traced.run(*ARGUMENTS)
    with replace.served(engine):
        inside = traced.run(*ARGUMENTS)
    assert ours == ["dense"] * 2
    after = traced.run(*ARGUMENTS)
    assert ours == ["dense"] * 2
    for got in (inside, after):
        assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))


@pytest.mark.parametrize("name", ["cutlass", "cudnn", "vllm-cutlass"])
def test_a_linear_layer_has_the_bits_of_the_original(engine: Engine, ours: list[str], name: str) -> None:
    kernel, layer = kernel_and_layer(name, 24, 128)
    x = activation(5, 128)
    expected = kernel.apply_weights(layer, x)
    with replace.served(engine):
        assert torch.equal(kernel.apply_weights(layer, x), expected)
    assert ours == ["dense"]


def test_padded_n_is_the_originals(engine: Engine, ours: list[str]) -> None:
    x = activation(5, K)
    expected = vllm_cpu_ops.vllm_quantize(x, padded_n=128)
    with replace.served(engine):
        got = vllm_cpu_ops.vllm_quantize(x, padded_n=128)
        linear = vllm_cpu_ops.vllm_quantize(x, is_sf_swizzled_layout=False)
    assert ours == []
    assert linear[1].shape == (5, K // 16)
    assert all(
        torch.equal(one.view(torch.uint8), other.view(torch.uint8)) for one, other in zip(got, expected, strict=True)
    )


@pytest.mark.parametrize("activation_name", ["silu", "relu2_no_mul"])
def test_the_expert_layer_has_the_bits_of_the_original_and_no_stale_scales(
    engine: Engine, ours: list[str], activation_name: str
) -> None:
    layer = Layer(6, 80, 208, activation_name)
    generator = torch.Generator().manual_seed(3)
    steps = [
        (activation(tokens, 208, tokens), torch.randint(6, (tokens, 2), generator=generator, dtype=torch.int32))
        for tokens in (9, 1, 9, 4, 2, 7)
    ]
    for k in (80, 208):
        engine.pool.reserve(18, k, experts=6)
    expected = [layer.run(*step) for step in steps]
    vllm_cpu_moe_ops.stale.clear()
    vllm_cpu_moe_ops.quantized.clear()
    engine.saved = lambda launch, rows: 1.0 if rows > 4 else None  # both kernels in turn
    with replace.served(engine):
        got = [layer.run(*step) for step in steps]
    assert ours == ["grouped"] * 8
    assert len(vllm_cpu_moe_ops.quantized) == 4
    assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))
    assert set(vllm_cpu_moe_ops.stale) == {0}
    assert engine.pool.verify() == 2


CONFIG = SimpleNamespace(
    compilation_config=CompilationConfig(cudagraph_mode=CUDAGraphMode.FULL, cudagraph_capture_sizes=[1, 2, 4]),
    model_config=SimpleNamespace(enforce_eager=False),
    parallel_config=SimpleNamespace(tensor_parallel_size=1, use_ubatching=False),
    scheduler_config=SimpleNamespace(max_num_seqs=64),
    speculative_config=None,
    lora_config=None,
)
"""The fields of a ``VllmConfig`` that the plugin reads."""


class StandIn(SimpleNamespace):
    """A worker."""


class Runner:
    """A model runner of one layer."""

    def __init__(self) -> None:
        self.weight = kernel_and_layer("cutlass", 24, WHOLE_K)

    def step(self, rows: int) -> Tensor:
        kernel, layer = self.weight
        return kernel.apply_weights(layer, activation(rows, WHOLE_K))

    def profile_run(self) -> None:
        self.step(64)

    def capture_model(self) -> list[Tensor]:
        return [self.step(rows) for rows in (4, 2, 1)]


def start(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A worker of which the plugin has hooked vLLM's class, after its start."""
    worker: Any = StandIn(vllm_config=CONFIG, device=CPU, rank=0, model_runner=Runner())
    monkeypatch.setattr(Worker, "determine_available_memory", lambda self: self.model_runner.profile_run())
    monkeypatch.setattr(Worker, "compile_or_warm_up_model", lambda self: self.model_runner.capture_model())
    monkeypatch.setattr(startup, "capturing", lambda: True)
    monkeypatch.setattr(replace.allocator, "_logged", set())
    integration.register()
    Worker.determine_available_memory(worker)
    worker.out = Worker.compile_or_warm_up_model(worker)
    return worker


@pytest.mark.parametrize(
    ("times", "said"),
    [
        ((1.0, 4.0), "quantizers: ours in 3 of 3 sites, 0.01 ms a step less (measured)"),
        ((4.0, 1.0), "quantizers: ours in 0 of 3 sites, 0.00 ms a step less (measured)"),
    ],
)
def test_a_worker_compares_at_start_serves_in_captures_and_says_so(
    monkeypatch: pytest.MonkeyPatch,
    log: list[logging.LogRecord],
    ours: list[str],
    times: tuple[float, float],
    said: str,
) -> None:
    before = registrations()
    monkeypatch.delenv("SAFEALLOC_QUANTIZER")
    expected = start(monkeypatch).out
    integration.unregister()
    assert ours == []
    log.clear()
    monkeypatch.setenv("SAFEALLOC_QUANTIZER", "safealloc")
    monkeypatch.setattr(proof, "graph_times", lambda *given: tuple([time] * 4 for time in times))
    worker = start(monkeypatch)
    engine = engine_of(worker)
    assert engine is not None
    assert engine.launches == {Launch(DENSE.name, WHOLE_K, torch.bfloat16)}
    compared = 3 * 3  # inputs of each row count
    assert len(ours) == compared + (3 if times[0] < times[1] else 0)
    assert all(torch.equal(one, other) for one, other in zip(worker.out, expected, strict=True))
    assert registrations() == before
    assert said in log[-1].getMessage()
    assert [record.levelno for record in log if record.levelno > logging.INFO] == []
    switch = [record.getMessage() for record in log if "without SAFEALLOC_QUANTIZER" in record.getMessage()]
    assert len(switch) == 1
    assert ops.scaled_fp4_quant(activation(1, K), vllm_cpu_ops.GLOBAL_SCALE)[0].shape == (1, K // 2)


def test_a_worker_whose_kernel_is_wrong_keeps_vllms_and_names_it(
    monkeypatch: pytest.MonkeyPatch, log: list[logging.LogRecord], ours: list[str]
) -> None:
    def wrong(x: Tensor, g: Tensor, data: Tensor, *rest: Any) -> None:
        quantizer_ops.run_dense(x, g, data, *rest)
        data[-1, -1] ^= 8

    monkeypatch.setitem(quantizer_ops.QUANTIZERS, "triton", quantizer_ops.Backend("triton", lambda call: None, wrong))
    monkeypatch.setattr(proof, "graph_times", lambda *given: ([1.0] * 4, [4.0] * 4))
    start(monkeypatch)
    assert ours == ["dense"]
    (warning,) = [record.getMessage() for record in log if record.levelno == logging.WARNING]
    assert f"scaled_fp4_quant.out of 1 x {WHOLE_K}, bfloat16: 1 of {WHOLE_K // 2} bytes of the data" in warning
    assert "quantizers: ours in 0 of 3 sites" in log[-1].getMessage()

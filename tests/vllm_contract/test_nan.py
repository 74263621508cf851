"""``SAFEALLOC_NAN=1`` beside vLLM's own code: which layer, row and step the first NaN has.

Ops and kernels are stand-ins on a CPU, which has no graphs: the steps run inside of ``capture_model``, where the ops are
overridden, as a replay runs what was captured there.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support import quantizer_ops
from support.quantizer_ops import registrations
from support.vllm_cpu_ops import CPU, GLOBAL_SCALE, activation, kernel_and_layer
from torch import Tensor, nn
from vllm.config import CompilationConfig, CUDAGraphMode
from vllm.forward_context import override_forward_context
from vllm.model_executor.layers.fused_moe.config import nvfp4_moe_quant_config
from vllm.v1.worker.gpu_worker import Worker

from safealloc import NanError
from safealloc.integrations import startup
from safealloc.integrations import vllm as integration
from safealloc.integrations.serve import engine_of
from safealloc.integrations.vllm import nan, proof, replace

K, BATCH = 128, 8
CONFIG = SimpleNamespace(
    compilation_config=CompilationConfig(cudagraph_mode=CUDAGraphMode.FULL, cudagraph_capture_sizes=[BATCH]),
    model_config=SimpleNamespace(enforce_eager=False),
    parallel_config=SimpleNamespace(tensor_parallel_size=1, use_ubatching=False),
    scheduler_config=SimpleNamespace(max_num_seqs=64),
    speculative_config=None,
    lora_config=None,
)


class Context(SimpleNamespace):
    """A forward context, of which there are weak references."""


class Model(nn.Module):
    """Linear layers one after the other; what each is handed is planted."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        self.kernels = []
        for _ in range(4):
            kernel, layer = kernel_and_layer.__wrapped__("cutlass", K, K)  # not the same one for all
            layer.input_global_scale_inv = nn.Parameter(GLOBAL_SCALE.clone().reshape(()), requires_grad=False)
            self.kernels.append(kernel)
            self.layers.append(nn.ModuleDict({"down_proj": layer}))

    def forward(self, places: dict[tuple[int, int, int], float]) -> None:
        for number, (kernel, layer) in enumerate(zip(self.kernels, self.layers, strict=True)):
            x = activation(BATCH, K)
            for (of, row, column), value in places.items():
                if of == number:
                    x[row, column] = value
            with override_forward_context(Context(batch_descriptor=SimpleNamespace(num_tokens=BATCH))):
                kernel.apply_weights(layer["down_proj"], x)


class Runner:
    def __init__(self, plan: Callable[[Any], None]) -> None:
        self.model, self.plan = Model(), plan
        self.worker: Any = None
        self.places: dict[tuple[int, int, int], float] = {}

    def profile_run(self) -> None:
        self.model({})

    def capture_model(self) -> None:
        self.plan(self.worker)

    def execute_model(self, scheduler_output: Any, intermediate_tensors: Any) -> None:
        self.model(self.places)


class StandIn(SimpleNamespace):
    """A worker."""

    def step(self, places: dict[tuple[int, int, int], float] | None = None, tokens: int = BATCH) -> None:
        self.model_runner.places = places or {}
        Worker.execute_model(self, SimpleNamespace(total_num_scheduled_tokens=tokens))


@pytest.fixture(params=["vllm", "safealloc"])
def start(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Callable[..., Any]:
    """Starts a worker whose captures run ``plan``; with vLLM's quantizers, and with ours."""
    monkeypatch.setenv("SAFEALLOC_NAN", "1")
    monkeypatch.setenv("SAFEALLOC_QUANTIZER", request.param)
    if request.param == "safealloc":
        our_kernels(monkeypatch)
    monkeypatch.setattr(proof, "graph_times", lambda *given: ([1.0] * 4, [4.0] * 4))
    monkeypatch.setattr(startup, "capturing", lambda: True)
    monkeypatch.setattr(Worker, "determine_available_memory", lambda self: self.model_runner.profile_run())
    monkeypatch.setattr(Worker, "compile_or_warm_up_model", lambda self: self.model_runner.capture_model())
    monkeypatch.setattr(Worker, "execute_model", execute_model)

    def run(plan: Callable[[Any], None]) -> Any:
        worker: Any = StandIn(vllm_config=CONFIG, device=CPU, rank=0, model_runner=Runner(plan))
        worker.model_runner.worker = worker
        integration.register()
        Worker.determine_available_memory(worker)
        Worker.compile_or_warm_up_model(worker)
        return worker

    return run


def execute_model(self: Any, scheduler_output: Any) -> None:
    self.model_runner.execute_model(scheduler_output, None)


def our_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of the tests of replacements, with what ours does on a GPU: it tests its input as it goes."""
    quantizer_ops.our_kernels(monkeypatch)
    row = quantizer_ops.QUANTIZERS["triton"]

    def run(x: Tensor, *given: Any, nan: Tensor | None = None) -> None:
        row.run(x, *given)
        if nan is not None:
            watching().note(x, nan)

    monkeypatch.setitem(quantizer_ops.QUANTIZERS, "triton", quantizer_ops.Backend("triton", lambda call: None, run))


def watching() -> Any:
    engine = replace.allocator.engine
    assert engine is not None
    return nan.of(engine)


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "safealloc.pool"]


@pytest.mark.parametrize(
    ("places", "said"),
    [
        ({(2, 3, 17): math.nan}, "first NaN in layers.2.down_proj, row 3 of 8, column 17, step 5, "),
        (
            {(1, 4, column): math.nan for column in range(K)},
            "first NaN in layers.1.down_proj, row 4 of 8, column 0, step 5, ",
        ),
        ({(3, 0, 0): math.nan, (1, 5, 9): math.nan}, "first NaN in layers.1.down_proj, row 5 of 8, column 9, step 5, "),
        ({(0, 6, 2): -math.inf}, "first infinity in layers.0.down_proj, row 6 of 8, column 2, step 5, "),
    ],
    ids=["element", "row", "two layers", "infinity"],
)
def test_a_planted_one_is_named(
    start: Callable[..., Any], caplog: pytest.LogCaptureFixture, places: dict[tuple[int, int, int], float], said: str
) -> None:
    def plan(worker: Any) -> None:
        for _ in range(4):
            worker.step()
        worker.step(places)
        assert warnings_of(caplog) == []
        for _ in range(3):
            worker.step()

    before = registrations()
    start(plan)
    (line,) = warnings_of(caplog)
    assert line.startswith(said)
    assert registrations() == before


def test_clean_steps_and_dead_rows_name_nothing(start: Callable[..., Any], caplog: pytest.LogCaptureFixture) -> None:
    def plan(worker: Any) -> None:
        for _ in range(20):
            worker.step()
        worker.step({(1, 5, 3): math.nan}, tokens=5)
        worker.step()

    worker = start(plan)
    engine = engine_of(worker)
    assert engine is not None
    assert nan.of(engine) is not None
    assert warnings_of(caplog) == []


def test_strict_raises_at_the_next_step(start: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAFEALLOC_STRICT", "1")

    def plan(worker: Any) -> None:
        worker.step({(1, 5, 3): math.nan})
        with pytest.raises(NanError, match=r"layers\.1\.down_proj, row 5 of 8") as raised:
            worker.step()
        assert (raised.value.first.step, raised.value.first.batch) == (1, BATCH)

    start(plan)


def test_global_scales_of_experts_name_their_layer() -> None:
    layer = nn.Module()
    scales = [torch.full((6,), float(number)) for number in range(6)]
    a1, a2, w1, w2, alpha1, alpha2 = scales
    layer.quant_method = SimpleNamespace()
    layer.moe_quant_config = nvfp4_moe_quant_config(alpha1, alpha2, a1, a2, w1, w2)
    model = nn.Module()
    model.experts = layer
    named: dict[int, str] = {}
    watch = SimpleNamespace(name_layers=named.update)
    nan.name_layers(SimpleNamespace(pool=SimpleNamespace(nan=watch)), SimpleNamespace(model=model))  # type: ignore[arg-type]
    assert [named.get(one.data_ptr()) for one in (a1, a2)] == ["experts"] * 2


def test_without_it_nothing_is_overridden(
    start: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, log: list[logging.LogRecord]
) -> None:
    monkeypatch.delenv("SAFEALLOC_NAN")
    before = registrations()
    inside = []
    worker = start(lambda worker: inside.append(registrations()))
    engine = engine_of(worker)
    assert engine is not None
    assert nan.of(engine) is None
    if not engine.launches:
        assert inside == [before]

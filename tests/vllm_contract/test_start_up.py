"""The plugin in a worker's start-up: what it reads of the configuration, and what it logs."""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from support.vllm_cpu_ops import CPU, activation, engine_config, in_forward_context
from support.vllm_cpu_ops import vllm_quantize as quantize
from vllm.v1.worker.gpu_worker import Worker

from safealloc import ScalePool
from safealloc.integrations import vllm as integration
from safealloc.integrations.vllm import serve
from safealloc.integrations.vllm.serve import allocator
from safealloc.integrations.vllm.startup import Steps

K = 80


def test_steps_are_read_from_a_configuration() -> None:
    assert Steps.of(engine_config((4, 1, 2), max_num_seqs=3)) == Steps((1, 2, 4), 4)
    assert Steps.of(engine_config((1, 2), max_num_seqs=16)) == Steps((1, 2), 16)
    assert Steps.of(engine_config((1, 2), max_num_seqs=16, mode=0)) == Steps((), 16)
    assert Steps.of(engine_config((1, 5, 8), use_ubatching=True)) == Steps((1, 2, 3, 4, 5, 8), 8, copies=2)
    assert Steps.of(engine_config((8,), enable_dbo=True)) == Steps((4, 8), 8, copies=2)
    eager = engine_config()
    eager.model_config.enforce_eager = True
    assert Steps.of(eager) == Steps((), 8)


def test_vllms_configuration_has_the_fields_that_are_read() -> None:
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


def test_a_worker_passes_its_configuration_before_it_measures_memory(
    pool: ScalePool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own method runs and returns what it returns."""
    seen: list[Steps | None] = []

    def determine_available_memory(self: Any) -> int:
        seen.append(allocator.steps)
        return 4711

    monkeypatch.setattr(Worker, "determine_available_memory", determine_available_memory)
    integration.register()
    assert Worker.determine_available_memory(worker(engine_config((1, 2), max_num_seqs=2))) == 4711
    assert seen == [Steps((1, 2), 2)]


def warmed_up(monkeypatch: pytest.MonkeyPatch, warm_up: Callable[[], None]) -> Callable[[], Any]:
    """A worker's start with ``warm_up`` in place of vLLM's; the plugin is registered."""

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
    with in_forward_context():
        for count in rows:
            quantize(activation(count, K))


def test_a_worker_logs_how_many_sites_are_served(
    pool: ScalePool, monkeypatch: pytest.MonkeyPatch, log: list[logging.LogRecord]
) -> None:
    """One line per rank. Sites are counted in CUDA graph captures, which a CPU does not have."""
    start = warmed_up(monkeypatch, lambda: in_a_step(5, 4))
    log.clear()
    assert start() == 1.5
    (record,) = log
    assert record.levelno == logging.INFO
    assert record.getMessage().startswith("safealloc: rank 3: serves 0 of 0 NVFP4 scale sites per step")
    assert "2 buffers" in record.getMessage()


def test_growth_after_the_warm_up_is_logged_once(
    pool: ScalePool, monkeypatch: pytest.MonkeyPatch, log: list[logging.LogRecord]
) -> None:
    warmed_up(monkeypatch, lambda: in_a_step(5))()
    monkeypatch.setattr(serve, "workspace_locked", lambda: True)
    log.clear()
    in_a_step(5)
    assert log == []
    in_a_step(6, 7)
    (record,) = log
    assert record.levelno == logging.WARNING
    assert "6 rows, k=80, layout_128x4" in record.getMessage()


@pytest.mark.parametrize("strict", [False, True])
def test_a_worker_starts_in_spite_of_our_errors_unless_strict(
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

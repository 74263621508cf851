"""The plugin in a worker's start-up: what it reads of vLLM's configuration, by vLLM's own rules, and what it logs."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import vllm._custom_ops as ops
from support.vllm_cpu_ops import CPU
from vllm.config import CompilationConfig, CUDAGraphMode
from vllm.v1.cudagraph_dispatcher import CudagraphDispatcher
from vllm.v1.worker.gpu.cudagraph_utils import CudaGraphManager
from vllm.v1.worker.gpu_worker import Worker

from safealloc.integrations import vllm as integration
from safealloc.integrations.serve import engine_of
from safealloc.integrations.vllm.sizes import capture_sizes, captured_rows

K = 80
MODES = [mode for mode in CUDAGraphMode if mode is not CUDAGraphMode.NONE]


def config(mode: CUDAGraphMode, sizes: tuple[int, ...], max_num_seqs: int = 64) -> SimpleNamespace:
    """The fields of a ``VllmConfig`` that vLLM's own rules read; its compilation part is vLLM's class."""
    compilation = CompilationConfig(cudagraph_mode=mode, cudagraph_capture_sizes=list(sizes))
    compilation.max_cudagraph_capture_size = max(sizes)
    return SimpleNamespace(
        compilation_config=compilation,
        model_config=SimpleNamespace(enforce_eager=False),
        parallel_config=SimpleNamespace(tensor_parallel_size=1, use_ubatching=False),
        scheduler_config=SimpleNamespace(max_num_seqs=max_num_seqs),
        speculative_config=None,
        lora_config=None,
        cache_config=SimpleNamespace(use_kda_recoverssm=False),
    )


@pytest.mark.parametrize("query", range(1, 9))
@pytest.mark.parametrize("largest", [512, 1024])
@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)
def test_v1_rows_are_those_of_vllms_dispatcher(mode: CUDAGraphMode, largest: int, query: int) -> None:
    given = config(mode, capture_sizes(largest))
    ours = captured_rows(given, query, second_runner=False)
    if mode.decode_mode() == CUDAGraphMode.FULL:
        given.compilation_config.adjust_cudagraph_sizes_for_spec_decode(query)
    dispatcher: Any = CudagraphDispatcher.__new__(CudagraphDispatcher)
    vars(dispatcher).update(vllm_config=given, compilation_config=given.compilation_config)
    rows: set[int] = set()
    dispatcher._compute_bs_to_padded_graph_size = dispatcher._get_lora_cases = lambda: [0]
    dispatcher._create_padded_batch_descriptor = lambda size, uniform, *lora: _Descriptor(size)
    dispatcher.add_cudagraph_key = lambda mode, descriptor: rows.add(descriptor.num_tokens)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vllm.v1.cudagraph_dispatcher.replace", lambda descriptor, **changed: descriptor)
        dispatcher.initialize_cudagraph_keys(mode, query)
    assert ours == tuple(sorted(rows))


class _Descriptor:
    def __init__(self, num_tokens: int) -> None:
        self.num_tokens = num_tokens


@pytest.mark.parametrize("query", range(1, 9))
@pytest.mark.parametrize("largest", [512, 1024])
@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)
def test_v2_rows_are_those_of_vllms_manager(mode: CUDAGraphMode, largest: int, query: int) -> None:
    given = config(mode, capture_sizes(largest))
    manager: Any = CudaGraphManager.__new__(CudaGraphManager)
    vars(manager).update(
        vllm_config=given, compilation_config=given.compilation_config, cudagraph_mode=mode, decode_query_len=query,
        max_num_reqs=64, varlen_decode=False, ubatch_runner=None, lora_capture_cases=[0], _candidates={}, _capture_descs={},
    )  # fmt: skip
    manager._init_candidates()
    rows = {descriptor.num_tokens for descriptors in manager._capture_descs.values() for descriptor in descriptors}
    assert captured_rows(given, query, second_runner=True) == tuple(sorted(rows))


class Runner:
    """A model runner of one layer."""

    def step(self, rows: int) -> torch.Tensor:
        return ops.create_fp4_scale_tensor(rows, K, CPU, True)

    def profile_run(self) -> None:
        self.step(4096)

    def capture_model(self) -> list[torch.Tensor]:
        return [self.step(rows) for rows in (2, 1)]


def started(monkeypatch: pytest.MonkeyPatch, mode: CUDAGraphMode) -> Any:
    """A worker of which the plugin has hooked vLLM's class, after its start."""
    worker: Any = SimpleNamespace(vllm_config=config(mode, (1, 2)), device=CPU, rank=3, model_runner=Runner())
    monkeypatch.setattr(Worker, "determine_available_memory", lambda self: self.model_runner.profile_run())
    monkeypatch.setattr(Worker, "compile_or_warm_up_model", lambda self: self.model_runner.capture_model() and 1.5)
    integration.register()
    Worker.determine_available_memory(worker)
    assert Worker.compile_or_warm_up_model(worker) == 1.5
    return worker


def test_a_worker_logs_one_line_about_its_captures(
    monkeypatch: pytest.MonkeyPatch, log: list[logging.LogRecord]
) -> None:
    """Sites are counted in CUDA graph captures, which a CPU does not have."""
    started(monkeypatch, CUDAGraphMode.FULL)
    assert [record.levelno for record in log if "sites per step" in record.getMessage()] == [logging.INFO]
    assert "safealloc: rank 3: serves 0 of 0 FP4 scale sites per step" in log[-1].getMessage()


def test_an_eager_worker_has_no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    assert engine_of(started(monkeypatch, CUDAGraphMode.NONE)) is None


@pytest.mark.parametrize("strict", [False, True])
def test_a_worker_starts_in_spite_of_our_errors_unless_strict(
    monkeypatch: pytest.MonkeyPatch, log: list[logging.LogRecord], strict: bool
) -> None:
    monkeypatch.setenv("SAFEALLOC_STRICT", "1" if strict else "0")
    monkeypatch.setattr(Worker, "determine_available_memory", lambda self: 4711)
    integration.register()
    log.clear()
    broken: Any = SimpleNamespace(vllm_config=None, device=CPU, model_runner=Runner())
    if strict:
        with pytest.raises(AttributeError):
            Worker.determine_available_memory(broken)
        return
    assert Worker.determine_available_memory(broken) == 4711
    assert [record.levelno for record in log] == [logging.ERROR]

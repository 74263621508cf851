"""Errors in the plugin: each kind is logged once and called what it is, and none reaches vLLM unless it is asked for."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch

from safealloc import PoolClosedError, PoolExhaustedError, ScalePool
from safealloc.integrations import startup
from safealloc.integrations.startup import Steps
from safealloc.integrations.vllm import hooks, worker
from safealloc.integrations.vllm.engine import Engine
from safealloc.integrations.vllm.serve import Allocator
from safealloc.pool import driver
from safealloc.pool.contents import spec_of

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _not_strict(monkeypatch):
    monkeypatch.delenv("SAFEALLOC_STRICT", raising=False)


@pytest.fixture
def log(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    caplog.set_level(logging.DEBUG, "vllm.safealloc")
    return caplog


@pytest.fixture
def allocator():
    made = Allocator()
    made.enabled = True
    made.vllm_scale_tensor = lambda m, n, device, swizzled: torch.zeros((128, n // 64), dtype=torch.int32)
    return made


@pytest.fixture
def engine(monkeypatch):
    """In a capture."""
    monkeypatch.setattr(startup, "capturing", lambda: True)
    made = Engine(Steps({8: 1}), CPU)
    with ScalePool("cpu") as pool:
        made.pool = pool
        yield made


def raiser(error):
    def fail(*given, **named):
        raise error

    return fail


def ask(allocator, engine, rows=5):
    """One call in a capture; whether vLLM answered it."""
    allocator.engine = engine  # ``working`` would use the pool
    try:
        return spec_of(allocator.scales(rows, 64, CPU, None)) is None
    finally:
        allocator.engine = None


CUDA_ERROR = RuntimeError("CUDA error: an illegal memory access was encountered")


def test_each_kind_of_error_is_logged_once(allocator, engine, log, monkeypatch):
    for error in (PoolClosedError("closed"), PoolExhaustedError("full"), CUDA_ERROR, ValueError("odd")) * 3:
        monkeypatch.setattr(engine, "pool", SimpleNamespace(acquire=raiser(error), captures=lambda: 0))
        assert ask(allocator, engine)
    kinds = [record.getMessage().partition("logged once: ")[2].partition(":")[0] for record in log.records]
    assert kinds == ["PoolClosedError", "PoolExhaustedError", "RuntimeError", "ValueError"]


def test_a_cuda_error_is_not_called_a_pool_error(allocator, engine, log, monkeypatch):
    monkeypatch.setattr(
        engine, "pool", SimpleNamespace(acquire=raiser(CUDA_ERROR), trim=lambda **_: 0, captures=lambda: 0)
    )
    assert ask(allocator, engine)
    (record,) = log.records
    assert record.getMessage().startswith(
        "safealloc: an error was met; vLLM allocates instead; logged once: RuntimeError: CUDA"
    )
    assert dict(engine.captured().bypassed) == {"an error that is not the pool's": 1}
    monkeypatch.setattr(
        engine, "pool", SimpleNamespace(acquire=raiser(PoolClosedError("x")), trim=lambda **_: 0, captures=lambda: 0)
    )
    assert ask(allocator, engine)
    assert dict(engine.captured().bypassed) == {"pool error": 1}
    assert "the pool failed" in log.records[-1].getMessage()


@pytest.mark.parametrize("account", ["observe", "count", "observe_grouped"])
def test_an_error_in_the_accounts_does_not_reach_vllm_unless_strict(allocator, engine, log, monkeypatch, account):
    monkeypatch.setattr(engine, account, raiser(RuntimeError("no such luck")))
    if account != "count":
        engine.pool = None  # in the profile run

    def call():
        if account == "observe_grouped":
            offsets = torch.tensor([0, 5], dtype=torch.int32)
            allocator.engine = engine
            return allocator.grouped_scales(5, 64, 1, offsets, offsets) is not None
        return ask(allocator, engine) == (account == "observe")

    for _ in range(2):
        assert call()
    (record,) = log.records
    assert "the line after the captures may be wrong; logged once: RuntimeError: no such luck" in record.getMessage()
    monkeypatch.setenv("SAFEALLOC_STRICT", "1")
    with pytest.raises(RuntimeError, match="no such luck"):
        call()
    allocator.engine = None


def test_an_error_while_the_line_is_made_does_not_reach_vllm(allocator, engine, log, monkeypatch):
    monkeypatch.setattr(hooks, "allocator", allocator)
    monkeypatch.setattr(engine, "captured", raiser(RuntimeError("no such luck")))
    fake = SimpleNamespace(_safealloc_engine=engine, model_runner=SimpleNamespace(capture_model=lambda: None))
    hook = []
    patches = SimpleNamespace(wrap=lambda holder, name, around: hook.append(around))
    module = SimpleNamespace(Worker=object)
    hooks.HOOKS[hooks.targets.WARM_UP](patches, module, "Worker.compile_or_warm_up_model")
    assert hook[0](lambda self: 1.5, fake) == 1.5
    assert "no such luck" in log.records[-1].getMessage()


# --- what is counted --------------------------------------------------------------------------------------------------


def test_fused_plain_and_grouped_sites_of_a_step_are_counted_apart(allocator, engine):
    allocator.engine = engine
    for fused in (True, False, False, True, False):
        allocator.scales(5, 64, CPU, None, fused)
    offsets = torch.tensor([0, 5], dtype=torch.int32)
    allocator.grouped_scales(5, 64, 1, offsets, torch.tensor([0, 128], dtype=torch.int32))
    allocator.scales(9, 64, CPU, None, fused=True)  # above the largest captured batch
    allocator.engine = None
    sites = engine.captured()
    assert (sites.served, sites.fused, sites.grouped) == (6, 2, 1)
    assert dict(sites.bypassed) == {startup.ABOVE_MAX_ROWS: 1}


def test_graphs_without_a_forward_context_are_counted_by_capture(allocator, engine, monkeypatch):
    """Encoder graphs: ten of them with three sites each are no step with thirty."""

    class Capture:
        """A CUDA graph capture."""

    captures = [Capture() for _ in range(10)]
    monkeypatch.setattr(worker, "forward_context", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=7))
    allocator.engine = engine
    for capture in captures:
        monkeypatch.setattr(driver, "under_way", lambda stream, capture=capture: capture)
        for _ in range(3):
            allocator.scales(5, 64, CPU, None)
    allocator.engine = None
    assert engine.captured().served == 3

"""The guard's safe point around vLLM's own ``Worker.execute_model``: there with ``SAFEALLOC_VERIFY``, and gone without."""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import stand_ins
import torch
import vllm.envs
import vllm.v1.worker.gpu_worker
from test_register import LOADED, run
from vllm.v1.worker.gpu_worker import Worker

from safealloc import PaddingCorruptionError, ScalePool, use_pool
from safealloc.integrations import vllm as integration
from safealloc.integrations.vllm import plugin, targets
from safealloc.integrations.vllm.allocator import allocator
from safealloc.pool.guard import REPAIR, VERIFY

K = 80
ORIGINAL = vars(Worker)["execute_model"]


@pytest.fixture
def guarded(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., ScalePool]]:
    """Registers under ``SAFEALLOC_VERIFY=1``, with a default pool that was made so."""
    with contextlib.ExitStack() as stack:

        def make(*, repair: bool = False) -> ScalePool:
            monkeypatch.setenv(VERIFY, "1")
            monkeypatch.setenv(REPAIR, str(int(repair)))
            pool = stack.enter_context(use_pool(stack.enter_context(ScalePool("cpu"))))
            integration.register()
            return pool

        yield make


class Steps:
    """What vLLM's own ``execute_model`` needs of a worker for a step without tokens of its first rank."""

    use_v2_model_runner = False

    def __init__(self, step: Callable[[], None] = lambda: None) -> None:
        self._pp_send_work: list[Any] = []
        self.model_runner = SimpleNamespace(execute_model=self._execute)
        self.ran: list[Any] = []
        self.step = step

    def annotate_profile(self, scheduler_output: Any) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def _execute(self, scheduler_output: Any, intermediate_tensors: Any) -> None:
        assert torch.is_inference_mode_enabled()
        assert intermediate_tensors is None
        self.ran.append(scheduler_output)
        self.step()


NOTHING = SimpleNamespace(total_num_scheduled_tokens=0)


def replays(pool: ScalePool) -> None:
    """What a graph's node does: look at all that graphs hold."""
    assert pool._guard is not None
    for buffer, watched in pool._guard._watched.items():
        pool._guard._check(buffer, watched.slot)


def dirtied(pool: ScalePool) -> None:
    """A quantization of vLLM's, after which somebody writes the last padding byte."""
    _, scales = stand_ins.vllm_quantize(stand_ins.activation(5, K))
    assert pool.spec(scales) is not None
    scales.view(torch.uint8).view(-1)[stand_ins.L128.offsets(128, 128)[127, 7]] = 0x38
    del scales
    replays(pool)


@pytest.mark.parametrize(("setting", "hooked"), [(None, False), ("", False), ("0", False), ("1", True), ("50", True)])
def test_steps_are_hooked_with_the_guard_only(
    pool: ScalePool, monkeypatch: pytest.MonkeyPatch, setting: str | None, hooked: bool
) -> None:
    """Which changes no compiled code, and so not where vLLM caches it."""
    integration.register()
    without = vllm.envs.compile_factors()
    integration.unregister()
    if setting is not None:
        monkeypatch.setenv(VERIFY, setting)
    integration.register()
    assert (vars(Worker)["execute_model"] is not ORIGINAL) == hooked
    registered = plugin.registered()
    assert registered is not None
    assert (targets.STEP.name in registered) == hooked
    assert vllm.envs.compile_factors() == without
    integration.unregister()
    assert vars(Worker)["execute_model"] is ORIGINAL


def test_it_is_called_as_it_was(guarded: Callable[..., ScalePool]) -> None:
    before = list(inspect.signature(ORIGINAL).parameters)
    guarded()
    assert list(inspect.signature(Worker.execute_model).parameters) == before


@pytest.mark.parametrize("old_body", ["def execute_model(", "self, scheduler_output: "])
def test_a_step_that_vllm_has_changed_is_left_alone(
    pool: ScalePool, monkeypatch: pytest.MonkeyPatch, log: list[logging.LogRecord], old_body: str
) -> None:
    """It is said where it matters only."""
    found = targets.installed()
    assert found is not None
    version, source = found

    def changed(name: str) -> str | None:
        text = source(name)
        new = {
            "def execute_model(": "def execute_step(",
            "self, scheduler_output: ": "self, wait: bool, scheduler_output: ",
        }
        if name == targets.STEP.module and text is not None:
            assert old_body in text
            return text.replace(old_body, new[old_body])
        return text

    monkeypatch.setattr(targets, "installed", lambda: (version, changed))
    integration.register()
    assert [record.levelno for record in log] == [logging.INFO]
    integration.unregister()
    log.clear()
    monkeypatch.setenv(VERIFY, "1")
    integration.register()
    assert vars(Worker)["execute_model"] is ORIGINAL
    (warning,) = [record for record in log if record.levelno >= logging.WARNING]
    assert f"is left as it is at: {targets.STEP.name} (" in warning.getMessage()


def test_one_safe_point_a_step(guarded: Callable[..., ScalePool], monkeypatch: pytest.MonkeyPatch) -> None:
    pool = guarded()
    worker = Steps()
    calls: list[int] = []
    monkeypatch.setattr(pool, "safe_point", lambda: calls.append(len(worker.ran)))
    Worker.execute_model(worker, NOTHING)
    assert calls == []  # nobody has asked for a buffer yet
    stand_ins.vllm_quantize(stand_ins.activation(5, K))
    calls.clear()  # of that acquire
    assert Worker.execute_model(worker, NOTHING) is None
    assert Worker.execute_model(worker, scheduler_output=NOTHING) is None
    assert worker.ran == [NOTHING] * 3
    assert calls == [1, 2]


def test_a_dirty_byte_is_raised_at_the_next_step(
    guarded: Callable[..., ScalePool], log: list[logging.LogRecord]
) -> None:
    pool = guarded()
    worker = Steps(lambda: dirtied(pool))
    log.clear()
    Worker.execute_model(worker, NOTHING)
    with pytest.raises(PaddingCorruptionError, match="scale row 127, column 7; last handed to "):
        Worker.execute_model(worker, NOTHING)
    assert len(worker.ran) == 1
    assert log == []
    pool.verify(repair=True)


def test_it_is_healed_at_the_next_step(
    guarded: Callable[..., ScalePool], caplog: pytest.LogCaptureFixture, log: list[logging.LogRecord]
) -> None:
    pool = guarded(repair=True)
    expected = stand_ins.vllm_quantize(stand_ins.activation(5, K))[1].clone()
    log.clear()
    Worker.execute_model(Steps(lambda: dirtied(pool)), NOTHING)
    worker = Steps()
    Worker.execute_model(worker, NOTHING)
    assert len(worker.ran) == 1
    (record,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert "zeroed padding that somebody wrote" in record.getMessage()
    assert "scale row 127, column 7" in record.getMessage()
    assert pool.verify() == pool.stats().buffers
    again = stand_ins.vllm_quantize(stand_ins.activation(5, K))[1]
    assert torch.equal(again.view(torch.uint8), expected.view(torch.uint8))
    assert log == []


def test_a_call_raises_it_too(guarded: Callable[..., ScalePool], log: list[logging.LogRecord]) -> None:
    """Without ``SAFEALLOC_STRICT``: vLLM does not go on with memory of its own."""
    pool = guarded()
    log.clear()
    dirtied(pool)
    with pytest.raises(PaddingCorruptionError):
        stand_ins.vllm_quantize(stand_ins.activation(5, K))
    assert log == []
    assert allocator.pool is pool
    pool.verify(repair=True)


def test_a_spawned_process_has_the_guard_too(tmp_path: Any) -> None:
    """As workers of vLLM's: they inherit the environment, load the plugin, and make their pools themselves."""
    (tmp_path / "spawned_program.py").write_text(
        LOADED
        + """
def guarded():
    import vllm.plugins
    vllm.plugins.load_general_plugins()
    allocate()
    from vllm.v1.worker.gpu_worker import Worker
    pool = default_pool("cpu")
    return "safe point at each step" in plugin.registered(), Worker.execute_model.__module__, pool._guard.every, pool._repair

if __name__ == "__main__":
    import vllm.v1.worker.gpu_worker as imported
    expected = True, imported.__name__, 7, True
    with multiprocessing.get_context("spawn").Pool(1) as processes:
        assert processes.apply(guarded) == guarded() == expected, guarded()
    assert imported.Worker.execute_model.__code__.co_filename.endswith("hooks.py")
"""
    )
    run(
        f"import runpy; runpy.run_path({str(tmp_path / 'spawned_program.py')!r}, run_name='__main__')",
        SAFEALLOC_VERIFY="7",
        SAFEALLOC_VERIFY_REPAIR="1",
        SAFEALLOC_STRICT="1",
    )

"""The guard's safe point before vLLM's own ``Worker.execute_model``, which is hooked with ``SAFEALLOC_VERIFY`` only."""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import vllm.envs
import vllm.v1.worker.gpu_worker
from support.internals import check_all
from support.vllm_cpu_ops import activation, capturing, vllm_quantize
from support.vllm_registration import LOADED, run
from vllm.v1.worker.gpu_worker import Worker

from safealloc import PaddingCorruptionError, ScalePool, SfLayout, use_pool
from safealloc.integrations import vllm as integration
from safealloc.integrations.serve import ENGINE
from safealloc.integrations.vllm import plugin, targets
from safealloc.integrations.vllm.engine import Engine
from safealloc.settings import VERIFY

K = 80
ORIGINAL = vars(Worker)["execute_model"]


@pytest.fixture
def guarded(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., ScalePool]]:
    """Registers under ``SAFEALLOC_VERIFY=1``, with a default pool that checks every handout and replay."""
    with contextlib.ExitStack() as stack:

        def make(*, repair: bool = False) -> ScalePool:
            monkeypatch.setenv(VERIFY, "1")
            pool = stack.enter_context(ScalePool("cpu", verify_every=1, verify_repair=repair))
            stack.enter_context(use_pool(pool))
            engines.append(stack.enter_context(capturing(pool)))
            integration.register()
            return pool

        yield make


engines: list[Engine] = []


class FakeWorker:
    """The worker that vLLM's own ``execute_model`` needs for a step without tokens."""

    use_v2_model_runner = False

    def __init__(self, step: Callable[[], None] = lambda: None) -> None:
        self._pp_send_work: list[Any] = []
        self.model_runner = SimpleNamespace(execute_model=self._execute)
        self.ran: list[Any] = []
        self.step = step
        if engines:
            setattr(self, ENGINE, engines[-1])

    def annotate_profile(self, scheduler_output: Any) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def _execute(self, scheduler_output: Any, intermediate_tensors: Any) -> None:
        assert torch.is_inference_mode_enabled()
        assert intermediate_tensors is None
        self.ran.append(scheduler_output)
        self.step()


NOTHING = SimpleNamespace(total_num_scheduled_tokens=0)


def quantize_and_dirty(pool: ScalePool) -> None:
    """A quantization by vLLM, after which the last padding byte is written."""
    _, scales = vllm_quantize(activation(5, K))
    assert pool.spec(scales) is not None
    scales.view(torch.uint8).view(-1)[SfLayout.layout_128x4.offsets(128, 128)[127, 7]] = 0x38
    del scales
    check_all(pool)


@pytest.mark.parametrize(("setting", "hooked"), [(None, False), ("", False), ("0", False), ("1", True), ("50", True)])
def test_steps_are_hooked_with_safealloc_verify_only(
    pool: ScalePool, monkeypatch: pytest.MonkeyPatch, setting: str | None, hooked: bool
) -> None:
    """That changes no compiled code, so vLLM's cache key stays the same."""
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


def test_the_hooked_step_has_the_parameters_of_the_original(guarded: Callable[..., ScalePool]) -> None:
    before = list(inspect.signature(ORIGINAL).parameters)
    guarded()
    assert list(inspect.signature(Worker.execute_model).parameters) == before


@pytest.mark.parametrize("old_body", ["def execute_model(", "self, scheduler_output: "])
def test_a_step_that_vllm_has_changed_is_not_hooked(
    pool: ScalePool, monkeypatch: pytest.MonkeyPatch, log: list[logging.LogRecord], old_body: str
) -> None:
    """That is logged with ``SAFEALLOC_VERIFY`` only."""
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
    assert f": {targets.STEP.name} (" in warning.getMessage()


def test_one_safe_point_per_step(guarded: Callable[..., ScalePool], monkeypatch: pytest.MonkeyPatch) -> None:
    pool = guarded()
    worker = FakeWorker()
    calls: list[int] = []
    monkeypatch.setattr(pool, "safe_point", lambda: calls.append(len(worker.ran)))
    Worker.execute_model(worker, NOTHING)
    assert calls == [0]
    calls.clear()
    vllm_quantize(activation(5, K))
    calls.clear()  # the one of that acquire
    assert Worker.execute_model(worker, NOTHING) is None
    assert Worker.execute_model(worker, scheduler_output=NOTHING) is None
    assert worker.ran == [NOTHING] * 3
    assert calls == [1, 2]


def test_dirty_padding_is_raised_at_the_next_step(
    guarded: Callable[..., ScalePool], log: list[logging.LogRecord]
) -> None:
    pool = guarded()
    worker = FakeWorker(lambda: quantize_and_dirty(pool))
    log.clear()
    Worker.execute_model(worker, NOTHING)
    with pytest.raises(PaddingCorruptionError, match="scale row 127, column 7; last handed to "):
        Worker.execute_model(worker, NOTHING)
    assert len(worker.ran) == 1
    assert log == []
    pool.verify(repair=True)


def test_dirty_padding_is_repaired_at_the_next_step(
    guarded: Callable[..., ScalePool], caplog: pytest.LogCaptureFixture, log: list[logging.LogRecord]
) -> None:
    pool = guarded(repair=True)
    expected = vllm_quantize(activation(5, K))[1].clone()
    log.clear()
    Worker.execute_model(FakeWorker(lambda: quantize_and_dirty(pool)), NOTHING)
    worker = FakeWorker()
    Worker.execute_model(worker, NOTHING)
    assert len(worker.ran) == 1
    (record,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert "zeroed padding that somebody wrote" in record.getMessage()
    assert "scale row 127, column 7" in record.getMessage()
    assert pool.verify() == pool.stats().buffers
    again = vllm_quantize(activation(5, K))[1]
    assert torch.equal(again.view(torch.uint8), expected.view(torch.uint8))
    assert log == []


def test_dirty_padding_is_raised_at_the_next_call(
    guarded: Callable[..., ScalePool], log: list[logging.LogRecord]
) -> None:
    """Also without ``SAFEALLOC_STRICT``: vLLM does not continue with its own memory."""
    pool = guarded()
    log.clear()
    quantize_and_dirty(pool)
    with pytest.raises(PaddingCorruptionError):
        vllm_quantize(activation(5, K))
    assert log == []
    pool.verify(repair=True)


def test_a_spawned_process_has_the_guard(tmp_path: Any) -> None:
    """Like vLLM's workers: they inherit the environment, load the plugin, and make their own pools."""
    (tmp_path / "spawned_program.py").write_text(
        LOADED
        + """
from support.internals import guard_of, watch_of

def guarded():
    import vllm.plugins
    vllm.plugins.load_general_plugins()
    plugin.register()  # as a worker does when it loads such a model
    allocate()
    from vllm.v1.worker.gpu_worker import Worker
    pool = default_pool("cpu")
    hooked = "safe point at each step" in plugin.registered()
    return hooked, Worker.execute_model.__module__, guard_of(pool).every, watch_of(pool)._repair

if __name__ == "__main__":
    import vllm.v1.worker.gpu_worker as imported
    expected = True, imported.__name__, 7, True
    with multiprocessing.get_context("spawn").Pool(1) as processes:
        assert processes.apply(guarded) == guarded() == expected, guarded()
    assert imported.Worker.execute_model.__code__.co_filename.endswith("patches.py")
"""
    )
    run(
        f"import runpy; runpy.run_path({str(tmp_path / 'spawned_program.py')!r}, run_name='__main__')",
        SAFEALLOC_VERIFY="7",
        SAFEALLOC_VERIFY_REPAIR="1",
        SAFEALLOC_STRICT="1",
    )

"""The pool's guard in a vLLM worker, without vLLM and without a GPU: what it finds reaches the worker from every call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.internals import check_all
from torch import Tensor

from safealloc import PaddingCorruptionError, PoolClosedError, ScalePool, SfLayout, settings
from safealloc.integrations.patches import Patches
from safealloc.integrations.serve import ENGINE
from safealloc.integrations.startup import Steps
from safealloc.integrations.vllm import hooks, ops, targets
from safealloc.integrations.vllm.engine import Engine
from safealloc.integrations.vllm.serve import Allocator
from safealloc.integrations.vllm.worker import logger
from safealloc.pool import default
from safealloc.settings import POISON, STRICT, VERIFY, VERIFY_REPAIR

CPU = torch.device("cpu")
TOPK = 2


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (STRICT, VERIFY, VERIFY_REPAIR, POISON):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(logger, "propagate", True)


def capturing(pool: ScalePool) -> Allocator:
    """An allocator of an engine whose captures are under way."""
    allocator = Allocator()
    allocator.enabled = True
    allocator.engine = Engine(Steps({8: 1}), CPU)
    allocator.engine.pool = pool
    return allocator


@pytest.fixture
def guarded() -> Iterator[Callable[..., tuple[Allocator, ScalePool]]]:
    """Makes an allocator in a step, and the pool that it hands out from, which checks every handout and replay."""
    pools: list[ScalePool] = []

    def make(*, repair: bool = False) -> tuple[Allocator, ScalePool]:
        pool = ScalePool("cpu", verify_every=1, verify_repair=repair)
        pools.append(pool)
        return capturing(pool), pool

    yield make
    for pool in pools:
        pool.close()


def dirty(scales: Tensor, k: int, row: int, column: int) -> None:
    """Write one byte of a buffer in 128x4."""
    scales.view(torch.uint8).view(-1)[SfLayout.layout_128x4.offsets(row + 1, k)[row, column]] = 0x38


def dense(allocator: Allocator) -> Tensor:
    return allocator.scales(5, 64, CPU, None)


def grouped(allocator: Allocator) -> Tensor:
    offsets, tiles = torch.tensor([0, 4, 4, 10]), torch.tensor([0, 128, 128, 256])
    scales = allocator.grouped_scales(10, 64, TOPK, offsets.int(), tiles.int())
    assert scales is not None
    return scales


@pytest.mark.parametrize("site", [dense, grouped])
def test_dirty_padding_is_raised_by_every_kind_of_call(
    guarded: Callable[..., Any], site: Callable[[Allocator], Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    """Other pool errors are logged, and vLLM allocates; after this one tokens may be wrong."""
    allocator, pool = guarded()
    scales = site(allocator)
    assert pool.spec(scales) is not None
    scales.view(torch.uint8).view(-1)[-1] = 0x38
    del scales
    check_all(pool)
    with pytest.raises(PaddingCorruptionError):
        site(allocator)
    assert caplog.records == []
    pool.verify(repair=True)
    assert pool.spec(site(allocator)) is not None


def test_dirty_padding_is_raised_by_the_op_of_compiled_code(
    guarded: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    allocator, pool = guarded()
    monkeypatch.setattr(ops, "allocator", allocator)
    torch.ops.safealloc.vllm_scales(5, 64, CPU, None).view(torch.uint8).view(-1)[-1] = 0x38
    check_all(pool)
    with pytest.raises(PaddingCorruptionError):
        torch.ops.safealloc.vllm_scales(5, 64, CPU, None)
    assert caplog.records == []
    pool.verify(repair=True)


def test_dirty_padding_is_repaired_by_every_kind_of_call(
    guarded: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    allocator, pool = guarded(repair=True)
    dense(allocator).view(torch.uint8).view(-1)[-1] = 0x38
    check_all(pool)
    assert pool.spec(dense(allocator)) is not None
    assert pool.verify() > 0
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_a_debug_pool_raises_dirty_padding_too() -> None:
    with ScalePool("cpu", debug=True) as pool:
        allocator = capturing(pool)
        dense(allocator).view(torch.uint8).view(-1)[-1] = 0x38
        with pytest.raises(PaddingCorruptionError):
            dense(allocator)


# --- the worker's step ------------------------------------------------------------------------------------------------


class Worker:
    """Stands in for vLLM's."""

    def __init__(self) -> None:
        self.steps: list[Any] = []

    def execute_model(self, scheduler_output: Any) -> Any:
        """Run a step."""
        self.steps.append(scheduler_output)
        return self, scheduler_output


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Allocator], Worker]]:
    """Makes a worker with the hook around its steps."""
    patches, original = Patches(), Worker.execute_model

    def make(allocator: Allocator) -> Worker:
        monkeypatch.setattr(hooks, "allocator", allocator)
        hooks.HOOKS[targets.STEP](patches, SimpleNamespace(Worker=Worker), "Worker.execute_model")
        assert Worker.execute_model is not original
        made = Worker()
        setattr(made, ENGINE, allocator.engine)
        return made

    yield make
    patches.restore()
    assert Worker.execute_model is original


def test_a_hooked_step_returns_what_the_original_returns(
    guarded: Callable[..., Any], worker: Callable[[Allocator], Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    allocator, pool = guarded()
    stepping = worker(allocator)
    assert allocator.engine is not None
    allocator.engine.pool = None
    assert stepping.execute_model(1) == (stepping, 1)
    allocator.engine.pool = pool
    dense(allocator)
    calls: list[int] = []
    monkeypatch.setattr(pool, "safe_point", lambda: calls.append(len(stepping.steps)))
    assert stepping.execute_model(2) == (stepping, 2)
    assert stepping.execute_model(scheduler_output=3) == (stepping, 3)
    assert stepping.steps == [1, 2, 3]
    assert calls == [1, 2]  # once per step, before it
    assert Worker.execute_model.__doc__ == "Run a step."


def test_a_hooked_step_raises_what_the_original_raises(
    guarded: Callable[..., Any], worker: Callable[[Allocator], Worker]
) -> None:
    allocator, _ = guarded()
    dense(allocator)
    with pytest.raises(TypeError, match="scheduler_output"):
        worker(allocator).execute_model()  # type: ignore[call-arg]


def test_a_step_of_replays_alone_raises_dirty_padding(
    guarded: Callable[..., Any], worker: Callable[[Allocator], Worker]
) -> None:
    allocator, pool = guarded()
    stepping = worker(allocator)
    scales = dense(allocator)
    dirty(scales, 64, 127, 3)
    stepping.execute_model(1)
    check_all(pool)
    with pytest.raises(PaddingCorruptionError, match="scale row 127, column 3") as raised:
        stepping.execute_model(2)
    assert "last handed to " in str(raised.value)
    assert stepping.steps == [1]
    stepping.execute_model(3)  # raised once
    pool.verify(repair=True)


def test_a_step_of_replays_alone_repairs_dirty_padding(
    guarded: Callable[..., Any], worker: Callable[[Allocator], Worker], caplog: pytest.LogCaptureFixture
) -> None:
    allocator, pool = guarded(repair=True)
    stepping = worker(allocator)
    dirty(dense(allocator), 64, 127, 3)
    check_all(pool)
    assert stepping.execute_model(1) == (stepping, 1)
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "scale row 127, column 3" in record.getMessage()
    assert pool.verify() == 1


def test_other_pool_errors_do_not_stop_a_step(
    guarded: Callable[..., Any],
    worker: Callable[[Allocator], Worker],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    allocator, pool = guarded()
    stepping = worker(allocator)
    dense(allocator).view(torch.uint8).view(-1)[-1] = 0x38
    check_all(pool)
    pool.close()
    for step in range(3):
        assert stepping.execute_model(step) == (stepping, step)
    (record,) = caplog.records
    assert record.levelname == "ERROR"
    assert "PoolClosedError" in record.getMessage()
    monkeypatch.setenv("SAFEALLOC_STRICT", "1")
    with pytest.raises(PoolClosedError):
        stepping.execute_model(3)


def test_dirty_padding_stops_a_workers_start_and_other_errors_do_not(
    guarded: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    _, pool = guarded()
    scales = pool.acquire(5, 64, SfLayout.layout_128x4)
    dirty(scales, 64, 127, 3)

    def fails() -> None:
        raise RuntimeError("no such luck")

    with pytest.raises(PaddingCorruptionError):
        hooks.log_errors(pool.verify)
    hooks.log_errors(fails)
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    pool.verify(repair=True)


def test_a_value_that_is_not_a_number_is_logged_once(
    worker: Callable[[Allocator], Worker], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """No pool is made then, and vLLM allocates."""
    monkeypatch.setenv(VERIFY, "often")
    monkeypatch.setattr(default, "_pools", {})
    allocator = Allocator()
    allocator.enabled = True
    engine = allocator.engine = Engine(Steps({8: 1}), CPU)
    stepping = worker(allocator)
    for step in range(3):
        assert dense(allocator).shape == (128, 1)
        hooks.log_errors(engine.reserve)
        assert stepping.execute_model(step) == (stepping, step)
    (record,) = caplog.records
    assert record.levelname == "ERROR"
    assert "SAFEALLOC_VERIFY must be a whole number" in record.getMessage()


@pytest.mark.parametrize(("text", "expected"), [(None, False), ("", False), ("0", False), ("1", True), ("100", True)])
def test_whether_padding_is_watched(monkeypatch: pytest.MonkeyPatch, text: str | None, expected: bool) -> None:
    if text is not None:
        monkeypatch.setenv(VERIFY, text)
    assert settings.watching() is expected

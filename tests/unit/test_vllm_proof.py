"""The comparison of our quantizers with vLLM's at start-up, with stand-ins for both: wrong and slow ones are found."""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support import quantizer_ops
from torch import Tensor

from safealloc.integrations.startup import GroupedSite, Launch, Steps
from safealloc.integrations.vllm import proof
from safealloc.integrations.vllm.engine import Engine
from safealloc.integrations.vllm.proof import measured_rows, prove, prove_for
from safealloc.integrations.vllm.replace import DENSE, EXPERTS, OPS, SILU, SILU_EXPERTS
from safealloc.ops.backends import GROUPED_QUANTIZERS, QUANTIZERS, Backend
from safealloc.pool.pool import ScalePool

CPU = torch.device("cpu")
DENSE_64 = Launch(DENSE.name, 64, torch.bfloat16)
LAUNCHES = [Launch(op.name, 80, torch.float16, 3 if op.grouped else 0) for op in OPS]


@pytest.fixture(autouse=True)
def ops(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    yield from quantizer_ops.defined(monkeypatch)


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    caplog.set_level(logging.WARNING, "vllm.safealloc")
    return caplog


def taking(ours: float, theirs: float, noise: float = 0.0) -> proof.Timer:
    """A timer by which both take so long, in rounds that differ by up to so much."""

    def timer(*calls: Callable[[], object]) -> tuple[list[float], list[float]]:
        for call in calls:
            call()
        rounds = [noise * number / 10 for number in range(11)]
        return [ours + more for more in rounds], [theirs + more for more in rounds]

    return timer


def wrong(monkeypatch: pytest.MonkeyPatch, change: Callable[[Tensor, Tensor, Tensor], None]) -> None:
    """Plant a kernel of ours that is wrong: ``change`` is given x, data and scales afterwards."""

    def dense(x: Tensor, g: Tensor, data: Tensor, scales: Tensor, *rest: Any) -> None:
        quantizer_ops.run_dense(x, g, data, scales, *rest)
        change(x, data, scales)

    def grouped(x: Tensor, g: Tensor, data: Tensor, scales: Tensor, *rest: Any) -> None:
        quantizer_ops.run_grouped(x, g, data, scales, *rest)
        change(x, data, scales)

    monkeypatch.setitem(QUANTIZERS, "triton", Backend("triton", lambda call: None, dense))
    monkeypatch.setitem(GROUPED_QUANTIZERS, "triton", Backend("triton", lambda call: None, grouped))


@pytest.mark.parametrize("launch", LAUNCHES, ids=lambda launch: launch.op)
def test_ours_serves_where_it_is_equal_and_faster(launch):
    found = prove({launch: [1, 2, 4]}, CPU, taking(1.0, 3.0))
    assert found.differing == []
    assert [finding.rows for finding in found.findings] == [1, 2, 4]
    assert [found.saved(launch, rows) for rows in (1, 2, 3, 4)] == [2.0] * 4
    assert found.saved(launch, 5) is None
    assert found.saved(launch._replace(k=64), 1) is None
    assert found.saved(launch._replace(dtype=torch.bfloat16), 1) is None


@pytest.mark.parametrize("launch", LAUNCHES, ids=lambda launch: launch.op)
def test_a_planted_slow_kernel_does_not_serve(launch):
    assert prove({launch: [1, 2]}, CPU, taking(3.0, 1.0)).saved(launch, 1) is None


def test_faster_by_less_than_the_spread_is_not_faster():
    def saved(noise: float) -> float | None:
        return prove({DENSE_64: [1]}, CPU, taking(1.0, 1.5, noise)).saved(DENSE_64, 1)

    assert saved(0.5) == pytest.approx(0.5)
    assert saved(2.0) is None


def test_rows_between_two_that_were_measured_save_the_less_of_both(monkeypatch):
    times = iter([(1.0, 3.0), (1.0, 2.0), (1.0, 0.5)])
    found = prove({DENSE_64: [2, 8, 32]}, CPU, lambda *calls: taking(*next(times))(*calls))
    assert [found.saved(DENSE_64, rows) for rows in (1, 2, 5, 8, 16, 32)] == [None, 2.0, 1.0, 1.0, None, None]


def _one_data_byte(x: Tensor, data: Tensor, scales: Tensor) -> None:
    data[0, 0] ^= 1


def _one_scale(x: Tensor, data: Tensor, scales: Tensor) -> None:
    scales.view(-1)[0] ^= 1


def _padding(x: Tensor, data: Tensor, scales: Tensor) -> None:
    scales.view(-1)[-1] = 1


def _where(special: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor, Tensor], None]:
    """Wrong where a value of the first row is special."""

    def change(x: Tensor, data: Tensor, scales: Tensor) -> None:
        if special(x[0].float()).any():
            data[0, 0] ^= 1

    return change


PLANTED = {
    "a byte of data": _one_data_byte,
    "a scale": _one_scale,
    "a byte of padding": _padding,
    "NaN": _where(torch.isnan),
    "Inf": _where(torch.isinf),
    "-0": _where(lambda x: (x == 0) & torch.signbit(x)),
    "tiny": _where(lambda x: (x != 0) & (x.abs() < 1e-7)),
    "large": _where(lambda x: x.abs() > 1e4),
}


@pytest.mark.parametrize("planted", list(PLANTED))
def test_a_planted_wrong_kernel_does_not_serve_at_any_row_count(monkeypatch, planted):
    wrong(monkeypatch, PLANTED[planted])
    launch = Launch(DENSE.name, 1008, torch.bfloat16)
    found = prove({launch: [1, 2, 4]}, CPU, taking(1.0, 3.0))
    assert len(found.differing) == 1
    assert [found.saved(launch, rows) for rows in (1, 2, 4)] == [None] * 3
    kind = "scales" if planted in ("a scale", "a byte of padding") else "data"
    assert f"bytes of the {kind}" in found.differing[0].differs


def test_a_kernel_that_is_wrong_at_one_row_count_serves_at_none(monkeypatch):
    wrong(monkeypatch, lambda x, data, scales: _one_scale(x, data, scales) if len(x) == 4 else None)
    found = prove({DENSE_64: [1, 2, 4], DENSE_64._replace(k=80): [1]}, CPU, taking(1.0, 3.0))
    assert [finding.rows for finding in found.differing] == [4]
    assert [found.saved(DENSE_64, rows) for rows in (1, 2, 4)] == [None] * 3
    assert found.saved(DENSE_64._replace(k=80), 1) == 2.0


@pytest.mark.parametrize("launch", LAUNCHES, ids=lambda launch: launch.op)
def test_it_is_found_behind_every_op(monkeypatch, launch):
    wrong(monkeypatch, _one_scale)
    found = prove({launch: [3]}, CPU, taking(1.0, 3.0))
    assert [finding.launch for finding in found.differing] == [launch]


@pytest.mark.parametrize("launch", LAUNCHES[2:], ids=lambda launch: launch.op)
def test_a_kernel_that_takes_the_global_scale_of_another_expert_is_found(monkeypatch, launch):
    def grouped(x: Tensor, g: Tensor, *rest: Any) -> None:
        quantizer_ops.run_grouped(x, g.flip(0), *rest)

    monkeypatch.setitem(GROUPED_QUANTIZERS, "triton", Backend("triton", lambda call: None, grouped))
    assert len(prove({launch: [3]}, CPU, taking(1.0, 3.0)).differing) == 1


def test_a_kernel_that_fails_does_not_serve(monkeypatch):
    def fail(*given: Any) -> None:
        raise RuntimeError("no binary\nand more")

    monkeypatch.setitem(QUANTIZERS, "triton", Backend("triton", lambda call: None, fail))
    found = prove({DENSE_64: [1], LAUNCHES[2]: [1]}, CPU, taking(1.0, 3.0))
    assert [finding.differs for finding in found.differing] == ["it did not run: RuntimeError: no binary"]
    assert found.saved(DENSE_64, 1) is None
    assert found.saved(LAUNCHES[2], 1) == 2.0


def engine_of(*launches: Launch) -> Engine:
    engine = Engine(Steps({1: 1, 3: 1}), CPU)
    engine.launches = set(launches)
    engine.observe_grouped(GroupedSite(80, 3, 2))
    return engine


def test_one_warning_names_every_launch_that_differs(monkeypatch, log):
    wrong(monkeypatch, _one_scale)
    with ScalePool("cpu") as pool:
        engine = engine_of(DENSE_64, LAUNCHES[2])
        engine.pool = pool
        prove_for(engine, taking(1.0, 3.0))
    (message,) = [record.getMessage() for record in log.records]
    assert "scaled_fp4_quant.out of 1 x 64, bfloat16: 1 of 512 bytes of the scales" in message
    assert "scaled_fp4_experts_quant of 2 x 80, float16, 3 experts: 1 of" in message
    assert engine.saved(DENSE_64, 1) is None


def test_an_engine_learns_what_its_rows_save(log):
    with ScalePool("cpu") as pool:
        engine = engine_of(DENSE_64, LAUNCHES[2])
        engine.pool = pool
        prove_for(engine, taking(1.0, 3.0))
    assert [engine.saved(DENSE_64, rows) for rows in (1, 3, 4)] == [2.0, 2.0, None]
    assert [engine.saved(LAUNCHES[2], rows) for rows in (1, 2, 6)] == [None, 2.0, 2.0]  # tokens times experts a token
    assert log.records == []


def test_an_engine_without_launches_is_not_asked(monkeypatch):
    monkeypatch.setattr(proof, "prove", None)  # it would be called
    prove_for(engine_of())


def test_the_memory_is_given_back(monkeypatch):
    made = []
    original = proof.ScalePool

    def pool_of(device: torch.device) -> ScalePool:
        pool = original(device)
        made.append(weakref.ref(pool))
        return pool

    monkeypatch.setattr(proof, "ScalePool", pool_of)
    for fails in (False, True):
        if fails:
            wrong(monkeypatch, _one_scale)
        prove({DENSE_64: [1, 2], LAUNCHES[2]: [4]}, CPU, taking(1.0, 3.0))
    gc.collect()
    assert len(made) == 5
    assert [pool for pool in made if pool() is not None] == []


@pytest.mark.parametrize(
    ("launch", "rows", "measured"),
    [
        (DENSE_64._replace(k=4096), range(1, 41), [1, 2, 4, 8, 16, 17, 32, 40]),  # few blocks up to 16 rows
        (DENSE_64._replace(k=8192), [1, 2, 4, 8, 16, 24, 32, 40, 48], [1, 2, 4, 8, 16, 32, 48]),
        (Launch(SILU.name, 4096, torch.bfloat16), [3, 5, 16, 24, 28], [3, 16, 24, 28]),
        (Launch(SILU_EXPERTS.name, 2048, torch.bfloat16, 256), [8, 24, 32, 40, 48], [8, 32, 40, 48]),
        (Launch(EXPERTS.name, 7168, torch.bfloat16, 256), [8], [8]),
    ],
)
def test_rows_are_measured_at_both_ends_of_each_tiling_and_at_powers_of_two(launch, rows, measured):
    assert measured_rows(launch, rows) == measured

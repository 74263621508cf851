"""Our kernels behind vLLM's quantization ops: which calls they take, and that nothing of them stays.

The ops and our kernels are stand-ins on a CPU, so that this tests which one runs.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support import quantizer_ops
from support.quantizer_ops import LAYOUT, SCHEMAS, registrations
from torch import Tensor

from safealloc import ScalePool, SfLayout
from safealloc.integrations import startup
from safealloc.integrations.startup import Launch, Steps
from safealloc.integrations.vllm import replace, serve
from safealloc.integrations.vllm.engine import Engine
from safealloc.integrations.vllm.replace import DENSE, EXPERTS, OPS, SILU, SILU_EXPERTS, Call
from safealloc.pool.default import use_pool

CPU = torch.device("cpu")
ROWS, K, PER_EXPERT = 5, 80, (3, 0, 2)


@pytest.fixture(autouse=True)
def ops(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("SAFEALLOC_QUANTIZER", "safealloc")
    monkeypatch.setattr(serve, "allocator", serve.Allocator())
    monkeypatch.setattr(replace, "allocator", serve.allocator)
    monkeypatch.setattr(startup, "capturing", lambda: True)
    yield from quantizer_ops.defined(monkeypatch)


@pytest.fixture
def pool() -> Iterator[ScalePool]:
    with ScalePool("cpu") as pool:
        yield pool


@pytest.fixture
def engine(pool: ScalePool) -> Engine:
    """One that has measured ours as 2 us faster for up to 8 rows."""
    engine = Engine(Steps({8: 1}), CPU)
    engine.pool = pool
    engine.launches = {Launch(DENSE.name, K, torch.bfloat16)}
    engine.saved = lambda launch, rows: 2.0 if rows <= 8 else None
    return engine


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    caplog.set_level(logging.DEBUG, "vllm.safealloc")
    return caplog


def offsets(counts: tuple[int, ...] = PER_EXPERT) -> tuple[Tensor, Tensor]:
    rows = torch.tensor([0, *counts])
    return rows.cumsum(0).int(), ((rows + 127) // 128 * 128).cumsum(0).int()


def call(op: Any, pool: ScalePool, rows: int = ROWS, k: int = K, **changed: Any) -> Call:
    x = torch.randn(rows, k * (2 if op.silu else 1), generator=torch.Generator().manual_seed(rows)).bfloat16()
    data = torch.full((rows, k // 2), 0xA5, dtype=torch.uint8)
    if op.grouped:
        scales = pool.acquire_grouped(rows, k, len(PER_EXPERT)).view(torch.int32)
        made = Call(op, x, torch.linspace(10, 30, len(PER_EXPERT)), data, scales, offsets())
    else:
        made = Call(op, x, torch.tensor([20.0]), data, pool.acquire(rows, k, LAYOUT).view(torch.int32))
    return made._replace(**changed)


def ran() -> tuple[int, int]:
    """How often ours ran, and how often the ops' own; forgotten then."""
    counts = len(quantizer_ops.ours), len(quantizer_ops.theirs)
    quantizer_ops.ours.clear()
    quantizer_ops.theirs.clear()
    return counts


def in_capture(engine: Engine, *calls: Call) -> tuple[int, int]:
    with use_pool(engine.pool), serve.allocator.working(engine), replace.served(engine):
        for one in calls:
            assert one.run_original() is None
    return ran()


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_ours_runs_in_a_capture_and_writes_the_bytes_of_the_original(pool, engine, op):
    one, other = call(op, pool), call(op, pool)
    one.run_original()
    assert ran() == (0, 1)
    assert in_capture(engine, other) == (1, 0)
    assert torch.equal(one.data, other.data)
    assert torch.equal(one.scales, other.scales)


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_the_op_returns_nothing_through_ours_and_through_the_original(pool, engine, op):
    one = call(op, pool)
    given = {"output": one.data, "output_scale": one.scales}
    for rows in (8, 0):
        engine.saved = lambda launch, number, most=rows: 1.0 if number <= most else None
        with serve.allocator.working(engine), replace.served(engine):
            if op is DENSE:
                assert op.overload()(one.x, one.global_scale, True, **given) is None
            else:
                assert op.overload()(one.data, one.scales, one.x, one.global_scale, *one.offsets) is None
    assert ran() == (1, 1)


def cases(pool: ScalePool) -> dict[str, Call]:
    """Calls that ours must not take."""
    x = torch.randn(ROWS, 2 * K).bfloat16()
    foreign = torch.zeros(LAYOUT.padded_shape(ROWS, K), dtype=torch.uint8).view(torch.int32)
    unaligned = torch.zeros(ROWS * K + 1, dtype=torch.bfloat16)[1:].view(ROWS, K)
    rows = pool.acquire(ROWS + 1, K, LAYOUT).view(torch.int32)
    linear = {"swizzled": False, "scales": torch.zeros(ROWS, K // 16, dtype=torch.uint8)}
    none = {"x": x[:0, :K], "data": torch.zeros(0, K // 2, dtype=torch.uint8), "scales": foreign[:0]}
    padded = pool.acquire(ROWS, K, LAYOUT, padded_k=128).view(torch.int32)
    return {
        "padded_n": call(DENSE, pool, data=torch.empty(ROWS, 64, dtype=torch.uint8), scales=padded),
        "linear scales": call(DENSE, pool, **linear),
        "memory of no pool": call(DENSE, pool, scales=foreign),
        "strides": call(DENSE, pool, x=x[:, :K]),
        "not aligned": call(DENSE, pool, x=unaligned),
        "no rows": call(DENSE, pool, **none),
        "a buffer for other rows": call(DENSE, pool, scales=rows),
        "a buffer for other columns": call(DENSE, pool, scales=pool.acquire(ROWS, 96, LAYOUT).view(torch.int32)),
        "rows beyond the captured": call(DENSE, pool, rows=9),
        "another type": call(DENSE, pool, x=torch.randn(ROWS, K)),
        "experts beyond": call(EXPERTS, pool, rows=9),
    }


NOT_OURS = (
    *("padded_n", "linear scales", "memory of no pool", "strides", "not aligned", "no rows", "a buffer for other rows"),
    *("a buffer for other columns", "rows beyond the captured", "another type", "experts beyond"),
)


@pytest.mark.parametrize("case", NOT_OURS)
def test_a_call_that_ours_does_not_take_meets_the_original(pool, engine, case):
    one = cases(pool)[case]
    assert in_capture(engine, one) == (0, 1)


def test_eager_calls_meet_the_original_alone(pool, engine, monkeypatch):
    monkeypatch.setattr(replace, "_override", None)  # it would be called
    call(DENSE, pool).run_original()
    with serve.allocator.working(engine):
        call(DENSE, pool).run_original()
    assert ran() == (0, 2)


def test_a_call_of_another_engine_meets_the_original(pool, engine):
    other = Engine(Steps({8: 1}), CPU)
    with replace.served(engine), serve.allocator.working(other):
        call(DENSE, pool).run_original()
    assert ran() == (0, 1)


def test_nothing_of_it_stays(pool, engine):
    before = registrations()
    for fails in (False, True):
        try:
            with replace.served(engine):
                inside = registrations()
                if fails:
                    raise RuntimeError("a capture failed")
        except RuntimeError:
            assert fails
        assert all(inside[name] != before[name] for name in SCHEMAS)
        assert registrations() == before
        assert not engine.op_cleans
    call(DENSE, pool).run_original()
    assert ran() == (0, 1)


def test_compiled_code_meets_it_too(pool, engine):
    one = call(SILU, pool)
    scales = one.scales.view(torch.float8_e4m3fn)
    op = SILU.overload()
    torch.library.register_fake(f"{quantizer_ops.NAMESPACE}::{SILU.name}", lambda *given: None)

    @torch.compile(backend="eager", fullgraph=True)
    def step(x: Tensor) -> Tensor:
        op(one.data, scales, x, one.global_scale)
        return x + 1

    step(one.x)
    assert ran() == (0, 1)
    with serve.allocator.working(engine), replace.served(engine):
        step(one.x)
    assert ran() == (1, 0)
    step(one.x)
    assert ran() == (0, 1)


def test_it_is_not_installed_unless_it_is_asked_for(engine, monkeypatch):
    monkeypatch.delenv("SAFEALLOC_QUANTIZER")
    before = registrations()
    with replace.observed(engine):
        assert registrations() == before
    engine.launches = set()
    with replace.served(engine):
        assert registrations() == before


def test_a_value_that_the_variable_cannot_have_is_logged(engine, monkeypatch, log):
    monkeypatch.setenv("SAFEALLOC_QUANTIZER", "ours")
    before = registrations()
    with replace.observed(engine):
        assert registrations() == before
    assert "SAFEALLOC_QUANTIZER must be vllm or safealloc, got 'ours'" in log.text


def test_the_launches_of_a_profile_run_are_noted(pool, engine):
    """Not what ours never takes."""
    engine.launches = set()
    linear = torch.zeros(ROWS, 3, dtype=torch.uint8)
    padded = pool.acquire(ROWS, 64, LAYOUT, padded_k=128).view(torch.int32)
    others = (
        call(DENSE, pool, k=48, swizzled=False, scales=linear),
        call(DENSE, pool, k=64, data=torch.empty(ROWS, 64, dtype=torch.uint8), scales=padded),
    )
    with replace.observed(engine):
        for one in (*(call(op, pool) for op in OPS), *others):
            one.run_original()
    assert ran() == (0, 6)
    assert engine.launches == {
        *(Launch(op.name, K, torch.bfloat16) for op in (DENSE, SILU)),
        *(Launch(op.name, K, torch.bfloat16, len(PER_EXPERT)) for op in (EXPERTS, SILU_EXPERTS)),
    }


def test_an_error_of_ours_is_logged_and_the_original_quantizes(pool, engine, monkeypatch, log):
    def fail(self: Call, watch: object, batch: object) -> None:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(Call, "run", fail)
    assert in_capture(engine, call(DENSE, pool), call(DENSE, pool)) == (0, 2)
    errors = [record.getMessage() for record in log.records if record.levelno == logging.ERROR]
    assert len(errors) == 1
    assert "vLLM's kernel quantizes instead" in errors[0]
    assert "no such kernel" in errors[0]


@pytest.mark.parametrize("most", [8, 0])
@pytest.mark.parametrize("op", [EXPERTS, SILU_EXPERTS], ids=lambda op: op.name)
def test_no_scale_of_an_earlier_step_stays_whoever_quantizes(pool, engine, monkeypatch, op, most):
    """The allocator leaves the cleaning to the op: ours cleans as it quantizes."""
    monkeypatch.setattr(serve, "clean_grouped_scales", None)  # it would be called
    allocator = serve.allocator
    allocator.enabled = True
    engine.saved = lambda launch, rows: 1.0 if rows <= most else None
    pool.reserve(ROWS, K, experts=3)
    with use_pool(pool), allocator.working(engine), replace.served(engine):
        assert engine.op_cleans
        for counts in ((3, 0, 2), (0, 5, 0), (1, 1, 3), (0, 0, 5)):
            x = torch.randn(ROWS, K * (2 if op.silu else 1)).bfloat16()
            scales = allocator.grouped_scales(ROWS, K, 1, *offsets(counts))
            data = torch.empty(ROWS, K // 2, dtype=torch.uint8)
            op.overload()(data, scales, x, torch.full((3,), 20.0), *offsets(counts))
            assert pool.verify() == 1  # it looks at every byte that the record does not name
            del scales
    assert ran() == ((4, 0) if most else (0, 4))


@pytest.mark.parametrize(
    "schema",
    [
        "(Tensor! result, Tensor! result_block_scale, Tensor input, Tensor input_global_scale, bool fast=False) -> ()",
        "(Tensor! result, Tensor! result_block_scale, Tensor input, Tensor scale) -> ()",
        "(Tensor result, Tensor! result_block_scale, Tensor input, Tensor input_global_scale) -> ()",
        "(Tensor! result, Tensor! result_block_scale, Tensor input, Tensor input_global_scale) -> Tensor",
        "(Tensor! result, Tensor! result_block_scale, Tensor input, float input_global_scale) -> ()",
    ],
)
def test_an_op_with_another_schema_is_left_alone_and_named(engine, monkeypatch, log, schema):
    monkeypatch.setattr(quantizer_ops, "NAMESPACE", "safealloc_other_C")
    for _ in quantizer_ops.defined(monkeypatch, silu_and_mul_nvfp4_quant=schema):
        before = registrations()
        with replace.observed(engine):
            inside = registrations()
        with replace.served(engine):
            assert registrations()[SILU.name] == before[SILU.name]
        assert {name for name in SCHEMAS if inside[name] != before[name]} == set(SCHEMAS) - {SILU.name}
    (warning,) = [record for record in log.records if record.levelno == logging.WARNING]
    assert "safealloc_other_C::silu_and_mul_nvfp4_quant" in warning.getMessage()


def test_an_op_that_a_release_does_not_have_is_none(engine, monkeypatch, log):
    monkeypatch.setattr(replace, "NAMESPACE", "safealloc_empty_C")
    with replace.observed(engine), replace.served(engine):
        assert [op.overload() for op in OPS] == [None] * 4
    assert [record for record in log.records if record.levelno >= logging.WARNING] == []


def test_calls_and_what_ours_save_are_counted_for_the_step_that_saves_most(pool, engine):
    with serve.allocator.working(engine), replace.served(engine):
        for saved, calls in ((2.0, 3), (5.0, 2), (None, 4)):
            context = Context()
            engine.saved = lambda launch, rows, saved=saved: saved
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(Engine, "step_under_way", lambda self, context=context: context)
                for _ in range(calls):
                    call(DENSE, pool).run_original()
                cases(pool)["memory of no pool"].run_original()
    sites = engine.captured()
    assert (sites.ours, sites.quantizers, sites.saved_us) == (2, 3, 10.0)
    assert sites.bypassed == {}


def test_where_nothing_is_saved_the_step_with_the_most_calls_counts(pool, engine):
    engine.saved = lambda launch, rows: None
    with serve.allocator.working(engine), replace.served(engine):
        for calls in (1, 3, 2):
            context = Context()
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(Engine, "step_under_way", lambda self, context=context: context)
                for _ in range(calls):
                    call(DENSE, pool).run_original()
    sites = engine.captured()
    assert (sites.ours, sites.quantizers, sites.saved_us) == (0, 3, 0.0)


class Context:
    """A step."""


def test_linear_layout_is_never_ours() -> None:
    with ScalePool("cpu") as pool:
        scales = pool.acquire(ROWS, K, SfLayout.layout_linear)
        assert not call(DENSE, pool, scales=scales).ours
        assert not call(DENSE, pool, swizzled=False).ours
        assert call(DENSE, pool).ours

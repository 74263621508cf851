"""Our quantizers beside stand-ins of vLLM's with the same bits: the comparison at start-up on a GPU, and real captures."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support.quantizer_ops import NAMESPACE, SCHEMAS, registrations

from safealloc import ScalePool, SfLayout, capture
from safealloc.integrations import startup
from safealloc.integrations.startup import Launch, Steps
from safealloc.integrations.vllm import proof, replace
from safealloc.integrations.vllm.engine import Engine
from safealloc.integrations.vllm.replace import DENSE, OPS, Call
from safealloc.integrations.vllm.serve import allocator

pytestmark = pytest.mark.gpu
run_ours = Call.run
called: list[str] = []
"""Ops whose own kernels ran."""


def after_work(call: Call) -> None:
    """Our kernel, slower by a few launches."""
    for _ in range(6):
        call.data.zero_()
    run_ours(call)


@pytest.fixture(autouse=True)
def ops(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Ops of vLLM, behind which our kernel runs slower than alone."""
    library = torch.library.Library(NAMESPACE, "FRAGMENT")

    def kernel(op: Any) -> Callable[..., None]:
        def run(*given: Any, **named: Any) -> None:
            called.append(op.name)
            after_work(Call.of(op, given, named))

        return run

    for op in OPS:
        library.define(op.name + SCHEMAS[op.name])
        library.impl(op.name, kernel(op), "CUDA")
    monkeypatch.setattr(replace, "NAMESPACE", NAMESPACE)
    called.clear()
    yield
    library._destroy()


def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


def launches(k: int, dtype: torch.dtype) -> list[Launch]:
    return [Launch(op.name, k, dtype, 8 if op.grouped else 0) for op in OPS]


def timed(ours_us: float, theirs_us: float) -> proof.Timer:
    """A timer that runs both as graph nodes, and says that they took so long: others may use the GPU at the same time."""

    def timer(ours: Callable[[], object], theirs: Callable[[], object]) -> tuple[list[float], list[float]]:
        times = proof.graph_times(ours, theirs)
        assert [len(samples) for samples in times] == [12, 12]
        assert min(map(min, times)) > 0
        return [ours_us] * 12, [theirs_us] * 12

    return timer


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("k", [80, 4096])
def test_equal_bytes_are_found_behind_every_op_and_ours_serves_where_it_takes_less_time(k, dtype):
    found = proof.prove(dict.fromkeys(launches(k, dtype), (1, 8, 64)), device(), timed(1, 2))
    assert found.differing == []
    for launch in launches(k, dtype):
        assert all((found.saved(launch, rows) or 0) > 0 for rows in (1, 5, 64)), found.findings
        assert found.saved(launch, 65) is None


def test_a_slower_kernel_does_not_serve():
    found = proof.prove(dict.fromkeys(launches(4096, torch.bfloat16), (1, 8)), device(), timed(2, 1))
    assert found.differing == []
    assert [finding for finding in found.findings if finding.saved_us is not None] == []


def test_a_planted_wrong_kernel_is_found_behind_every_op(monkeypatch):
    def wrong(call: Call) -> None:
        run_ours(call)
        call.data[-1:, -1:].bitwise_xor_(1)

    monkeypatch.setattr(Call, "run", wrong)
    found = proof.prove(dict.fromkeys(launches(4096, torch.bfloat16), (1, 8)), device())
    assert {finding.launch.op: finding.differs for finding in found.differing} == {
        op.name: "1 of 2048 bytes of the data" for op in OPS
    }


def test_the_memory_is_given_back():
    proof.prove({launches(4096, torch.bfloat16)[0]: (1, 8)}, device())  # modules and streams stay
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    proof.prove(dict.fromkeys(launches(8192, torch.bfloat16), (1, 512)), device())
    assert (torch.cuda.memory_allocated(), torch.cuda.memory_reserved()) == before


def test_a_graph_keeps_ours_when_the_override_is_gone():
    rows, k = 5, 4096
    x = torch.randn(rows, k, device="cuda").bfloat16()
    global_scale = torch.tensor([448 * 6 / 5.0], device="cuda")
    data = torch.zeros((2, rows, k // 2), dtype=torch.uint8, device="cuda")
    before = registrations()
    with ScalePool("cuda") as pool:
        pool.reserve(rows, k, copies=2)
        engine = Engine(Steps({rows: 1}), pool.device)
        engine.pool = pool
        engine.launches = {Launch(DENSE.name, k, torch.bfloat16)}
        engine.saved = lambda launch, number: 1.0
        scales = pool.acquire(rows, k, SfLayout.layout_128x4)
        Call(DENSE, x, global_scale, data[0], scales.view(torch.int32)).run_original()
        assert called == [DENSE.name]
        held = []
        with replace.served(engine), allocator.working(engine), capture(pool=pool) as graph:
            held.append(pool.acquire(rows, k, SfLayout.layout_128x4))
            Call(DENSE, x, global_scale, data[1], held[0].view(torch.int32)).run_original()
        assert called == [DENSE.name]
        assert registrations() == before
        for _ in range(3):
            data[1].zero_()
            graph.replay()
            assert torch.equal(data[0], data[1])
            assert torch.equal(scales, held[0])
        sites = engine.captured()
        assert (sites.ours, sites.quantizers) == (1, 1)
    assert startup.SAVED not in sites.bypassed

"""Who gets a pool buffer in a worker's start-up, without vLLM and without a GPU: both are played."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from safealloc import SafeAllocError, ScalePool, SfLayout, use_pool
from safealloc.integrations.vllm import allocator as module
from safealloc.integrations.vllm import plugin
from safealloc.integrations.vllm.allocator import ABOVE_MAX_ROWS, ATTENTION_FUSION, OUTSIDE_A_STEP, Allocator, Steps

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
L128, L8 = SfLayout.layout_128x4, SfLayout.layout_8x4


class Context:
    """A forward pass."""


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> Iterator[ScalePool]:
    with ScalePool("cpu") as pool:
        monkeypatch.setattr(module, "default_pool", lambda device: pool)
        yield pool


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What of vLLM is looked at: the forward context, and whether a capture is under way."""
    state = SimpleNamespace(_forward_context=Context(), capturing=False)
    monkeypatch.setitem(sys.modules, "vllm.forward_context", state)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state.capturing)
    monkeypatch.setenv("SAFEALLOC_STRICT", "1")
    return state


@pytest.fixture
def allocator(pool: ScalePool, vllm: SimpleNamespace) -> Allocator:
    made = Allocator()
    made.enabled = True
    return made


def config(*rows: int, max_num_seqs: int = 4, **parallel: bool) -> SimpleNamespace:
    return SimpleNamespace(
        compilation_config=SimpleNamespace(cudagraph_mode=SimpleNamespace(value=2), cudagraph_capture_sizes=list(rows)),
        model_config=SimpleNamespace(enforce_eager=False),
        parallel_config=SimpleNamespace(**parallel),
        scheduler_config=SimpleNamespace(max_num_seqs=max_num_seqs),
    )


def held(pool: ScalePool) -> list[tuple[int, int, SfLayout]]:
    return sorted((b.spec.rows, b.spec.k, b.spec.layout) for b in pool._inventory.by_address.values())


def test_the_profile_run_reserves_for_all_captured_batch_sizes(allocator: Allocator, pool: ScalePool) -> None:
    """It runs with more rows than the pool serves; what it holds at once is reserved as often."""
    allocator.begin(config(1, 2, 4), CUDA)
    one = allocator.scales(100, 64, CPU, None)
    assert pool.spec(one) is None
    assert held(pool) == [(rows, 64, L128) for rows in (1, 2, 4)]
    del one
    for _ in range(5):  # layers, one after the other
        allocator.scales(100, 64, CPU, None)
    assert pool.stats().buffers == 3
    both = [allocator.scales(100, 64, CPU, None) for _ in range(2)]
    assert held(pool) == sorted([(rows, 64, L128) for rows in (1, 2, 4)] * 2)
    del both
    allocator.scales(4, 80, CPU, 96)
    assert {b.spec.padded_k for b in pool._inventory.by_address.values() if b.spec.k == 80} == {96}


def test_the_warm_up_then_finds_what_was_reserved(allocator: Allocator, pool: ScalePool) -> None:
    allocator.begin(config(1, 2, 4), CUDA)
    allocator.scales(100, 64, CPU, None)
    for rows in (4, 2, 1, 4):
        tensor = allocator.scales(rows, 64, CPU, None)
        assert pool.spec(tensor) is not None
        del tensor
    assert pool.misses == 0
    assert pool.stats().buffers == 3


def test_what_a_warm_up_within_the_limit_holds_is_reserved_too(allocator: Allocator, pool: ScalePool) -> None:
    """The pool keeps a buffer for ever: held is what counts, not what is alive."""
    allocator.begin(config(1, 2, 4), CUDA)
    for _ in range(6):
        allocator.scales(4, 64, CPU, None)
    assert pool.stats().buffers == 4  # that one, and three that nobody has used
    both = [allocator.scales(4, 64, CPU, None) for _ in range(2)]
    assert both[0].data_ptr() != both[1].data_ptr()
    assert len([rows for rows, _, _ in held(pool) if rows == 1]) == 2


def test_two_micro_batches_have_twice_as_many_and_halves(allocator: Allocator, pool: ScalePool) -> None:
    allocator.begin(config(4, enable_dbo=True), CUDA)
    assert allocator.steps == Steps((2, 4), 4, copies=2)
    allocator.scales(100, 64, CPU, None)
    assert held(pool) == [(2, 64, L128)] * 2 + [(4, 64, L128)] * 2


def test_layers_on_our_kernel_are_reserved_for_before_the_profile_run(allocator: Allocator, pool: ScalePool) -> None:
    layers = [Context(), Context()]
    for layer in layers:
        allocator.linear_ks[layer] = 64
    allocator.begin(config(8, 32, 40), CUDA)
    assert held(pool) == [(8, 64, L8), (32, 64, L8), (40, 64, L128)]
    assert allocator.ready().served == 2


def test_sites_of_captured_steps(allocator: Allocator, vllm: SimpleNamespace) -> None:
    allocator.begin(config(1, 2, 4), CUDA)
    allocator.scales(100, 64, CPU, None)
    vllm.capturing = True
    for rows in (4, 2, 1):
        vllm._forward_context = Context()
        for _ in range(3):
            allocator.scales(rows, 64, CPU, None)
        allocator.zero_scales(rows, 64, CPU, None)
        allocator.scales(100, 64, CPU, None)
    vllm.capturing = False
    sites = allocator.ready()
    assert sites.served == 3
    assert sites.bypassed == {ATTENTION_FUSION: 1, ABOVE_MAX_ROWS: 1}


def test_steps_whose_contexts_have_one_address(allocator: Allocator, vllm: SimpleNamespace) -> None:
    """A context dies with its step, and the next one may lie where it lay."""
    allocator.begin(config(1), CUDA)
    vllm.capturing = True
    for _ in range(20):
        vllm._forward_context = None
        vllm._forward_context = Context()
        allocator.scales(1, 64, CPU, None)
    assert allocator.ready().served == 1


def test_weights_are_left_to_vllm_and_reserve_nothing(
    allocator: Allocator, pool: ScalePool, vllm: SimpleNamespace
) -> None:
    allocator.loading = 1
    assert pool.spec(allocator.scales(2, 64, CPU, None)) is None
    allocator.loading = 0
    allocator.begin(config(1, 2), CUDA)
    vllm._forward_context = None
    assert pool.spec(allocator.scales(2, 64, CPU, None)) is None
    assert pool.stats().buffers == 0
    vllm.capturing = True
    allocator.scales(2, 64, CPU, None)
    assert allocator.ready().bypassed == {OUTSIDE_A_STEP: 1}


def test_a_reservation_that_fails_is_one_error(
    allocator: Allocator, pool: ScalePool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("SAFEALLOC_STRICT", "0")
    monkeypatch.setattr(module.logger, "propagate", True)
    pool.max_bytes = pool._inventory.max_bytes = 0
    allocator.begin(config(1, 2, 4), CUDA)
    for _ in range(3):
        assert pool.spec(allocator.scales(4, 64, CPU, None)) is None
        assert pool.spec(allocator.scales(100, 64, CPU, None)) is None
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    assert "PoolExhaustedError" in caplog.text


@pytest.fixture
def compact(monkeypatch: pytest.MonkeyPatch) -> Iterator[ScalePool]:
    with ScalePool("cpu", compact=True) as pool:
        monkeypatch.setattr(module, "default_pool", lambda device: pool)
        yield pool


def test_a_compact_pool_is_refused_before_anything_is_allocated(allocator: Allocator, compact: ScalePool) -> None:
    x, g = torch.ones(2, 64).bfloat16(), torch.ones(1)
    for use in (
        lambda: allocator.begin(config(1, 2), CUDA),
        lambda: allocator.scales(2, 64, CPU, None),
        lambda: allocator.quantized_8x4(x, g),
    ):
        with pytest.raises(SafeAllocError, match="which a compact pool refuses"):
            use()
    assert compact.stats().buffers == compact.misses == 0


def test_where_errors_are_not_raised_vllm_allocates_instead_of_a_compact_pool(
    allocator: Allocator, compact: ScalePool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("SAFEALLOC_STRICT", "0")
    monkeypatch.setattr(module.logger, "propagate", True)
    for _ in range(3):
        tensor = allocator.scales(2, 64, CPU, None)
        assert (tensor.shape, tensor.dtype) == ((128, 1), torch.int32)
        assert compact.spec(tensor) is None
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    assert "which a compact pool refuses" in caplog.text
    assert compact.stats().buffers == compact.misses == 0


def test_nothing_is_registered_on_a_compact_pool(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module.logger, "propagate", True)
    before = plugin.registered()
    assert before is None
    with ScalePool("cpu", compact=True) as pool, use_pool(pool):
        plugin.register()
    assert plugin.registered() is None
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert record.getMessage().startswith("safealloc: not registered: SafeAllocError: ")
    assert "which a compact pool refuses" in record.getMessage()


def test_a_second_engine_starts_anew(allocator: Allocator, pool: ScalePool) -> None:
    allocator.begin(config(1), CUDA)
    allocator.scales(100, 64, CPU, None)
    allocator.ready()
    allocator.begin(config(1, 2, 8, max_num_seqs=2), CUDA)
    assert allocator.steps == Steps((1, 2, 8), 8)
    allocator.scales(100, 64, CPU, None)
    assert held(pool) == [(1, 64, L128), (2, 64, L128), (8, 64, L128)]

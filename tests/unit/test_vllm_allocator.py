"""Who gets a pool buffer in a worker's start-up, without vLLM and without a GPU: both are played."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from safealloc import SafeAllocError, ScalePool, ScaleSpec, SfLayout, use_pool
from safealloc.integrations.vllm import allocator as module
from safealloc.integrations.vllm import plugin
from safealloc.integrations.vllm.allocator import (
    ABOVE_MAX_ROWS,
    ATTENTION_FUSION,
    OUTSIDE_A_STEP,
    POOL_ERROR,
    Allocator,
    Steps,
)

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


# --- experts --------------------------------------------------------------------------------------------------------------

EXPERTS, TOPK = 6, 2


def offsets(*counts: int) -> tuple[Tensor, Tensor]:
    """Expert and block scale offsets for so many rows an expert, int32 ``[EXPERTS + 1]``."""
    rows = torch.tensor([*counts, *[0] * (EXPERTS - len(counts))])
    tiles = (rows + 127) // 128 * 128
    first, first_scale = (torch.cat([torch.zeros(1, dtype=torch.long), part.cumsum(0)]) for part in (rows, tiles))
    return first.int(), first_scale.int()


def expert_scales(allocator: Allocator, tokens: int, k: int = 80) -> Tensor:
    """For tokens that all go to the same experts."""
    tensor = allocator.expert_scales(TOPK * tokens, k, TOPK, *offsets(*[tokens] * TOPK))
    assert tensor is not None
    assert tensor.shape == (L128.grouped_rows(TOPK * tokens, EXPERTS), -(-k // 64))
    assert tensor.dtype == torch.int32
    return tensor


def grouped(rows: int, k: int = 80) -> ScaleSpec:
    return ScaleSpec.grouped(rows, k, L128, EXPERTS)


def specs(pool: ScalePool) -> list[ScaleSpec]:
    return sorted((b.spec for b in pool._inventory.by_address.values()), key=lambda spec: (spec.k, spec.rows))


def test_one_buffer_serves_experts_at_all_batch_sizes(allocator: Allocator, pool: ScalePool) -> None:
    """Reserved when the profile run, which it does not serve itself, comes to the layer."""
    allocator.begin(config(1, 2, 4), CUDA)
    large = expert_scales(allocator, 100)
    assert pool.spec(large) is None
    assert not large.any()
    assert specs(pool) == [grouped(8)]
    for tokens in (4, 2, 1, 3, 4):
        assert pool.spec(expert_scales(allocator, tokens)) == grouped(8)
    assert (pool.misses, pool.stats().buffers) == (0, 1)


def test_each_site_of_experts_is_reserved_for(allocator: Allocator, pool: ScalePool) -> None:
    """The first quantizer of a layer and the second have another k; so many micro-batches need so many buffers."""
    allocator.begin(config(4, enable_dbo=True), CUDA)
    for _ in range(3):  # layers
        expert_scales(allocator, 4, 80)
        expert_scales(allocator, 4, 32)
    assert specs(pool) == [grouped(8, 32)] * 2 + [grouped(8, 80)] * 2
    both = [expert_scales(allocator, 2, 80) for _ in range(2)]
    assert both[0].data_ptr() != both[1].data_ptr()
    assert pool.misses == 0


def test_an_expert_layer_gathers_the_tokens_of_all_data_parallel_ranks(allocator: Allocator, pool: ScalePool) -> None:
    """Of a captured batch of 4 on each of 3 ranks, it sees 12."""
    allocator.begin(config(1, 2, 4, data_parallel_size=3), CUDA)
    assert allocator.steps == Steps((1, 2, 4), 4, ranks=3)
    assert pool.spec(expert_scales(allocator, 12)) == grouped(24)
    assert pool.spec(expert_scales(allocator, 13)) is None
    assert pool.spec(allocator.scales(5, 64, CPU, None)) is None  # a dense layer sees its own
    assert specs(pool)[-1] == grouped(24)


def test_experts_without_graphs_are_reserved_for_the_most_rows(allocator: Allocator, pool: ScalePool) -> None:
    allocator.begin(config(max_num_seqs=16), CUDA)
    assert allocator.steps == Steps((), 16)
    allocator.scales(100, 64, CPU, None)  # dense sites are not: each batch size would need a buffer of its own
    expert_scales(allocator, 3)
    assert specs(pool) == [grouped(32)]
    assert pool.misses == 0


def test_rows_that_the_user_allows_bound_what_is_reserved(
    allocator: Allocator, pool: ScalePool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAFEALLOC_MAX_ROWS", "2")
    allocator.begin(config(1, 2, 4, 8), CUDA)
    assert pool.spec(expert_scales(allocator, 4)) is None
    assert pool.spec(expert_scales(allocator, 2)) == grouped(4)
    assert specs(pool) == [grouped(4)]


@pytest.mark.parametrize(("rows", "served"), [(8, True), (7, True), (9, False), (10, False)])
def test_routed_rows_are_counted_as_tokens(allocator: Allocator, pool: ScalePool, rows: int, served: bool) -> None:
    """A step has ``rows / topk`` tokens, and one that has begun counts."""
    allocator.begin(config(1, 4), CUDA)
    tensor = allocator.expert_scales(rows, 80, TOPK, *offsets(rows))
    assert tensor is not None
    assert (pool.spec(tensor) is not None) is served


def test_expert_sites_of_captured_steps(
    allocator: Allocator, pool: ScalePool, vllm: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    allocator.begin(config(1, 2, 4), CUDA)
    expert_scales(allocator, 100)
    allocator.scales(100, 64, CPU, None)
    vllm.capturing = True
    for tokens in (4, 2, 1):
        vllm._forward_context = Context()
        allocator.scales(tokens, 64, CPU, None)
        for _ in range(2):
            expert_scales(allocator, tokens)
        expert_scales(allocator, 100)
    assert specs(pool)[-1] == grouped(8)  # a capture reserves nothing
    expert_scales(allocator, 4, 32)
    assert {spec.k for spec in specs(pool)} == {32, 64, 80}
    assert pool.misses == 1
    monkeypatch.setenv("SAFEALLOC_STRICT", "0")
    monkeypatch.setattr(pool, "acquire_grouped", None)
    expert_scales(allocator, 4)
    vllm.capturing = False
    sites = allocator.ready()
    assert sites.served == 4
    assert sites.bypassed == {ABOVE_MAX_ROWS: 1, POOL_ERROR: 1}


def test_a_buffer_for_experts_is_clean_before_the_producer_runs(allocator: Allocator, pool: ScalePool) -> None:
    """Whether it then writes or fails: its rows are in the record."""
    everywhere = offsets(3, 3)
    first = allocator.expert_scales(6, 80, TOPK, *everywhere)
    assert first is not None
    scales = L128.swizzle(
        torch.full((256, 5), 0x7F, dtype=torch.uint8)
    )  # of two experts, of which three rows each count
    logical = L128.logical(scales, 256, 80)
    logical[3:128] = logical[131:] = 0
    first.view(torch.uint8)[:256] = L128.swizzle(logical)
    assert pool.verify() == 1
    del first
    second = allocator.expert_scales(4, 80, TOPK, *offsets(0, 0, 4))
    assert second is not None
    left = L128.logical(second.view(torch.uint8), second.shape[0], 80)
    assert left.nonzero()[:, 0].unique().tolist() == [0, 1, 2]  # where this step writes: row 3 was not there before
    assert pool.verify() == 1


def test_what_vllm_has_to_allocate_for_experts(allocator: Allocator, pool: ScalePool) -> None:
    assert allocator.expert_scales(0, 80, TOPK, *offsets()) is None
    allocator.enabled = False
    assert allocator.expert_scales(4, 80, TOPK, *offsets(2, 2)) is None
    assert pool.stats().buffers == 0


def test_experts_outside_of_a_step_are_served_by_zeros(
    allocator: Allocator, pool: ScalePool, vllm: SimpleNamespace
) -> None:
    """And nothing is reserved for them."""
    allocator.begin(config(1, 2, 4), CUDA)
    vllm._forward_context = None
    tensor = expert_scales(allocator, 2)
    assert pool.spec(tensor) is None
    assert not tensor.any()
    vllm._forward_context, allocator.loading = Context(), 1
    assert pool.spec(expert_scales(allocator, 2)) is None
    assert pool.stats().buffers == 0
    allocator.loading, vllm._forward_context, vllm.capturing = 0, None, True
    expert_scales(allocator, 2)
    assert allocator.ready().bypassed == {OUTSIDE_A_STEP: 1}


def test_an_expert_reservation_that_fails_is_one_error(
    allocator: Allocator, pool: ScalePool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module.logger, "propagate", True)
    pool.max_bytes = pool._inventory.max_bytes = 0
    allocator.begin(config(1, 2, 4), CUDA)
    with pytest.raises(SafeAllocError, match="max_bytes"):
        expert_scales(allocator, 2)
    monkeypatch.setenv("SAFEALLOC_STRICT", "0")
    for tokens in (2, 100, 2):
        tensor = expert_scales(allocator, tokens)
        assert pool.spec(tensor) is None
        assert not tensor.any()
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    assert "PoolExhaustedError" in caplog.text


def test_a_compact_pool_is_refused_for_experts(
    allocator: Allocator, compact: ScalePool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SafeAllocError, match="which a compact pool refuses"):
        expert_scales(allocator, 2)
    monkeypatch.setenv("SAFEALLOC_STRICT", "0")
    assert compact.spec(expert_scales(allocator, 2)) is None
    assert compact.stats().buffers == compact.misses == 0


def test_growth_for_experts_after_the_warm_up_is_said_once(
    allocator: Allocator, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module.logger, "propagate", True)
    allocator.begin(config(1, 2, 4), CUDA)
    expert_scales(allocator, 4)
    allocator.ready()
    caplog.clear()
    expert_scales(allocator, 2)
    assert caplog.records == []
    held = [expert_scales(allocator, 4) for _ in range(3)]
    assert len(held) == 3
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "for 8 rows routed to 6 experts, k=80, layout_128x4; such shapes share a cache" in record.getMessage()

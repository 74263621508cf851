"""What is served and reserved in a worker's start-up, with stand-ins for vLLM and the GPU."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from support.internals import buffers_of, inventory_of
from torch import Tensor

from safealloc import SafeAllocError, ScalePool, ScaleSpec, SfLayout
from safealloc.integrations.vllm import serve
from safealloc.integrations.vllm.serve import Allocator
from safealloc.integrations.vllm.startup import (
    ABOVE_MAX_ROWS,
    ATTENTION_FUSION,
    OUTSIDE_A_STEP,
    POOL_ERROR,
    Steps,
)
from safealloc.integrations.vllm.worker import logger

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


class Context:
    """A forward pass."""


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> Iterator[ScalePool]:
    with ScalePool("cpu") as pool:
        monkeypatch.setattr(serve, "default_pool", lambda device: pool)
        yield pool


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The state of vLLM that is read: the forward context, and whether a capture is under way."""
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


def specs(pool: ScalePool) -> list[ScaleSpec]:
    """Of all buffers that the pool holds."""
    return sorted((buffer.spec for buffer in buffers_of(pool)), key=lambda spec: (spec.k, spec.rows))


def shapes(pool: ScalePool) -> list[tuple[int, int, SfLayout]]:
    """Rows, k and layout of all buffers that the pool holds."""
    return sorted((spec.rows, spec.k, spec.layout) for spec in specs(pool))


def test_the_profile_run_reserves_buffers_for_all_captured_batch_sizes(allocator: Allocator, pool: ScalePool) -> None:
    """It runs with more rows than the pool serves; as many buffers are reserved as it holds tensors at once."""
    allocator.begin(config(1, 2, 4), CUDA)
    one = allocator.scales(100, 64, CPU, None)
    assert pool.spec(one) is None
    assert shapes(pool) == [(rows, 64, SfLayout.layout_128x4) for rows in (1, 2, 4)]
    del one
    for _ in range(5):  # layers, one after the other
        allocator.scales(100, 64, CPU, None)
    assert pool.stats().buffers == 3
    both = [allocator.scales(100, 64, CPU, None) for _ in range(2)]
    assert shapes(pool) == sorted([(rows, 64, SfLayout.layout_128x4) for rows in (1, 2, 4)] * 2)
    del both
    allocator.scales(4, 80, CPU, 96)
    assert {spec.padded_k for spec in specs(pool) if spec.k == 80} == {96}


def test_the_warm_up_is_served_from_reserved_buffers(allocator: Allocator, pool: ScalePool) -> None:
    allocator.begin(config(1, 2, 4), CUDA)
    allocator.scales(100, 64, CPU, None)
    for rows in (4, 2, 1, 4):
        tensor = allocator.scales(rows, 64, CPU, None)
        assert pool.spec(tensor) is not None
        del tensor
    assert pool.misses == 0
    assert pool.stats().buffers == 3


def test_a_warm_up_within_the_row_limit_reserves_what_it_holds_at_once(allocator: Allocator, pool: ScalePool) -> None:
    """The pool never frees a buffer: tensors that somebody holds count, not storages that are alive."""
    allocator.begin(config(1, 2, 4), CUDA)
    for _ in range(6):
        allocator.scales(4, 64, CPU, None)
    assert pool.stats().buffers == 4  # the one in use, and three reserved
    both = [allocator.scales(4, 64, CPU, None) for _ in range(2)]
    assert both[0].data_ptr() != both[1].data_ptr()
    assert len([rows for rows, _, _ in shapes(pool) if rows == 1]) == 2


def test_micro_batches_double_the_buffers_and_add_half_batch_sizes(allocator: Allocator, pool: ScalePool) -> None:
    allocator.begin(config(4, enable_dbo=True), CUDA)
    assert allocator.steps == Steps((2, 4), 4, copies=2)
    allocator.scales(100, 64, CPU, None)
    assert shapes(pool) == [(2, 64, SfLayout.layout_128x4)] * 2 + [(4, 64, SfLayout.layout_128x4)] * 2


def test_buffers_of_layers_on_our_kernel_are_reserved_before_the_profile_run(
    allocator: Allocator, pool: ScalePool
) -> None:
    layers = [Context(), Context()]
    for layer in layers:
        allocator.linear_ks[layer] = 64
    allocator.begin(config(8, 32, 40), CUDA)
    assert shapes(pool) == [
        (8, 64, SfLayout.layout_8x4),
        (32, 64, SfLayout.layout_8x4),
        (40, 64, SfLayout.layout_128x4),
    ]
    assert allocator.ready().served == 2


def test_sites_of_captured_steps_are_counted(allocator: Allocator, vllm: SimpleNamespace) -> None:
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


def test_steps_whose_contexts_share_an_address_are_counted_apart(allocator: Allocator, vllm: SimpleNamespace) -> None:
    """A context dies with its step, and the next one may have the same address."""
    allocator.begin(config(1), CUDA)
    vllm.capturing = True
    for _ in range(20):
        vllm._forward_context = None
        vllm._forward_context = Context()
        allocator.scales(1, 64, CPU, None)
    assert allocator.ready().served == 1


def test_weights_are_not_served_and_reserve_nothing(
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


def test_a_failed_reservation_is_logged_once(
    allocator: Allocator, pool: ScalePool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("SAFEALLOC_STRICT", "0")
    monkeypatch.setattr(logger, "propagate", True)
    inventory_of(pool).max_bytes = 0
    allocator.begin(config(1, 2, 4), CUDA)
    for _ in range(3):
        assert pool.spec(allocator.scales(4, 64, CPU, None)) is None
        assert pool.spec(allocator.scales(100, 64, CPU, None)) is None
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    assert "PoolExhaustedError" in caplog.text


def test_a_second_engine_starts_from_scratch(allocator: Allocator, pool: ScalePool) -> None:
    allocator.begin(config(1), CUDA)
    allocator.scales(100, 64, CPU, None)
    allocator.ready()
    allocator.begin(config(1, 2, 8, max_num_seqs=2), CUDA)
    assert allocator.steps == Steps((1, 2, 8), 8)
    allocator.scales(100, 64, CPU, None)
    assert shapes(pool) == [
        (1, 64, SfLayout.layout_128x4),
        (2, 64, SfLayout.layout_128x4),
        (8, 64, SfLayout.layout_128x4),
    ]


# --- MoE --------------------------------------------------------------------------------------------------------------

EXPERTS, TOPK = 6, 2


def offsets(*counts: int) -> tuple[Tensor, Tensor]:
    """Expert and block scale offsets for so many rows per expert, int32 ``[EXPERTS + 1]``."""
    rows = torch.tensor([*counts, *[0] * (EXPERTS - len(counts))])
    tiles = (rows + 127) // 128 * 128
    first, first_scale = (torch.cat([torch.zeros(1, dtype=torch.long), part.cumsum(0)]) for part in (rows, tiles))
    return first.int(), first_scale.int()


def grouped_scales(allocator: Allocator, tokens: int, k: int = 80) -> Tensor:
    """Scales for tokens that all go to the same experts."""
    tensor = allocator.grouped_scales(TOPK * tokens, k, TOPK, *offsets(*[tokens] * TOPK))
    assert tensor is not None
    assert tensor.shape == (SfLayout.layout_128x4.grouped_rows(TOPK * tokens, EXPERTS), -(-k // 64))
    assert tensor.dtype == torch.int32
    return tensor


def grouped(rows: int, k: int = 80) -> ScaleSpec:
    return ScaleSpec.grouped(rows, k, SfLayout.layout_128x4, EXPERTS)


def test_one_grouped_buffer_serves_all_batch_sizes(allocator: Allocator, pool: ScalePool) -> None:
    """It is reserved when the profile run, which it does not serve itself, reaches the layer."""
    allocator.begin(config(1, 2, 4), CUDA)
    large = grouped_scales(allocator, 100)
    assert pool.spec(large) is None
    assert not large.any()
    assert specs(pool) == [grouped(8)]
    for tokens in (4, 2, 1, 3, 4):
        assert pool.spec(grouped_scales(allocator, tokens)) == grouped(8)
    assert (pool.misses, pool.stats().buffers) == (0, 1)


def test_a_grouped_buffer_is_reserved_per_quantizer_and_micro_batch(allocator: Allocator, pool: ScalePool) -> None:
    """The two quantizers of a layer differ in k; each micro-batch needs a buffer of its own."""
    allocator.begin(config(4, enable_dbo=True), CUDA)
    for _ in range(3):  # layers
        grouped_scales(allocator, 4, 80)
        grouped_scales(allocator, 4, 32)
    assert specs(pool) == [grouped(8, 32)] * 2 + [grouped(8, 80)] * 2
    both = [grouped_scales(allocator, 2, 80) for _ in range(2)]
    assert both[0].data_ptr() != both[1].data_ptr()
    assert pool.misses == 0


def test_a_moe_layer_gathers_the_tokens_of_all_data_parallel_ranks(allocator: Allocator, pool: ScalePool) -> None:
    """With a captured batch of 4 on each of 3 ranks it has 12 tokens."""
    allocator.begin(config(1, 2, 4, data_parallel_size=3), CUDA)
    assert allocator.steps == Steps((1, 2, 4), 4, ranks=3)
    assert pool.spec(grouped_scales(allocator, 12)) == grouped(24)
    assert pool.spec(grouped_scales(allocator, 13)) is None
    assert pool.spec(allocator.scales(5, 64, CPU, None)) is None  # a dense layer has its own tokens only
    assert specs(pool)[-1] == grouped(24)


def test_without_graphs_a_grouped_buffer_is_reserved_for_max_num_seqs(allocator: Allocator, pool: ScalePool) -> None:
    allocator.begin(config(max_num_seqs=16), CUDA)
    assert allocator.steps == Steps((), 16)
    allocator.scales(100, 64, CPU, None)  # no dense buffers: each batch size would need its own
    grouped_scales(allocator, 3)
    assert specs(pool) == [grouped(32)]
    assert pool.misses == 0


def test_max_rows_limits_what_is_reserved(
    allocator: Allocator, pool: ScalePool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAFEALLOC_MAX_ROWS", "2")
    allocator.begin(config(1, 2, 4, 8), CUDA)
    assert pool.spec(grouped_scales(allocator, 4)) is None
    assert pool.spec(grouped_scales(allocator, 2)) == grouped(4)
    assert specs(pool) == [grouped(4)]


@pytest.mark.parametrize(("rows", "served"), [(8, True), (7, True), (9, False), (10, False)])
def test_grouped_rows_are_counted_as_tokens(allocator: Allocator, pool: ScalePool, rows: int, served: bool) -> None:
    """A step has ``rows / topk`` tokens, rounded up."""
    allocator.begin(config(1, 4), CUDA)
    tensor = allocator.grouped_scales(rows, 80, TOPK, *offsets(rows))
    assert tensor is not None
    assert (pool.spec(tensor) is not None) is served


def test_grouped_sites_of_captured_steps_are_counted(
    allocator: Allocator, pool: ScalePool, vllm: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    allocator.begin(config(1, 2, 4), CUDA)
    grouped_scales(allocator, 100)
    allocator.scales(100, 64, CPU, None)
    vllm.capturing = True
    for tokens in (4, 2, 1):
        vllm._forward_context = Context()
        allocator.scales(tokens, 64, CPU, None)
        for _ in range(2):
            grouped_scales(allocator, tokens)
        grouped_scales(allocator, 100)
    assert specs(pool)[-1] == grouped(8)  # a capture reserves nothing
    grouped_scales(allocator, 4, 32)
    assert {spec.k for spec in specs(pool)} == {32, 64, 80}
    assert pool.misses == 1
    monkeypatch.setenv("SAFEALLOC_STRICT", "0")
    monkeypatch.setattr(pool, "acquire_grouped", None)
    grouped_scales(allocator, 4)
    vllm.capturing = False
    sites = allocator.ready()
    assert sites.served == 4
    assert sites.bypassed == {ABOVE_MAX_ROWS: 1, POOL_ERROR: 1}


def test_a_grouped_buffer_is_clean_before_the_producer_runs(allocator: Allocator, pool: ScalePool) -> None:
    """Also if the producer then fails: its rows are in the record."""
    everywhere = offsets(3, 3)
    first = allocator.grouped_scales(6, 80, TOPK, *everywhere)
    assert first is not None
    scales = SfLayout.layout_128x4.swizzle(
        torch.full((256, 5), 0x7F, dtype=torch.uint8)
    )  # of two experts with three rows each
    logical = SfLayout.layout_128x4.logical(scales, 256, 80)
    logical[3:128] = logical[131:] = 0
    first.view(torch.uint8)[:256] = SfLayout.layout_128x4.swizzle(logical)
    assert pool.verify() == 1
    del first
    second = allocator.grouped_scales(4, 80, TOPK, *offsets(0, 0, 4))
    assert second is not None
    left = SfLayout.layout_128x4.logical(second.view(torch.uint8), second.shape[0], 80)
    assert left.nonzero()[:, 0].unique().tolist() == [0, 1, 2]  # the rows that this step writes
    assert pool.verify() == 1


def test_without_rows_or_unregistered_vllm_allocates_grouped_scales(allocator: Allocator, pool: ScalePool) -> None:
    assert allocator.grouped_scales(0, 80, TOPK, *offsets()) is None
    allocator.enabled = False
    assert allocator.grouped_scales(4, 80, TOPK, *offsets(2, 2)) is None
    assert pool.stats().buffers == 0


def test_grouped_scales_outside_a_step_are_zeros(allocator: Allocator, pool: ScalePool, vllm: SimpleNamespace) -> None:
    """Nothing is reserved for them."""
    allocator.begin(config(1, 2, 4), CUDA)
    vllm._forward_context = None
    tensor = grouped_scales(allocator, 2)
    assert pool.spec(tensor) is None
    assert not tensor.any()
    vllm._forward_context, allocator.loading = Context(), 1
    assert pool.spec(grouped_scales(allocator, 2)) is None
    assert pool.stats().buffers == 0
    allocator.loading, vllm._forward_context, vllm.capturing = 0, None, True
    grouped_scales(allocator, 2)
    assert allocator.ready().bypassed == {OUTSIDE_A_STEP: 1}


def test_a_failed_grouped_reservation_is_logged_once(
    allocator: Allocator, pool: ScalePool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logger, "propagate", True)
    inventory_of(pool).max_bytes = 0
    allocator.begin(config(1, 2, 4), CUDA)
    with pytest.raises(SafeAllocError, match="max_bytes"):
        grouped_scales(allocator, 2)
    monkeypatch.setenv("SAFEALLOC_STRICT", "0")
    for tokens in (2, 100, 2):
        tensor = grouped_scales(allocator, tokens)
        assert pool.spec(tensor) is None
        assert not tensor.any()
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    assert "PoolExhaustedError" in caplog.text


def test_growth_of_grouped_buffers_after_the_warm_up_is_logged_once(
    allocator: Allocator, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logger, "propagate", True)
    allocator.begin(config(1, 2, 4), CUDA)
    grouped_scales(allocator, 4)
    allocator.ready()
    caplog.clear()
    grouped_scales(allocator, 2)
    assert caplog.records == []
    held = [grouped_scales(allocator, 4) for _ in range(3)]
    assert len(held) == 3
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "for 8 rows grouped by 6 experts, k=80, layout_128x4; such shapes share a cache" in record.getMessage()

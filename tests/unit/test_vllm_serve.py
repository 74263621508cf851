"""What is observed, reserved, served and given back in an engine's life, with stand-ins for vLLM and the GPU."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.internals import buffers_of
from torch import Tensor

from safealloc import PoolClosedError, ScalePool, ScaleSpec, SfLayout
from safealloc.formats.layout import MAX_ROWS_8X4
from safealloc.integrations import startup
from safealloc.integrations.serve import engine_of
from safealloc.integrations.startup import ABOVE_MAX_ROWS, ATTENTION_FUSION, NO_ROWS, POOL_ERROR, Steps
from safealloc.integrations.vllm import hooks, serve
from safealloc.integrations.vllm.engine import Engine, captured_steps
from safealloc.integrations.vllm.serve import Allocator
from safealloc.integrations.vllm.sizes import capture_sizes, captured_rows
from safealloc.integrations.vllm.worker import logger

CPU = torch.device("cpu")
EXPERTS, TOPK = 6, 2


class Context:
    """A forward pass."""


class Mode(SimpleNamespace):
    """As vLLM's ``CUDAGraphMode``."""

    def decode_mode(self) -> Mode:
        return MODES[self.decode]

    def mixed_mode(self) -> Mode:
        return MODES[self.mixed]

    def separate_routine(self) -> bool:
        return bool(self.separate)


MODES = {
    name: Mode(name=name, value=value, decode=decode, mixed=mixed, separate=decode != mixed or value > 2)
    for name, value, decode, mixed in (
        ("NONE", 0, "NONE", "NONE"),
        ("PIECEWISE", 1, "PIECEWISE", "PIECEWISE"),
        ("FULL", 2, "FULL", "FULL"),
        ("FULL_DECODE_ONLY", 3, "FULL", "NONE"),
        ("FULL_AND_PIECEWISE", 4, "FULL", "PIECEWISE"),
    )
}


def config(*rows: int, max_num_seqs: int = 1024, mode: str = "FULL", **parallel: Any) -> SimpleNamespace:
    return SimpleNamespace(
        compilation_config=SimpleNamespace(cudagraph_mode=MODES[mode], cudagraph_capture_sizes=list(rows)),
        model_config=SimpleNamespace(enforce_eager=False),
        parallel_config=SimpleNamespace(**parallel),
        scheduler_config=SimpleNamespace(max_num_seqs=max_num_seqs),
    )


class Runner:
    """A model runner, whose model is any function of the number of tokens."""

    def __init__(self, model: Callable[[int], object], rows: tuple[int, ...]) -> None:
        self.forward, self.rows = model, rows

    def profile_run(self) -> None:
        self.forward(4096)

    def capture_model(self) -> None:
        for rows in self.rows:
            self.forward(rows)


class Worker:
    """Calls its runner as vLLM's worker does."""

    def __init__(self, model: Callable[[int], object], *rows: int, **options: Any) -> None:
        self.vllm_config, self.device, self.rank = config(*rows, **options), CPU, 0
        self.model_runner: Any = Runner(model, rows)

    def determine_available_memory(self) -> None:
        self.model_runner.profile_run()

    def compile_or_warm_up_model(self) -> None:
        self.model_runner.forward(7)  # a size that is not captured
        self.model_runner.capture_model()

    def shutdown(self) -> None: ...

    def start(self) -> Engine | None:
        """As the plugin hooks it."""
        _hooked("_profile")(Worker.determine_available_memory, self)
        _hooked("_warm_up")(Worker.compile_or_warm_up_model, self)
        return engine_of(self)

    def stop(self) -> None:
        _hooked("_shutdown")(Worker.shutdown, self)


def _hooked(name: str) -> Callable[..., Any]:
    function: Callable[..., Any] = getattr(hooks, name)
    return function


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The state of vLLM that is read: the forward context, and whether a capture is under way."""
    state = SimpleNamespace(_forward_context=Context(), capturing=False)
    monkeypatch.setitem(sys.modules, "vllm.forward_context", state)
    monkeypatch.setattr(startup, "capturing", lambda: state.capturing)
    monkeypatch.setenv("SAFEALLOC_STRICT", "1")
    return state


@pytest.fixture
def allocator(vllm: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> Allocator:
    made = Allocator()
    made.enabled = True
    for module in (hooks, serve):
        monkeypatch.setattr(module, "allocator", made)
    monkeypatch.setattr(serve, "allocates_zeros", lambda: False)
    return made


def shapes(engine: Engine | None) -> list[tuple[int, int]]:
    """Rows and k of all buffers that an engine's pool holds."""
    assert engine is not None
    assert engine.pool is not None
    return sorted((buffer.spec.rows, buffer.spec.k) for buffer in buffers_of(engine.pool))


def closed(pool: ScalePool) -> bool:
    try:
        pool.stats()
    except PoolClosedError:
        return True
    return False


def profiled(allocator: Allocator, model: Callable[[int], object], *rows: int, **options: Any) -> Engine:
    """An engine whose profile run is over."""
    engine = Engine(captured_steps(config(*rows, **options)), CPU)
    with allocator.working(engine):
        model(4096)
    engine.reserve()
    return engine


class Broken:
    """A pool with an error of its own."""

    def acquire(self, *given: Any, **named: Any) -> Tensor:
        raise IndexError


# --- sizes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("largest", [512, 1024])
@pytest.mark.parametrize("query", range(1, 9))
def test_v1_rounds_all_sizes_for_speculative_decoding(largest: int, query: int) -> None:
    sizes = capture_sizes(largest)
    assert len(sizes) == {512: 51, 1024: 83}[largest]
    rounded = {query * -(-size // query) for size in sizes}
    expected = tuple(sorted(size for size in rounded if size <= largest))
    for mode in ("FULL", "FULL_AND_PIECEWISE", "FULL_DECODE_ONLY"):
        assert captured_rows(config(*sizes, mode=mode), query, second_runner=False) == expected
    assert captured_rows(config(*sizes, mode="PIECEWISE"), query, second_runner=False) == sizes


@pytest.mark.parametrize("largest", [512, 1024])
@pytest.mark.parametrize("query", range(1, 9))
def test_v2_rounds_the_sizes_of_decode_graphs_only(largest: int, query: int) -> None:
    sizes = capture_sizes(largest)
    rounded = {query * -(-size // query) for size in sizes}
    decode = {size for size in rounded if size <= min(largest, 64 * query)}
    given = config(*sizes, mode="FULL_AND_PIECEWISE", max_num_seqs=64)
    assert captured_rows(given, query, second_runner=True) == tuple(sorted({*sizes, *decode}))
    decode_only = config(*sizes, mode="FULL_DECODE_ONLY", max_num_seqs=64)
    assert captured_rows(decode_only, query, second_runner=True) == tuple(sorted(decode))


def test_nothing_is_captured_without_graphs() -> None:
    assert captured_steps(config(1, 2, mode="NONE")) == Steps({})
    eager = config(1, 2)
    eager.model_config.enforce_eager = True
    assert captured_steps(eager) == Steps({})


def test_micro_batches_add_half_batch_sizes_that_run_at_once() -> None:
    assert captured_steps(config(4, 9, use_ubatching=True, num_ubatches=2)) == Steps({2: 2, 4: 2, 5: 2, 9: 1})
    above = config(4, 64, enable_dbo=True, dbo_decode_token_threshold=32)
    assert captured_steps(above) == Steps({4: 1, 32: 2, 64: 1})


# --- an engine's life -------------------------------------------------------------------------------------------------


def test_only_captures_are_served(allocator: Allocator) -> None:
    """The profile run, other warm-ups and steps get vLLM's own memory."""
    found: list[tuple[int, bool]] = []

    def model(rows: int) -> None:
        tensor = allocator.scales(rows, 64, CPU, None)
        engine = engine_of(worker)
        found.append((rows, bool(engine and engine.pool and engine.pool.spec(tensor))))

    worker = Worker(model, 4, 2, 1)
    engine = worker.start()
    model(4)
    assert found == [(4096, False), (7, False), (4, True), (2, True), (1, True), (4, False)]
    assert engine is not None
    assert engine.pool is not None
    assert engine.pool.misses == 0


def test_what_no_graph_took_is_given_back_after_the_last_capture(allocator: Allocator) -> None:
    """On a CPU nothing is captured, so that is all."""
    worker = Worker(lambda rows: allocator.scales(rows, 64, CPU, None), 1, 2)
    held: list[Any] = []
    worker.model_runner.capture_model = lambda: held.append(shapes(engine_of(worker)))
    assert shapes(worker.start()) == []
    assert held == [[(1, 64), (2, 64)]]
    worker.model_runner.capture_model()  # the runner's own again


def test_as_many_buffers_are_reserved_as_the_profile_run_holds_at_once(allocator: Allocator) -> None:
    def one_after_the_other(rows: int) -> None:
        for _ in range(5):
            allocator.scales(rows, 64, CPU, None)

    def two_at_once(rows: int) -> list[Tensor]:
        return [allocator.scales(rows, 64, CPU, None) for _ in range(2)]

    assert shapes(profiled(allocator, one_after_the_other, 1, 2)) == [(1, 64), (2, 64)]
    assert shapes(profiled(allocator, two_at_once, 1, 2)) == [(1, 64)] * 2 + [(2, 64)] * 2
    assert shapes(profiled(allocator, one_after_the_other, 4, enable_dbo=True)) == [(2, 64)] * 2 + [(4, 64)]
    padded = profiled(allocator, lambda rows: allocator.scales(rows, 80, CPU, 96), 4)
    assert padded.pool is not None
    assert [buffer.spec.padded_k for buffer in buffers_of(padded.pool)] == [96]


def test_a_model_without_nvfp4_and_an_eager_engine_have_no_pool(allocator: Allocator) -> None:
    engine = Worker(lambda rows: None, 1, 2).start()
    assert engine is not None
    assert engine.pool is None
    assert Worker(lambda rows: allocator.scales(rows, 64, CPU, None), 1, mode="NONE").start() is None


def test_a_worker_that_never_measures_memory_serves_nothing(allocator: Allocator) -> None:
    worker = Worker(lambda rows: allocator.scales(rows, 64, CPU, None), 1, 2)
    _hooked("_warm_up")(Worker.compile_or_warm_up_model, worker)
    assert engine_of(worker) is None


@pytest.mark.parametrize("end", ["shutdown", "collected", "unregistered"])
def test_an_engine_that_ends_gives_its_memory_back(allocator: Allocator, end: str) -> None:
    def model(rows: int) -> Tensor:
        return allocator.scales(rows, 64, CPU, None)

    first, second = Worker(model, 1, 2), Worker(model, 8)
    pools = []
    for worker in (first, second):
        _hooked("_profile")(Worker.determine_available_memory, worker)
        engine = engine_of(worker)
        assert engine is not None
        pools.append(engine.pool)
        del engine
    assert pools[0] is not None
    assert pools[1] is not None
    assert pools[0] is not pools[1]
    if end == "shutdown":
        first.stop()
    elif end == "collected":
        del first, worker
        gc.collect()
    else:
        allocator.reset()
    assert closed(pools[0])
    assert closed(pools[1]) is (end == "unregistered")


def test_a_pool_that_somebody_closed_is_replaced_before_the_captures(allocator: Allocator) -> None:
    def model(rows: int) -> Tensor:
        return allocator.scales(rows, 64, CPU, None)

    engine = profiled(allocator, model, 1, 2)
    before = engine.pool
    assert before is not None
    before.close()
    with allocator.working(engine):
        tensor = model(2)
    assert engine.pool is not None
    assert engine.pool is not before
    assert engine.pool.spec(tensor) is not None
    assert shapes(engine) == [(1, 64), (2, 64)]


def test_a_second_engine_changes_nothing_for_the_first(allocator: Allocator) -> None:
    def model(rows: int) -> Tensor:
        return allocator.scales(rows, 64, CPU, None)

    first = profiled(allocator, model, 1, 300)
    second = profiled(allocator, model, 1)
    for engine, served in ((first, True), (second, False), (first, True)):
        with allocator.working(engine):
            tensor = model(300)
        assert engine.pool is not None
        assert (engine.pool.spec(tensor) is not None) is served
    assert shapes(first) == [(1, 64), (300, 64)]


# --- captures ---------------------------------------------------------------------------------------------------------


def test_sites_of_captured_steps_are_counted(allocator: Allocator, vllm: SimpleNamespace) -> None:
    engine = profiled(allocator, lambda rows: allocator.scales(rows, 64, CPU, None), 1, 2, 4)
    vllm.capturing = True
    with allocator.working(engine):
        for rows in (4, 2, 1):
            vllm._forward_context = None
            vllm._forward_context = Context()  # perhaps at the address of the one before
            for _ in range(3):
                allocator.scales(rows, 64, CPU, None)
            allocator.zero_scales(rows, 64, CPU, None)
            allocator.scales(100, 64, CPU, None)
            allocator.scales(0, 64, CPU, None)
    sites = engine.captured()
    assert sites.served == 3
    assert sites.bypassed == {ATTENTION_FUSION: 1, ABOVE_MAX_ROWS: 1, NO_ROWS: 1}


def test_layers_on_our_kernel_get_both_layouts_and_count_as_sites(allocator: Allocator) -> None:
    engine = Engine(captured_steps(config(8, 32, 40)), CPU, [64, 64])
    engine.reserve()
    assert engine.pool is not None
    assert sorted((buffer.spec.rows, buffer.spec.layout.name) for buffer in buffers_of(engine.pool)) == [
        (8, "layout_8x4"),
        (MAX_ROWS_8X4, "layout_8x4"),
        (40, "layout_128x4"),
    ]
    assert engine.captured().served == 2


def test_each_kind_of_error_is_logged_once_and_vllm_allocates(
    allocator: Allocator, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("SAFEALLOC_STRICT", "0")
    monkeypatch.setattr(logger, "propagate", True)
    engine = profiled(allocator, lambda rows: allocator.scales(rows, 64, CPU, None), 4)
    assert engine.pool is not None
    with allocator.working(engine):
        engine.pool.close()
        for _ in range(3):
            assert allocator.scales(4, 64, CPU, None).shape == (128, 1)
        engine.pool = Broken()  # type: ignore[assignment]
        for _ in range(3):
            assert allocator.scales(4, 64, CPU, None).shape == (128, 1)
    first, second = [record.getMessage() for record in caplog.records]
    assert "the pool failed" in first
    assert "PoolClosedError" in first
    assert "an error was met" in second
    assert "IndexError" in second
    assert POOL_ERROR == "pool error"


# --- outside captures -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "k", "padded_k"), [(5, 80, None), (5, 80, 128), (128, 64, None), (300, 2832, 2848)])
def test_a_fused_producer_gets_zeroed_padding_where_vllm_allocates_with_empty(
    allocator: Allocator, monkeypatch: pytest.MonkeyPatch, rows: int, k: int, padded_k: int | None
) -> None:
    """Tiles without padding are left as they are; the plain quantizer gets what vLLM allocates."""
    layout = SfLayout.layout_128x4

    def stale(m: int, n: int, device: torch.device, is_sf_swizzled_layout: bool) -> Tensor:
        assert is_sf_swizzled_layout
        padded_rows, padded_cols = layout.padded_shape(m, n)
        return torch.full((padded_rows, padded_cols // 4), 0x7F7F7F7F, dtype=torch.int32, device=device)

    allocator.vllm_scale_tensor = stale
    scales = allocator.scales(rows, k, CPU, padded_k, True).view(torch.uint8).view(-1)
    padding = layout.padding_mask(rows, k, "cpu", padded_k=padded_k).view(-1)
    assert not scales[padding].any()
    tile = layout.tile.rows * layout.tile.cols
    tiles = scales.view(-1, tile)
    with_padding = padding.view(-1, tile).any(1)
    assert not tiles[with_padding].any()
    assert (tiles[~with_padding] == 0x7F).all()
    assert (allocator.scales(rows, k, CPU, padded_k).view(torch.uint8) == 0x7F).all()
    monkeypatch.setattr(serve, "allocates_zeros", lambda: True)
    assert (allocator.scales(rows, k, CPU, padded_k, True).view(torch.uint8) == 0x7F).all()


# --- MoE --------------------------------------------------------------------------------------------------------------


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


def test_one_grouped_buffer_serves_all_batch_sizes_and_ranks(allocator: Allocator) -> None:
    """With a captured batch of 4 on each of 3 ranks a layer has up to 12 tokens; other calls get zeroed memory."""

    def model(tokens: int) -> None:
        for k in (80, 32) * 2:  # two layers of two quantizers
            assert not grouped_scales(allocator, tokens, k).any()

    engine = profiled(allocator, model, 1, 2, 4, data_parallel_size=3)
    pool = engine.pool
    assert pool is not None
    largest = ScaleSpec.grouped(24, 80, SfLayout.layout_128x4, EXPERTS)
    assert sorted(buffer.spec.k for buffer in buffers_of(pool)) == [32, 80]
    with allocator.working(engine):
        for tokens in (12, 4, 1, 12):
            assert pool.spec(grouped_scales(allocator, tokens)) == largest
        assert pool.spec(grouped_scales(allocator, 13)) is None
    outside = grouped_scales(allocator, 4)
    assert pool.spec(outside) is None
    assert not outside.any()
    assert pool.misses == 0


def test_a_grouped_buffer_is_clean_before_the_producer_runs(allocator: Allocator) -> None:
    """Also if the producer then fails: its rows are in the record."""
    engine = profiled(allocator, lambda tokens: grouped_scales(allocator, tokens), 4)
    assert engine.pool is not None
    with allocator.working(engine):
        first = allocator.grouped_scales(6, 80, TOPK, *offsets(3, 3))
        assert first is not None
        logical = torch.zeros((256, 5), dtype=torch.uint8)  # of two experts with three rows each
        logical[:3] = logical[128:131] = 0x7F
        first.view(torch.uint8)[:256] = SfLayout.layout_128x4.swizzle(logical)
        assert engine.pool.verify() == 1
        del first
        second = allocator.grouped_scales(4, 80, TOPK, *offsets(0, 0, 4))
    assert second is not None
    left = SfLayout.layout_128x4.logical(second.view(torch.uint8), second.shape[0], 80)
    assert left.nonzero()[:, 0].unique().tolist() == [0, 1, 2]  # the rows that this step writes
    assert engine.pool.verify() == 1


def test_without_rows_or_unregistered_vllm_allocates_grouped_scales(allocator: Allocator) -> None:
    assert allocator.grouped_scales(0, 80, TOPK, *offsets()) is None
    allocator.enabled = False
    assert allocator.grouped_scales(4, 80, TOPK, *offsets(2, 2)) is None

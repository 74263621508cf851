"""The pool in real CUDA graphs."""

from __future__ import annotations

import gc
import random
import subprocess
import sys
import warnings

import pytest
import torch
from support.adversary import STALE, Adversary
from support.internals import buffers_of
from support.layers import Layer

from safealloc import (
    CaptureGrowthError,
    CaptureGrowthWarning,
    PoolClosedError,
    SafeAllocError,
    ScalePool,
    ScaleSpec,
    SfLayout,
    capture,
)

pytestmark = pytest.mark.gpu
SWIZZLED = (SfLayout.layout_128x4, SfLayout.layout_8x4)


@pytest.fixture
def pool():
    with ScalePool("cuda", growth_in_capture="error") as pool:
        yield pool


def captured(layer: Layer, **keywords) -> torch.cuda.CUDAGraph:
    layer.run()  # compiles the kernels and leaves a buffer behind
    with capture(pool=layer.pool, **keywords) as graph:
        layer.run()
    return graph


@pytest.mark.parametrize("layout", SWIZZLED)
def test_every_row_count_from_1_to_64(pool, layout):
    pool.reserve(range(1, 65), 1008, layout)
    for rows in range(1, 65):
        layer = Layer(rows, 1008, 64, layout, pool, seed=rows)
        graph = captured(layer)
        layer.x.mul_(2)
        layer.y.fill_(float("nan"))
        graph.replay()
        layer.check()
    assert pool.verify() >= 64
    assert pool.stats().capture_fallbacks == 0


def test_padding_stays_zero_in_ten_thousand_replays_under_an_adversary(pool):
    random.seed(0)
    shapes = [(1, 1008), (3, 1024), (8, 4080), (17, 1008), (32, 4096), (33, 2032), (48, 1008), (64, 4080)]
    layers = [Layer(rows, k, 256, SWIZZLED[i % 2], pool, seed=i) for i, (rows, k) in enumerate(shapes)]
    handle = torch.cuda.graph_pool_handle()
    graphs = []
    for i, layer in enumerate(layers):  # half share one handle, half have their own
        graphs.append(captured(layer, graph_pool=handle if i % 2 else None))
    # Freed blocks of the graphs' private memory, filled at every replay of this one.
    dirty = torch.cuda.CUDAGraph()
    with torch.cuda.graph(dirty, pool=handle):
        for nbytes in (512, 1024, 4096, 1 << 16, 1 << 20):
            torch.full((nbytes,), STALE, dtype=torch.uint8, device="cuda")
    adversary = Adversary(pool, [ScaleSpec(layer.rows, layer.k, layer.layout) for layer in layers])
    adversary.run_compiled_code()
    replays = 0
    for thousand in range(10):
        adversary.fill_device()
        for _ in range(1000):
            i = random.randrange(len(graphs))
            graphs[i].replay()
            replays += 1
            if replays % 10 == 0:
                adversary.write_eager_buffers()
                adversary.fill_cached_memory()
                dirty.replay()
            if replays % 100 == 0:
                adversary.run_compiled_code()
                layers[i].y.fill_(float("nan"))
                graphs[i].replay()
                layers[i].check()
        assert pool.verify() >= len(layers), thousand
    assert replays == 10_000
    for layer, graph in zip(layers, graphs, strict=True):
        layer.x.neg_()
        graph.replay()
        layer.check()


def test_the_adversary_would_reach_a_torch_empty_buffer(pool):
    """The test above can fail: the same adversary reaches memory of ``torch.empty``."""
    rows, k, layout = 8, 1008, SfLayout.layout_8x4
    layer = Layer(rows, k, 64, layout, pool)
    layer.run()
    x_fp4 = torch.empty(rows, k // 2, dtype=torch.uint8, device="cuda")
    shape = layout.padded_shape(rows, k)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        torch.full(shape, STALE, dtype=torch.uint8, device="cuda")  # freed at once: the next one gets its memory
        scales = torch.empty(shape, dtype=torch.uint8, device="cuda")
        layer.multiply(x_fp4, scales)
    graph.replay()
    assert (scales.view(-1)[layout.padding_mask(rows, k, "cuda")] == STALE).all()
    assert layer.y.isnan().all()


def test_graphs_of_different_handles_replay_concurrently(pool):
    rows, k = 16, 4080
    layers = [Layer(rows, k, 2048, SfLayout.layout_128x4, pool, seed=i) for i in range(2)]
    pool.reserve(rows, k, copies=2)
    graphs = [captured(layer) for layer in layers]
    reports = [pool.graph_report(graph) for graph in graphs]
    assert all(len(report.buffers) == 1 for report in reports)
    assert pool.stats().captured == 2
    expected = [layer.expected() for layer in layers]
    streams = [torch.cuda.Stream() for _ in graphs]
    torch.cuda.synchronize()
    for _ in range(200):
        for layer in layers:
            layer.y.fill_(float("nan"))
        torch.cuda.synchronize()
        for graph, stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                for _ in range(5):
                    graph.replay()
        torch.cuda.synchronize()
        for layer, y in zip(layers, expected, strict=True):
            torch.testing.assert_close(layer.y, y, rtol=2**-7, atol=1e-3 * float(y.abs().max()))
    assert pool.verify() >= 2


def test_graphs_of_one_handle_share_buffers(pool):
    layers = [Layer(8, 1008, 64, SfLayout.layout_8x4, pool, seed=i) for i in range(2)]
    first = captured(layers[0])
    second = captured(layers[1], graph_pool=first.pool())
    assert pool.stats().captured == 1
    for _ in range(3):
        first.replay()
        second.replay()
    for layer in layers:
        layer.check()


def test_a_capture_never_shares_with_eager_callers(pool):
    layer = Layer(8, 1008, 64, SfLayout.layout_8x4, pool)
    graph = captured(layer)
    stream = torch.cuda.graph.default_capture_stream  # the capture's own stream, used eagerly afterwards
    with torch.cuda.stream(stream):
        eager = pool.acquire(8, 1008, SfLayout.layout_8x4)
        eager.fill_(STALE)
    torch.cuda.synchronize()
    layer.y.fill_(float("nan"))
    graph.replay()
    layer.check()


def test_two_live_tensors_in_one_capture_are_two_buffers(pool):
    pool.reserve(4, 512, copies=2)
    with capture(pool=pool) as graph:
        first = pool.acquire(4, 512, SfLayout.layout_128x4)
        second = pool.acquire(4, 512, SfLayout.layout_128x4)
        address = first.data_ptr()
        assert address != second.data_ptr()
        first.add_(1)
        del first
        third = pool.acquire(4, 512, SfLayout.layout_128x4)
        assert third.data_ptr() == address  # free again, in the order of one stream
    assert len(pool.graph_report(graph).buffers) == 2


def test_forked_streams_in_one_capture_do_not_share(pool):
    pool.reserve(4, 512, copies=2)
    side = torch.cuda.Stream()
    with capture(pool=pool):
        first = pool.acquire(4, 512, SfLayout.layout_128x4).add_(1)
        address = first.data_ptr()
        side.wait_stream(torch.cuda.current_stream())
        del first  # but its kernel may still run when the side stream's does
        with torch.cuda.stream(side):
            second = pool.acquire(4, 512, SfLayout.layout_128x4)
            second.add_(1)
        assert second.data_ptr() != address
        torch.cuda.current_stream().wait_stream(side)


def test_record_stream_in_a_capture_keeps_the_buffer_from_that_capture(pool):
    pool.reserve(4, 512, copies=2)
    side = torch.cuda.Stream()
    total = torch.zeros((), device="cuda", dtype=torch.int64)
    with capture(pool=pool) as graph:
        scales = pool.acquire(4, 512, SfLayout.layout_128x4)
        address = scales.data_ptr()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            total += scales.sum(dtype=torch.int64)
        pool.record_stream(scales, side)
        del scales
        again = pool.acquire(4, 512, SfLayout.layout_128x4)
        assert again.data_ptr() != address
        torch.cuda.current_stream().wait_stream(side)
        del again
    graph.replay()
    with capture(pool=pool, graph_pool=graph.pool()):  # a later capture of the handle may have it
        assert pool.acquire(4, 512, SfLayout.layout_128x4).data_ptr() in {one.address for one in buffers_of(pool)}
        total.add_(1)


def test_record_stream_in_eager_work_waits_for_the_stream(pool):
    side = torch.cuda.Stream()
    big = torch.ones(1 << 28, device="cuda")
    scales = pool.acquire(4, 512, SfLayout.layout_128x4)
    address = scales.data_ptr()
    with torch.cuda.stream(side):
        for _ in range(50):
            big.mul_(1.0)
        copy = scales.clone()
    pool.record_stream(scales.view(torch.float8_e4m3fn), side)
    del scales
    other = pool.acquire(4, 512, SfLayout.layout_128x4)
    assert other.data_ptr() != address  # the side stream has not passed
    assert not side.query()
    side.synchronize()
    assert pool.acquire(4, 512, SfLayout.layout_128x4).data_ptr() == address
    del copy, other


def test_streams_do_not_share_eager_buffers(pool):
    first = pool.acquire(4, 512, SfLayout.layout_128x4)
    address = first.data_ptr()
    del first
    with torch.cuda.stream(torch.cuda.Stream()):
        assert pool.acquire(4, 512, SfLayout.layout_128x4).data_ptr() != address
    assert pool.acquire(4, 512, SfLayout.layout_128x4).data_ptr() == address


@pytest.mark.parametrize("how", ["delete", "reset"])
def test_buffers_come_back_when_the_last_graph_is_gone(pool, how):
    layer = Layer(8, 1008, 64, SfLayout.layout_8x4, pool)
    first = captured(layer)
    second = captured(layer, graph_pool=first.pool())
    second.replay()
    if how == "reset":
        first.reset()
    del first
    gc.collect()
    torch.cuda.synchronize()
    assert pool.stats().captured == 1  # the second graph still writes it
    second.replay()
    if how == "reset":
        second.reset()
    del second
    gc.collect()
    torch.cuda.synchronize()
    stats = pool.stats()
    assert stats.captured == 0
    assert captured(layer) is not None  # and they serve again
    assert pool.stats().buffers == stats.buffers


def test_a_graph_destroyed_in_flight_keeps_its_buffers_until_it_is_over(pool):
    pool.reserve(4, 512)
    big = torch.ones(1 << 28, device="cuda")
    with capture(pool=pool) as graph:
        scales = pool.acquire(4, 512, SfLayout.layout_128x4)
        for _ in range(50):
            big.mul_(1.0)
        scales.add_(1)
        del scales
    for _ in range(3):
        graph.replay()
    del graph
    gc.collect()
    # Whatever the pool reports now, its buffer is not handed out before the replays are over.
    again = pool.acquire(4, 512, SfLayout.layout_128x4)
    again.zero_()
    torch.cuda.synchronize()
    assert int(again.sum()) == 0


def test_a_graph_outlives_a_closed_pool():
    pool = ScalePool("cuda")
    layer = Layer(8, 1008, 64, SfLayout.layout_8x4, pool)
    graph = captured(layer)
    buffer = next(buffer for buffer in buffers_of(pool) if isinstance(buffer.owner, tuple))
    shape, address = buffer.base.shape, buffer.address
    del buffer
    pool.close()
    gc.collect()
    torch.cuda.empty_cache()
    others = [torch.full(shape, STALE, dtype=torch.uint8, device="cuda") for _ in range(2000)]
    assert address not in {other.data_ptr() for other in others}
    Adversary(pool, []).fill_device()
    for _ in range(10):
        layer.y.fill_(float("nan"))
        graph.replay()
        layer.check()
    with pytest.raises(PoolClosedError):
        pool.acquire(8, 1008, SfLayout.layout_8x4)


def test_a_graph_outlives_a_deleted_pool():
    layer = Layer(8, 1008, 64, SfLayout.layout_8x4, ScalePool("cuda"))
    graph = captured(layer)
    layer.pool = None
    gc.collect()
    torch.cuda.empty_cache()
    others = [torch.full((512,), STALE, dtype=torch.uint8, device="cuda") for _ in range(5000)]
    layer.y.fill_(float("nan"))
    graph.replay()
    layer.check()
    del others


def test_growth_in_a_capture_is_an_error_that_names_the_reserve_call(pool):
    before = pool.stats()
    with pytest.raises(CaptureGrowthError, match=r"reserve\(5, 1008, SfLayout.layout_8x4\)"), capture(pool=pool):
        torch.zeros(1, device="cuda")
        pool.acquire(5, 1008, SfLayout.layout_8x4)
    assert pool.stats() == before
    pool.reserve(5, 1008, SfLayout.layout_8x4)
    with capture(pool=pool):
        pool.acquire(5, 1008, SfLayout.layout_8x4).add_(1)


def test_growth_in_a_capture_falls_back_to_recorded_zeros():
    with ScalePool("cuda") as pool:
        layer = Layer(8, 1008, 64, SfLayout.layout_8x4, ScalePool("cuda"))
        layer.run()
        layer.pool = pool
        with (
            pytest.warns(CaptureGrowthWarning, match=r"reserve\(8, 1008, SfLayout.layout_8x4\)"),
            capture(pool=pool) as graph,
        ):
            layer.run()
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # once a shape
            with capture(pool=pool):
                layer.run()
        assert pool.stats().capture_fallbacks == 2
        assert pool.stats().buffers == 0
        Adversary(pool, []).fill_cached_memory()
        layer.y.fill_(float("nan"))
        graph.replay()
        layer.check()


def test_reserve_trim_verify_and_close_refuse_to_run_in_a_capture(pool):
    pool.reserve(4, 512)
    verified = ScalePool("cuda", debug=True)
    verified.reserve(4, 512)
    with capture(pool=pool):
        pool.acquire(4, 512, SfLayout.layout_128x4).add_(1)
        with pytest.raises(CaptureGrowthError):
            pool.reserve(4, 512, copies=2)
        for refused in (pool.trim, pool.verify, pool.close):
            with pytest.raises(SafeAllocError, match="capture"):
                refused()
        with pytest.raises(SafeAllocError, match="capture"):
            verified.acquire(4, 512, SfLayout.layout_128x4)
    assert pool.verify() == verified.verify() == 1
    verified.close()


def test_captures_begun_elsewhere_share_buffers_only_where_asked(pool):
    pool.reserve(4, 512, copies=3)

    def foreign() -> tuple[torch.cuda.CUDAGraph, int]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            buffer = pool.acquire(4, 512, SfLayout.layout_128x4).add_(1)
        return graph, buffer.data_ptr()

    first, address = foreign()
    second, other = foreign()
    assert other != address  # each is a handle of its own
    with pool.shared_captures():
        third, shared = foreign()
        fourth, again = foreign()
    assert again == shared
    assert shared not in (address, other)
    with pytest.raises(CaptureGrowthError):
        foreign()
    graphs = [first, second, third, fourth]
    for graph in graphs:
        graph.replay()
    del first, second, third, fourth, graph, graphs
    gc.collect()
    torch.cuda.synchronize()
    assert pool.stats().captured == 0


def test_a_capture_takes_over_the_buffer_of_a_warm_up(pool):
    address = pool.acquire(4, 512, SfLayout.layout_128x4).data_ptr()
    with capture(pool=pool) as graph:
        assert pool.acquire(4, 512, SfLayout.layout_128x4).add_(1).data_ptr() == address
    assert pool.acquire(4, 512, SfLayout.layout_128x4).data_ptr() != address  # the graph has it
    del graph


def test_the_reference_can_be_captured(pool):
    layer = Layer(8, 1008, 64, SfLayout.layout_8x4, pool)
    layer.expected()  # cuBLAS makes its workspace outside
    with capture(pool=pool) as graph:
        y = layer.expected()
    layer.x.mul_(2)
    graph.replay()
    assert torch.equal(y, layer.expected())


def test_a_capture_that_fails_gives_its_buffers_back(pool):
    pool.reserve(4, 512)
    stream = torch.cuda.current_stream()
    with pytest.raises(RuntimeError), capture(pool=pool):
        pool.acquire(4, 512, SfLayout.layout_128x4).add_(1)
        torch.cuda.synchronize()  # not allowed in a capture
    assert torch.cuda.current_stream() == stream
    gc.collect()
    torch.cuda.synchronize()
    with capture(pool=pool) as graph:  # retried
        pool.acquire(4, 512, SfLayout.layout_128x4).add_(1)
    graph.replay()
    torch.cuda.synchronize()
    assert pool.stats().buffers == 1


ACTIVE_MEMORY_POOL = """
import torch
from safealloc import ScalePool, SfLayout
active, pool = torch.cuda.MemPool(), ScalePool("cuda")
with torch.cuda.use_mem_pool(active):
    inside = torch.ones(512, dtype=torch.uint8, device="cuda")
    buffer = pool.acquire(3, 1008, SfLayout.layout_8x4)
segments = [(s["address"], s["address"] + s["total_size"]) for s in active.snapshot()]
assert any(start <= inside.data_ptr() < end for start, end in segments)
assert not any(start <= buffer.data_ptr() < end for start, end in segments)
"""


def test_memory_comes_from_outside_the_active_memory_pool():
    """In a process of its own, where numbers of pools are small: ``MemPool.snapshot`` of torch 2.11 drops a reference too
    many to the numbers of the pool's id, which integers above 256 do not survive.
    """
    done = subprocess.run([sys.executable, "-c", ACTIVE_MEMORY_POOL], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_trim_gives_memory_back_to_the_device():
    with ScalePool("cuda", cache_bytes=1 << 30) as pool:
        pool.reserve(8, 1024)
        pool.acquire(1 << 17, 1 << 13, SfLayout.layout_128x4)
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved()
        freed = pool.trim()
        torch.cuda.empty_cache()
        assert freed == 1 << 26
        assert before - torch.cuda.memory_reserved() >= freed
        assert pool.stats().buffers == 1


def test_a_real_allocation_failure_leaves_the_pool_as_it_was(pool):
    pool.reserve(8, 1024)
    before = pool.stats()
    free, _ = torch.cuda.mem_get_info()
    rows = 128 * (free // (128 * 1024) // 4)
    with pytest.raises(torch.OutOfMemoryError):
        pool.reserve(rows, 16 * 1024, copies=8)
    torch.cuda.empty_cache()
    assert pool.stats() == before
    assert pool.verify() == 1


def test_capture_refuses_wrong_arguments(pool):
    with pytest.raises(TypeError), capture(graph="graph", pool=pool):
        pass
    with pytest.raises(TypeError), capture(pool="pool"):
        pass
    with pytest.raises(TypeError), capture(pool=pool, no_such_argument=1):
        pass
    with pytest.raises(ValueError, match="CUDA device"), capture(pool=ScalePool("cpu")):
        pass
    with capture(pool=pool), pytest.raises(SafeAllocError, match="nest"), capture(pool=pool):
        pass
    with pytest.raises(ValueError, match="captured"):
        pool.graph_report(torch.cuda.CUDAGraph())

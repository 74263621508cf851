"""The guard on a GPU: asynchronous checks, at replays, of every buffer that graphs were given."""

from __future__ import annotations

import gc
import logging

import pytest
import torch
from support.internals import buffers_of
from support.layers import Layer

from safealloc import PaddingCorruptionError, SafeAllocError, ScalePool, SfLayout, capture, nvfp4_quantize

pytest.importorskip("triton", reason="the guard's kernels need triton")

pytestmark = pytest.mark.gpu


@pytest.fixture
def guarded():
    pools: list[ScalePool] = []

    def make(every: int, repair: bool = False) -> ScalePool:
        pools.append(ScalePool("cuda", growth_in_capture="error", verify_every=every, verify_repair=repair))
        return pools[-1]

    yield make
    for pool in pools:
        pool.close()


def captured(layer: Layer, **keywords) -> torch.cuda.CUDAGraph:
    layer.run()  # compiles the kernels and leaves a buffer behind
    gc.collect()  # an earlier graph that an error's traceback holds: CUDA forbids to destroy one in a capture
    with capture(pool=layer.pool, **keywords) as graph:
        layer.run()
    return graph


def write_padding(pool: ScalePool, rows: int, layout: SfLayout = SfLayout.layout_128x4) -> None:
    """Write the last padding byte of the buffer that graphs were given for so many rows."""
    (buffer,) = [one for one in buffers_of(pool) if one.spec.rows == rows and one.captures]
    padding = layout.padding_mask(rows, buffer.spec.k, "cuda").nonzero().flatten()
    buffer.base.view(-1)[padding[-1:]] = 0x7F
    torch.cuda.synchronize()


def raises_after(pool: ScalePool, graph: torch.cuda.CUDAGraph, replays: int) -> PaddingCorruptionError:
    """The error of the last of so many replays; none of those before finds anything."""
    for _ in range(replays - 1):
        graph.replay()
        torch.cuda.synchronize()
        pool.safe_point()
    graph.replay()
    torch.cuda.synchronize()
    with pytest.raises(PaddingCorruptionError) as raised:
        pool.safe_point()
    return raised.value


@pytest.mark.parametrize("layout", [SfLayout.layout_128x4, SfLayout.layout_8x4])
def test_every_nth_replay_checks(guarded, layout):
    pool = guarded(3)
    layer = Layer(5, 1008, 64, layout, pool, seed=0)
    graph = captured(layer)
    for _ in range(7):
        graph.replay()
    torch.cuda.synchronize()
    pool.safe_point()
    write_padding(pool, 5, layout)  # after 7 replays: the ninth checks
    error = raises_after(pool, graph, 2)
    (found,) = error.corruptions
    assert (found.spec.rows, found.value, found.count) == (5, 0x7F, 1)
    assert found.handed_to is not None
    assert "layers.py:" in found.handed_to
    raises_after(pool, graph, 3)  # still there
    assert pool.verify(repair=True)
    for _ in range(9):
        graph.replay()
    torch.cuda.synchronize()
    pool.safe_point()
    layer.check()


def test_repair_zeroes_and_logs(guarded, caplog):
    pool = guarded(2, repair=True)
    layer = Layer(5, 1008, 64, SfLayout.layout_128x4, pool, seed=0)
    graph = captured(layer)
    write_padding(pool, 5)
    for _ in range(2):
        graph.replay()
    torch.cuda.synchronize()
    with caplog.at_level(logging.WARNING, "safealloc"):
        pool.safe_point()
    assert "zeroed padding that somebody wrote" in caplog.text
    assert pool.verify() >= 1
    graph.replay()
    torch.cuda.synchronize()
    layer.check()


def test_a_graph_checks_buffers_handed_out_after_its_node_and_those_of_other_graphs(guarded):
    pool = guarded(1)
    layers = [Layer(rows, 1008, 64, SfLayout.layout_128x4, pool, seed=rows) for rows in (5, 9, 17)]
    for layer in layers:
        layer.run()
    with capture(pool=pool) as first:
        layers[0].run()
        layers[1].run()
    second = captured(layers[2])
    for layer, graph in zip(layers, (first, first, first), strict=True):
        write_padding(pool, layer.rows)
        raises_after(pool, graph, 1)
        pool.verify(repair=True)
    second.replay()
    torch.cuda.synchronize()
    pool.safe_point()


def test_a_capture_begun_elsewhere_is_checked(guarded):
    pool = guarded(1)
    layer = Layer(5, 1008, 64, SfLayout.layout_128x4, pool, seed=0)
    layer.run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        layer.run()
    write_padding(pool, 5)
    raises_after(pool, graph, 1)
    pool.verify(repair=True)


def test_the_guard_adds_one_node_per_graph(guarded):
    pytest.importorskip("cuda.bindings.driver", reason="node counts come from cuda.bindings")
    counts = []
    for every in (0, 1):
        pool = guarded(every)
        layers = [Layer(rows, 1008, 64, SfLayout.layout_128x4, pool, seed=rows) for rows in (5, 9)]
        for layer in layers:
            layer.run()
        with capture(pool=pool) as graph:
            for layer in layers:
                layer.run()
        counts.append(sum(pool.graph_report(graph).nodes.values()))
        del graph
    assert counts[1] == counts[0] + 1


def test_nothing_synchronizes_while_padding_is_zero(guarded):
    pool = guarded(1)
    layer = Layer(5, 1008, 64, SfLayout.layout_128x4, pool, seed=0)
    graph = captured(layer)
    x = torch.randn(5, 1008, dtype=torch.bfloat16, device="cuda")
    one = torch.ones(1, device="cuda")
    nvfp4_quantize(x, one, pool=pool)
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(5):
            nvfp4_quantize(x, one, pool=pool)
            graph.replay()
            pool.safe_point()
    finally:
        torch.cuda.set_sync_debug_mode(before)


def test_eager_calls_are_checked_at_every_nth_handout(guarded):
    pool = guarded(2)
    x = torch.randn(5, 1008, dtype=torch.bfloat16, device="cuda")
    one = torch.ones(1, device="cuda")
    for _ in range(3):
        nvfp4_quantize(x, one, pool=pool)
    _, scales = nvfp4_quantize(x, one, pool=pool)  # the same buffer: nobody held it
    scales.view(-1)[SfLayout.layout_128x4.offsets(128, 1008, "cuda")[100, 62]] = 0x38
    del scales
    for _ in range(2):
        nvfp4_quantize(x, one, pool=pool)
    torch.cuda.synchronize()
    with pytest.raises(PaddingCorruptionError, match=r"row 100, column 62; last handed to nvfp4_quantize at "):
        nvfp4_quantize(x, one, pool=pool)
    pool.verify(repair=True)


def test_graphs_outlive_the_pool(guarded):
    pool = guarded(1)
    layer = Layer(5, 1008, 64, SfLayout.layout_128x4, pool, seed=0)
    graph = captured(layer)
    pool.close()
    gc.collect()
    torch.cuda.empty_cache()
    rubbish = [torch.full((1 << 20,), 0x7F, dtype=torch.uint8, device="cuda") for _ in range(8)]
    pinned = [torch.full((1 << 16,), 0x7F, dtype=torch.uint8, pin_memory=True) for _ in range(8)]
    for _ in range(10):
        graph.replay()
    torch.cuda.synchronize()
    layer.check()
    del rubbish, pinned


def test_a_guarded_pool_cannot_be_made_in_a_capture(guarded):
    graph = torch.cuda.CUDAGraph()
    x = torch.zeros(1, device="cuda")
    with torch.cuda.graph(graph):
        x.add_(1)
        with pytest.raises(SafeAllocError, match="before the capture"):
            guarded(1)
    graph.replay()
    torch.cuda.synchronize()
    assert int(x) == 1

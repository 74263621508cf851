"""A compact pool inside real CUDA graphs: graphs of different rows share a buffer, and each replay leaves it clean."""

from __future__ import annotations

import gc
import random
import warnings

import pytest
import torch
from adversary import STALE
from layers import Layer

from safealloc import CaptureGrowthWarning, SafeAllocError, ScalePool, SfLayout, capture, nvfp4_quantize
from safealloc.kernels import reference

pytestmark = pytest.mark.gpu

SHAPES = [
    (SfLayout.layout_128x4, (120, 3, 17), 1008),
    (SfLayout.layout_128x4, (128, 1), 4096),
    (SfLayout.layout_8x4, (8, 3, 5), 1008),
    (SfLayout.layout_8x4, (2, 8, 1), 8192),
]
shapes = pytest.mark.parametrize(("layout", "rows", "k"), SHAPES, ids=lambda value: getattr(value, "name", str(value)))


@pytest.fixture
def pool():
    with ScalePool("cuda", compact=True, growth_in_capture="error") as pool:
        yield pool


def make_layers(pool: ScalePool, rows: tuple[int, ...], k: int, layout: SfLayout) -> list[Layer]:
    layers = [Layer(several, k, 64, layout, pool, seed=several) for several in rows]
    for layer in layers:
        layer.run()  # compiles the kernels
        layer.check()
    torch.cuda.synchronize()
    return layers


def expected_scales(layer: Layer) -> torch.Tensor:
    data = torch.empty(layer.rows, layer.k // 2, dtype=torch.uint8, device="cuda")
    scales = torch.zeros(layer.layout.padded_shape(layer.rows, layer.k), dtype=torch.uint8, device="cuda")
    reference.quantize(layer.x, layer.global_scale, data, scales, layer.layout)
    return scales


def captured_buffer(pool: ScalePool):
    (buffer,) = [buffer for buffer in pool._inventory.by_address.values() if buffer.capture is not None]
    return buffer


@shapes
def test_graphs_of_different_rows_share_a_buffer_and_leave_it_clean(pool, layout, rows, k):
    layers = make_layers(pool, rows, k, layout)
    pool.reserve(rows, k, layout)
    handle = torch.cuda.graph_pool_handle()
    graphs = []
    for layer in layers:
        with capture(pool=pool, graph_pool=handle) as graph:
            layer.run()
        graphs.append(graph)
    assert pool.stats().captured == 1
    assert pool.stats().capture_fallbacks == 0
    buffer = captured_buffer(pool)
    assert all(pool.graph_report(graph).buffers == (buffer.spec,) for graph in graphs)
    random.seed(0)
    for replay in range(60):
        i = replay % len(graphs) if replay < 12 else random.randrange(len(graphs))
        layers[i].x.neg_()
        layers[i].y.fill_(float("nan"))
        graphs[i].replay()
        assert torch.equal(buffer.base, expected_scales(layers[i]))
        assert buffer.record.tolist() == [layers[i].rows] * buffer.spec.record
        assert pool.verify() == pool.stats().buffers
        layers[i].check()
    # Without anything in between that lets the device pass.
    for _ in range(200):
        for graph in graphs:
            graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(buffer.base, expected_scales(layers[-1]))
    for layer in layers:
        layer.check()


@shapes
def test_one_graph_of_several_row_counts(pool, layout, rows, k):
    """Its kernels follow each other as programmatic dependents, where the device launches such."""
    layers = make_layers(pool, rows, k, layout)
    pool.reserve(rows, k, layout)
    with capture(pool=pool) as graph:
        for layer in (*layers, *reversed(layers)):
            layer.run()
    assert len(pool.graph_report(graph).buffers) == 1
    for _ in range(50):
        for layer in layers:
            layer.x.neg_()
            layer.y.fill_(float("nan"))
        graph.replay()
        for layer in layers:
            layer.check()
        assert torch.equal(captured_buffer(pool).base, expected_scales(layers[0]))
        assert pool.verify() == pool.stats().buffers


def test_a_graph_has_as_many_nodes_as_with_a_pool_that_is_not_compact(pool):
    pytest.importorskip("cuda.bindings.driver", reason="node counts come from cuda.bindings")
    graphs, nodes = [], []
    for chosen in (pool, ScalePool("cuda")):
        (layer,) = make_layers(chosen, (5,), 1008, SfLayout.layout_128x4)
        layer.run()  # loads the kernels
        with capture(pool=chosen) as graph:
            layer.run()
        graphs.append(graph)
        nodes.append(chosen.graph_report(graph).nodes)
    assert nodes[0] == nodes[1]


def test_graphs_of_different_handles_have_buffers_of_their_own(pool):
    layers = make_layers(pool, (120, 3), 1008, SfLayout.layout_128x4)
    pool.reserve((120, 3), 1008, copies=2)
    graphs = []
    for layer in layers:
        with capture(pool=pool) as graph:
            layer.run()
        graphs.append(graph)
    assert pool.stats().captured == 2
    streams = [torch.cuda.Stream() for _ in graphs]
    for _ in range(100):
        for layer in layers:
            layer.y.fill_(float("nan"))
        torch.cuda.synchronize()
        for graph, stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
        torch.cuda.synchronize()
        for layer in layers:
            layer.check()
    assert pool.verify() == pool.stats().buffers


def test_growth_in_a_capture_zeroes_the_counts_too():
    with ScalePool("cuda", compact=True) as pool:
        layers = make_layers(pool, (120, 3), 1008, SfLayout.layout_128x4)
        pool.trim()
        handle = torch.cuda.graph_pool_handle()
        graphs = []
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            for layer in layers:
                with capture(pool=pool, graph_pool=handle) as graph:
                    layer.run()
                graphs.append(graph)
        assert [warning.category for warning in said].count(CaptureGrowthWarning) == 1  # once a padded shape
        assert pool.stats().capture_fallbacks == 2
        for _ in range(20):
            for layer, graph in zip(layers, graphs, strict=True):
                layer.x.neg_()
                layer.y.fill_(float("nan"))
                graph.replay()
                layer.check()


def test_a_buffer_keeps_its_counts_on_the_way_from_a_warm_up_to_a_graph_and_back(pool):
    layers = make_layers(pool, (120, 3), 1008, SfLayout.layout_128x4)  # one warm-up buffer, which held 120 rows
    assert pool.stats().buffers == 1
    (buffer,) = pool._inventory.by_address.values()
    layers[0].run()
    with capture(pool=pool) as graph:
        layers[1].run()
    assert buffer.capture is not None
    graph.replay()
    assert torch.equal(buffer.base, expected_scales(layers[1]))
    del graph
    gc.collect()
    torch.cuda.synchronize()
    assert pool.stats().captured == 0
    for layer in (*layers, *reversed(layers)):
        layer.run()
        assert torch.equal(buffer.base, expected_scales(layer))
        layer.check()
    assert pool.verify() == 1


def test_a_capture_that_grew_with_an_error_or_a_foreign_writer_leaves_nothing(pool):
    x, g = torch.randn(5, 1008, dtype=torch.bfloat16, device="cuda"), torch.ones(1, device="cuda")
    nvfp4_quantize(x, g, pool=pool)
    before = pool.stats()
    for use in (
        lambda: pool.acquire(5, 1008, SfLayout.layout_128x4),
        lambda: torch.ops.safealloc.acquire(5, 1008, 0, pool.device),
    ):
        with pytest.raises(SafeAllocError, match="compact"), capture(pool=pool):
            torch.empty(1, device="cuda").fill_(1)
            use()
    assert pool.stats() == before


def test_the_reference_can_be_captured_and_clears_too(pool):
    g = torch.ones(1, device="cuda")
    xs = [torch.randn(rows, 1008, dtype=torch.bfloat16, device="cuda") for rows in (120, 3)]
    for x in xs:
        nvfp4_quantize(x, g, pool=pool, backend="reference")
    handle, graphs = torch.cuda.graph_pool_handle(), []
    for x in xs:
        with capture(pool=pool, graph_pool=handle) as graph:
            nvfp4_quantize(x, g, pool=pool, backend="reference")
        graphs.append(graph)
    buffer = captured_buffer(pool)
    for graph, x in [*zip(graphs, xs, strict=True)] * 3:
        graph.replay()
        expected = torch.zeros_like(buffer.base)
        data = torch.empty(x.shape[0], 504, dtype=torch.uint8, device="cuda")
        reference.quantize(x, g, data, expected, SfLayout.layout_128x4)
        assert torch.equal(buffer.base, expected)
        assert pool.verify() == 1


def test_what_somebody_writes_is_named_and_healed(pool):
    layers = make_layers(pool, (120, 3), 1008, SfLayout.layout_128x4)
    with capture(pool=pool) as graph:
        layers[1].run()
    graph.replay()
    buffer = captured_buffer(pool)
    at = SfLayout.layout_128x4.offsets(128, 1008, "cuda")
    buffer.base.view(-1)[at[100, 5]] = STALE
    with pytest.raises(SafeAllocError, match="0x7F at scale row 100, column 5"):
        pool.verify()
    assert pool.verify(repair=True) == pool.verify()
    assert torch.equal(buffer.base, expected_scales(layers[1]))
    graph.replay()
    layers[1].check()

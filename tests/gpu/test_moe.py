"""MoE layers in captured graphs: no replay reads a scale of an earlier routing."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the quantizer under test is Triton's")

from support.adversary import STALE, Adversary
from support.moe_layer import LAYOUT, MoeLayer

from safealloc import ScalePool, ScaleSpec, capture, clean_grouped_scales, nvfp4_quantize_grouped
from safealloc.kernels import triton_grouped
from safealloc.ops import backends

pytestmark = pytest.mark.gpu

TOPK, EXPERTS, HIDDEN, WIDTH = 4, 16, 272, 144  # 17 and 9 scale columns: padding columns everywhere
TOKENS = (16, 1, 5)


@pytest.fixture
def pool():
    with ScalePool("cuda", growth_in_capture="error") as pool:
        yield pool
        torch.cuda.synchronize()


def routings(tokens: int, count: int) -> Tensor:
    """int32 ``[count, tokens, topk]``: even, skewed, all to the same experts, and some on other ranks (-1)."""
    rng = torch.Generator("cuda").manual_seed(tokens)
    weights = torch.rand(count, tokens, EXPERTS, device="cuda", generator=rng)
    kind = torch.arange(count, device="cuda") % 4
    slope = torch.linspace(0, 3, EXPERTS, device="cuda")
    weights += torch.where((kind == 1)[:, None, None], slope, 0)
    weights = torch.where((kind == 2)[:, None, None], weights[:, :1], weights)
    chosen = weights.topk(TOPK, -1).indices.to(torch.int32)
    away = torch.rand(chosen.shape, device="cuda", generator=rng) < 0.4
    return torch.where((kind == 3)[:, None, None] & away, -1, chosen)


def make_layers(pool: ScalePool, copies: int = 1) -> list[MoeLayer]:
    for k in (HIDDEN, WIDTH):
        pool.reserve([tokens * TOPK for tokens in TOKENS], k, LAYOUT, copies, experts=EXPERTS)
    return [MoeLayer(tokens, TOPK, EXPERTS, HIDDEN, WIDTH, pool) for tokens in TOKENS]


def captured(layer: MoeLayer, graph_pool: Any = None, **quantizers: Any) -> torch.cuda.CUDAGraph:
    layer.run(**quantizers)
    torch.cuda.synchronize()
    layer.stale.zero_()
    with capture(pool=layer.pool, graph_pool=graph_pool) as graph:
        layer.run(**quantizers)
    return graph


class Steps:
    """Inputs of each replay: another routing, other activations, and other invalid tokens, which hold NaN."""

    def __init__(self, layers: list[MoeLayer]) -> None:
        self.random = random.Random(0)
        self.layers = layers
        self.ids = [routings(layer.tokens, 997) for layer in layers]
        rng = torch.Generator("cuda").manual_seed(1)
        shape = (61, max(TOKENS), HIDDEN)
        self.x = (torch.randn(shape, device="cuda", generator=rng) * 3).bfloat16()

    def next(self) -> int:
        """Prepare a step of one of the layers; its index."""
        which = self.random.randrange(len(self.layers))
        layer = self.layers[which]
        valid = self.random.randint(0, layer.tokens) if self.random.random() < 0.3 else layer.tokens
        layer.ids.copy_(self.ids[which][self.random.randrange(997)])
        layer.x.copy_(self.x[self.random.randrange(61), : layer.tokens])
        layer.x[valid:].fill_(float("nan"))
        layer.valid.fill_(valid)
        return which


def test_no_stale_scale_in_ten_thousand_replays_with_changing_routings(pool):
    layers = make_layers(pool)
    steps = Steps(layers)
    handle = torch.cuda.graph_pool_handle()
    graphs = [captured(layer, handle) for layer in layers]
    assert pool.stats().captured == 2  # one per k, for all batch sizes
    assert pool.stats().capture_fallbacks == 0
    dirty = torch.cuda.CUDAGraph()  # freed blocks of the graphs' private memory, filled at every replay of this one
    with torch.cuda.graph(dirty, pool=handle):
        for nbytes in (512, 1024, 4096, 1 << 16, 1 << 20, 16 << 20):
            torch.full((nbytes,), STALE, dtype=torch.uint8, device="cuda")
    adversary = Adversary(pool, [ScaleSpec.grouped(max(TOKENS) * TOPK, k, LAYOUT, EXPERTS) for k in (HIDDEN, WIDTH)])
    adversary.run_compiled_code()
    eager = MoeLayer(3, TOPK, EXPERTS, HIDDEN, WIDTH, pool)
    eager_ids = routings(3, 100)
    replays = checks = 0
    for thousand in range(10):
        adversary.fill_device()
        for _ in range(1000):
            which = steps.next()
            graphs[which].replay()
            replays += 1
            if replays % 10 == 0:
                adversary.fill_cached_memory()
                dirty.replay()
                eager.ids.copy_(eager_ids[replays // 10 % 100])
                eager.run()
            if replays % 100 == 0:
                adversary.run_compiled_code()
                layers[which].check()
                checks += 1
        assert pool.verify() >= 2, thousand
        eager.check()
    assert (replays, checks) == (10_000, 100)
    assert [int(layer.stale) for layer in layers] == [0, 0, 0]


def test_a_quantizer_that_does_not_clean_leaves_stale_bytes(pool, monkeypatch):
    """The test above can fail."""
    careless = dataclasses.replace(
        backends.GROUPED_QUANTIZERS["triton"],
        run=lambda *given: triton_grouped.quantize(*given[:5], None, *given[6:]),
    )
    monkeypatch.setitem(backends.GROUPED_QUANTIZERS, "triton", careless)
    (layer, *_) = layers = make_layers(pool)
    steps = Steps([layer])
    graph = captured(layer)
    for _ in range(20):
        steps.next()
        graph.replay()
    assert int(layer.stale) > 0
    assert len(layers) == len(TOKENS)


def test_clean_grouped_scales_beside_another_producer_in_a_graph(pool):
    """As vLLM's quantizers do, the producer writes valid scales only, into the pool's buffer."""

    def produce(silu_and_mul: bool):
        def quantize(x, global_scales, *offsets, layout, pool, backend, valid_rows, row_tokens):
            if backend == "reference":
                return nvfp4_quantize_grouped(x, global_scales, *offsets, layout=layout, pool=pool, backend=backend)
            rows, k = x.shape[0], x.shape[1] // (2 if silu_and_mul else 1)
            scales = pool.acquire_grouped(rows, k, EXPERTS, layout)
            clean_grouped_scales(scales, *offsets, rows)
            data = torch.empty(rows, k // 2, dtype=torch.uint8, device="cuda")
            padded_batch = valid_rows, row_tokens
            triton_grouped.quantize(x, global_scales, data, scales, layout, None, *offsets, *padded_batch, silu_and_mul)
            return data, scales

        return quantize

    layers = make_layers(pool)
    steps = Steps(layers)
    handle = torch.cuda.graph_pool_handle()
    graphs = [captured(layer, handle, quantize=produce(False), activate=produce(True)) for layer in layers]
    for replay in range(1000):
        which = steps.next()
        graphs[which].replay()
        if replay % 100 == 0:
            layers[which].check()
            assert pool.verify() >= 2
    assert [int(layer.stale) for layer in layers] == [0, 0, 0]


def test_graphs_of_different_handles_have_buffers_of_their_own(pool):
    layers = make_layers(pool, copies=len(TOKENS))
    steps = Steps(layers)
    graphs = [captured(layer) for layer in layers]
    assert pool.stats().captured == 2 * len(layers)
    streams = [torch.cuda.Stream() for _ in graphs]
    for _ in range(100):
        for _ in range(6):
            steps.next()
        torch.cuda.synchronize()
        for graph, stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
        torch.cuda.synchronize()
        for layer in layers:
            layer.check()
    assert pool.verify() >= 6


def test_a_grouped_quantization_is_one_node(pool):
    pytest.importorskip("cuda.bindings.driver", reason="node counts come from cuda.bindings")
    pool.reserve(64, HIDDEN, LAYOUT, experts=EXPERTS)
    x = torch.randn(64, HIDDEN, device="cuda").bfloat16()
    one = torch.ones(EXPERTS, device="cuda")
    offsets = torch.arange(0, 4 * EXPERTS + 1, 4, dtype=torch.int32, device="cuda")
    tiles = 32 * offsets
    nvfp4_quantize_grouped(x, one, offsets, tiles, pool=pool)
    with capture(pool=pool) as graph:
        nvfp4_quantize_grouped(x, one, offsets, tiles, pool=pool)
    assert pool.graph_report(graph).nodes == {"kernel": 1}
    assert pool.graph_report(graph).buffers == (ScaleSpec.grouped(64, HIDDEN, LAYOUT, EXPERTS),)

"""The first NaN in replayed graphs: its name, what that costs in nodes, and that nothing synchronizes or changes bits."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from torch import Tensor

import safealloc
from safealloc import NanError, ScalePool

pytestmark = pytest.mark.gpu

ROWS, K, LAYERS = 8, 2048, 4


@pytest.fixture
def pool(monkeypatch):
    monkeypatch.setenv("SAFEALLOC_STRICT", "1")
    with ScalePool("cuda", nan=True) as pool:
        yield pool


class Graph:
    """A graph of one quantizer a layer, whose inputs are ``xs``, beside a vendor's quantizer or of ours."""

    def __init__(
        self, pool: ScalePool, *, vendor: bool, valid_rows: Tensor | None = None, dtype=torch.bfloat16
    ) -> None:
        self.xs = torch.randn(LAYERS, ROWS, K, device="cuda").to(dtype)
        self.scales = torch.ones(LAYERS, 1, device="cuda")
        self.pool, self.vendor, self.valid_rows = pool, vendor, valid_rows
        if pool.nan is not None:
            pool.nan.name_layers({self.scales[layer].data_ptr(): f"layers.{layer}" for layer in range(LAYERS)})
        with ScalePool("cuda") as warm:  # compiles
            self.step(warm)
        if pool.nan is not None:
            self.step(pool)
        pool.reserve(ROWS, K, copies=LAYERS + 1)
        torch.cuda.synchronize()
        with safealloc.capture(pool=pool) as self.graph:
            self.out = self.step(pool)

    def step(self, pool: ScalePool) -> list[tuple[Tensor, Tensor]]:
        out = []
        for x, scale in zip(self.xs, self.scales, strict=True):
            if self.vendor and pool.nan is not None:
                site = pool.nan.site(x, scale)
                assert site is not None
                pool.nan.note(x, site, self.valid_rows)
            out.append(quantize(pool, x, scale, self.vendor, self.valid_rows))
        return out

    def replay(self, times: int = 1, live_rows: int | None = None) -> None:
        for _ in range(times):
            if self.pool.nan is not None:
                self.pool.nan.begin_step(live_rows)
            self.graph.replay()


def quantize(pool, x, scale, vendor, valid_rows):
    if not vendor:
        return safealloc.nvfp4_quantize(x, scale, pool=pool, valid_rows=valid_rows)
    from safealloc.kernels import triton_quantize

    data = torch.empty((x.shape[0], x.shape[1] // 2), dtype=torch.uint8, device=x.device)
    scales = pool.acquire(*x.shape, safealloc.SfLayout.layout_128x4)
    triton_quantize.quantize(x, scale, data, scales, safealloc.SfLayout.layout_128x4, valid_rows)
    return data, scales


def first_of(pool):
    torch.cuda.synchronize()  # a safe point waits for nothing
    with pytest.raises(NanError) as raised:
        pool.safe_point()
    return raised.value.first


beside = pytest.mark.parametrize("vendor", [True, False], ids=["beside a vendor's", "ours"])


@beside
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_element_a_row_and_two_layers_at_once_are_named(pool, vendor, dtype):
    graph = Graph(pool, vendor=vendor, dtype=dtype)
    step = 0
    for places, expected in (
        ([(2, 3, 17)], ("layers.2", 3, 17, 1)),
        ([(1, 5, slice(None))], ("layers.1", 5, 0, K)),
        ([(3, 0, 0), (1, 7, K - 1)], ("layers.1", 7, K - 1, 2)),
    ):
        graph.replay(7)
        pool.safe_point()
        clean = graph.xs.clone()
        for place in places:
            graph.xs[place] = math.nan
        graph.replay()
        graph.xs.copy_(clean)
        graph.replay(7)
        first = first_of(pool)
        assert (first.layer, first.row, first.column, first.count) == expected
        assert (first.kind, first.rows, first.step) == ("NaN", ROWS, step + 8)
        assert first.order == int(first.layer[-1]) + 1
        step += 15
        pool.safe_point()


@beside
def test_10000_clean_replays_name_nothing(pool, vendor):
    graph = Graph(pool, vendor=vendor)
    graph.xs[0, 0, 0] = torch.finfo(torch.bfloat16).max
    for _ in range(100):
        graph.replay(100)
        pool.safe_point()
    torch.cuda.synchronize()
    pool.safe_point()
    assert not pool.nan.alarmed


@beside
def test_infinity_is_told_apart(pool, vendor, caplog):
    graph = Graph(pool, vendor=vendor)
    graph.xs[1, 2, 3] = -math.inf
    graph.replay()
    torch.cuda.synchronize()
    pool.safe_point()
    (record,) = caplog.records
    assert "first infinity in layers.1, row 2 of 8, column 3, step 1, quantizer 2 of its graph" in record.getMessage()


@beside
def test_dead_rows_do_not_count(pool, vendor):
    valid = torch.full((1,), ROWS, dtype=torch.int32, device="cuda")
    graph = Graph(pool, vendor=vendor, valid_rows=valid)
    graph.xs[1, 5:] = math.nan
    valid.fill_(5)
    graph.replay(3)
    torch.cuda.synchronize()
    pool.safe_point()
    valid.fill_(6)
    graph.replay()
    torch.cuda.synchronize()
    assert (first_of(pool).row, pool.nan.alarmed) == (5, False)


@beside
def test_one_node_beside_anothers_quantizer_and_none_with_ours(pool, vendor):
    with ScalePool("cuda") as plain:
        without = nodes(Graph(plain, vendor=vendor), plain)
        with_it = nodes(Graph(pool, vendor=vendor), pool)
    assert with_it - without == (LAYERS if vendor else 0)


def nodes(graph, pool):
    return sum(pool.graph_report(graph.graph).nodes.values())


@beside
@pytest.mark.parametrize("dirty", [False, True])
def test_bits_are_those_without_it(pool, vendor, dirty):
    with ScalePool("cuda") as plain:
        graphs = [Graph(pool, vendor=vendor), Graph(plain, vendor=vendor)]
        graphs[1].xs.copy_(graphs[0].xs)
        for graph in graphs:
            if dirty:
                graph.xs[:, 3, 100:110] = math.nan
                graph.xs[:, 4, 7] = math.inf
            graph.replay()
        torch.cuda.synchronize()
        for ours, theirs in zip(graphs[0].out, graphs[1].out, strict=True):
            assert all(map(torch.equal, ours, theirs))
        assert pool.nan.alarmed == dirty


@beside
def test_nothing_synchronizes_while_all_is_finite(pool, vendor):
    graph = Graph(pool, vendor=vendor)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(10):
            pool.safe_point()
            graph.replay(live_rows=ROWS)
            graph.step(pool)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_every_quantizer_of_ours_tests_its_input(pool):
    scale, offsets = torch.ones(2, device="cuda"), torch.tensor([0, 4, 8], dtype=torch.int32, device="cuda")
    starts = torch.tensor([0, 128, 256], dtype=torch.int32, device="cuda")
    calls = {
        "words": (512, K, functools.partial(safealloc.nvfp4_quantize, global_scale=scale[:1])),
        "silu": (ROWS, 2 * K, functools.partial(safealloc.silu_and_mul_nvfp4_quantize, global_scale=scale[:1])),
        "mxfp8": (ROWS, K, safealloc.mxfp8_quantize),
        "mxfp4": (ROWS, K, safealloc.mxfp4_quantize),
        "grouped": (ROWS, K, lambda x, pool: safealloc.nvfp4_quantize_grouped(x, scale, offsets, starts, pool=pool)),
    }
    for name, (rows, width, call) in calls.items():
        x = torch.randn(rows, width, device="cuda").bfloat16()
        call(x, pool=pool)
        torch.cuda.synchronize()
        pool.safe_point()
        for column in (0, 9, width - 1):
            x[rows - 1, column] = math.nan
            call(x, pool=pool)
            torch.cuda.synchronize()
            first = first_of(pool)
            assert (first.row, first.column, first.count) == (rows - 1, column, 1), name
            x[rows - 1, column] = 0

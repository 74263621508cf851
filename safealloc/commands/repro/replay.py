"""Scale buffers in real CUDA graphs, replayed while everything around them is filled with stale NaN bytes.

Each shape is captured twice: with scales in a ``torch.empty`` buffer, which is memory of the graph's private pool, and with
scales from a safealloc pool. The quantizer writes valid scales only, as vLLM's fused producers do. All graphs share one
memory-pool handle, as a serving engine's do, and the adversary writes wherever PyTorch lets it:

- in each graph, before the quantizer: a temporary full of 0x7F that is freed again, as in any model's graph;
- in a graph of its own with the same handle: every free block of the private pool is filled with 0x7F;
- in eager work: every free block of the caching allocator is filled with 0x7F;
- through the pool itself: an eager caller quantizes NaN in the shapes that the graphs use.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from safealloc import PaddingCorruptionError, ScalePool, capture, nvfp4_quantize
from safealloc.commands.report import Progress
from safealloc.commands.repro import operands
from safealloc.commands.repro.operands import Section, Weight
from safealloc.formats.format import BLOCK_SIZE, NAN_SCALE
from safealloc.formats.layout import SfLayout, short
from safealloc.ops.backends import Call, triton_refusal

N = 256
ROWS = (1, 3, 8, 17, 32, 48)
K = (1008, 1024)
"""63 scale columns and so one of padding, and 64 and so none."""
LAYOUTS = (SfLayout.layout_128x4, SfLayout.layout_8x4)
BACKEND = "triton"

_SMALL = 1 << 20  # kSmallSize of PyTorch's CUDACachingAllocator: up to here blocks come from segments of their own
_REFRESH = 256  # strikes until the list of free blocks is read again


@dataclass(frozen=True, slots=True)
class ReplayRow:
    """One shape."""

    m: int  # rows of the activation
    k: int  # columns of the activation
    layout: str  # of its scales
    padding_columns: int  # scale columns beyond k / 16
    replays: int  # of each of the two graphs
    # rows with NaN over all replays of the graph with ``torch.empty``; some where there are padding columns.
    # (Our GEMM never reads padding rows, so none are stated elsewhere.)
    nan_rows_empty: int
    nan_rows_pool: int  # the same with the pool: none
    # rows over all replays that differ by any bit from the product over a fresh zeroed buffer: none
    wrong_rows_pool: int
    adversary_reached: bool  # whether the adversary's graph filled the memory of the ``torch.empty`` buffer
    nodes_empty: int | None  # of the graph with ``torch.empty``, or ``None`` without ``cuda.bindings``
    nodes_pool: int | None  # of the graph with the pool

    @property
    def as_stated(self) -> bool:
        pool_is_right = self.nan_rows_pool == self.wrong_rows_pool == 0 and self.nodes_empty == self.nodes_pool
        return pool_is_right and (self.nan_rows_empty > 0 or not self.padding_columns)

    def cells(self) -> dict[str, object]:
        total = self.m * self.replays
        shape = {"m": self.m, "k": self.k, "layout": self.layout, "padding columns": self.padding_columns}
        nan = {"NaN rows, empty": f"{self.nan_rows_empty}/{total}", "NaN rows, pool": f"{self.nan_rows_pool}/{total}"}
        nodes = {"nodes, empty": self.nodes_empty, "nodes, pool": self.nodes_pool}
        return {**shape, **nan, "wrong rows, pool": f"{self.wrong_rows_pool}/{total}", **nodes}


def refusal(device: torch.device) -> str | None:
    """Why there is nothing to replay on a device, in one sentence, or ``None``."""
    if device.type != "cuda":
        return f"CUDA graphs need a CUDA device, not {device}"
    return triton_refusal(Call(device, SfLayout.layout_128x4))


def replay(device: torch.device, seed: int, replays: int, progress: Progress) -> Section:
    """On the current CUDA device: capture, then replay in random order between the adversary's strikes."""
    generator = torch.Generator().manual_seed(seed)
    weights = {k: Weight.random(N, k, device, generator) for k in K}
    shapes = list(itertools.product(ROWS, K, LAYOUTS))
    with ScalePool(device, growth_in_capture="error") as pool, operands.foreign_scales("trust"):
        # This compiles every kernel that is captured, for exactly these arguments.
        cases = [
            _Case(operands.random_activation(m, k, device, generator), layout, weights[k]) for m, k, layout in shapes
        ]
        for case in cases:
            case.quantize_nan(pool)
            torch.full((case.nbytes,), NAN_SCALE, dtype=torch.uint8, device=device)
        for layout in LAYOUTS:
            pool.reserve(ROWS, K, layout)
        progress("replay: capturing", 0.0)
        handle = torch.cuda.graph_pool_handle()
        captured = [_capture(case, pool, handle, from_pool=from_pool) for case in cases for from_pool in (False, True)]
        adversary = _Adversary(cases, pool, handle, device, seed)
        nan, wrong = _replay_all(captured, adversary, seed, replays, progress)
        failure = None
        try:
            checked = pool.verify()
        except PaddingCorruptionError as error:
            checked, failure = 0, str(error)
        rows = [  # even numbers are the graphs with torch.empty
            ReplayRow(
                m=m,
                k=k,
                layout=short(layout),
                padding_columns=layout.padded_shape(m, k)[1] - k // BLOCK_SIZE,
                replays=replays,
                nan_rows_empty=nan[2 * number],
                nan_rows_pool=nan[2 * number + 1],
                wrong_rows_pool=wrong[2 * number + 1],
                adversary_reached=adversary.reached(captured[2 * number].scales_address, layout.nbytes(m, k)),
                nodes_empty=captured[2 * number].nodes,
                nodes_pool=captured[2 * number + 1].nodes,
            )
            for number, (m, k, layout) in enumerate(shapes)
        ]
        text = _text(rows, checked, adversary)
        del captured, adversary  # graphs go before the memory they write
        torch.cuda.synchronize(device)
    return Section("replay", f"CUDA graphs, {replays} replays each", BACKEND, text, rows, failure)


class _Case:
    """One shape: operands, and the correct product."""

    def __init__(self, x: Tensor, layout: SfLayout, weight: Weight) -> None:
        self.x, self.layout, self.weight = x, layout, weight
        self.nbytes = layout.nbytes(*x.shape)
        self._nan = torch.full_like(x, float("nan"))
        self.expected = self._multiply(*operands.quantize(x, layout, BACKEND, weight.alpha))

    def quantize_nan(self, pool: ScalePool) -> None:
        nvfp4_quantize(self._nan, self.weight.alpha, layout=self.layout, pool=pool, backend=BACKEND)

    def product(self, pool: ScalePool | None) -> tuple[Tensor, int]:
        """The product with scales from a pool or, without one, in memory from ``torch.empty``; and their address."""
        if pool is None:
            scales = torch.empty(self.layout.padded_shape(*self.x.shape), dtype=torch.uint8, device=self.x.device)
            x_fp4, _ = operands.quantize(self.x, self.layout, BACKEND, self.weight.alpha, scales)
        else:
            x_fp4, scales = nvfp4_quantize(self.x, self.weight.alpha, layout=self.layout, pool=pool, backend=BACKEND)
        return self._multiply(x_fp4, scales), scales.data_ptr()

    def _multiply(self, x_fp4: Tensor, scales: Tensor) -> Tensor:
        return self.weight.multiply(x_fp4, scales, BACKEND, use_8x4=self.layout is SfLayout.layout_8x4)


@dataclass(frozen=True, slots=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    y: Tensor
    expected: Tensor
    scales_address: int
    nodes: int | None


def _capture(case: _Case, pool: ScalePool, handle: Any, *, from_pool: bool) -> _Captured:
    with capture(pool=pool, graph_pool=handle) as graph:
        temporary = torch.full((case.nbytes,), NAN_SCALE, dtype=torch.uint8, device=case.x.device)
        del temporary  # back to the private pool, which hands it out as the next block of this size
        y, scales_address = case.product(pool if from_pool else None)
    nodes = pool.graph_report(graph).nodes
    return _Captured(graph, y, case.expected, scales_address, None if nodes is None else sum(nodes.values()))


def _replay_all(
    captured: Sequence[_Captured], adversary: _Adversary, seed: int, replays: int, progress: Progress
) -> tuple[list[int], list[int]]:
    """Rows with NaN, and rows that differ from the correct product, over all replays of each graph."""
    device = captured[0].y.device
    nan = torch.zeros(len(captured), dtype=torch.int64, device=device)
    wrong = torch.zeros_like(nan)
    order = [number for number in range(len(captured)) for _ in range(replays)]
    random.Random(seed).shuffle(order)
    for step, number in enumerate(order):
        if step % _REFRESH == 0:
            progress(f"replay: {step} of {len(order)}", step / len(order))
        adversary.strike()
        one = captured[number]
        one.graph.replay()
        nan[number] += one.y.isnan().any(1).sum()
        wrong[number] += (one.y.view(torch.int16) != one.expected.view(torch.int16)).any(1).sum()
    return nan.tolist(), wrong.tolist()


class _Adversary:
    """Fills with 0x7F whatever PyTorch's allocator hands out."""

    def __init__(self, cases: Sequence[_Case], pool: ScalePool, handle: Any, device: torch.device, seed: int) -> None:
        self._cases, self._pool, self._device = cases, pool, device
        self._random = random.Random(seed)
        self._strikes = 0
        self._eager_sizes: list[int] = []
        self.eager_bytes = 0
        self._graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(device)
        sizes = _free_blocks(torch.cuda.memory_snapshot(), device, tuple(handle))
        with torch.cuda.graph(self._graph, pool=handle):
            blocks = [self._filled(size) for size in sizes]
        self._ranges = _merged((block.data_ptr(), block.data_ptr() + block.numel()) for block in blocks)
        self.graph_bytes = sum(sizes)

    def strike(self) -> None:
        """Queue one round of filling on the current stream."""
        if self._strikes % _REFRESH == 0:
            torch.cuda.synchronize(self._device)
            stream = torch.cuda.current_stream(self._device).cuda_stream
            self._filled(64 << 20)  # so that the allocator has a cache to fill
            self._eager_sizes = _free_blocks(torch.cuda.memory_snapshot(), self._device, (0, 0), stream)
            self.eager_bytes = sum(self._eager_sizes)
        self._strikes += 1
        self._graph.replay()
        self._random.choice(self._cases).quantize_nan(self._pool)
        blocks = [self._filled(size) for size in self._eager_sizes]  # all at once, so that no two share memory
        del blocks

    def reached(self, address: int, nbytes: int) -> bool:
        """Whether the adversary's graph fills all these bytes."""
        return any(start <= address and address + nbytes <= end for start, end in self._ranges)

    def _filled(self, nbytes: int) -> Tensor:
        return torch.full((nbytes,), NAN_SCALE, dtype=torch.uint8, device=self._device)


def _free_blocks(
    segments: Iterable[dict[str, Any]], device: torch.device, memory_pool: tuple[int, ...], stream: int | None = None
) -> list[int]:
    """Bytes of each allocation that together take every free block of a memory pool, on one or (``None``) every stream.

    Largest first, so that each gets a block of exactly its size, or the rest of one that was split before: the allocator
    takes the smallest block that fits. Eager work allocates from memory pool ``(0, 0)``.
    """
    sizes = []
    for segment in segments:
        if segment["device"] != device.index or tuple(segment["segment_pool_id"]) != memory_pool:
            continue
        if stream is not None and segment["stream"] != stream:
            continue
        for size in (block["size"] for block in segment["blocks"] if block["state"] == "inactive"):
            if segment["segment_type"] == "small":  # larger allocations never come from here
                sizes += [_SMALL] * (size // _SMALL) + ([size % _SMALL] if size % _SMALL else [])
            elif size > _SMALL:
                sizes.append(size)
    return sorted(sizes, reverse=True)


def _merged(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """The ranges, with those that touch merged."""
    merged: list[tuple[int, int]] = []
    for start, end in sorted(ranges):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def _text(rows: list[ReplayRow], checked: int, adversary: _Adversary) -> str:
    padded = [row for row in rows if row.padding_columns]
    total = sum(row.m * row.replays for row in rows)
    return (
        f"Between replays the adversary fills {adversary.graph_bytes} free bytes of the graphs' memory pool (it reaches "
        f"{sum(row.adversary_reached for row in rows)} of {len(rows)} torch.empty buffers) and {adversary.eager_bytes} of "
        f"the caching allocator. torch.empty: NaN in {sum(row.nan_rows_empty for row in padded)} of "
        f"{sum(row.m * row.replays for row in padded)} rows where k leaves padding columns. The pool: NaN in "
        f"{sum(row.nan_rows_pool for row in rows)} and any wrong bit in {sum(row.wrong_rows_pool for row in rows)} of "
        f"{total} rows; verify() checked {checked} buffers."
    )

"""``capture``: ``torch.cuda.graph`` with a pool that knows about it."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch

from safealloc import _optional
from safealloc.errors import SafeAllocError
from safealloc.pool import driver
from safealloc.pool.default import checked_pool, default_pool, use_pool
from safealloc.pool.driver import Capture
from safealloc.pool.memory import end_recording
from safealloc.pool.pool import ScalePool


@contextlib.contextmanager
def capture(
    graph: torch.cuda.CUDAGraph | None = None,
    *,
    pool: ScalePool | None = None,
    graph_pool: Any = None,
    **torch_cuda_graph_arguments: Any,
) -> Iterator[torch.cuda.CUDAGraph]:
    """Capture a CUDA graph whose scale buffers come from a pool.

    Inside, the pool is the default pool, and what it hands out belongs to the graph's memory-pool handle until the last
    graph of that handle is destroyed. Afterwards ``pool.graph_report(graph)`` tells what the graph uses.

    Args:
        graph: captured into; ``None`` makes one.
        pool: ``None`` is the default pool of the current device.
        graph_pool: ``torch.cuda.graph``'s ``pool``: a handle from ``torch.cuda.graph_pool_handle()`` or ``graph.pool()``.
            Graphs that share one share buffers, and must not replay concurrently. ``None`` makes one.
        **torch_cuda_graph_arguments: ``stream``, ``capture_error_mode``, ..., as ``torch.cuda.graph`` takes them.

    Yields:
        The graph. CUDA forbids to destroy another in a capture: a name that is bound anew here must not be its last holder.

    Raises:
        TypeError, ValueError: an argument is wrong; no capture was begun.
        SafeAllocError: the current stream is already capturing.
        PoolClosedError: the pool was closed.
    """
    if graph is not None and not isinstance(graph, torch.cuda.CUDAGraph):
        raise TypeError(f"graph must be a torch.cuda.CUDAGraph, got {type(graph).__name__}")
    pool = default_pool() if pool is None else checked_pool(pool)
    if pool.device.type != "cuda":
        raise ValueError(f"CUDA graphs are captured on a CUDA device, the pool is on {pool.device}")
    pool.safe_point()
    with torch.cuda.device(pool.device):
        if torch.cuda.is_current_stream_capturing():
            raise SafeAllocError("the current stream is capturing already: captures do not nest")
        graph = torch.cuda.CUDAGraph() if graph is None else graph
        handle = torch.cuda.graph_pool_handle() if graph_pool is None else graph_pool
        capturing = torch.cuda.graph(graph, pool=handle, **torch_cuda_graph_arguments)
        # Where ending a capture fails, torch.cuda.graph leaves its stream current and its memory pool recording.
        with torch.cuda.stream(torch.cuda.current_stream()):
            try:
                with use_pool(pool), capturing:
                    under_way = driver.under_way(torch.cuda.current_stream().cuda_stream)
                    if under_way is None:
                        raise SafeAllocError("the CUDA driver does not know of the capture that was just begun")
                    under_way.handle = handle
                    yield graph
                    pool.note_graph(graph, under_way, node_counts(under_way))
            except BaseException:
                end_recording(pool.device, handle)
                raise
    pool.safe_point()


def node_counts(under_way: Capture) -> dict[str, int] | None:
    """Nodes by type of a graph under capture."""
    if _optional.missing("cuda.bindings.driver"):
        return None
    driver = _optional.require("cuda.bindings.driver")
    success = driver.CUresult.CUDA_SUCCESS
    error, _, count = driver.cuGraphGetNodes(under_way.graph, 0)
    if error != success:
        return None
    error, nodes, count = driver.cuGraphGetNodes(under_way.graph, count)
    if error != success:
        return None
    types = (driver.cuGraphNodeGetType(node)[1].name for node in nodes[:count])
    return dict(Counter(name.removeprefix("CU_GRAPH_NODE_TYPE_").lower() for name in types))

"""The pool: zero-padded scale buffers that outlive a step, a graph and its replays.

A buffer belongs to whoever orders its writers and readers: in eager work the stream it was acquired on, in CUDA graphs the
graph memory-pool handle, since graphs that share one never replay concurrently. Within that, a buffer is free again as
soon as nobody holds a tensor of it. Each shape has buffers of its own, shapes without padding too: an address then stands
for one shape and one layout as long as the pool holds it, which is what lets a GEMM refuse a contradicting flag, also
where captured graphs still write the buffer.

This file decides who gets which buffer. :mod:`safealloc.pool.inventory` holds the buffers, :mod:`safealloc.pool.graphs` knows
whose graphs are alive, and :mod:`safealloc.pool.watch` checks what is handed out.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
import threading
import warnings
from collections.abc import Iterable
from typing import Any, Literal, Self

import torch
from torch import Tensor
from torch._guards import active_fake_mode

from safealloc._checks import check_is_tensor, checked_bytes, checked_count, checked_device
from safealloc.errors import CaptureGrowthError, PoolClosedError, SafeAllocError
from safealloc.formats.layout import SfLayout
from safealloc.formats.spec import ScaleSpec, specs_for
from safealloc.pool import driver
from safealloc.pool.buffer import STOCK, Buffer
from safealloc.pool.contents import spec_of
from safealloc.pool.driver import Capture
from safealloc.pool.graphs import GraphUses
from safealloc.pool.inventory import Inventory
from safealloc.pool.process import OfOneProcess
from safealloc.pool.reports import CaptureGrowthWarning, GraphReport, PoolStats
from safealloc.pool.watch import Watch

_NO_BUFFERS: list[Buffer] = []
_dispatch_modes = torch._C._len_torch_dispatch_stack
_use_count = torch._C._storage_Use_Count
_references = sys.getrefcount


class ScalePool(OfOneProcess):
    """NVFP4 scale buffers on one device whose padding is zero at every call and every replay.

    Args:
        device: where the buffers live; ``None`` is the current CUDA device, or the CPU where there is none.
        max_bytes: what the pool may hold, buffers made for one call included; ``None`` is no limit.
        cache_bytes: what it may hold in shapes that were neither reserved nor captured; the least recently used go
            first, and what does not fit is made for the one call.
        growth_in_capture: ``"zeros"`` or ``"error"``: what a capture gets for which no buffer is there.
        debug: verify all padding at each acquire, which synchronizes.
        verify_every: check each buffer at every N-th handout, and at every N-th replay of each graph, asynchronously; 0 is
            never.
        verify_repair: zero and log dirty padding that such a check finds, instead of raising.
        poison: fill the valid bytes of new buffers with NaN, so that a scale which a producer forgets shows.

    Raises:
        TypeError, ValueError: an argument of the wrong type or out of range.
        SafeAllocError: ``verify_every`` on CUDA without Triton, or in a capture.
    """

    def __init__(
        self,
        device: torch.device | str | int | None = None,
        *,
        max_bytes: int | None = None,
        cache_bytes: int = 64 << 20,
        growth_in_capture: Literal["zeros", "error"] = "zeros",
        debug: bool = False,
        verify_every: int = 0,
        verify_repair: bool = False,
        poison: bool = False,
    ) -> None:
        self.device = checked_device(device)
        self.max_bytes = None if max_bytes is None else checked_bytes(max_bytes, "max_bytes")
        self.cache_bytes = checked_bytes(cache_bytes, "cache_bytes")
        if growth_in_capture not in ("zeros", "error"):
            raise ValueError(f'growth_in_capture must be "zeros" or "error", got {growth_in_capture!r}')
        self.growth_in_capture = growth_in_capture
        verify_every = checked_count(verify_every, "verify_every")
        self._on_cuda = self.device.type == "cuda"
        if self._on_cuda:
            torch.cuda.init()
        self._index = self.device.index or 0
        self._raw_stream, self._capturing = driver.stream_queries(self.device)
        self._number = next(_pool_numbers)
        self._lock = threading.RLock()
        self._unusable: str | None = None
        watched = debug or verify_every > 0  # every handout is seen, so that none is answered by the hit path
        limits = self.max_bytes, self.cache_bytes
        self._inventory = Inventory(self.device, *limits, self._number, poison=poison, ready=not watched)
        self._watch = Watch(self._inventory, debug=debug, verify_every=verify_every, verify_repair=verify_repair)
        self._graphs = GraphUses(self._number)
        self._warned: set[ScaleSpec] = set()
        self._requests = self._fallbacks = 0
        self.misses = 0
        """Acquires so far that had to make a buffer."""
        super().__init__()

    # --- acquire: the hit path ----------------------------------------------------------------------------------------

    def acquire(self, rows: int, k: int, layout: SfLayout, *, padded_k: int | None = None) -> Tensor:
        """A scale buffer for a ``[rows, k]`` matrix.

        Args:
            rows: rows of the matrix, at least 1.
            k: columns of the matrix in elements, a multiple of 16.
            layout: order of the scale bytes.
            padded_k: columns that the consumer was padded to, where that is more than ``k``; what lies beyond ``k`` is
                padding too.

        Returns:
            uint8 ``[padded_rows, padded_cols]`` (:meth:`SfLayout.padded_shape`), contiguous, 512-byte aligned; padding
            zero, the valid bytes undefined. It shares memory with no other tensor that anybody holds. Once nobody holds
            it, it is handed out again to the same stream, or to captures of the same graph memory-pool handle.

        Raises:
            CaptureGrowthError: no buffer is there, in a capture, with ``growth_in_capture="error"``.
            PoolExhaustedError: it would take the pool beyond ``max_bytes``.
            PoolClosedError: the pool was closed, or this process is a fork of the pool's.
            TypeError, ValueError: an argument of the wrong type or out of range.
        """
        with self._lock:
            stream = self._raw_stream(self._index)
            if not stream or not self._capturing(stream):  # the default stream, 0, is never in a capture
                try:  # what is there costs less so than by get()
                    buffers = self._inventory.ready[rows, k, layout, padded_k, stream]
                except KeyError:
                    buffers = _NO_BUFFERS
                for buffer in buffers:
                    # buffer.idle(), without the call
                    if (
                        _use_count(buffer.storage_address) == buffer.idle_uses
                        and _references(buffer.storage) == buffer.idle_references
                        and not buffer.readers
                    ):
                        if _dispatch_modes():  # fake tensors, perhaps
                            self._check_usable()
                        self._requests = buffer.last_use = self._requests + 1
                        return buffer.base.data  # a fresh tensor, as detach() makes, without the dispatcher
            return self._serve(ScaleSpec.checked(rows, k, layout, padded_k), stream)

    # --- acquire: all the rest ----------------------------------------------------------------------------------------

    def acquire_grouped(self, rows: int, k: int, experts: int, layout: SfLayout = SfLayout.layout_128x4) -> Tensor:
        """A scale buffer for ``[rows, k]`` whose rows are routed to experts, each of which starts at a tile of its own.

        Which bytes are scales changes with the routing, so that a buffer comes with a record of those of the last step.
        :func:`safealloc.nvfp4_quantize_grouped` and :func:`safealloc.silu_and_mul_nvfp4_quantize_grouped` keep both; beside
        another producer, :func:`safealloc.clean_grouped_scales` does. One buffer serves all row counts up to the largest
        that was reserved or captured, in turn.

        Args:
            rows: rows routed in all, tokens times experts a token, at least 1.
            k: columns of the matrix in elements, a multiple of 16.
            experts: groups of rows, at least 1.
            layout: order of the scale bytes.

        Returns:
            uint8 ``[padded_rows, padded_cols]`` with rows for the worst routing (:meth:`SfLayout.grouped_rows`), contiguous,
            512-byte aligned; every byte zero that is not a scale of the last step. Liveness and errors are those of
            :meth:`acquire`.
        """
        spec = ScaleSpec.grouped(rows, k, layout, experts)
        with self._lock:
            return self._serve(spec, self._raw_stream(self._index))[: spec.padded_shape[0]]

    def _serve(self, spec: ScaleSpec, stream: int) -> Tensor:
        """What the hit path cannot answer: captures, misses, grouped scales, and all of a pool that is watched."""
        self._check_usable()
        capture = self._capture()
        self._watch.before_handout(capture)
        if capture is not None:
            tensor = self._serve_capture(spec, stream, capture)
        else:
            self._take_back()
            found = self._inventory.take(spec, (stream, STOCK), Buffer.passed, stream)
            buffer = found or self._inventory.make_cached(spec, stream)
            tensor = self._inventory.make_for_one_call(spec) if buffer is None else buffer.base.data
            self._requests += 1
            if buffer is not None:
                buffer.last_use = self._requests
            if found is None:
                self.misses += 1
        self._watch.handed_out(tensor, capture)
        return tensor

    def _serve_capture(self, spec: ScaleSpec, stream: int, capture: Capture) -> Tensor:
        use = self._graphs.use_of(capture, self._requests)
        buffer = self._inventory.take(spec, (use.handle,), use.may_reuse(stream), use.handle)
        if buffer is None:
            eager = (STOCK, *self._inventory.streams())
            buffer = self._inventory.take(spec, eager, use.may_take_over, use.handle)
        if buffer is None:
            return self._grow_in_capture(spec)
        self._inventory.keep(buffer)
        use.give(buffer, stream)
        self._requests += 1
        return buffer.base.data

    def _grow_in_capture(self, spec: ScaleSpec) -> Tensor:
        named = {"padded_k": spec.padded_k, "experts": spec.experts}
        further = "".join(f", {name}={value}" for name, value in named.items() if value is not None)
        remedy = f"call pool.reserve({spec.rows}, {spec.k}, SfLayout.{spec.layout.name}{further}) before the capture"
        if self.growth_in_capture == "error":
            raise CaptureGrowthError(
                f"no idle buffer for {spec} in this capture, and a pool does not grow in one: {remedy} (copies=N for N "
                "that are held at once, or that belong to different graph memory-pool handles)"
            )
        tensor = self._inventory.make_in_capture(spec)
        self._requests += 1
        self.misses += 1
        self._fallbacks += 1
        if spec not in self._warned:
            self._warned.add(spec)
            message = f"no idle buffer for {spec}: this graph zeroes one at every replay; {remedy} to save that"
            warnings.warn(message, CaptureGrowthWarning, stacklevel=5)
        return tensor

    # --- making buffers and giving them up ----------------------------------------------------------------------------

    def reserve(
        self,
        rows: int | Iterable[int],
        k: int | Iterable[int],
        layout: SfLayout = SfLayout.layout_128x4,
        copies: int = 1,
        *,
        padded_k: int | None = None,
        experts: int | None = None,
    ) -> None:
        """See to it that ``copies`` unused buffers of each shape are there, and wait until their padding is zero.

        They are kept until the pool is closed, for eager work and captures alike.

        Args:
            rows, k: one or several of each; every pair is a shape.
            layout: order of the scale bytes.
            copies: how many are held at once, or belong to different graph memory-pool handles.
            padded_k: as in :meth:`acquire`.
            experts: for :meth:`acquire_grouped`, whose buffer for the most rows serves fewer too, so that one is made for
                each k.

        Raises:
            CaptureGrowthError: in a capture.
            PoolExhaustedError: they would take the pool beyond ``max_bytes``; none is made.
            PoolClosedError, TypeError, ValueError: as in :meth:`acquire`.
        """
        copies = checked_count(copies, "copies", least=1)
        specs = specs_for(rows, k, layout, padded_k, experts)
        with self._lock:
            self._check_usable()
            if self._capture() is not None:
                raise CaptureGrowthError("reserve was called in a capture: call it before the capture begins")
            self._take_back()
            missing: list[ScaleSpec] = []
            for spec in specs:
                unused = sum(not buffer.held() for buffer in self._inventory.owned(spec, STOCK))
                missing += [spec] * (copies - unused)
            self._inventory.make_all(missing)
            if missing and self._on_cuda:
                torch.cuda.current_stream(self.device).synchronize()

    def trim(self) -> int:
        """Give up the idle buffers of the cache, and their memory to the device; returns their bytes.

        Reserved, captured and held buffers stay.

        Raises:
            SafeAllocError: in a capture.
            PoolClosedError: the pool was closed.
        """
        with self._lock:
            self._check_usable("trim")
            self._take_back()
            return self._inventory.trim()

    def close(self) -> None:
        """Give up every buffer; each later use of the pool is an error.

        Tensors that somebody holds stay valid, and so does what living graphs use, until they are gone; the memory that only
        those graphs used is free when a pool, any pool, is called next.

        Raises:
            SafeAllocError: in a capture.
        """
        with self._lock:
            if self._unusable is not None:
                return
            self._check_usable("close")
            self._watch.close()
            self._inventory.clear()
            self._graphs.clear()
            self._unusable = "this pool was closed"

    # --- streams and captures -----------------------------------------------------------------------------------------

    def record_stream(self, tensor: Tensor, stream: torch.Stream) -> None:
        """Another stream reads ``tensor`` too: its buffer is not handed out again before that stream has passed.

        As with ``torch.Tensor.record_stream``, what counts is the work queued on ``stream`` by the time the last holder
        is gone. In a capture, the buffer is not handed out again in that capture; ``stream`` must be forked from the
        capture and join it. A no-op on a CPU.

        Args:
            tensor: any tensor or view that starts at a buffer of this pool.
            stream: a CUDA stream of the pool's device.

        Raises:
            ValueError: ``tensor`` does not start at a buffer of this pool, or ``stream`` is on another device.
            PoolClosedError: the pool was closed.
        """
        check_is_tensor(tensor)
        with self._lock:
            self._check_usable()
            buffer = self._inventory.by_address.get(tensor.data_ptr())
            if buffer is None and spec_of(tensor, self._number) is None:
                raise ValueError("the tensor does not start at a buffer of this pool")
            if not self._on_cuda:
                return
            if not isinstance(stream, torch.cuda.Stream):
                raise TypeError(f"stream must be a torch.cuda.Stream, got {type(stream).__name__}")
            if stream.device != self.device:
                raise ValueError(f"the stream is on {stream.device}, the pool on {self.device}")
            if buffer is None:  # made for one call: PyTorch's allocator frees it
                tensor.record_stream(stream)
            elif stream.cuda_stream != (buffer.owner if isinstance(buffer.owner, int) else buffer.stream):
                buffer.readers[stream.cuda_stream] = stream

    def shared_captures(self) -> contextlib.AbstractContextManager[Any]:
        """Treat captures that were not begun by :func:`safealloc.capture` as sharing one graph memory-pool handle.

        True where one framework captures them all into one pool, and so replays them one after the other. Without it
        each is on its own. Holds from the call on; as a context manager, until its end.
        """
        with self._lock:
            self._check_usable()
            return self._graphs.share()

    def graph_report(self, graph: torch.cuda.CUDAGraph) -> GraphReport:
        """What a graph that :func:`safealloc.capture` captured with this pool uses.

        Raises:
            TypeError: not a ``torch.cuda.CUDAGraph``.
            ValueError: the graph was not captured that way.
            PoolClosedError: the pool was closed.
        """
        if not isinstance(graph, torch.cuda.CUDAGraph):
            raise TypeError(f"graph must be a torch.cuda.CUDAGraph, as safealloc.capture() yields it, got {graph!r}")
        with self._lock:
            self._check_usable()
            report = self._graphs.report(graph)
        if report is None:
            raise ValueError("no capture() with this pool captured that graph")
        return report

    def note_graph(self, graph: torch.cuda.CUDAGraph, capture: Capture, nodes: dict[str, int] | None) -> None:
        """Called by :func:`safealloc.capture` when its capture ends: makes the graph's report."""
        with self._lock:
            self._graphs.note(graph, capture, nodes)

    def captures(self) -> int:
        """How many captures of living graphs were given buffers."""
        with self._lock:
            return self._graphs.alive()

    def take_back(self) -> None:
        """Take back what only destroyed graphs used, which a capture cannot do; a no-op inside one.

        Raises:
            PoolClosedError: the pool was closed.
        """
        with self._lock:
            self._check_usable()
            if self._capture() is None:
                self._take_back()

    def _capture(self) -> Capture | None:
        """The capture under way on the current stream of the pool's device."""
        return driver.under_way(self._raw_stream(self._index)) if self._on_cuda else None

    def _take_back(self) -> None:
        gone = self._graphs.take_gone()
        if gone:
            self._inventory.return_to_stock(gone)

    # --- looking ------------------------------------------------------------------------------------------------------

    def spec(self, tensor: Tensor) -> ScaleSpec | None:
        """Shape and layout of the buffer that ``tensor`` starts at; ``None`` where it is none of this pool's.

        Args:
            tensor: any tensor, view or dtype view.

        Raises:
            TypeError: not a tensor.
            PoolClosedError: the pool was closed.
        """
        check_is_tensor(tensor)
        self._check_usable()
        return spec_of(tensor, self._number)

    def verify(self, repair: bool = False) -> int:
        """Check that all padding is zero, in every buffer the pool holds or made; synchronizes the device.

        In grouped scales, what the last quantization did not write is padding too.

        Args:
            repair: zero what is not, and log it as a warning, instead of raising.

        Returns:
            How many buffers were checked.

        Raises:
            PaddingCorruptionError: padding is not zero; lists each such buffer.
            SafeAllocError: in a capture.
            PoolClosedError: the pool was closed.
        """
        with self._lock:
            self._check_usable("verify")
            return self._watch.verify(repair)

    def safe_point(self) -> None:
        """Raise what the checks of ``verify_every`` have found since the last call, or repair it.

        Each acquire is one, and so are both ends of a :func:`safealloc.capture`. A program that only replays graphs calls it
        once per step: it reads one word of the host's memory, and synchronizes only where something was found. In a capture,
        and without ``verify_every``, it does nothing.

        Raises:
            PaddingCorruptionError: padding is not zero, without ``verify_repair``; names the last caller that was handed
                the buffer.
            PoolClosedError: the pool was closed.
        """
        if not self._watch.alarmed:
            return
        with self._lock:
            self._check_usable()
            if self._capture() is None:
                self._watch.report_alarms()

    def held(self, rows: int, k: int, layout: SfLayout, *, padded_k: int | None = None) -> int:
        """How many buffers of a shape somebody holds now.

        Args:
            rows, k, layout, padded_k: as in :meth:`acquire`.
        """
        spec = ScaleSpec.checked(rows, k, layout, padded_k)
        with self._lock:
            return sum(buffer.held() for buffer in self._inventory.by_address.values() if buffer.spec == spec)

    def stats(self) -> PoolStats:
        """The pool's counters now."""
        with self._lock:
            self.take_back()
            buffers = self._inventory.by_address.values()
            handles = self._graphs.handles()
            return PoolStats(
                buffers=len(buffers),
                bytes=self._inventory.bytes,
                live=sum(buffer.held() for buffer in buffers),
                captured=sum(buffer.owner in handles for buffer in buffers),
                hits=self._requests - self.misses,
                misses=self.misses,
                evictions=self._inventory.evictions,
                capture_fallbacks=self._fallbacks,
            )

    def _check_usable(self, synchronizes: str = "") -> None:
        """Raise where the pool cannot be called, or ``synchronizes``, a method's name, not in this capture."""
        if self._unusable is not None:
            raise PoolClosedError(self._unusable)
        if active_fake_mode() is not None:
            raise SafeAllocError(
                "a pool has no fake tensors: traced code calls torch.ops.safealloc.acquire or safealloc.nvfp4_linear"
            )
        if synchronizes and self._capture() is not None:
            raise SafeAllocError(f"{synchronizes} synchronizes, which a CUDA graph capture forbids: call it outside")

    # --- the pool as an object ----------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        self._check_usable()
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = self._unusable or f"{len(self._inventory.by_address)} buffers, {self._inventory.bytes} bytes"
        return f"<ScalePool on {self.device}: {state}>"

    def _leave_to_parent(self, parent: int) -> None:
        self._lock = threading.RLock()  # a thread of the parent may have held it
        self._unusable = f"this pool belongs to process {parent}, of which this one is a fork: make one here"
        # Not dropped: freeing the parent's device memory from here would be an error.
        self._left_behind = self._inventory, self._watch
        self._inventory = Inventory(self.device)
        self._watch = Watch(self._inventory)


_pool_numbers = itertools.count(1)

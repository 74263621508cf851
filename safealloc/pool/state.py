"""What a pool is made of, and what can be seen of it; who gets which buffer is decided in :mod:`safealloc.pool.pool`."""

from __future__ import annotations

import itertools
from typing import Literal

import torch
from torch import Tensor
from torch._guards import active_fake_mode

from safealloc import _torch
from safealloc._checks import check_is_tensor, checked_bytes, checked_count, checked_device
from safealloc.errors import PoolClosedError, SafeAllocError
from safealloc.formats.format import ScaleFormat
from safealloc.formats.layout import SfLayout
from safealloc.formats.spec import ScaleSpec
from safealloc.pool import driver
from safealloc.pool.contents import spec_of
from safealloc.pool.driver import Capture
from safealloc.pool.graphs import GraphUses
from safealloc.pool.inventory import Inventory
from safealloc.pool.memory import check_allocator
from safealloc.pool.nan import NanWatch
from safealloc.pool.process import Entrance, OfOneProcess
from safealloc.pool.reports import GraphReport, PoolStats
from safealloc.pool.watch import Watch


class PoolState(OfOneProcess):
    """Base of :class:`safealloc.ScalePool`: its parts, its counters, and the methods that only look."""

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
        nan: bool = False,
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
            check_allocator()
        self._index = self.device.index or 0
        self._raw_stream, self._capturing = driver.current_stream(self.device), driver.capture_query(self.device)
        self._number = next(_pool_numbers)
        self._entrance = Entrance()
        self._unusable: str | None = None
        watched = debug or verify_every > 0  # every handout is seen, so that none is answered by the hit path
        limits = self.max_bytes, self.cache_bytes
        self._inventory = Inventory(
            self.device, *limits, self._number, poison=poison, red_zones=debug, ready=not watched
        )
        self.nan = NanWatch(self.device) if nan else None
        """What watches the inputs of quantizers, with ``nan=True``."""
        self._watch = Watch(
            self._inventory, debug=debug, verify_every=verify_every, verify_repair=verify_repair, nan=self.nan
        )
        self._graphs = GraphUses(self._number)
        self._warned: set[ScaleSpec] = set()
        self._ticks = itertools.count(1)  # requests and looks, in an order that all threads agree on
        self._looks = self._fallbacks = 0
        self._streams: set[int] = set()  # on which buffers are used
        self.misses = 0
        """Acquires so far that had to make a buffer."""
        _torch.log_reasons()
        super().__init__()

    # --- looking ------------------------------------------------------------------------------------------------------

    def spec(self, tensor: Tensor) -> ScaleSpec | None:
        """What ``tensor`` holds, if it is a buffer of this pool or whole row tiles of one; ``None`` for anything else.

        Args:
            tensor: any tensor, view or dtype view. Of whole row tiles, the rows that lie in the view count.

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
        with self._entrance():
            self._check_usable("verify")
            return self._watch.verify(repair)

    def safe_point(self) -> None:
        """Raise what the checks of ``verify_every`` have found since the last call, or repair it; log the first NaN.

        Both ends of a :func:`safealloc.capture` are one, and for padding each acquire. A program that only replays graphs
        calls it once per step: it reads a word of the host's memory, and synchronizes only where something was found. In
        a capture, and without ``verify_every`` and ``nan``, it does nothing.

        Raises:
            PaddingCorruptionError: padding is not zero, without ``verify_repair``; names the last caller that was handed
                the buffer.
            NanError: with ``nan``, a NaN entered a quantizer, and ``SAFEALLOC_STRICT=1``.
            PoolClosedError: the pool was closed.
        """
        if not self._watch.alarmed:
            return
        with self._entrance():
            self._check_usable()
            if self._capture() is None:
                self._watch.report_alarms()

    def held(
        self,
        rows: int,
        k: int,
        layout: SfLayout,
        *,
        padded_k: int | None = None,
        format: ScaleFormat = ScaleFormat.nvfp4,
    ) -> int:
        """How many buffers of a shape somebody holds now.

        Args:
            rows, k, layout, padded_k, format: as in :meth:`acquire`.
        """
        spec = ScaleSpec.checked(rows, k, layout, padded_k, format)
        with self._entrance():
            return sum(buffer.held() for buffer in self._inventory.buffers() if buffer.spec == spec)

    def stats(self) -> PoolStats:
        """The pool's counters now."""
        with self._entrance():
            self._check_usable()
            if self._capture() is None:
                self._take_back_and_drain()
            buffers = self._inventory.buffers()
            requests = self._now() - self._looks
            handles = self._graphs.handles()
            return PoolStats(
                buffers=len(buffers),
                bytes=sum(buffer.nbytes for buffer in buffers),
                live=sum(buffer.held() for buffer in buffers),
                captured=sum(buffer.owner in handles for buffer in buffers),
                hits=requests - self.misses,
                misses=self.misses,
                evictions=self._inventory.evictions,
                capture_fallbacks=self._fallbacks,
            )

    def graph_report(self, graph: torch.cuda.CUDAGraph) -> GraphReport:
        """What a graph that :func:`safealloc.capture` captured with this pool uses.

        Raises:
            TypeError: not a ``torch.cuda.CUDAGraph``.
            ValueError: the graph was not captured that way.
            PoolClosedError: the pool was closed.
        """
        if not isinstance(graph, torch.cuda.CUDAGraph):
            raise TypeError(f"graph must be a torch.cuda.CUDAGraph, as safealloc.capture() yields it, got {graph!r}")
        with self._entrance():
            self._check_usable()
            report = self._graphs.report(graph)
        if report is None:
            raise ValueError("no capture() with this pool captured that graph")
        return report

    def note_graph(self, graph: torch.cuda.CUDAGraph, capture: Capture, nodes: dict[str, int] | None) -> None:
        """Called by :func:`safealloc.capture` when its capture ends: makes the graph's report."""
        with self._entrance():
            self._graphs.note(graph, capture, nodes)

    def captures(self) -> int:
        """How many captures of living graphs were given buffers."""
        with self._entrance():
            return self._graphs.alive()

    # --- for those who decide -----------------------------------------------------------------------------------------

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

    def _capture(self) -> Capture | None:
        """The capture under way on the current stream of the pool's device."""
        return driver.under_way(self._raw_stream(self._index)) if self._on_cuda else None

    def _take_back(self) -> None:
        self._graphs.return_gone(self._inventory)
        self._inventory.collect_returning(self._streams)

    def _take_back_and_drain(self) -> None:
        """Between steps: take back what came back, and record what a capture that follows may take over."""
        self._take_back()
        self._inventory.start_drain()

    def _now(self) -> int:
        """A number between those of the requests before and after."""
        self._looks += 1
        return next(self._ticks)

    # --- the pool as an object ----------------------------------------------------------------------------------------

    def __repr__(self) -> str:
        state = self._unusable or f"{len(self._inventory.by_address)} buffers, {self._inventory.nbytes} bytes"
        return f"<ScalePool on {self.device}: {state}>"

    def _leave_to_parent(self, parent: int) -> None:
        self._entrance = Entrance()  # a thread of the parent may have held it
        self._unusable = f"this pool belongs to process {parent}, of which this one is a fork: make one here"
        # Not dropped: freeing the parent's device memory from here would be an error.
        self._left_behind = self._inventory, self._watch
        self._inventory = Inventory(self.device)
        self._watch = Watch(self._inventory)


_pool_numbers = itertools.count(1)

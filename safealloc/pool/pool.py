"""The pool: zero-padded scale buffers that outlive a step, a graph and its replays.

A buffer belongs to whoever orders its writers and readers: in eager work the stream it was acquired on, in CUDA graphs the
graph memory-pool handle, since graphs that share one never replay concurrently. Within that, a buffer is free again as
soon as nobody holds a tensor of it. Each shape has buffers of its own, shapes without padding too: an address then stands
for one shape and one layout as long as the pool holds it, which is what lets a GEMM refuse a contradicting flag, also
where captured graphs still write the buffer.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Literal, NoReturn, Self

import torch
from torch import Tensor
from torch._guards import active_fake_mode

from safealloc._checks import check_is_tensor, checked_bytes, checked_device
from safealloc.errors import (
    CaptureGrowthError,
    PaddingCorruptionError,
    PoolClosedError,
    PoolPicklingError,
    SafeAllocError,
)
from safealloc.formats.layout import SfLayout
from safealloc.formats.spec import ScaleSpec
from safealloc.pool import driver
from safealloc.pool.buffer import Buffer, remember, spec_of
from safealloc.pool.driver import Capture
from safealloc.pool.guard import Guard, GuardSettings
from safealloc.pool.inventory import Inventory
from safealloc.pool.reports import CaptureGrowthWarning, GraphReport, PoolStats
from safealloc.pool.verify import Corruption, find_corruptions, heal

logger = logging.getLogger(__name__)

_STOCK = "stock"  # owner of a buffer that no stream and no graph has touched since it was made or came back
_NO_BUFFERS: list[Buffer] = []
_dispatch_modes = torch._C._len_torch_dispatch_stack
_use_count = torch._C._storage_Use_Count
_references = sys.getrefcount


@dataclass(slots=True)
class _CaptureUse:
    """What a pool knows of one capture."""

    capture: Capture
    handle: Hashable
    since: int  # acquires the pool had answered when it first saw the capture
    buffers: dict[Buffer, None]


class ScalePool:
    """NVFP4 scale buffers on one device whose padding is zero at every call and every replay.

    Args:
        device: where the buffers live; ``None`` is the current CUDA device, or the CPU where there is none.
        max_bytes: what the pool may hold, buffers made for one call included; ``None`` is no limit.
        cache_bytes: what it may hold in shapes that were neither reserved nor captured; the least recently used go
            first, and what does not fit is made for the one call.
        growth_in_capture: ``"zeros"`` or ``"error"``: what a capture gets for which no buffer is there.
        debug: verify all padding at each acquire, which synchronizes.

    Raises:
        TypeError, ValueError: an argument of the wrong type or out of range.
    """

    def __init__(
        self,
        device: torch.device | str | int | None = None,
        *,
        max_bytes: int | None = None,
        cache_bytes: int = 64 << 20,
        growth_in_capture: Literal["zeros", "error"] = "zeros",
        debug: bool = False,
    ) -> None:
        self.device = checked_device(device)
        self.max_bytes = None if max_bytes is None else checked_bytes(max_bytes, "max_bytes")
        self.cache_bytes = checked_bytes(cache_bytes, "cache_bytes")
        if growth_in_capture not in ("zeros", "error"):
            raise ValueError(f'growth_in_capture must be "zeros" or "error", got {growth_in_capture!r}')
        self.growth_in_capture = growth_in_capture
        self._on_cuda = self.device.type == "cuda"
        if self._on_cuda:
            torch.cuda.init()
        self._raw_stream: Callable[[int], int] = torch._C._cuda_getCurrentRawStream if self._on_cuda else _no_stream
        self._capturing: Callable[[int], bool] = driver.StreamStatus().capturing if self._on_cuda else _never
        self._index = self.device.index or 0
        self._id = next(_pool_numbers)
        self._renew_lock()
        self._unusable: str | None = None
        settings = GuardSettings.of(os.environ)
        self._repair = settings.repair
        self._guard = Guard(self.device, settings.every) if settings.every else None
        self._inventory = Inventory(self.device, self.max_bytes, self.cache_bytes, self._id, poison=settings.poison)
        self._buffers = self._inventory.by_key
        self._recent = self._inventory.recent
        self._captures: dict[int, _CaptureUse] = {}
        self._destroyed = 0  # graphs of the process found destroyed when the pool last took buffers back
        self._shared_handle: Hashable = None  # of captures that somebody else began, where they share one
        self._reports: weakref.WeakKeyDictionary[Any, GraphReport] = weakref.WeakKeyDictionary()
        self._warned: set[ScaleSpec] = set()
        self._requests = self._fallbacks = 0
        self.misses = 0
        """Acquires so far that had to make a buffer."""
        self._debug = debug
        if debug or self._guard is not None:
            self.acquire = self._acquire_watched  # type: ignore[method-assign]
        _pools.add(self)

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
            zero, the real bytes undefined. It shares memory with no other tensor that anybody holds. Once nobody holds
            it, it is handed out again to the same stream, or to captures of the same graph memory-pool handle.

        Raises:
            CaptureGrowthError: no buffer is there, in a capture, with ``growth_in_capture="error"``.
            PoolExhaustedError: it would take the pool beyond ``max_bytes``.
            PoolClosedError: the pool was closed, or this process is a fork of the pool's.
            TypeError, ValueError: an argument of the wrong type or out of range.
        """
        self._enter()  # a third of what `with self._lock` costs
        try:
            stream = self._raw_stream(self._index)
            if stream and self._capturing(stream):  # the default stream, 0, is never in a capture
                return self._acquire_slowly(self._spec(rows, k, layout, padded_k))
            try:  # what is there costs less so than by get()
                buffers = self._buffers[rows, k, layout, padded_k, stream]
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
                    if not buffer.kept:
                        self._recent.move_to_end(buffer)
                    return buffer.base.data  # a fresh tensor, as detach() makes, without the dispatcher
            return self._acquire_slowly(self._spec(rows, k, layout, padded_k))
        finally:
            self._leave()

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
            self._before_handout()
            return self._handed_out(self._acquire_slowly(spec))[: spec.padded_shape[0]]

    def record(self, tensor: Tensor) -> Tensor | None:
        """What tells which rows of a buffer are real now, int32 (:class:`ScaleSpec`), for those who keep it.

        Args:
            tensor: uint8, starts at a buffer of this pool.

        Returns:
            ``None`` for other memory, and where the real rows are always the same.
        """
        buffer = self._inventory.by_address.get(tensor.data_ptr())
        if buffer is not None:
            return buffer.record
        spec = spec_of(tensor, self._id)  # made for one call, or in a capture
        return None if spec is None else spec.record_in(tensor)

    def _acquire_slowly(self, spec: ScaleSpec) -> Tensor:
        self._check_usable()
        capture = self._capture()
        if capture is not None:
            return self._acquire_in_capture(spec, capture)
        self._reclaim()
        stream = self._raw_stream(self._index)
        for owner in (stream, _STOCK):
            buffer = next((buffer for buffer in self._inventory.owned(spec, owner) if buffer.passed()), None)
            if buffer is not None:
                self._inventory.change_owner(buffer, stream)
                return self._hand_out(buffer)
        if self._inventory.make_room_in_cache(spec.nbytes):
            tensor = self._hand_out(self._inventory.make(spec, stream, kept=False))
        else:
            tensor = self._inventory.make_loose(spec)
            self._requests += 1
        self.misses += 1
        return tensor

    def _hand_out(self, buffer: Buffer) -> Tensor:
        self._requests = buffer.last_use = self._requests + 1
        if not buffer.kept:
            self._recent.move_to_end(buffer)
        return buffer.base.data

    def _acquire_in_capture(self, spec: ScaleSpec, capture: Capture) -> Tensor:
        use = self._use_of(capture)
        stream = self._raw_stream(self._index)
        for buffer in self._inventory.owned(spec, use.handle):
            # Graphs of one handle replay one after the other. Within one graph only the stream orders, and a reader on
            # another stream joins at some point that is not known here.
            same_capture = buffer.capture is capture
            if not buffer.held() and (not same_capture or (buffer.stream == stream and not buffer.readers)):
                break
        else:
            moved = self._move_to_capture(spec, use)
            if moved is None:
                return self._grow_in_capture(spec)
            buffer = moved
        if buffer.capture is not capture:
            buffer.readers.clear()
        buffer.capture, buffer.stream = capture, stream
        capture.keep(buffer.base)
        use.buffers[buffer] = None
        self._requests += 1
        return buffer.base.data

    def _move_to_capture(self, spec: ScaleSpec, use: _CaptureUse) -> Buffer | None:
        """A reserved buffer, or one that eager work (a warm-up) left behind before the capture began.

        Who begins a capture lets the device pass what came before it (``torch.cuda.graph`` synchronizes), so that no replay
        can meet it. What eager callers of other threads were given since then is left alone.
        """
        eager = {key[-1] for key in self._buffers if isinstance(key[-1], int)}
        for owner in (_STOCK, *eager):
            for buffer in self._inventory.owned(spec, owner):
                if buffer.idle() and buffer.last_use <= use.since:
                    self._inventory.change_owner(buffer, use.handle)
                    self._inventory.keep(buffer)
                    return buffer
        return None

    def _grow_in_capture(self, spec: ScaleSpec) -> Tensor:
        named = {"padded_k": spec.padded_k, "experts": spec.experts}
        further = "".join(f", {name}={value}" for name, value in named.items() if value is not None)
        remedy = f"call pool.reserve({spec.rows}, {spec.k}, SfLayout.{spec.layout.name}{further}) before the capture"
        if self.growth_in_capture == "error":
            raise CaptureGrowthError(
                f"no idle buffer for {spec} in this capture, and a pool does not grow in one: {remedy} (copies=N for N "
                "that are held at once, or that belong to different graph memory-pool handles)"
            )
        tensor = spec.scales_in(torch.zeros(spec.nbytes, dtype=torch.uint8, device=self.device))
        remember(tensor, spec, self._id)
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
        if isinstance(copies, bool) or not isinstance(copies, int):
            raise TypeError(f"copies must be an integer, got {copies!r}")
        if copies < 1:
            raise ValueError(f"copies must be at least 1, got {copies}")
        specs = self._specs(_several(rows), _several(k), layout, padded_k, experts)
        with self._lock:
            self._check_usable()
            if self._capture() is not None:
                raise CaptureGrowthError("reserve was called in a capture: call it before the capture begins")
            self._reclaim()
            missing: list[ScaleSpec] = []
            for spec in specs:
                unused = sum(not buffer.held() for buffer in self._inventory.owned(spec, _STOCK))
                missing += [spec] * (copies - unused)
            self._inventory.make_room(sum(spec.nbytes for spec in missing))
            made: list[Buffer] = []
            try:
                for spec in missing:
                    made.append(self._inventory.make(spec, _STOCK, kept=True))
            except BaseException:
                for buffer in made:
                    self._inventory.forget(buffer)
                raise
            if made and self._on_cuda:
                torch.cuda.current_stream(self.device).synchronize()

    def trim(self) -> int:
        """Give up the idle buffers of the cache, and their memory to the device; returns their bytes.

        Reserved, captured and held buffers stay.

        Raises:
            SafeAllocError: in a capture.
            PoolClosedError: the pool was closed.
        """
        with self._lock:
            self._check_usable()
            self._refuse_in_capture("trim")
            self._reclaim()
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
            self._refuse_in_capture("close")
            if self._guard is not None:
                self._guard.close()
            self._inventory.clear()
            self._captures.clear()
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
            if buffer is None and spec_of(tensor, self._id) is None:
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
            restore = contextlib.ExitStack()
            restore.callback(setattr, self, "_shared_handle", self._shared_handle)
            self._shared_handle = ("shared captures of pool", self._id)
            return restore

    def graph_report(self, graph: torch.cuda.CUDAGraph) -> GraphReport:
        """What a graph that :func:`safealloc.capture` captured with this pool uses.

        Raises:
            ValueError: the graph was not captured that way.
            PoolClosedError: the pool was closed.
        """
        with self._lock:
            self._check_usable()
            report = self._reports.get(graph)
        if report is None:
            raise ValueError("no capture() with this pool captured that graph")
        return report

    def note_graph(self, graph: torch.cuda.CUDAGraph, capture: Capture, nodes: dict[str, int] | None) -> None:
        """Called by :func:`safealloc.capture` when its capture ends: makes the graph's report."""
        with self._lock:
            use = self._captures.get(capture.id)
            buffers = tuple(use.buffers) if use else ()
            specs = tuple(buffer.spec for buffer in buffers)
            self._reports[graph] = GraphReport(specs, sum(buffer.nbytes for buffer in buffers), nodes)

    def _capture(self) -> Capture | None:
        """The capture under way on the current stream of the pool's device."""
        if not self._on_cuda:
            return None
        return driver.under_way(self._raw_stream(self._index))

    def _use_of(self, capture: Capture) -> _CaptureUse:
        use = self._captures.get(capture.id)
        if use is None:
            handle = capture.handle or self._shared_handle or ("capture", capture.id)
            use = self._captures[capture.id] = _CaptureUse(capture, handle, self._requests, {})
        return use

    def _reclaim(self) -> None:
        """Take back the buffers of handles whose last graph is destroyed, once the device has passed."""
        destroyed = driver.destroyed()
        if destroyed == self._destroyed:
            return
        self._destroyed = destroyed
        dead = [use for use in self._captures.values() if not use.capture.alive]
        for use in dead:
            del self._captures[use.capture.id]
        gone = {use.handle for use in dead} - {use.handle for use in self._captures.values()}
        returning = [buffer for buffer in self._inventory.by_address.values() if buffer.owner in gone]
        if returning:
            torch.cuda.synchronize(self.device)
        for buffer in returning:
            self._inventory.change_owner(buffer, _STOCK)
            buffer.capture, buffer.last_use = None, 0
            buffer.readers.clear()

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
        return spec_of(tensor, self._id)

    def verify(self, repair: bool = False) -> int:
        """Check that all padding is zero, in every buffer the pool holds or made; synchronizes the device.

        In a buffer for routed rows, what the last quantization did not write is padding too.

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
            self._check_usable()
            self._refuse_in_capture("verify")
            if self._on_cuda:
                torch.cuda.synchronize(self.device)
            buffers = [(buffer.spec, buffer.base) for buffer in self._inventory.by_address.values()]
            loose = [(loose.spec, loose.tensor()) for loose in self._inventory.loose]
            buffers += [(spec, tensor) for spec, tensor in loose if tensor is not None]
            del loose
            count = len(buffers)
            self._settle(buffers, repair)
            return count

    def safe_point(self) -> None:
        """Raise what the checks of ``SAFEALLOC_VERIFY`` have found since the last call, or heal it.

        Each acquire is one, and so are both ends of a :func:`safealloc.capture`. A program that only replays graphs calls it
        once a step: it reads one word of the host's memory, and synchronizes only where something was found. In a capture,
        and without ``SAFEALLOC_VERIFY``, it does nothing.

        Raises:
            PaddingCorruptionError: padding is not zero, without ``SAFEALLOC_VERIFY_REPAIR=1``; says who was handed the
                buffer last.
            PoolClosedError: the pool was closed.
        """
        if self._guard is None or not self._guard.alarmed:
            return
        with self._lock:
            self._check_usable()
            if self._capture() is not None:
                return
            if self._on_cuda:
                torch.cuda.synchronize(self.device)
            alarmed = [(buffer.spec, buffer.base) for buffer in self._guard.alarms()]
            if not self._settle(alarmed, self._repair):
                logger.warning("a check found padding that was not zero, and that is zero now")

    def _settle(self, buffers: list[tuple[ScaleSpec, Tensor]], repair: bool) -> bool:
        """Raise what is dirty in buffers, or zero and log it; empties the list, which the error's traceback would hold."""
        corruptions = [self._with_suspect(corruption) for corruption in find_corruptions(buffers)]
        if corruptions and repair:
            heal(buffers, corruptions)
            if self._on_cuda:
                torch.cuda.synchronize(self.device)
        buffers.clear()
        if corruptions and not repair:
            raise PaddingCorruptionError(corruptions)
        for corruption in corruptions:
            logger.warning("zeroed padding that somebody wrote: %s", corruption)
        return bool(corruptions)

    def _with_suspect(self, corruption: Corruption) -> Corruption:
        buffer = self._inventory.by_address.get(corruption.address)
        if self._guard is None or buffer is None:
            return corruption
        return replace(corruption, handed_to=self._guard.suspect(buffer))

    def take_back(self) -> None:
        """Take back what only destroyed graphs used, which a capture cannot do; a no-op inside one.

        Raises:
            PoolClosedError: the pool was closed.
        """
        with self._lock:
            self._check_usable()
            if self._capture() is None:
                self._reclaim()

    def held(self, rows: int, k: int, layout: SfLayout, *, padded_k: int | None = None) -> int:
        """How many buffers of a shape somebody holds now.

        Args:
            rows, k, layout, padded_k: as in :meth:`acquire`.
        """
        spec = self._spec(rows, k, layout, padded_k)
        with self._lock:
            return sum(buffer.held() for buffer in self._inventory.by_address.values() if buffer.spec == spec)

    def captures(self) -> int:
        """How many captures of living graphs were given buffers."""
        with self._lock:
            return sum(use.capture.alive for use in self._captures.values())

    def stats(self) -> PoolStats:
        """The pool's counters now."""
        with self._lock:
            self.take_back()
            buffers = self._inventory.by_address.values()
            handles = {use.handle for use in self._captures.values()}
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

    def _acquire_watched(self, rows: int, k: int, layout: SfLayout, *, padded_k: int | None = None) -> Tensor:
        with self._lock:
            self._before_handout()
            return self._handed_out(ScalePool.acquire(self, rows, k, layout, padded_k=padded_k))

    def _before_handout(self) -> None:
        if self._debug:
            self.verify()
        self.safe_point()

    def _handed_out(self, tensor: Tensor) -> Tensor:
        buffer = self._inventory.by_address.get(tensor.data_ptr())
        if self._guard is not None and buffer is not None:  # not what was made for one call
            self._guard.handed_out(buffer, self._capture())
        return tensor

    def _spec(self, rows: int, k: int, layout: SfLayout, padded_k: int | None) -> ScaleSpec:
        return ScaleSpec.checked(rows, k, layout, padded_k)

    def _specs(
        self, rows: list[int], ks: list[int], layout: SfLayout, padded_k: int | None, experts: int | None
    ) -> list[ScaleSpec]:
        """What to reserve."""
        if experts is None:
            pairs = itertools.product(rows, ks)
            return list(dict.fromkeys(self._spec(row, k, layout, padded_k) for row, k in pairs))
        if padded_k is not None:
            raise ValueError(f"buffers for experts have no padded_k, got padded_k={padded_k}")
        every = [[ScaleSpec.grouped(row, k, layout, experts) for row in rows] for k in dict.fromkeys(ks)]
        return [max(specs, key=lambda spec: spec.rows) for specs in every if specs]

    def _check_usable(self) -> None:
        if self._unusable is not None:
            raise PoolClosedError(self._unusable)
        if active_fake_mode() is not None:
            raise SafeAllocError(
                "a pool hands out real memory and cannot be called on fake tensors: traced code calls "
                "torch.ops.safealloc.acquire or safealloc.nvfp4_linear"
            )

    def _refuse_in_capture(self, what: str) -> None:
        if self._capture() is not None:
            raise SafeAllocError(f"{what} synchronizes, which a CUDA graph capture forbids: call it outside")

    # --- the pool as an object ----------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        self._check_usable()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __reduce__(self) -> NoReturn:
        raise PoolPicklingError("a ScalePool holds memory of one process and cannot be pickled or copied")

    def __repr__(self) -> str:
        state = self._unusable or f"{len(self._inventory.by_address)} buffers, {self._inventory.bytes} bytes"
        return f"<ScalePool on {self.device}: {state}>"

    def _renew_lock(self) -> None:
        self._lock = threading.RLock()
        self._enter, self._leave = self._lock.acquire, self._lock.release

    def _become_unusable_after_fork(self, parent: int) -> None:
        self._renew_lock()  # a thread of the parent may have held it
        self._unusable = f"this pool belongs to process {parent}, of which this one is a fork: make one here"
        # Not dropped: freeing the parent's device memory from here would be an error.
        self._left_behind = self._inventory, self._guard
        self._guard = None
        self._inventory = Inventory(self.device, self.max_bytes, self.cache_bytes, self._id)
        self._buffers, self._recent = self._inventory.by_key, self._inventory.recent


def _no_stream(index: int) -> int:
    """In place of a CUDA stream, on a CPU."""
    return 0


def _never(stream: int) -> bool:
    """Whether it is capturing, on a CPU."""
    return False


def _several(value: int | Iterable[int]) -> list[int]:
    return list(value) if isinstance(value, Iterable) else [value]


_pool_numbers = itertools.count(1)
_pools: weakref.WeakSet[ScalePool] = weakref.WeakSet()


def _after_fork() -> None:
    for pool in list(_pools):
        pool._become_unusable_after_fork(os.getppid())


os.register_at_fork(after_in_child=_after_fork)

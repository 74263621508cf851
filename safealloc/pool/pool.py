"""The pool: zero-padded scale buffers that outlive a step, a graph and its replays.

A buffer belongs to whoever orders its writers and readers: in eager work the stream it was acquired on, in CUDA graphs the
graph memory-pool handle, since graphs that share one never replay concurrently. Within that, a buffer is free again as
soon as nobody holds a tensor of it. Each shape has buffers of its own, shapes without padding too: an address then stands
for one shape, one layout and one format as long as the pool holds it, which is what lets a GEMM refuse a contradicting
flag, also where captured graphs still write the buffer.

This file decides who gets which buffer. :mod:`safealloc.pool.state` is what it decides on, which can be looked at:
:mod:`safealloc.pool.inventory` holds the buffers, :mod:`safealloc.pool.graphs` knows
whose graphs are alive, and :mod:`safealloc.pool.watch` checks what is handed out.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable
from typing import Any, Self

import torch
from torch import Tensor

from safealloc import _torch
from safealloc._checks import check_is_tensor, checked_count
from safealloc.errors import CaptureGrowthError
from safealloc.formats.format import ScaleFormat
from safealloc.formats.layout import SfLayout
from safealloc.formats.spec import ScaleSpec, specs_for
from safealloc.pool.buffer import STOCK, Buffer
from safealloc.pool.contents import note_of
from safealloc.pool.driver import Capture
from safealloc.pool.reports import CaptureGrowthWarning
from safealloc.pool.state import PoolState

_NO_BUFFERS: list[Buffer] = []
_dispatch_modes = _torch.dispatch_modes
_use_count = _torch.use_count
_references = _torch.references
_standard = _torch.standard_deleter


class ScalePool(PoolState):
    """Scale buffers on one device, of NVFP4, MXFP8 and MXFP4, whose padding is zero at every call and every replay.

    Args:
        device: where the buffers live; ``None`` is the current CUDA device, or the CPU where there is none.
        max_bytes: what the pool may hold, buffers made for one call included; ``None`` is no limit.
        cache_bytes: what it may hold in shapes that were neither reserved nor captured; the least recently used go
            first, and what does not fit is made for the one call.
        growth_in_capture: ``"zeros"`` or ``"error"``: what a capture gets for which no buffer is there.
        debug: verify all padding at each acquire, which synchronizes, and the bytes around each buffer too.
        verify_every: check each buffer at every N-th handout, and at every N-th replay of each graph, asynchronously; 0 is
            never.
        verify_repair: zero and log dirty padding that such a check finds, instead of raising.
        poison: fill the valid bytes of new buffers with NaN of the format, so that a scale which a producer forgets shows.
        nan: tell the first NaN that enters a quantizer which uses this pool, asynchronously: :meth:`safe_point` logs it.

    Raises:
        TypeError, ValueError: an argument of the wrong type or out of range.
        SafeAllocError: ``verify_every`` or ``nan`` on CUDA without Triton, or in a capture; another allocator
            than PyTorch's native one.
    """

    # --- acquire: the hit path ----------------------------------------------------------------------------------------

    def acquire(
        self,
        rows: int,
        k: int,
        layout: SfLayout,
        *,
        padded_k: int | None = None,
        format: ScaleFormat = ScaleFormat.nvfp4,
    ) -> Tensor:
        """A scale buffer for a ``[rows, k]`` matrix.

        Args:
            rows: rows of the matrix, at least 1.
            k: columns of the matrix in elements, a multiple of the format's block size.
            layout: order of the scale bytes.
            padded_k: columns that the consumer was padded to, where that is more than ``k``; what lies beyond ``k`` is
                padding too.
            format: of the scales.

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
        stream = self._raw_stream(self._index)
        if (
            (not stream or not self._capturing(stream))  # the default stream, 0, is never in a capture
            and rows.__class__ is k.__class__ is int  # 4.0 and True are equal to what is filed, and are errors
            and layout.__class__ is SfLayout
            and (padded_k is None or padded_k.__class__ is int)
            and not _dispatch_modes()  # fake tensors, perhaps
        ):
            try:  # what is there costs less so than by get()
                buffers = self._inventory.ready[rows, k, layout, padded_k, format, stream]
            except KeyError:
                buffers = _NO_BUFFERS
            for buffer in buffers:
                tensor = buffer.base.data  # buffer.claim(), without the call: a fresh tensor, if it is the only one
                if (
                    _references(buffer.storage) == buffer.claimed_references
                    and _use_count(buffer.cdata) == buffer.claimed_uses
                    and _references(buffer.storage) == buffer.claimed_references
                    and buffer.ready_for == stream
                    and tensor.data_ptr() == buffer.address
                    and (buffer.standard is None or _standard(buffer.cdata) == buffer.standard)
                ):
                    buffer.last_use = next(self._ticks)
                    return tensor
                del tensor  # or nobody else could claim it
        return self._serve(ScaleSpec.checked(rows, k, layout, padded_k, format), stream)

    # --- acquire: all the rest ----------------------------------------------------------------------------------------

    def acquire_grouped(
        self,
        rows: int,
        k: int,
        experts: int,
        layout: SfLayout = SfLayout.layout_128x4,
        *,
        format: ScaleFormat = ScaleFormat.nvfp4,
    ) -> Tensor:
        """A scale buffer for ``[rows, k]`` whose rows are routed to experts, each of which starts at a tile of its own.

        Which bytes are scales changes with the routing, so that a buffer comes with a record of those of the last step.
        :func:`safealloc.nvfp4_quantize_grouped` and :func:`safealloc.silu_and_mul_nvfp4_quantize_grouped` keep both; beside
        another producer, :func:`safealloc.clean_grouped_scales` does. One buffer serves all row counts up to the largest
        that was reserved or captured, in turn.

        Args:
            rows: rows routed in all, tokens times experts a token, at least 1.
            k: columns of the matrix in elements, a multiple of the format's block size.
            experts: groups of rows, at least 1.
            layout: order of the scale bytes.
            format: of the scales.

        Returns:
            uint8 ``[padded_rows, padded_cols]`` with rows for the worst routing (:meth:`SfLayout.grouped_rows`), contiguous,
            512-byte aligned; every byte zero that is not a scale of the last step. Liveness and errors are those of
            :meth:`acquire`.
        """
        spec = ScaleSpec.grouped(rows, k, layout, experts, format)
        return self._serve(spec, self._raw_stream(self._index))[: spec.padded_shape[0]]

    def _serve(self, spec: ScaleSpec, stream: int) -> Tensor:
        """What the hit path cannot answer: captures, misses, grouped scales, and all of a pool that is watched."""
        with self._entrance():
            self._check_usable()
            self._streams.add(stream)
            capture = self._capture()
            self._watch.before_handout(capture)
            tensor = self._serve_eager(spec, stream) if capture is None else self._serve_capture(spec, stream, capture)
            self._watch.handed_out(tensor, capture)
            return tensor

    def _serve_eager(self, spec: ScaleSpec, stream: int) -> Tensor:
        self._take_back()
        found = self._inventory.take(spec, (stream,), Buffer.passed_readers, stream)
        found = found or self._inventory.take(spec, (STOCK,), Buffer.drained, stream)
        given = found or self._inventory.make_cached(spec, stream)
        tensor = given[1] if given else self._inventory.make_for_one_call(spec)
        request = next(self._ticks)
        if given:
            given[0].last_use = request
        if not found:
            self.misses += 1
        return tensor

    def _serve_capture(self, spec: ScaleSpec, stream: int, capture: Capture) -> Tensor:
        use = self._graphs.use_of(capture, self._now())
        tensor = use.take(self._inventory, spec, stream)
        if tensor is None and self.growth_in_capture == "error":
            raise CaptureGrowthError(
                f"no idle buffer for {spec} in this capture, and a pool does not grow in one: call pool.{spec.reserve_call} "
                "before the capture (copies=N for N held at once, or on different graph memory-pool handles)"
            )
        next(self._ticks)
        if tensor is not None:
            return tensor
        tensor = self._inventory.make_in_capture(spec)
        self.misses += 1
        self._fallbacks += 1
        if spec not in self._warned:
            self._warned.add(spec)
            message = f"no idle buffer for {spec}: this graph zeroes one at every replay"
            remedy = f"call pool.{spec.reserve_call} before the capture to save that"
            warnings.warn(f"{message}; {remedy}", CaptureGrowthWarning, stacklevel=4)
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
        format: ScaleFormat = ScaleFormat.nvfp4,
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
            format: of the scales.

        Raises:
            CaptureGrowthError: in a capture.
            PoolExhaustedError: they would take the pool beyond ``max_bytes``; none is made.
            PoolClosedError, TypeError, ValueError: as in :meth:`acquire`.
        """
        copies = checked_count(copies, "copies", least=1)
        specs = specs_for(rows, k, layout, padded_k, experts, format)
        with self._entrance():
            self._check_usable()
            if self._capture() is not None:
                raise CaptureGrowthError("reserve was called in a capture: call it before the capture begins")
            self._take_back_and_drain()
            missing: list[ScaleSpec] = []
            for spec in specs:
                missing += [spec] * (copies - self._inventory.unused(spec))
            self._inventory.make_all(missing, self._raw_stream(self._index))
            if missing and self._on_cuda:
                torch.cuda.current_stream(self.device).synchronize()

    def trim(self, *, reserved: bool = False) -> int:
        """Give up the idle buffers of the cache, and their memory to the device; returns their bytes.

        Captured and held buffers stay, and without ``reserved`` the reserved ones.

        Raises:
            SafeAllocError: in a capture.
            PoolClosedError: the pool was closed.
        """
        with self._entrance():
            self._check_usable("trim")
            self._take_back_and_drain()
            return self._inventory.trim(reserved)

    def close(self) -> None:
        """Give up every buffer; each later use of the pool is an error.

        Tensors that somebody holds stay valid, and so does what living graphs use, until they are gone; the memory that only
        those graphs used is free when a pool, any pool, is called next.

        Raises:
            SafeAllocError: in a capture.
        """
        with self._entrance():
            if self._unusable is not None:
                return
            self._check_usable("close")
            self._watch.close()
            self._inventory.clear()
            self._graphs.clear()
            self._unusable = "this pool was closed"

    def __enter__(self) -> Self:
        self._check_usable()
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # --- streams and captures -----------------------------------------------------------------------------------------

    def record_stream(self, tensor: Tensor, stream: torch.Stream) -> None:
        """Another stream reads ``tensor`` too: its buffer is not handed out again before that stream has passed.

        As with ``torch.Tensor.record_stream``, what counts is the work queued on ``stream`` by the time the last holder
        is gone. In a capture, the buffer is not handed out again in that capture; ``stream`` must be forked from the
        capture and join it. A no-op on a CPU.

        Args:
            tensor: any tensor or view of a buffer of this pool.
            stream: a CUDA stream of the pool's device.

        Raises:
            ValueError: ``tensor`` lies in no buffer of this pool, or ``stream`` is on another device.
            PoolClosedError: the pool was closed.
        """
        check_is_tensor(tensor)
        with self._entrance():
            self._check_usable()
            note = note_of(tensor, self._number)
            if note is None:
                raise ValueError("the tensor lies in no buffer of this pool")
            buffer = self._inventory.by_address.get(note.address)
            if not self._on_cuda:
                return
            if not isinstance(stream, torch.cuda.Stream):
                raise TypeError(f"stream must be a torch.cuda.Stream, got {type(stream).__name__}")
            if stream.device != self.device:
                raise ValueError(f"the stream is on {stream.device}, the pool on {self.device}")
            if buffer is None:  # made for one call: PyTorch's allocator frees it
                tensor.record_stream(stream)
                return
            reader, capture = stream.cuda_stream, self._capture()
            self._streams.add(reader)
            if capture is not None and capture.id in buffer.captures:
                if buffer.captures[capture.id] != reader:
                    buffer.captures[capture.id] = None
            elif reader != buffer.owner:
                buffer.read_by(reader)

    def shared_captures(self, *, synchronized: bool = False) -> contextlib.AbstractContextManager[Any]:
        """Treat captures that were not begun by :func:`safealloc.capture` as sharing one graph memory-pool handle.

        True where one framework captures them all into one pool, and so replays them one after the other. Without it
        each is on its own. Holds from the call on; as a context manager, until its end.

        Args:
            synchronized: who begins those captures synchronizes the device first, as ``torch.cuda.graph`` does: then a
                capture may take over what a warm-up has left on its own stream.
        """
        with self._entrance():
            self._check_usable()
            return self._graphs.share(synchronized)

    def take_back(self) -> None:
        """Take back what only destroyed graphs used, which a capture cannot do; a no-op inside one.

        Raises:
            PoolClosedError: the pool was closed.
        """
        with self._entrance():
            self._check_usable()
            if self._capture() is None:
                self._take_back_and_drain()

"""Who wrote which scales in vLLM, and whether a consumer reads them so: ``SAFEALLOC_CONTRACT``.

Producers note what they wrote, consumers compare it with what they read, on the host. A replay of a CUDA graph runs neither.
Scales of which nothing is known pass.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from safealloc.errors import LayoutMismatchError
from safealloc.formats.format import ScaleFormat
from safealloc.formats.layout import SfLayout
from safealloc.formats.spec import ScaleSpec
from safealloc.integrations.vllm.worker import logger
from safealloc.pool.contents import Note, forget_declared, is_whole_storage, pool_note_of, remember_declared
from safealloc.pool.declare import contradiction, known

_POOL = "a producer that wrote a pool's buffer"


class Matrix(NamedTuple):
    """Scales that a call reads or writes.

    Attributes:
        scales: the tensor.
        shape: of the matrix, k in elements; more than two dimensions are matrices one behind the other. Of what is read,
            ``None`` stands for any shape.
        layout, format: of the scales.
        padded_k: columns in elements that the scales have at most.
    """

    scales: Tensor
    shape: Sequence[int] | None
    layout: SfLayout
    format: ScaleFormat
    padded_k: int | None = None


class Contract:
    """What the hooks share: the mode, ``warn`` or ``error``, and which alarms were logged."""

    def __init__(self, mode: str) -> None:
        self.mode = mode
        self._logged: set[tuple[object, ...]] = set()

    def wrote(self, producer: str, *written: Matrix) -> None:
        """Note what was written; a view of a larger storage gets no note, and neither does a pool's buffer."""
        for one in written:
            scales = one.scales
            if pool_note_of(scales) is not None:
                continue
            forget_declared(scales)
            found = _spec(one)
            if found is not None and is_whole_storage(scales):
                remember_declared(scales, *found, producer)

    def gathered(self, producer: str, source: Tensor, target: Tensor, ranks: int) -> None:
        """Note what an all-gather along the rows put together from ``ranks`` tensors like ``source``."""
        note = known(source)
        spec = None if note is None else note.spec_in(source)
        if note is None or not is_whole_storage(target) or pool_note_of(target) is not None:
            return
        forget_declared(target)
        if spec is None or spec.experts is not None:
            return
        rows, origin = spec.layout.tile.rows, f"{producer} of {note.origin or _POOL}"
        of_row = math.prod(source.shape[1:]) * source.element_size()
        total, nbytes = spec.rows * ranks, _nbytes(target)
        if spec.layout is SfLayout.layout_linear and source.ndim > 1 and of_row * spec.rows == _nbytes(source):
            total = nbytes // of_row  # ranks may have different numbers of rows
        whole = ScaleSpec.checked(total, spec.k, spec.layout, spec.padded_k, spec.format)
        if spec.rows % rows == 0 and whole.scale_bytes == nbytes:
            remember_declared(target, whole, 1, origin)
        elif ranks * spec.scale_bytes == nbytes:
            remember_declared(target, spec, ranks, origin)

    def reads(self, consumer: str, *read: Matrix) -> None:
        """Compare what a consumer is about to read with what is known of it.

        Raises:
            LayoutMismatchError: they differ, and the mode is ``error``.
        """
        for one in read:
            note = known(one.scales)
            if note is None or not one.scales.is_contiguous():
                continue
            reason = _mismatch(note, one)
            if reason:
                self._alarm(note, consumer, one, reason)

    def failed(self, name: str, error: Exception) -> None:
        """Log an error of our own once; vLLM goes on."""
        if self._is_new(name, type(error)):
            text = f"{type(error).__name__}: {error}"
            logger.error("safealloc: the contract of %s cannot be checked; logged once: %s", name, text)

    def _alarm(self, note: Note, consumer: str, read: Matrix, reason: str) -> None:
        producer = note.origin or _POOL
        message = f"scale layout: {consumer} does not read what {producer} wrote: {reason}"
        if self.mode == "error":
            raise LayoutMismatchError(message)
        shape = tuple(read.scales.shape) if read.shape is None else tuple(read.shape)
        if self._is_new(producer, consumer, shape):
            logger.warning("safealloc: %s", message)

    def _is_new(self, *key: object) -> bool:
        new = key not in self._logged
        self._logged.add(key)
        return new


def format_of(data: Tensor) -> tuple[ScaleFormat, int]:
    """The format of activations that are FP8 (one value a byte) or FP4 (two), and their columns in elements."""
    if data.dtype.is_floating_point:
        return ScaleFormat.mxfp8, data.shape[-1]
    return ScaleFormat.nvfp4, 2 * data.shape[-1] * data.element_size()


def _mismatch(note: Note, read: Matrix) -> str | None:
    held = note.spec_in(read.scales)
    spec = note.spec if held is None else held
    if read.shape is None or spec.experts is not None:
        if (spec.layout, spec.format) == (read.layout, read.format):
            return None
        return contradiction(note, held, ScaleSpec.checked(spec.rows, spec.k, read.layout, None, read.format))
    rows = math.prod(read.shape[:-1])
    if held is not None and rows < held.rows:
        rows = held.rows  # the first rows of a matrix may be read alone
    return contradiction(note, held, ScaleSpec.checked(rows, read.shape[-1], read.layout, None, read.format))


def _spec(written: Matrix) -> tuple[ScaleSpec, int] | None:
    """What a tensor with its number of bytes holds, and how many matrices; ``None`` where that does not fit."""
    assert written.shape is not None
    *outer, rows, k = written.shape
    nbytes, parts = _nbytes(written.scales), math.prod(outer)
    for count, each in ((1, parts * rows), (parts, rows)):
        spec = ScaleSpec.checked(each, k, written.layout, written.padded_k, written.format)
        if nbytes and count * spec.scale_bytes == nbytes and written.scales.is_contiguous():
            return spec, count
    return None


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()

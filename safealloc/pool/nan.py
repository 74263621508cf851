"""The first NaN: which quantizer's input had it, where, and at which step.

Each quantizer in a graph, or eager call of one shape, is a site. A kernel that finds something in its input which is not
finite records that on the device, with the site (:mod:`safealloc.kernels.reference_nan`), and sets a word in the host's
memory, which the next safe point reads. Nothing synchronizes while all is finite.
"""

from __future__ import annotations

import ctypes
import logging
import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from safealloc import _optional, settings
from safealloc.errors import NanError, NotFinite, SafeAllocError
from safealloc.kernels import reference_nan
from safealloc.kernels.reference_nan import (
    COUNT,
    FIRST,
    HEAD_WORDS,
    LIVE_ROWS,
    NOTHING,
    SITE_BITS,
    SITE_WORDS,
    STEP,
)
from safealloc.pool import driver

MAX_SITES = 1 << 16  # 320 quantizers in graphs of 51 batch sizes are a quarter of that
_KINDS = ("NaN", "infinity")
_LONGEST_PAUSE = 1023  # safe points; some seconds of decoding
_PACKAGE = str(Path(__file__).parents[1]) + os.sep
_TORCH = str(Path(torch.__file__).parent)
_never_freed: list[Tensor] = []  # a replay may write them after the pool is gone

logger = logging.getLogger("safealloc.pool")


@dataclass(frozen=True, slots=True)
class _Site:
    """What the host knows of a site.

    Attributes:
        address: of the global scale that its quantizer is handed, 0 where there is none.
        caller: who called the quantizer.
        rows, width: of its input.
        batch: tokens of the batch that its graph was captured for.
        order: which quantizer of its graph it is, from 1; 0 in eager calls.
    """

    address: int
    caller: str
    rows: int
    width: int
    batch: int
    order: int


class NanWatch:
    """Watches the inputs of the quantizers that use one pool; made by ``ScalePool(..., nan=True)``.

    Args:
        device: of the inputs.

    Raises:
        SafeAllocError: on CUDA without Triton, or in a capture.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_cuda = device.type == "cuda"
        if self._on_cuda and (missing := _optional.missing("triton")):
            raise SafeAllocError(f"nan needs Triton on CUDA: {missing}")
        if self._on_cuda and torch.cuda.is_current_stream_capturing():
            raise SafeAllocError("nan: make the pool before the capture, not in it")
        self._device = device
        with torch.inference_mode(False):  # a framework makes its pool in that mode, and counts steps outside of it
            self._allocate()
        self._words = (ctypes.c_int32 * 2).from_address(self._flags.data_ptr())
        self._sites: list[_Site] = []
        self._unwatched: set[str] = set()  # what was logged
        self._eager: dict[tuple[int, int, int, int, int | None], int] = {}  # numbers of eager calls
        self._orders: dict[int, int] = {}  # by capture: how many quantizers it has
        self._names: dict[int, str] = {}  # of layers, by the address of a global scale
        self._named: set[tuple[int, str]] = set()  # what was logged
        self._pause = self._left_out = 0  # looks to leave out, since the last ones told nothing new
        if self._on_cuda:
            self._compile()

    def _allocate(self) -> None:
        self._flags = torch.zeros(2, dtype=torch.int32, device="cpu", pin_memory=self._on_cuda)
        self._table = torch.zeros((MAX_SITES, SITE_WORDS), dtype=torch.int64, device="cpu", pin_memory=self._on_cuda)
        head = [0, NOTHING, NOTHING, NOTHING, 0, 0, self._flags.data_ptr(), 0]  # live rows and both keys: none
        self._record = torch.full((HEAD_WORDS + 2 * MAX_SITES,), NOTHING, dtype=torch.int64, device=self._device)
        self._record[:HEAD_WORDS] = torch.tensor(head, dtype=torch.int64, device="cpu")
        _never_freed.extend((self._flags, self._table, self._record))

    @property
    def alarmed(self) -> bool:
        """Whether something was found that :meth:`report` has not told yet.

        Where looks tell nothing new, they become rare: a model may have infinity at every step, and a look synchronizes.
        """
        if self._words[0] == 0 and self._words[1] == 0:
            return False
        if self._left_out < self._pause and not (self._words[0] and settings.strict()):
            self._left_out += 1
            return False
        return True

    # --- the path -----------------------------------------------------------------------------------------------------

    def site(
        self, x: Tensor, global_scale: Tensor | None, *, batch: int | None = None, by_expert: bool = False
    ) -> Tensor | None:
        """Where the kernel of one call records, int64 ``[SITE_WORDS]``; ``None`` if the input cannot be watched.

        In a capture, each call is a site of its own.

        Args:
            x: input of the quantizer, bfloat16 or float16 ``[rows, columns]``, contiguous.
            global_scale: what the quantizer is handed, by which a model's layers are told apart.
            batch: tokens of the batch, padding included; where these are the rows of ``x``, those that :meth:`begin_step` was
                told are dead do not count.
            by_expert: whether rows are sorted by expert, so that they are no tokens in order.
        """
        if x.ndim != 2 or x.dtype not in (torch.bfloat16, torch.float16) or x.shape[1] % 16 or not x.is_contiguous():
            self._warn_once("a quantizer's input", f"{x.dtype} {list(x.shape)} with strides {list(x.stride())}")
            return None
        rows, width = x.shape
        in_order = batch == rows and not by_expert
        address = 0 if global_scale is None else global_scale.data_ptr()
        stream = driver.current_stream(self._device)(self._device.index or 0) if self._on_cuda else 0
        capture = driver.under_way(stream)
        if capture is not None:
            order = self._orders[capture.id] = self._orders.get(capture.id, 0) + 1
            return self._add(_Site(address, _caller(), rows, width, batch or rows, order), in_order)
        # A global scale that lives in no model may be at the address of an earlier one, in another line of the program.
        line = 0 if address in self._names else hash(_caller())
        key = (address, rows, width, line, batch)
        number = self._eager.get(key)
        if number is not None:
            return self._table[number]
        site = self._add(_Site(address, _caller(), rows, width, batch or rows, 0), in_order)
        if site is not None:
            self._eager[key] = len(self._sites) - 1
        return site

    def note(self, x: Tensor, site: Tensor, valid_rows: Tensor | None = None) -> None:
        """Read a quantizer's input, by a kernel of its own, asynchronously.

        Args:
            x: as in :meth:`site`.
            site: what that returned.
            valid_rows: int32, one element on the device; rows at or beyond it do not count.
        """
        if self._on_cuda:
            from safealloc.kernels import triton_nan

            triton_nan.note(x, site, valid_rows)
        else:
            reference_nan.note(x, site, self._record, self._flags, valid_rows)

    def begin_step(self, live_rows: int | None = None) -> None:
        """Count a step, on the current stream, before its graphs are replayed.

        Args:
            live_rows: rows of its batch that hold a token; ``None``: all.
        """
        self._record[STEP].add_(1)
        self._record[LIVE_ROWS].fill_(NOTHING if live_rows is None else live_rows)

    def end_step(self) -> None:
        """Until the next step, on the current stream: a batch that is run has no row with a token, as a dummy batch."""
        self._record[LIVE_ROWS].fill_(0)

    # --- looking ------------------------------------------------------------------------------------------------------

    def name_layers(self, names: Mapping[int, str]) -> None:
        """Name the sites whose global scales are at these addresses."""
        self._names.update(names)

    def report(self) -> None:
        """Log the first NaN and the first infinity since the last call, each layer once; synchronizes the device.

        Raises:
            NanError: there was a NaN, with ``SAFEALLOC_STRICT=1``.
        """
        found = list(self._take())
        told = len(self._named)
        for one in found:
            kind = _KINDS.index(one.kind), one.layer
            if kind not in self._named:
                self._named.add(kind)
                logger.warning("%s", one)
        self._pause = 0 if len(self._named) > told else min(2 * self._pause + 1, _LONGEST_PAUSE)
        self._left_out = 0
        if settings.strict() and found and found[0].kind == "NaN":
            raise NanError(found[0])

    def forget(self) -> None:
        """Forget what was found, as in the dummy batches of a warm-up; synchronizes the device."""
        list(self._take())

    def _take(self) -> Iterable[NotFinite]:
        if self._on_cuda:
            torch.cuda.synchronize(self._device)
        self._words[0] = self._words[1] = 0
        head = self._record[:HEAD_WORDS].tolist()
        for kind, name in enumerate(_KINDS):
            key = head[FIRST + kind]
            if key == NOTHING:
                continue
            step, number = key >> SITE_BITS, key & ((1 << SITE_BITS) - 1)
            site = self._sites[number]
            row, column = divmod(int(self._record[HEAD_WORDS + 2 * number + kind]), site.width)
            layer = self._names.get(site.address) or site.caller
            yield NotFinite(name, layer, row, site.rows, column, step, site.batch, site.order, head[COUNT + kind])
        self._record[FIRST : FIRST + 2] = NOTHING
        self._record[COUNT : COUNT + 2] = 0
        self._record[HEAD_WORDS:] = NOTHING
        if self._on_cuda:
            torch.cuda.synchronize(self._device)  # whatever stream records next

    def _add(self, site: _Site, counts_live_rows: bool) -> Tensor | None:
        number = len(self._sites)
        if number == MAX_SITES:
            self._warn_once(f"what follows the first {number} quantizers", site.caller)
            return None
        self._sites.append(site)
        # On the host, where a capture can write too.
        self._table[number] = torch.tensor(
            [self._record.data_ptr(), number, counts_live_rows, site.width], dtype=torch.int64, device="cpu"
        )
        return self._table[number]

    def _warn_once(self, kind: str, what: str) -> None:
        if kind not in self._unwatched:
            self._unwatched.add(kind)
            logger.warning("nan: %s is not watched (logged once): %s", kind, what)

    def _compile(self) -> None:
        from safealloc.kernels import triton_nan

        valid = torch.zeros(1, dtype=torch.int32, device=self._device)
        for dtype in (torch.bfloat16, torch.float16):
            x = torch.zeros((1, 16), dtype=dtype, device=self._device)
            for valid_rows in (None, valid):
                triton_nan.note(x, self._table[0], valid_rows)
        torch.cuda.synchronize(self._device)


def _caller() -> str:
    """Where the function of this package was called from."""
    frame = sys._getframe(1)
    name = ""
    while frame.f_back is not None:
        file = frame.f_code.co_filename
        if file.startswith(_PACKAGE):
            name = frame.f_code.co_name
        elif not file.startswith(_TORCH):
            break
        frame = frame.f_back
    return f"{name} at {frame.f_code.co_filename}:{frame.f_lineno} ({frame.f_code.co_name})"

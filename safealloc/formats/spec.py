"""What a scale tensor holds: the one descriptor, which nothing derives again."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from safealloc.formats.format import ScaleFormat
from safealloc.formats.layout import SfLayout, checked_integer, checked_layout, checked_shape

_LINEAR_ROWS = 16


@dataclass(frozen=True, slots=True)
class ScaleSpec:
    """Which matrix a scale buffer belongs to, and how it is laid out.

    Attributes:
        rows: rows of the matrix.
        k: its columns in elements; ``k // format.block_size`` scale columns are valid.
        layout: order of the bytes.
        padded_k: columns that the consumer was padded to, where that is more than ``k``; else ``None``.
        format: of the scales.
        experts: number of experts, for a buffer of up to ``rows`` rows grouped by expert (MoE); each group starts at a tile.
            Its record tells which scale rows are valid now.

    A record is ``record`` int32, ``record_offset`` bytes from the start. For each row of the last step it holds the scale row
    where the row's scales lie, counted from 1, or -1 if the row belongs to no group; it is 0 behind the last of them.
    """

    rows: int
    k: int
    layout: SfLayout
    padded_k: int | None = None
    format: ScaleFormat = ScaleFormat.nvfp4
    experts: int | None = None

    @classmethod
    def checked(
        cls,
        rows: int,
        k: int,
        layout: SfLayout | int,
        padded_k: int | None = None,
        format: ScaleFormat = ScaleFormat.nvfp4,
    ) -> ScaleSpec:
        """A spec whose numbers were checked; ``padded_k == k`` becomes ``None``.

        Args:
            rows, k, layout, padded_k, format: the matrix, and the layout and format of its scales.

        Raises:
            TypeError, ValueError: see :meth:`SfLayout.padded_shape`.
        """
        rows, k, padded_k = checked_shape(rows, k, padded_k, format)
        return cls(rows, k, checked_layout(layout), None if padded_k == k else padded_k, format)

    @classmethod
    def grouped(
        cls, rows: int, k: int, layout: SfLayout | int, experts: int, format: ScaleFormat = ScaleFormat.nvfp4
    ) -> ScaleSpec:
        """A spec for rows grouped by expert, whose numbers were checked.

        Args:
            rows: rows of all groups, at least 1.
            k, layout, format: as in :meth:`checked`.
            experts: at least 1.

        Raises:
            TypeError, ValueError: an argument is wrong.
        """
        rows, k, _ = checked_shape(rows, k, None, format)
        experts = checked_integer(experts, "experts")
        if experts < 1:
            raise ValueError(f"experts must be at least 1, got {experts}")
        return cls(rows, k, checked_layout(layout), None, format, experts)

    @property
    def stored_rows(self) -> int:
        """Rows of the matrix as it lies in the buffer, before the last tile is padded."""
        return self.rows if self.experts is None else self.layout.grouped_rows(self.rows, self.experts)

    @property
    def cols(self) -> int:
        """Valid scales of each row."""
        return self.k // self.format.block_size

    @property
    def padded_shape(self) -> tuple[int, int]:
        return self.layout.padded_shape(self.stored_rows, self.k, padded_k=self.padded_k, format=self.format)

    @property
    def scale_bytes(self) -> int:
        """Bytes of the scales, padding included."""
        return self.layout.nbytes(self.stored_rows, self.k, padded_k=self.padded_k, format=self.format)

    @property
    def record(self) -> int:
        """Number of int32 behind the scale bytes that tell which rows are valid; 0 where these are always the same."""
        return 0 if self.experts is None else self.rows

    @property
    def record_offset(self) -> int:
        """Where the record starts: ``scale_bytes``, aligned."""
        return -(-self.scale_bytes // 16) * 16

    @property
    def nbytes(self) -> int:
        """Bytes of the whole buffer: scales and record.

        In linear, whole tiles of 16 rows, as FlashInfer allocates: its TMA kernels write every row of their last tile.
        """
        if self.record:
            return self.record_offset + 4 * self.record
        if self.layout is SfLayout.layout_linear:
            padded_rows, padded_cols = self.padded_shape
            return -(-padded_rows // _LINEAR_ROWS) * _LINEAR_ROWS * padded_cols
        return self.scale_bytes

    def row_tiles(self, offset: int, nbytes: int) -> ScaleSpec | None:
        """What a part of the scales holds, if it is whole row tiles: a matrix of the rows that lie in it.

        Args:
            offset: where the part starts, in bytes from the first scale.
            nbytes: its size.

        Returns:
            ``None`` where it is no whole number of row tiles, or holds no row of the matrix.
        """
        padded_rows, padded_cols = self.padded_shape
        tile = self.layout.tile.rows * padded_cols
        if offset == 0 and nbytes == padded_rows * padded_cols:
            return self
        if offset < 0 or nbytes < 1 or offset % tile or nbytes % tile or offset + nbytes > padded_rows * padded_cols:
            return None
        first = offset // padded_cols
        rows = min(self.rows - first, nbytes // padded_cols)
        return replace(self, rows=rows) if rows > 0 else None

    def scales_in(self, memory: Tensor) -> Tensor:
        """The scales of a buffer, uint8 ``[padded_rows, padded_cols]``, without the record behind them.

        Args:
            memory: all of the buffer, uint8 ``[nbytes]``.
        """
        return memory[: self.scale_bytes].view(self.padded_shape)

    def record_in(self, scales: Tensor) -> Tensor | None:
        """The record behind the scales of a buffer, int32 ``[record]``; ``None`` if it has none.

        Args:
            scales: the buffer or its first rows, uint8.
        """
        if not self.record:
            return None
        behind = scales.storage_offset() + self.record_offset
        return scales.as_strided((4 * self.record,), (1,), behind).view(torch.int32)

    def valid_rows_in(self, record: Tensor) -> Tensor:
        """Which rows of a buffer with a record hold scales now, bool ``[stored_rows]``.

        Args:
            record: int32 ``[record]``.
        """
        valid = torch.zeros(self.stored_rows, dtype=torch.bool, device=record.device)
        valid[record[(record > 0) & (record <= self.stored_rows)].long() - 1] = True
        return valid

    def padding_views(self, buffer: Tensor) -> list[Tensor]:
        """Views that cover the padding of ``buffer``; see :meth:`SfLayout.padding_views`.

        Of a buffer with a record these are the padding columns only: the record tells which rows are padding.
        """
        return self.layout.padding_views(buffer, self.stored_rows, self.k, padded_k=self.padded_k, format=self.format)

    def zero_padding(self, buffer: Tensor) -> None:
        """Zero the padding of ``buffer`` in place, with the rows that its record does not name; valid scales are not touched.

        Without a record that is at most four fills, and nothing synchronizes.

        Args:
            buffer: contiguous, all scales of the buffer.
        """
        for padding in self.padding_views(buffer):
            padding.zero_()
        record = self.record_in(buffer)
        if record is not None:
            offsets = self.layout.offsets(self.stored_rows, self.k, buffer.device, format=self.format)
            buffer.view(-1)[offsets[~self.valid_rows_in(record)]] = 0

    @property
    def reserve_call(self) -> str:
        """The call that makes such a buffer, for messages."""
        named = {"padded_k": self.padded_k, "experts": self.experts}
        further = "".join(f", {name}={value}" for name, value in named.items() if value is not None)
        if self.format is not ScaleFormat.nvfp4:
            further += f", format={self.format}"
        return f"reserve({self.rows}, {self.k}, SfLayout.{self.layout.name}{further})"

    def __str__(self) -> str:
        padded = "" if self.padded_k is None else f", padded_k={self.padded_k}"
        experts = "" if self.experts is None else f", experts={self.experts}"
        format = "" if self.format is ScaleFormat.nvfp4 else f", {self.format.name}"
        return f"rows={self.rows}, k={self.k}, {self.layout.name}{padded}{experts}{format}"


def specs_for(
    rows: int | Iterable[int],
    k: int | Iterable[int],
    layout: SfLayout | int,
    padded_k: int | None = None,
    experts: int | None = None,
    format: ScaleFormat = ScaleFormat.nvfp4,
) -> list[ScaleSpec]:
    """Every shape of a request for several: all pairs of rows and k, once each; with ``experts`` the most rows of each k.

    Raises:
        TypeError, ValueError: as :meth:`ScaleSpec.checked`; ``experts`` beside ``padded_k``.
    """
    all_rows = list(rows) if isinstance(rows, Iterable) else [rows]
    all_k = list(k) if isinstance(k, Iterable) else [k]
    if experts is None:
        pairs = itertools.product(all_rows, all_k)
        return list(dict.fromkeys(ScaleSpec.checked(row, k, layout, padded_k, format) for row, k in pairs))
    if padded_k is not None:
        raise ValueError(f"buffers for experts have no padded_k, got padded_k={padded_k}")
    grouped = [[ScaleSpec.grouped(row, k, layout, experts, format) for row in all_rows] for k in dict.fromkeys(all_k)]
    return [max(specs, key=lambda spec: spec.rows) for specs in grouped if specs]

"""Where a scale byte lies in memory: the only swizzle in Python.

A matrix ``[rows, k]`` has one scale byte for each block of columns, so ``cols = k / block_size`` scales a row
(:class:`safealloc.formats.format.ScaleFormat`). Tensor cores read them in tiles, which are the same in each format. Inside
a tile, ``row = outer * inner_rows + inner`` lies at byte ``(inner * outer_rows + outer) * 4 + col``, and tiles follow each
other row by row:

- 128x4, 32 inner and 4 outer rows: the block scaling layout of cuBLAS and CUTLASS ("1D block scaling factors layout" in the
  cuBLAS documentation, "scale factor layout" in CUTLASS's Blackwell notes); 512 bytes a tile.
- 8x4, 8 inner rows: the layout of TensorRT-LLM's low-latency GEMMs (FlashInfer's ``SfLayout.layout_8x4``); 32 bytes a tile.
- linear: one byte a tile, which is the plain row-major matrix.

Rows round up to whole tiles and so do columns. What lies in a tile and is no scale of the matrix is padding.
"""

from __future__ import annotations

import enum
from typing import NamedTuple

import torch
from torch import Tensor

from safealloc.formats.format import ScaleFormat, checked_format

MAX_ROWS_8X4 = 32
"""Rows up to which vLLM and TensorRT-LLM take 8x4 for their low-latency GEMMs (vLLM's ``scaled_fp4_quant``)."""

MAX_SCALES = 2**40 - 1
"""The most scales that a matrix may have. 1 TiB of them is more than any device holds, so more is a mistake of the caller."""


class Tile(NamedTuple):
    """Rows (inner, outer) and columns of one tile."""

    inner_rows: int
    outer_rows: int
    cols: int

    @property
    def rows(self) -> int:
        return self.inner_rows * self.outer_rows


class SfLayout(enum.IntEnum):
    """Order of the scale bytes of one matrix; names and values are FlashInfer's."""

    layout_128x4 = 0
    layout_8x4 = 1
    layout_linear = 2

    @property
    def tile(self) -> Tile:
        return _TILES[self]

    def padded_shape(
        self, rows: int, k: int, *, padded_k: int | None = None, format: ScaleFormat = ScaleFormat.nvfp4
    ) -> tuple[int, int]:
        """``(padded_rows, padded_cols)``: rows and columns in scale bytes that a ``[rows, k]`` matrix occupies.

        Args:
            rows: rows of the matrix, at least 1.
            k: columns of the matrix in elements, a positive multiple of the format's block size.
            padded_k: columns that the consumer was padded to, at least ``k`` and such a multiple; ``None`` is ``k``.
            format: of the scales.

        Raises:
            TypeError: an argument is of the wrong type.
            ValueError: an argument is out of range, or the matrix has more than :data:`MAX_SCALES` scales.
        """
        rows, k, padded_k = checked_shape(rows, k, padded_k, format)
        return self.round_up(rows, (k if padded_k is None else padded_k) // format.block_size)

    def round_up(self, rows: int, cols: int) -> tuple[int, int]:
        """Rows and scale columns rounded up to whole tiles; unchecked, and they may be symbolic."""
        tile = self.tile
        return -(-rows // tile.rows) * tile.rows, -(-cols // tile.cols) * tile.cols

    def grouped_rows(self, rows: int, experts: int) -> int:
        """Scale rows for ``rows`` rows grouped by expert in the worst case; each group starts at a tile of its own.

        A group of ``c`` rows takes ``tile * ceil(c / tile)`` (vLLM's ``compute_expert_blockscale_offsets``), so at most
        ``tile - 1`` are padding in each group that has a row, of which there are ``min(experts, rows)`` at most. All groups
        are whole tiles, so the sum ``rows + (tile - 1) * min(experts, rows)`` rounds down to them; groups that each have one
        row more than whole tiles need that many. (vLLM's PR 37626 has the sum with ``experts`` in place of the minimum.)

        Args:
            rows: rows of all groups, tokens times experts per token; unchecked, and they may be symbolic.
            experts: number of groups.
        """
        tile = self.tile.rows
        groups: int = torch.sym_min(experts, rows)
        return (rows + (tile - 1) * groups) // tile * tile

    def nbytes(self, rows: int, k: int, *, padded_k: int | None = None, format: ScaleFormat = ScaleFormat.nvfp4) -> int:
        """Bytes of the whole buffer, padding included."""
        padded_rows, padded_cols = self.padded_shape(rows, k, padded_k=padded_k, format=format)
        return padded_rows * padded_cols

    def offsets(
        self,
        rows: int,
        k: int,
        device: torch.device | str | None = None,
        *,
        padded_k: int | None = None,
        format: ScaleFormat = ScaleFormat.nvfp4,
    ) -> Tensor:
        """Byte offset in the flat buffer of each valid scale, int64 ``[rows, k // block_size]``."""
        padded_rows, padded_cols = self.padded_shape(rows, k, padded_k=padded_k, format=format)
        flat = torch.arange(padded_rows * padded_cols, dtype=torch.int64, device=device)
        logical = self._tiles(flat, padded_rows, padded_cols).reshape(padded_rows, padded_cols)
        return logical[:rows, : k // format.block_size].contiguous()

    def padding_mask(
        self,
        rows: int,
        k: int,
        device: torch.device | str | None = None,
        *,
        padded_k: int | None = None,
        format: ScaleFormat = ScaleFormat.nvfp4,
    ) -> Tensor:
        """Bool ``[padded_rows * padded_cols]``, True where no valid scale lies."""
        mask = torch.zeros(self.nbytes(rows, k, padded_k=padded_k, format=format), dtype=torch.bool, device=device)
        for padding in self.padding_views(mask, rows, k, padded_k=padded_k, format=format):
            padding.fill_(True)
        return mask

    def padding_views(
        self,
        buffer: Tensor,
        rows: int,
        k: int,
        *,
        padded_k: int | None = None,
        format: ScaleFormat = ScaleFormat.nvfp4,
    ) -> list[Tensor]:
        """At most four strided views that together are the padding of ``buffer``; a byte may lie in two of them.

        Args:
            buffer: contiguous, ``padded_rows * padded_cols`` elements of any dtype.
            rows, k, padded_k, format: the matrix, as in :meth:`padded_shape`.
        """
        padded_rows, padded_cols = self.padded_shape(rows, k, padded_k=padded_k, format=format)
        tile = self.tile
        tiles = self._tiles(buffer, padded_rows, padded_cols)  # [row tile, outer, inner, column tile, column]
        last, row = divmod(rows, tile.rows)
        outer, inner = divmod(row, tile.inner_rows)
        column_tile, column = divmod(k // format.block_size, tile.cols)
        views = []
        if row:  # the last tile has padding rows: the rest of one outer group, then the groups below it
            views += [tiles[last, outer, inner:], tiles[last, outer + 1 :]]
        if column:
            views.append(tiles[:, :, :, column_tile, column:])
            column_tile += 1
        views.append(tiles[:, :, :, column_tile:])  # whole tiles of padding, where padded_k is beyond k
        return [view for view in views if view.numel()]

    def swizzle(self, linear: Tensor, *, format: ScaleFormat = ScaleFormat.nvfp4) -> Tensor:
        """The ``[rows, cols]`` scales as one buffer of this layout, padding zero; the bytes are the same in each format.

        Args:
            linear: ``[rows, cols]``, uint8 or a one-byte view of it such as float8_e4m3fn.
            format: of the scales.

        Returns:
            uint8 ``[padded_rows, padded_cols]``.
        """
        linear = _as_bytes(linear, "linear")
        if linear.ndim != 2:
            raise ValueError(f"linear must be [rows, cols], got shape {tuple(linear.shape)}")
        rows, cols = linear.shape
        padded_rows, padded_cols = self.padded_shape(rows, cols * format.block_size, format=format)
        logical = linear.new_zeros(padded_rows, padded_cols)
        logical[:rows, :cols] = linear
        buffer = torch.empty_like(logical)
        tiles = self._tiles(buffer, padded_rows, padded_cols)
        tiles.copy_(logical.view(tiles.shape))
        return buffer

    def unswizzle(
        self,
        buffer: Tensor,
        rows: int,
        k: int,
        *,
        padded_k: int | None = None,
        format: ScaleFormat = ScaleFormat.nvfp4,
    ) -> Tensor:
        """The valid scales of a buffer as uint8 ``[rows, k // block_size]``, the inverse of :meth:`swizzle`.

        Raises:
            ValueError: ``buffer`` is not contiguous or not of this layout's size.
        """
        logical = self.logical(buffer, rows, k, padded_k=padded_k, format=format)
        return logical[:rows, : k // format.block_size].contiguous()

    def logical(
        self,
        buffer: Tensor,
        rows: int,
        k: int,
        *,
        padded_k: int | None = None,
        format: ScaleFormat = ScaleFormat.nvfp4,
    ) -> Tensor:
        """All bytes of a buffer in matrix order, padding included: uint8 ``[padded_rows, padded_cols]``, a copy."""
        padded_rows, padded_cols = self.padded_shape(rows, k, padded_k=padded_k, format=format)
        buffer = _as_bytes(buffer, "buffer")
        if not buffer.is_contiguous() or buffer.numel() != padded_rows * padded_cols:
            raise ValueError(
                f"a {self.name} buffer for rows={rows}, k={k} is {padded_rows * padded_cols} contiguous bytes, "
                f"got shape {tuple(buffer.shape)} with strides {buffer.stride()}"
            )
        tiles = self._tiles(buffer, padded_rows, padded_cols)
        # Not reshape(), which does not copy where a buffer is one tile wide.
        return tiles.clone(memory_format=torch.contiguous_format).view(padded_rows, padded_cols)

    def _tiles(self, buffer: Tensor, padded_rows: int, padded_cols: int) -> Tensor:
        """The buffer as a view ``[row tile, outer, inner, column tile, column]``, which is matrix order."""
        tile = self.tile
        stored = (padded_rows // tile.rows, padded_cols // tile.cols, tile.inner_rows, tile.outer_rows, tile.cols)
        return buffer.view(stored).permute(0, 3, 2, 1, 4)


_TILES = {
    SfLayout.layout_128x4: Tile(inner_rows=32, outer_rows=4, cols=4),
    SfLayout.layout_8x4: Tile(inner_rows=8, outer_rows=1, cols=4),
    SfLayout.layout_linear: Tile(inner_rows=1, outer_rows=1, cols=1),
}


def short(layout: SfLayout) -> str:
    """``"128x4"`` for layout_128x4."""
    return layout.name.removeprefix("layout_")


def checked_layout(layout: SfLayout | int) -> SfLayout:
    """``layout`` as an :class:`SfLayout`; FlashInfer's enum of the same values is accepted.

    Raises:
        TypeError: not an integer or an enum of integers.
        ValueError: no such layout.
    """
    if type(layout) is SfLayout:
        return layout
    value = getattr(layout, "value", layout)
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"layout must be an SfLayout, got {layout!r}")
    try:
        return SfLayout(value)
    except ValueError:
        names = ", ".join(f"{member.name}={member.value}" for member in SfLayout)
        raise ValueError(f"layout must be one of {names}, got {layout!r}") from None


def checked_shape(
    rows: int, k: int, padded_k: int | None, format: ScaleFormat = ScaleFormat.nvfp4
) -> tuple[int, int, int | None]:
    """Rows and columns of a matrix as integers.

    Raises:
        TypeError, ValueError: see :meth:`SfLayout.padded_shape`.
    """
    rows, k = checked_integer(rows, "rows"), checked_integer(k, "k")
    block_size = checked_format(format).block_size
    if rows < 1:
        raise ValueError(f"rows must be at least 1, got {rows}")
    if k < block_size or k % block_size:
        raise ValueError(f"k must be a positive multiple of {block_size}, got {k}")
    if padded_k is not None:
        padded_k = checked_integer(padded_k, "padded_k")
        if padded_k < k or padded_k % block_size:
            raise ValueError(f"padded_k must be a multiple of {block_size} and at least k={k}, got {padded_k}")
    columns = k if padded_k is None else padded_k
    scales = rows * columns // block_size
    if scales > MAX_SCALES:
        name = "k" if padded_k is None else "padded_k"
        raise ValueError(
            f"rows={rows} with {name}={columns} need {scales} scale bytes, and no device holds 1 TiB of them"
        )
    return rows, k, padded_k


def checked_integer(value: int, name: str) -> int:
    """``value`` as an ``int``; raises TypeError."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    return int(value.__index__())


def _as_bytes(tensor: Tensor, name: str) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.element_size() != 1:
        raise ValueError(f"{name} must hold bytes (uint8, float8_e4m3fn or float8_e8m0fnu), got {tensor.dtype}")
    return tensor.view(torch.uint8)

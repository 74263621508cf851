"""The numbers of the block-scaled formats: what a scale byte is, and how many columns share one."""

from __future__ import annotations

import enum

import torch

BLOCK_SIZE = 16
"""Columns that share one scale in NVFP4."""


class ScaleFormat(enum.Enum):
    """What the scales of a matrix are. A scale of each format is one byte, and a padding byte is zero in each.

    NVFP4 scales of k columns take as many bytes as MX scales of ``2 * k``, so a size does not tell them apart.

    Attributes:
        block_size: columns that share one scale.
        dtype: of a scale.
        nan_bytes: the scale bytes that are NaN.
    """

    block_size: int
    dtype: torch.dtype
    nan_bytes: tuple[int, ...]

    nvfp4 = "nvfp4", BLOCK_SIZE, torch.float8_e4m3fn, (0x7F, 0xFF)
    mxfp8 = "mxfp8", 32, torch.float8_e8m0fnu, (0xFF,)
    mxfp4 = "mxfp4", 32, torch.float8_e8m0fnu, (0xFF,)

    def __new__(cls, value: str, block_size: int, dtype: torch.dtype, nan_bytes: tuple[int, ...]) -> ScaleFormat:
        member = object.__new__(cls)
        member._value_ = value
        member.block_size, member.dtype, member.nan_bytes = block_size, dtype, nan_bytes
        return member

    __hash__ = object.__hash__  # Enum's own is a Python function, and each acquire hashes a format

    @property
    def values_per_byte(self) -> int:
        """Of the data: 2 of FP4, 1 of FP8."""
        return 1 if self is ScaleFormat.mxfp8 else 2

    def data_shape(self, rows: int, k: int) -> tuple[int, int]:
        """Shape in bytes of the data of a ``[rows, k]`` matrix; unchecked, and the numbers may be symbolic."""
        return rows, k // self.values_per_byte


def checked_format(format: ScaleFormat) -> ScaleFormat:
    """``format``; raises TypeError if it is no :class:`ScaleFormat`."""
    if type(format) is not ScaleFormat:
        raise TypeError(f"format must be a ScaleFormat, got {format!r}")
    return format


E2M1_MAX = 6.0
"""The largest FP4 value."""

E4M3_MAX = 448.0
"""The largest e4m3 value, which NVFP4's scales and MXFP8's data are."""

NAN_SCALE = 0x7F
"""NaN as an NVFP4 scale byte."""

"""The numbers of the NVFP4 format: e2m1 values, one e4m3 scale for each block of 16 columns."""

from __future__ import annotations

BLOCK_SIZE = 16
"""Columns that share one scale."""

MX_BLOCK_SIZE = 32
"""Columns that share one scale in MXFP4, whose scales lie in the same layouts."""


def nvfp4_k(k: int, block_size: int) -> int:
    """Columns of an NVFP4 matrix with as many scales a row as ``k`` columns have in blocks of ``block_size``.

    Layouts know scale columns only, so that its buffers are those of the other format.
    """
    return k // block_size * BLOCK_SIZE


E2M1_MAX = 6.0
"""The largest data value."""

E4M3_MAX = 448.0
"""The largest scale."""

NAN_SCALE = 0x7F
"""NaN as a scale byte (e4m3)."""

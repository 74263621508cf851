"""The numbers of the NVFP4 format: e2m1 values, one e4m3 scale for each block of 16 columns."""

from __future__ import annotations

BLOCK_SIZE = 16
"""Columns that share one scale."""

E2M1_MAX = 6.0
"""The largest data value."""

E4M3_MAX = 448.0
"""The largest scale."""

NAN_SCALE = 0x7F
"""NaN as a scale byte (e4m3)."""

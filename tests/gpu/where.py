"""Where tests of Triton kernels run: on a GPU, or with TRITON_INTERPRET=1 in Triton's interpreter on the CPU."""

from __future__ import annotations

import os

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
MARKS = [] if INTERPRETED else [pytest.mark.gpu]

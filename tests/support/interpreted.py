"""Programs whose Triton kernels run on the CPU, in Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys


def printed_lines(program: str) -> list[str]:
    """What a program prints, in a process of its own: TRITON_INTERPRET must be set before Triton is imported."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()

"""compute-sanitizer finds no uninitialized read, no access out of bounds and no race in our kernels."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SANITIZER = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
PROGRAM = Path(__file__).with_name("sanitizer_program.py")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(SANITIZER is None, reason="compute-sanitizer is part of the CUDA toolkit, which is not here"),
]


def errors(tool: str, what: str, *options: str) -> int:
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    result = subprocess.run(
        [SANITIZER, "--tool", tool, *options, sys.executable, str(PROGRAM), what],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)", result.stdout)
    assert summary, result.stdout[-2000:] + result.stderr[-2000:]
    return sum(map(int, summary))


def test_initcheck_sees_the_gemm_read_stale_padding_of_an_empty_buffer():
    assert errors("initcheck", "empty") > 0


def test_initcheck_finds_nothing_over_a_pool_buffer():
    assert errors("initcheck", "pool") == 0


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_all_kernels_are_clean(tool):
    assert errors(tool, "kernels") == 0

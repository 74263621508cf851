"""The Triton kernels on the CPU, in Triton's interpreter: the tests of tests/gpu over smaller shapes.

TRITON_INTERPRET must be set before triton is imported, so each class runs in a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "gpu"
CLASSES = {
    "TestLayout": "test_kernels.py",
    "TestQuantize": "test_kernels.py",
    "TestZeroPadding": "test_kernels.py",
    "TestInKernel": "test_kernels.py",
    "TestMm": "test_gemm_kernel.py",
    "TestGrouped": "test_grouped_kernels.py",
    "TestGuard": "test_guard_kernels.py",
}


@pytest.fixture(scope="module")
def processes() -> Iterator[dict[str, subprocess.Popen[str]]]:
    """All classes at once: they share nothing."""
    pytest.importorskip("triton", reason="the Triton kernels need triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    options = ("-q", "--tb=short", "--color=no", "-p", "no:cacheprovider", "-W", "ignore::RuntimeWarning")
    started = {
        name: subprocess.Popen(
            [sys.executable, "-m", "pytest", *options, f"{FOLDER / CLASSES[name]}::{name}"],
            cwd=FOLDER.parents[1],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for name in CLASSES
    }
    yield started
    for process in started.values():
        process.kill()
        process.wait()


@pytest.mark.parametrize("name", CLASSES)
def test_in_the_interpreter(name: str, processes: dict[str, subprocess.Popen[str]]) -> None:
    output, _ = processes[name].communicate(timeout=600)
    if processes[name].returncode:
        pytest.fail(f"{name} of {CLASSES[name]} with TRITON_INTERPRET=1:\n{output}", pytrace=False)
    if " passed" not in output:
        pytest.skip(output.strip().splitlines()[-2])  # the reason, from pytest's summary

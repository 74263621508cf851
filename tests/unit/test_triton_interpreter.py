"""The Triton kernels on the CPU, in Triton's interpreter: the tests of tests/gpu over smaller shapes.

TRITON_INTERPRET must be set before triton is imported, so they run in processes of their own.
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
    "TestGolden": "test_golden.py",
    "TestVendorArithmetic": "test_golden.py",
    "TestGuard": "test_guard_kernels.py",
}
ONE_OF_EACH = (
    "test_kernels.py::TestLayout::test_offsets_beyond_32_bits",
    "test_kernels.py::TestQuantize::test_unaligned_input",
    "test_kernels.py::TestZeroPadding::test_unaligned_buffer",
    "test_gemm_kernel.py::TestMm::test_nan_in_valid_scales_of_zero_data[layout_8x4]",
    "test_grouped_kernels.py::TestGrouped::test_without_a_record_nothing_is_cleaned",
    "test_golden.py::TestVendorArithmetic::test_shapes[32-0-bfloat16-silu_and_mul-flashinfer]",
    "test_guard_kernels.py::TestGuard::test_the_first_and_the_last_padding_byte[layout_8x4-padded]",
    "test_mx_kernels.py::TestMx::test_a_few_values_in_random_company",
    "test_mx_kernels.py::TestMx::test_pytorch_gives_the_same_bits_for_normal_values",
)


def interpreted(*tests: str) -> subprocess.Popen[str]:
    """A process of pytest over tests of ``FOLDER``, slow ones too, whose Triton interprets."""
    options = ("-q", "--tb=short", "--color=no", "-m", "slow or not slow", "-p", "no:cacheprovider")
    return subprocess.Popen(
        [sys.executable, "-m", "pytest", *options, "-W", "ignore::RuntimeWarning", *(f"{FOLDER}/{it}" for it in tests)],
        cwd=FOLDER.parents[1],
        env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def check(process: subprocess.Popen[str], what: str) -> None:
    output, _ = process.communicate(timeout=600)
    if process.returncode:
        pytest.fail(f"{what} with TRITON_INTERPRET=1:\n{output}", pytrace=False)
    if " passed" not in output:
        pytest.skip(output.strip().splitlines()[-2])  # the reason, from pytest's summary


@pytest.fixture(scope="module")
def processes() -> Iterator[dict[str, subprocess.Popen[str]]]:
    """All classes at once: they share nothing."""
    pytest.importorskip("triton", reason="the Triton kernels need triton")
    started = {name: interpreted(f"{file}::{name}") for name, file in CLASSES.items()}
    yield started
    for process in started.values():
        process.kill()
        process.wait()


@pytest.mark.slow
@pytest.mark.parametrize("name", CLASSES)
def test_every_shape(name: str, processes: dict[str, subprocess.Popen[str]]) -> None:
    check(processes[name], f"{name} of {CLASSES[name]}")


def test_one_shape_of_each_kernel() -> None:
    pytest.importorskip("triton", reason="the Triton kernels need triton")
    check(interpreted(*ONE_OF_EACH), "one test of each kernel")

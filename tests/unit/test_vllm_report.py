"""What the plugin tells vLLM's log."""

from __future__ import annotations

import logging
import threading
from collections import Counter

import pytest
import torch

from safealloc.errors import PoolExhaustedError
from safealloc.integrations.vllm.report import FailureLog, ready_line

END = "; sites without a hook are not counted, see safealloc doctor"


def line(version="0.33.0", capability=(10, 0), served=0, not_served=None):
    return ready_line(3, version, capability, served, Counter(not_served or {}), 102, 31_562_137, 0, 35)


def test_the_line_has_what_is_served_and_what_is_not():
    served = Counter({"scaled_fp4_quant": 64, "SiLU + FP4, pass": 32, "all-reduce + RMSNorm + FP4": 32})
    assert line(served=served, not_served={"no rows": 8, "pool error": 32}) == (
        "safealloc: rank 3: serves 128 of 168 hooked scale sites per step, in 35 captures "
        "(102 buffers, 30.1 MiB, 0 fallbacks); safety behind producers that zero no padding (64), no time saved; "
        "not served: no rows (8), pool error (32)" + END
    )


@pytest.mark.parametrize(
    ("version", "capability", "served", "meaning"),
    [
        ("0.33.0", (10, 0), {"scaled_fp4_quant": 64}, "no time saved"),
        ("0.33.0", (12, 0), {"SiLU + FP4, pass": 1}, "safety behind producers that zero no padding (1), no time saved"),
        ("0.28.0", (10, 0), {"scaled_fp4_quant": 64, "SiLU + FP4, pass": 32}, "saves fills (96)"),
        (
            "0.28.0",
            (12, 0),
            {"scaled_fp4_quant": 1, "NVFP4 expert quantizers": 2},
            "safety behind producers that zero no padding (2), saves fills (1)",
        ),
        ("0.33.0", (10, 0), {"something else": 5}, "no time saved, not known elsewhere (5)"),
        ("0.28.0", (10, 0), 96, "saves fills (up to 96)"),
        ("0.33.0", (10, 0), 96, "safety behind fused producers, no time saved"),
        ("0.22.1", (10, 0), 96, "safety: nobody else zeroes padding in vLLM 0.22.1, no time saved"),
        ("0.34.0", (10, 0), 96, "what that changes in vLLM 0.34.0 is not known, it was not read"),
        ("dev", (10, 0), 96, "what that changes in vLLM dev is not known, it was not read"),
        ("0.33.0", (9, 0), 0, "nothing changes: vLLM has no NVFP4 kernels for compute capability 9.0"),
        ("0.33.0", (10, 0), 0, "nothing changes"),
        ("0.33.0", None, {"scaled_fp4_quant": 0}, "nothing changes"),
    ],
)
def test_what_it_means_depends_on_release_gpu_and_sites(version, capability, served, meaning):
    text = line(version, capability, served)
    assert f"0 fallbacks); {meaning}; not served: none{END}" in text
    assert "\n" not in text


@pytest.fixture
def logged(caplog):
    logger = logging.getLogger("safealloc.test_report")
    with caplog.at_level(logging.DEBUG, logger.name):
        yield logger, caplog


def test_each_kind_of_failure_is_logged_once(logged):
    logger, caplog = logged
    failures = FailureLog()
    assert failures.log(logger, "while reserving", PoolExhaustedError("a"))
    assert not failures.log(logger, "while reserving", PoolExhaustedError("b"))
    assert failures.log(logger, "while acquiring", PoolExhaustedError("c"))
    assert failures.log(logger, "while reserving", TypeError("d"))
    assert caplog.messages == [
        "safealloc: pool error while reserving; further errors of this kind are not logged: PoolExhaustedError: a",
        "safealloc: pool error while acquiring; further errors of this kind are not logged: PoolExhaustedError: c",
        "safealloc: unexpected error while reserving; further errors of this kind are not logged: TypeError: d",
    ]
    assert {record.levelname for record in caplog.records} == {"ERROR"}


@pytest.mark.parametrize(
    ("error", "called"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), "the GPU is out of memory"),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), "a CUDA error, perhaps of an earlier"),
        (RuntimeError("boom"), "unexpected error"),
        (ValueError("CUDA error: in a text"), "unexpected error"),
    ],
)
def test_only_errors_of_the_pool_are_called_so(logged, error, called):
    logger, caplog = logged
    FailureLog().log(logger, "while acquiring", error)
    assert called in caplog.text
    assert "pool error" not in caplog.text


@pytest.mark.skipif(not hasattr(torch, "AcceleratorError"), reason="this torch has no AcceleratorError")
def test_an_accelerator_error_is_a_cuda_error(logged):
    logger, caplog = logged
    FailureLog().log(logger, "while acquiring", torch.AcceleratorError("device-side assert", 710))
    assert "a CUDA error" in caplog.text


def test_threads_log_a_kind_once(logged):
    logger, caplog = logged
    failures, start = FailureLog(), threading.Barrier(8)

    def fail():
        start.wait()
        failures.log(logger, "while acquiring", RuntimeError("boom"))

    threads = [threading.Thread(target=fail) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(caplog.messages) == 1

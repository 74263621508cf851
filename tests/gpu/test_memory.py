"""Memory that is not the pool's alone, and allocators of other kinds: each works, or is refused when a pool is made."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.gpu
PROGRAM = Path(__file__).with_name("memory_program.py")
EXPANDABLE = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
MALLOC_ASYNC = {"PYTORCH_CUDA_ALLOC_CONF": "backend:cudaMallocAsync"}
NO_CACHING = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}


def run(part: str, **environment: str) -> subprocess.CompletedProcess[str]:
    removed = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "PYTORCH_NO_CUDA_MEMORY_CACHING")
    inherited = {name: value for name, value in os.environ.items() if name not in removed}
    command = [sys.executable, str(PROGRAM), part]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env={**inherited, **environment})
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.parametrize(
    "environment",
    [
        {},
        EXPANDABLE,
        NO_CACHING,
        {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:21,garbage_collection_threshold:0.5"},
        {"PYTORCH_CUDA_ALLOC_CONF": "graph_capture_record_stream_reuse:True"},
    ],
    ids=["default", "expandable segments", "no caching", "split", "record stream reuse"],
)
def test_the_whole_life_of_a_buffer(environment: dict[str, str]) -> None:
    assert run("life", **environment).stdout.split() == ["OK"]


@pytest.mark.parametrize(
    ("part", "environment", "reason"),
    [("life", MALLOC_ASYNC, "this process has 'cudaMallocAsync'"), ("pluggable", {}, "this process has 'pluggable'")],
    ids=["cudaMallocAsync", "pluggable"],
)
def test_an_allocator_without_private_memory_pools_is_refused_when_a_pool_is_made(
    part: str, environment: dict[str, str], reason: str
) -> None:
    refusal = run(part, **environment).stdout
    assert refusal.startswith("REFUSED a pool needs PyTorch's native CUDA allocator")
    assert reason in refusal


@pytest.mark.parametrize(
    ("part", "environment"),
    [("shared", {}), ("sent_to_nobody", {}), ("sent_to_nobody", EXPANDABLE)],
    ids=["another process writes it", "made ready to be sent", "in an expandable segment"],
)
def test_what_a_holder_sends_to_another_process_is_not_handed_out_again(part: str, environment: dict[str, str]) -> None:
    done = run(part, **environment)
    assert done.stdout.split() == ["OK"]
    assert "a holder resized, moved or shared the memory of a buffer, which is not used again" in done.stderr

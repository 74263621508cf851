"""Little memory, whatever the machine has."""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Iterator
from pathlib import Path

import torch


@contextlib.contextmanager
def memory_limit(more: int) -> Iterator[None]:
    """Inside, the process gets at most so many more bytes of memory; how much the machine has does not matter."""
    before, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + more, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (before, hard))


@contextlib.contextmanager
def device_memory_limit(more: int) -> Iterator[None]:
    """Inside, PyTorch gets at most so many more bytes of the device; other processes are not disturbed."""
    torch.cuda.empty_cache()
    _, total = torch.cuda.mem_get_info()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + more) / total)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)

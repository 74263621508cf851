"""The process that an integration runs in: CUDA captures, the device, and methods of single objects."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from safealloc.pool import driver


def capturing() -> bool:
    """Whether the current stream is capturing a CUDA graph."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def capability(device: torch.device) -> tuple[int, int] | None:
    """Compute capability of a CUDA device; ``None`` elsewhere."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" and torch.version.hip is None else None


def capture_under_way() -> Any:
    """The capture that the current stream is in, or ``None``."""
    return driver.under_way(torch.cuda.current_stream().cuda_stream) if torch.cuda.is_initialized() else None


@contextlib.contextmanager
def around(holder: Any, name: str, replacement: Callable[..., Any]) -> Iterator[None]:
    """Inside, calls of a method of one object become ``replacement(method, *given, **named)``."""
    method, own = getattr(holder, name), vars(holder).get(name)
    setattr(holder, name, lambda *given, **named: replacement(method, *given, **named))
    try:
        yield
    finally:
        if own is None:
            delattr(holder, name)
        else:
            setattr(holder, name, own)

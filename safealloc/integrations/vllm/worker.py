"""What the plugin reads of the vLLM worker that it runs in; it imports nothing of vLLM for that."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch

from safealloc.pool import driver

# Below vLLM's logger, whose handlers and level the user has configured; a logger of our own would print nothing.
logger = logging.getLogger("vllm.safealloc")


def forward_context() -> Any:
    """The forward context of vLLM, which is set while a model runs, or ``None``."""
    module = sys.modules.get("vllm.forward_context")
    return None if module is None else module._forward_context


def step_under_way() -> Any:
    """What tells one captured step from another: the forward context, or outside of one, as for encoders, the capture."""
    context = forward_context()
    if context is None and torch.cuda.is_initialized():
        context = driver.under_way(torch.cuda.current_stream().cuda_stream)
    return context


def capturing() -> bool:
    """Whether the current stream is capturing a CUDA graph."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def capability(device: torch.device) -> tuple[int, int] | None:
    """Compute capability of a CUDA device; ``None`` elsewhere."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" and torch.version.hip is None else None


def query_length(worker: Any) -> int:
    """Tokens of a request in a decode step, ``num_speculative_tokens + 1``."""
    runner = worker.model_runner
    known = getattr(runner, "decode_query_len", None) or getattr(runner, "uniform_decode_query_len", None)
    speculative = getattr(worker.vllm_config, "speculative_config", None)
    return int(known or 1 + (getattr(speculative, "num_speculative_tokens", 0) or 0))


def is_second_runner(worker: Any) -> bool:
    """Whether the worker has model runner V2."""
    return type(worker.model_runner).__module__.startswith("vllm.v1.worker.gpu.")


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

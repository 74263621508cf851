"""What the plugin reads of the vLLM worker that it runs in; it imports nothing of vLLM for that."""

from __future__ import annotations

import logging
import sys
from typing import Any

from safealloc.integrations.host import capture_under_way

# Below vLLM's logger, whose handlers and level the user has configured; a logger of our own would print nothing.
logger = logging.getLogger("vllm.safealloc")


def forward_context() -> Any:
    """The forward context of vLLM, which is set while a model runs, or ``None``."""
    module = sys.modules.get("vllm.forward_context")
    return None if module is None else module._forward_context


def step_under_way() -> Any:
    """What tells one captured step from another: the forward context, or outside of one, as for encoders, the capture."""
    context = forward_context()
    return capture_under_way() if context is None else context


def query_length(worker: Any) -> int:
    """Tokens of a request in a decode step, ``num_speculative_tokens + 1``."""
    runner = worker.model_runner
    known = getattr(runner, "decode_query_len", None) or getattr(runner, "uniform_decode_query_len", None)
    speculative = getattr(worker.vllm_config, "speculative_config", None)
    return int(known or 1 + (getattr(speculative, "num_speculative_tokens", 0) or 0))


def is_second_runner(worker: Any) -> bool:
    """Whether the worker has model runner V2."""
    return type(worker.model_runner).__module__.startswith("vllm.v1.worker.gpu.")

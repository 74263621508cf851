"""The engine of a vLLM worker, and what it captures."""

from __future__ import annotations

from typing import Any

from safealloc.integrations import startup
from safealloc.integrations.startup import Steps
from safealloc.integrations.vllm.sizes import captured_rows
from safealloc.integrations.vllm.worker import step_under_way


class Engine(startup.Engine):
    """As every framework's; a forward context of vLLM's is one step."""

    step_under_way = staticmethod(step_under_way)


def captured_steps(vllm_config: Any, query: int = 1, *, second_runner: bool = False) -> Steps:
    """What an engine captures.

    Args:
        vllm_config: a ``VllmConfig``.
        query: tokens of a request in a decode step, ``num_speculative_tokens + 1``.
        second_runner: model runner V2, whose rules differ.
    """
    parallel = vllm_config.parallel_config
    rows = captured_rows(vllm_config, query, second_runner=second_runner)
    copies = dict.fromkeys(rows, 1)
    if getattr(parallel, "use_ubatching", False) or getattr(parallel, "enable_dbo", False):
        parts = max(2, getattr(parallel, "num_ubatches", 2) or 2)
        least = getattr(parallel, "dbo_decode_token_threshold", parts)
        for size in [size for size in rows if size >= max(parts, least)]:
            copies |= {size // parts: parts, size - (parts - 1) * (size // parts): parts}
    return Steps(dict(sorted(copies.items())), getattr(parallel, "data_parallel_size", 1))

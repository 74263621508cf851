"""What the plugin reads of the vLLM worker that it runs in; it imports nothing of vLLM for that."""

from __future__ import annotations

import logging
import sys
from typing import Any

# Below vLLM's logger, whose handlers and level the user has configured; a logger of our own would print nothing.
logger = logging.getLogger("vllm.safealloc")


def forward_context() -> Any:
    """The forward context of vLLM, which is set while a model runs, or ``None``."""
    module = sys.modules.get("vllm.forward_context")
    return None if module is None else module._forward_context


def workspace_locked() -> bool:
    """Whether vLLM no longer lets its own scratch memory grow; true where vLLM has no such memory."""
    module = sys.modules.get("vllm.v1.worker.workspace")
    manager = getattr(module, "_manager", None)
    return manager is None or bool(manager.is_locked())

"""What the markers need: a test whose hardware or package is not there is skipped with the reason, never silently."""

from __future__ import annotations

import importlib.util

import pytest
import torch


def _refusal(marker: str) -> str | None:
    """Why tests with this marker cannot run on this machine, or ``None``."""
    needed = (10, 0) if marker == "sm100" else (8, 9)
    wanted = f"needs a CUDA device of compute capability {needed[0]}.{needed[1]} or more"
    if not torch.cuda.is_available():
        return f"{wanted}: torch {torch.__version__} sees no CUDA device"
    capability = torch.cuda.get_device_capability()
    if capability < needed:
        return f"{wanted}: {torch.cuda.get_device_name()} has {capability[0]}.{capability[1]}"
    if marker == "vllm_engine" and importlib.util.find_spec("vllm") is None:
        return "starts the vLLM engine: vllm is not installed"
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reasons: dict[str, str | None] = {}
    for item in items:
        for marker in ("gpu", "vllm_engine", "sm100"):
            if item.get_closest_marker(marker) is None:
                continue
            if marker not in reasons:
                reasons[marker] = _refusal(marker)
            reason = reasons[marker]
            if reason is not None:
                item.add_marker(pytest.mark.skip(reason=reason))
                break

"""Whether the vLLM that the contract tests are written for is installed, without importing it."""

from __future__ import annotations

import importlib.metadata
import importlib.util

import torch

TESTED = "0.32.0"


def missing() -> str | None:
    """Why the contract tests cannot run here, or ``None``."""
    if torch.version.cuda is not None:
        return f"torch {torch.__version__} is a CUDA build, which would load vLLM's own kernels: a CPU build is needed"
    for package, distribution in (("vllm", "vllm"), ("flashinfer", "flashinfer-python")):
        try:
            version = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            return f"{distribution} is not installed"
        if importlib.util.find_spec(package) is None:
            return f"{distribution} {version} has no package {package}"
        if package == "vllm" and version != TESTED:
            return f"these are tests of vLLM {TESTED}, and {version} is installed"
    return None

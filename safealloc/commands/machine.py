"""The machine and the versions that a report's numbers depend on."""

from __future__ import annotations

import contextlib
import importlib.metadata

import torch

from safealloc import _optional
from safealloc.commands import doctor, report


def describe(device: torch.device) -> dict[str, str | None]:
    """Device, its model and, for a GPU, its compute capability and the driver."""
    found: dict[str, str | None] = {"device": str(device), "name": report.device_name(device)}
    if device.type == "cuda":
        found["compute capability"] = ".".join(map(str, torch.cuda.get_device_capability(device)))
        found["CUDA driver"] = doctor.driver().version
    return found


def versions() -> dict[str, str | None]:
    """Of every package that matters, also of one that is installed and cannot be imported; ``None``: not installed."""
    found = {**report.versions(), "CUDA": torch.version.cuda}
    for module in ("flashinfer", "vllm"):
        found[module] = None
        for distribution in doctor.PACKAGES[module]:
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                found[module] = importlib.metadata.version(distribution)
                break
        else:
            loaded = _optional.load(module)
            found[module] = None if isinstance(loaded, str) else str(getattr(loaded, "__version__", "unknown"))
    return found

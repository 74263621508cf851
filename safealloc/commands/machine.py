"""The machine and the versions that a report's numbers depend on."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import platform
import re
from pathlib import Path

import torch

from safealloc import _optional
from safealloc._version import __version__

DISTRIBUTIONS = {
    "triton": ("triton",),
    "flashinfer": ("flashinfer-python", "flashinfer"),
    "vllm": ("vllm",),
    "cuda.bindings.driver": ("cuda-bindings",),
    "matplotlib": ("matplotlib",),
}
"""Optional modules, and the distributions that have them."""


def describe(device: torch.device) -> dict[str, str | None]:
    """Device, its model and, for a GPU, its compute capability and the CUDA driver."""
    found: dict[str, str | None] = {"device": str(device), "name": device_name(device)}
    if device.type == "cuda":
        found["compute capability"] = capability(device)
        found["CUDA driver"] = driver()[0]
    return found


def versions() -> dict[str, str | None]:
    """The version of every package that numbers depend on; ``None`` where it is not there."""
    found: dict[str, str | None] = {"safealloc": __version__, "python": platform.python_version()}
    found |= {"torch": torch.__version__, "triton": installed_version("triton"), "CUDA": torch.version.cuda}
    return found | {module: installed_version(module) for module in ("flashinfer", "vllm")}


def installed_version(module: str) -> str | None:
    """Of one of :data:`DISTRIBUTIONS`, also if it cannot be imported; ``None`` where it is not installed."""
    for distribution in DISTRIBUTIONS[module]:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(distribution)
    loaded = _optional.load(module)  # from a source tree on the path
    return None if isinstance(loaded, str) else str(getattr(loaded, "__version__", "unknown"))


def device_name(device: torch.device) -> str:
    """The model of a GPU or of this machine's CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def capability(device: torch.device) -> str:
    """Compute capability of a CUDA device, such as "10.0"."""
    return ".".join(map(str, torch.cuda.get_device_capability(device)))


def driver() -> tuple[str | None, str | None]:
    """The CUDA driver's version and the CUDA version that it supports, or ``None``; and why there is none."""
    try:
        libcuda = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        return None, f"it cannot be loaded: {error}"
    number = ctypes.c_int()
    if libcuda.cuDriverGetVersion(ctypes.byref(number)):
        return None, "cuDriverGetVersion failed"
    version = f"for CUDA {number.value // 1000}.{number.value % 1000 // 10}"
    with contextlib.suppress(OSError):
        kernel_module = re.search(r"\d+\.\d+(\.\d+)?", Path("/proc/driver/nvidia/version").read_text())
        version = version if kernel_module is None else f"{kernel_module[0]}, {version}"
    return version, None

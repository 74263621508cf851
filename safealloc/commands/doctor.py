"""``safealloc doctor``: what is installed, which backends run on each device, and why the others do not."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import platform
import re
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from safealloc import ScalePool, _optional, capture
from safealloc._version import __version__
from safealloc.commands import doctor_vllm, report
from safealloc.errors import SafeAllocError
from safealloc.formats.layout import SfLayout, short
from safealloc.ops.backends import GEMMS, QUANTIZERS, Call, Table
from safealloc.ops.inductor import forbid_reuse
from safealloc.pool.driver import under_way

PACKAGES = {
    # what is used of it: its distributions
    "triton": ("triton",),
    "flashinfer": ("flashinfer-python", "flashinfer"),
    "vllm": ("vllm",),
    "cuda.bindings.driver": ("cuda-bindings",),
    "matplotlib": ("matplotlib",),
}
_DRIVER_CALLS = ("cuStreamGetCaptureInfo_v2", "cuUserObjectCreate", "cuGraphRetainUserObject")


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is there, in some version, or is not, for a reason."""

    name: str
    version: str | None
    reason: str | None


@dataclass(frozen=True, slots=True)
class BackendFinding:
    """One backend on one device.

    Attributes:
        name: as ``backend=`` takes it.
        usable: layouts it writes (a quantizer) or reads (a GEMM) here.
        auto: layouts for which "auto" takes it.
        refused: layout to why it cannot, in a sentence.
    """

    name: str
    usable: tuple[str, ...]
    auto: tuple[str, ...]
    refused: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class DeviceFinding:
    """One device.

    Attributes:
        device: as PyTorch names it.
        name: its model.
        capability: compute capability, or ``None`` for a CPU.
        quantizers, gemms: the backends; GEMMs for a bfloat16 result and one alpha.
        graph_lifetimes: why a pool cannot see there when a CUDA graph is gone, or ``None``.
    """

    device: str
    name: str
    capability: str | None
    quantizers: Sequence[BackendFinding]
    gemms: Sequence[BackendFinding]
    graph_lifetimes: str | None


@dataclass(frozen=True, slots=True)
class Result:
    """What was found.

    Attributes:
        versions: of the packages and the driver.
        devices: the CPU and every CUDA device.
        inductor: why Inductor cannot be told to leave pool buffers alone, or ``None``.
        vllm: which hooks would be registered with it, and the state of the plugin.
    """

    versions: Sequence[Finding]
    devices: Sequence[DeviceFinding]
    inductor: str | None
    vllm: doctor_vllm.VllmFinding

    def as_dict(self) -> dict[str, Any]:
        return {
            "command": "safealloc doctor",
            "versions": {found.name: {"version": found.version, "reason": found.reason} for found in self.versions},
            "devices": [asdict(device) for device in self.devices],
            "inductor": self.inductor,
            "vllm": asdict(self.vllm),
        }


def run(say: report.Say) -> Result:
    """Look; whatever a package prints when it is imported goes to standard error."""
    with contextlib.redirect_stdout(sys.stderr):
        say("packages")
        versions = _versions()
        devices = [torch.device("cpu")]
        if torch.cuda.is_available():
            devices += [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
        say("devices")
        found = [_device(device) for device in devices]
        say("Inductor")
        inductor = _inductor()
        say("vLLM")
        return Result(versions, found, inductor, doctor_vllm.look(_optional.missing("vllm")))


def show(result: Result, out: Console) -> None:
    """Print a result."""
    versions = (((found.name, found.version or "-", found.reason or ""), True) for found in result.versions)
    report.table(out, "Versions", ("", "version", "why not"), versions)
    for device in result.devices:
        capability = "" if device.capability is None else f", compute capability {device.capability}"
        title = f"{device.device}: {device.name}{capability}"
        rows = [("quantizer", found) for found in device.quantizers] + [("GEMM", found) for found in device.gemms]
        headings = ("", "backend", "layouts", "auto", "why not")
        report.table(out, title, headings, (((kind, *_cells(found)), True) for kind, found in rows))
        out.print(f"Graph lifetimes on {device.device}: {device.graph_lifetimes or 'tracked by the CUDA driver'}.\n")
    doctor_vllm.show(result.vllm, out)
    out.print(f"Inductor: {result.inductor or 'leaves pool buffers alone'}.")


def _cells(found: BackendFinding) -> tuple[str, str, str, str]:
    if found.usable:
        why = "; ".join(f"{layout}: {reason}" for layout, reason in found.refused.items())
    else:  # of several reasons the first, which is 128x4's: every backend would take that
        why = next(iter(found.refused.values()))
    auto = "yes" if found.auto == found.usable else " ".join(found.auto)
    return found.name, " ".join(found.usable) or "-", auto if found.auto else "-", why


def _versions() -> list[Finding]:
    found = [
        Finding("safealloc", __version__, None),
        Finding("python", platform.python_version(), None),
        Finding("torch", torch.__version__, None),
    ]
    cuda = torch.version.cuda
    found.append(Finding("CUDA (torch)", cuda, None if cuda else "this torch was built without CUDA"))
    found.append(driver())
    for module, distributions in PACKAGES.items():
        name = "cuda.bindings" if module.startswith("cuda.bindings") else module
        reason = _optional.missing(module)
        found.append(Finding(name, _version(name, distributions), reason))
    return found


def _version(module: str, distributions: Sequence[str]) -> str | None:
    """Also of what is installed and cannot be imported; ``None`` where nothing is installed."""
    for distribution in distributions:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(distribution)
    loaded = sys.modules.get(module)
    return None if loaded is None else str(getattr(loaded, "__version__", "unknown"))


def driver() -> Finding:
    name = "CUDA driver"
    try:
        libcuda = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        return Finding(name, None, f"it cannot be loaded: {error}")
    number = ctypes.c_int()
    if libcuda.cuDriverGetVersion(ctypes.byref(number)):
        return Finding(name, None, "cuDriverGetVersion failed")
    version = f"for CUDA {number.value // 1000}.{number.value % 1000 // 10}"
    with contextlib.suppress(OSError):
        kernel_module = re.search(r"\d+\.\d+(\.\d+)?", Path("/proc/driver/nvidia/version").read_text())
        version = version if kernel_module is None else f"{kernel_module[0]}, {version}"
    return Finding(name, version, None)


def _device(device: torch.device) -> DeviceFinding:
    capability = None
    if device.type == "cuda":
        capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
    gemm_layouts = (SfLayout.layout_128x4, SfLayout.layout_8x4)
    return DeviceFinding(
        device=str(device),
        name=report.device_name(device),
        capability=capability,
        quantizers=_backends(QUANTIZERS, [Call(device, layout) for layout in SfLayout]),
        gemms=_backends(GEMMS, [Call(device, layout, torch.bfloat16) for layout in gemm_layouts]),
        graph_lifetimes=_graph_lifetimes(device),
    )


def _backends(table: Table, calls: Sequence[Call]) -> list[BackendFinding]:
    auto = {call: table.choose("auto", call).name for call in calls}
    found = []
    for row in table.values():
        refusals = {call: row.refusal(call) for call in calls}
        found.append(
            BackendFinding(
                name=row.name,
                usable=tuple(short(call.layout) for call in calls if refusals[call] is None),
                auto=tuple(short(call.layout) for call in calls if auto[call] == row.name),
                refused={short(call.layout): reason for call, reason in refusals.items() if reason is not None},
            )
        )
    return found


def _graph_lifetimes(device: torch.device) -> str | None:
    """Capture a graph, destroy it, and see whether the driver tells."""
    if device.type != "cuda":
        return "there are no CUDA graphs on a CPU"
    try:
        libcuda = ctypes.CDLL("libcuda.so.1")
        lacking = [call for call in _DRIVER_CALLS if not hasattr(libcuda, call)]
        if lacking:
            return f"the CUDA driver lacks {', '.join(lacking)}"
        with torch.cuda.device(device), ScalePool(device) as pool:
            with capture(pool=pool) as graph:
                seen = under_way(torch.cuda.current_stream().cuda_stream)
                kept = torch.zeros(1, device=device)
            del graph, kept
            torch.cuda.synchronize()
            give_up = time.monotonic() + 2
            while seen is not None and seen.alive and time.monotonic() < give_up:
                time.sleep(0.01)
    except Exception as error:
        return f"not tracked: {type(error).__name__}: {error}"
    if seen is None or seen.alive:
        return "the CUDA driver does not tell when a graph is destroyed, so that a pool never reuses what a graph was given"
    return None


def _inductor() -> str | None:
    try:
        forbid_reuse(torch.ops.safealloc.acquire.default)
    except SafeAllocError as error:
        return str(error)
    return None

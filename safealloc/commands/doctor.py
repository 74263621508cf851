"""``safealloc doctor``: what is installed, which backends run on each device, and why the others do not."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Console

from safealloc import ScalePool, _optional, _torch, capture, settings
from safealloc.commands import doctor_sglang, doctor_vllm, machine, report
from safealloc.errors import SafeAllocError
from safealloc.formats.layout import SfLayout, short
from safealloc.ops.backends import GEMMS, QUANTIZERS, Call, Table
from safealloc.ops.inductor import forbid_reuse
from safealloc.pool.driver import under_way

SUMMARY = "what is installed, which backends and vLLM hooks work here, and why the others do not"

_DRIVER_CALLS = ("cuStreamGetCaptureInfo_v2", "cuUserObjectCreate", "cuGraphRetainUserObject")


@dataclass(frozen=True, slots=True)
class Finding:
    """A package or driver: its version, or the reason why it cannot be used, or both."""

    name: str
    version: str | None
    reason: str | None


@dataclass(frozen=True, slots=True)
class BackendFinding:
    """One backend on one device."""

    name: str  # as ``backend=`` takes it
    usable: tuple[str, ...]  # layouts it writes (a quantizer) or reads (a GEMM) here
    auto: tuple[str, ...]  # layouts for which "auto" chooses it
    refused: Mapping[str, str]  # layout to why it cannot, in a sentence


@dataclass(frozen=True, slots=True)
class DeviceFinding:
    """One device."""

    device: str  # as PyTorch names it
    name: str  # its model
    capability: str | None  # compute capability, or ``None`` for a CPU
    quantizers: Sequence[BackendFinding]
    gemms: Sequence[BackendFinding]  # for a bfloat16 result and one alpha
    graph_lifetimes: str | None  # why a pool cannot detect there that a CUDA graph is destroyed, or ``None``


@dataclass(frozen=True, slots=True)
class Result:
    """What was found."""

    versions: Sequence[Finding]  # of the packages and the driver
    settings: Sequence[tuple[str, str | None, str]]  # as of :func:`safealloc.settings.given`
    bad_settings: Mapping[str, str]  # name to the problem with its value
    devices: Sequence[DeviceFinding]  # the CPU and every CUDA device
    inductor: str | None  # why Inductor cannot be told to leave pool buffers alone, or ``None``
    vllm: doctor_vllm.VllmFinding  # which hooks would be registered with it, and the state of the plugin
    sglang: doctor_sglang.SGLangFinding  # the same of SGLang

    def as_dict(self) -> dict[str, Any]:
        return {
            "command": "safealloc doctor",
            "versions": {found.name: {"version": found.version, "reason": found.reason} for found in self.versions},
            "settings": {
                name: {"value": value, "meaning": meaning, "problem": self.bad_settings.get(name)}
                for name, value, meaning in self.settings
            },
            "devices": [asdict(device) for device in self.devices],
            "inductor": self.inductor,
            "private_torch": dict(_torch.REASONS),
            "vllm": asdict(self.vllm),
            "sglang": asdict(self.sglang),
        }


def run(progress: report.Progress) -> Result:
    """Look; whatever a package prints when it is imported goes to standard error."""
    with contextlib.redirect_stdout(sys.stderr):
        progress("packages", 0.0)
        versions = list(_versions())
        devices = [torch.device("cpu")]
        if torch.cuda.is_available():
            devices += [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
        progress("devices", 0.25)
        found = [_device(device) for device in devices]
        progress("Inductor", 0.5)
        inductor = _inductor()
        progress("vLLM", 0.75)
        vllm = doctor_vllm.look(_optional.missing("vllm"))
        return Result(versions, list(settings.given()), _bad_settings(), found, inductor, vllm, doctor_sglang.look())


def show(result: Result, out: Console) -> None:
    """Print a result."""
    versions = ((found.name, found.version or "-", found.reason or "") for found in result.versions)
    report.table(out, "Versions", ("", "version", "why not"), report.fine(versions))
    bad = result.bad_settings
    rows = (((name, value or "not set", meaning), name not in bad) for name, value, meaning in result.settings)
    report.table(out, "Settings", ("", "value", "meaning"), rows)
    for problem in bad.values():
        out.print(f"{report.one_line(problem)}.\n", style="bold red")
    for device in result.devices:
        capability = "" if device.capability is None else f", compute capability {device.capability}"
        title = f"{device.device}: {device.name}{capability}"
        kinds = {"quantizer": device.quantizers, "GEMM": device.gemms}
        backends = [(kind, *_cells(found)) for kind, those in kinds.items() for found in those]
        report.table(out, title, ("", "backend", "layouts", "auto", "why not"), report.fine(backends), names=2)
        out.print(
            'layouts: that a quantizer writes, or a GEMM reads, here. auto: for which of them backend="auto" chooses it '
            '("yes": all).'
        )
        out.print(f"Graph lifetimes on {device.device}: {device.graph_lifetimes or 'tracked by the CUDA driver'}.\n")
    doctor_vllm.show(result.vllm, out)
    doctor_sglang.show(result.sglang, out)
    out.print(f"Inductor: {result.inductor or 'leaves pool buffers alone'}.")
    for name, reason in _torch.REASONS.items():
        out.print(f"torch {torch.__version__} has no usable {name}: {reason}.")


def _cells(found: BackendFinding) -> tuple[str, str, str, str]:
    if found.usable:
        why = "; ".join(f"{layout}: {reason}" for layout, reason in found.refused.items())
    else:  # of several reasons the first, which is 128x4's: every backend would take that
        why = next(iter(found.refused.values()))
    auto = "yes" if found.auto == found.usable else " ".join(found.auto)
    return found.name, " ".join(found.usable) or "-", auto if found.auto else "-", why


def _versions() -> Iterator[Finding]:
    found = machine.versions()
    for name in ("safealloc", "python", "torch"):
        yield Finding(name, found[name], None)
    yield Finding("CUDA (torch)", found["CUDA"], None if found["CUDA"] else "this torch was built without CUDA")
    yield Finding("CUDA driver", *machine.driver())
    for module in machine.DISTRIBUTIONS:
        name = "cuda.bindings" if module == "cuda.bindings.driver" else module
        yield Finding(name, machine.installed_version(module), _optional.missing(module))


def _bad_settings() -> dict[str, str]:
    """Variables whose value has no meaning, and what follows from that."""
    problems = {}
    try:
        settings.watch()
    except ValueError as error:
        name = str(error).partition(" ")[0]
        problems[name] = f"No default pool can be made: {error}"
    return problems


def _device(device: torch.device) -> DeviceFinding:
    capability = machine.capability(device) if device.type == "cuda" else None
    quantizers = _backends(QUANTIZERS, [Call(device, layout) for layout in SfLayout])
    readable = (SfLayout.layout_128x4, SfLayout.layout_8x4)
    gemms = _backends(GEMMS, [Call(device, layout, torch.bfloat16) for layout in readable])
    name = machine.device_name(device)
    return DeviceFinding(str(device), name, capability, quantizers, gemms, _graph_lifetimes(device))


def _backends(table: Table, calls: Sequence[Call]) -> list[BackendFinding]:
    by_layout = {short(call.layout): call for call in calls}
    choices = {layout: table.choose("auto", call).name for layout, call in by_layout.items()}
    found = []
    for row in table.values():
        refused = {layout: reason for layout, call in by_layout.items() if (reason := row.refusal(call)) is not None}
        usable = tuple(layout for layout in by_layout if layout not in refused)
        auto = tuple(layout for layout, name in choices.items() if name == row.name)
        found.append(BackendFinding(row.name, usable, auto, refused))
    return found


def _graph_lifetimes(device: torch.device) -> str | None:
    """Capture a graph, destroy it, and see whether the driver reports that."""
    if device.type != "cuda":
        return "there are no CUDA graphs on a CPU"
    try:
        libcuda = ctypes.CDLL("libcuda.so.1")
        missing = [call for call in _DRIVER_CALLS if not hasattr(libcuda, call)]
        if missing:
            return f"the CUDA driver has no {', '.join(missing)}"
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
        return (
            "the CUDA driver does not report that a graph is destroyed, so a pool never reuses what a graph was given"
        )
    return None


def _inductor() -> str | None:
    try:
        forbid_reuse(torch.ops.safealloc.acquire.default)
    except SafeAllocError as error:
        return str(error)
    return None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """There are none."""


def main(given: argparse.Namespace) -> int:
    """Look and print; exit code 0, whatever is found."""
    report.check_writable(given.json)
    with report.progress("doctor") as progress:
        result = run(progress)
    report.deliver(given.json, result.as_dict(), lambda out: show(result, out))
    return 0

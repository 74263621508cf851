"""What ``safealloc doctor`` reports on vLLM, whose sources are read, not imported: hooks, plugin and linear kernel."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from rich.console import Console

from safealloc import _optional, settings
from safealloc.commands import report
from safealloc.integrations import drift
from safealloc.integrations.sites import family
from safealloc.integrations.vllm import kernel, plugin, sites, targets

_BY_OPTION, _NEVER = "by option", "never"
_GROUP, _NAME, _ENTRY_POINT = "vllm.general_plugins", "safealloc", "safealloc.integrations.vllm.plugin:load"


@dataclass(frozen=True, slots=True)
class HookFinding:
    """One hook."""

    name: str  # as in the log
    # "hooked" where it fits; "as known" where nothing is replaced, and hooks rely on it; "changed" or "missing" where
    # vLLM's own code is left alone; "not yet there" where vLLM is older than what it hooks
    status: str
    reason: str | None  # why it would not be registered although it fits, or has nothing to replace, or ``None``


@dataclass(frozen=True, slots=True)
class PaddingFinding:
    """Who zeroes padding in a vLLM without the plugin."""

    allocation: str | None  # what vLLM allocates scales with, "zeros" or "empty"; ``None`` if its function is not found
    kernel_zeroes: bool | None  # whether its sources say that its quantization kernel zeroes padding


@dataclass(frozen=True, slots=True)
class PluginFinding:
    """What decides whether vLLM's processes register the hooks."""

    entry_point: str | None  # why vLLM does not find the plugin, or ``None``
    vllm_plugins: str | None  # vLLM's variable ``VLLM_PLUGINS``, or ``None`` where it is not set
    allowed: bool  # whether that lets vLLM load the plugin
    enabled: bool  # whether ``SAFEALLOC`` leaves it on
    registered: Sequence[str] | None  # the hooks that are registered in this process, or ``None``


@dataclass(frozen=True, slots=True)
class LinearFinding:
    """The linear kernel on one CUDA device."""

    device: str  # as PyTorch names it; "cuda" where there is none
    path: str | None  # the GEMM it would run, "trtllm" or "triton", or ``None``
    reason: str | None  # why it cannot run, or why not on trtllm, or ``None``


@dataclass(frozen=True, slots=True)
class VllmFinding:
    """The installed vLLM."""

    version: str | None  # of it, or ``None``
    reason: str | None  # why it cannot be hooked, or ``None``
    note: str | None  # that its version is not one that was checked, or ``None``
    hooks: Sequence[HookFinding]  # what would be registered; empty without vLLM's sources
    padding: PaddingFinding  # who zeroes it in vLLM
    sites: Sequence[Mapping[str, str]]  # what the plugin changes here; empty where the release was not read
    plugin: PluginFinding  # the state of the plugin
    linear: Sequence[LinearFinding]  # one per CUDA device


def look(broken: str | None) -> VllmFinding:
    """Look at the installed vLLM; ``broken`` is why it cannot be imported, or ``None``."""
    version, reason, note = None, None, None
    hooks: list[HookFinding] = []
    padding = PaddingFinding(None, None)
    try:
        found = targets.installed()
        if found is None:
            reason = broken or "it is there, but its version cannot be found"
        else:
            version, source = found
            reason, note = broken, _note(version)
            hooks = [_hook(one) for one in targets.check(version, source)]
            padding = PaddingFinding(targets.own_allocation(source), targets.kernel_zeroes_padding(source))
    except Exception as error:  # an installation may be broken in any way
        reason = f"looking at its sources failed: {type(error).__name__}: {error}"
    return VllmFinding(version, reason, note, hooks, padding, _sites(version, hooks), _plugin(), _linear())


def _hook(found: drift.Finding) -> HookFinding:
    reason = found.detail or None
    if found.status == "hooked" and found.target.module == targets.MM.module:
        missing = _optional.missing("flashinfer")
        reason = None if missing is None else f"exists only with FlashInfer: {missing}"
    if found.status == "as known":
        reason = "not replaced: hooks rely on what it does"
    if found.status == "hooked" and found.target is targets.STEP and not settings.watching():
        reason = f"registered only with {settings.VERIFY}, which is not set"
    return HookFinding(found.target.name, found.status, reason)


def _sites(version: str | None, hooks: Sequence[HookFinding]) -> list[dict[str, str]]:
    """Sites of a release that was read; without a GPU they say on which GPUs they are the default."""
    if version is None or _note(version) is not None:
        return []
    unfit = {hook.name for hook in hooks if hook.status != "hooked"}
    gpu = torch.cuda.get_device_capability(torch.device("cuda", 0)) if torch.cuda.is_available() else None
    found = []
    for site in (site for site in sites.SITES if site.exists(version)):
        change = "nothing: hook unfit" if site.hook and site.hook.name in unfit else site.change(version)
        taken = " ".join(site.default) or _BY_OPTION
        if gpu is not None:
            here = family(gpu)
            change = change if here else "nothing: no NVFP4"
            taken = _NEVER if here is None else "default" if here in site.default else _BY_OPTION
        row = {"name": site.name, "scales": site.scales, "taken": taken, "when": site.when}
        found.append({**row, "zeroes_padding": site.zeroed_by(version), "change": change})
    return found


def _note(version: str) -> str | None:
    oldest, newest = targets.SUPPORTED
    numbers = drift.release(version)
    if not numbers:
        return f"its version is not a release number; its sources were compared with {oldest} to {newest}"
    if numbers < drift.release(oldest):
        return f"older than {oldest}, the oldest release that was checked"
    if numbers > drift.release(newest):
        return f"newer than {newest}, the newest release that was checked"
    return None


def _plugin() -> PluginFinding:
    plugins = os.environ.get("VLLM_PLUGINS")
    allowed = plugins is None or _NAME in plugins.split(",")
    return PluginFinding(_entry_point(), plugins, allowed, settings.enabled(), plugin.registered())


def _entry_point() -> str | None:
    """Why vLLM does not find the plugin, or ``None``."""
    try:
        found = {entry.value for entry in importlib.metadata.entry_points(group=_GROUP, name=_NAME)}
    except Exception as error:  # the metadata of any other package may be broken
        return f"reading entry points failed: {type(error).__name__}: {error}"
    if not found:
        return f"no installed distribution has the entry point {_NAME} in {_GROUP}: safealloc is on the path, not installed"
    if _ENTRY_POINT not in found:
        return f"the entry point {_NAME} in {_GROUP} is another package's: {', '.join(sorted(found))}"
    return None


def _linear() -> list[LinearFinding]:
    if not torch.cuda.is_available():
        return [LinearFinding("cuda", None, kernel.refusal(None))]
    found = []
    for device in (torch.device("cuda", index) for index in range(torch.cuda.device_count())):
        major, minor = torch.cuda.get_device_capability(device)
        refusal = kernel.refusal(10 * major + minor)
        trtllm = kernel.trtllm_refusal(device)
        path = None if refusal else "triton" if trtllm else "trtllm"
        found.append(LinearFinding(str(device), path, refusal or trtllm))
    return found


def show(found: VllmFinding, out: Console) -> None:
    """Print it: one line where there is no vLLM."""
    if found.version is None:
        out.print(f"vLLM: {found.reason}.\n")
        return
    for why in filter(None, (found.reason, found.note)):
        out.print(f"vLLM {found.version}: {why}.\n")
    rows = []
    for hook in found.hooks:
        fits = hook.status not in ("changed", "missing")
        registers = "yes" if hook.status == "hooked" and hook.reason is None else "-" if fits else f"no: {hook.status}"
        rows.append(((hook.name, registers, hook.reason or ""), fits))
    report.table(out, f"vLLM {found.version}: hooks", ("", "would register", "why not"), rows)
    out.print(
        "no: changed or missing: vLLM's own code stays in use there. -: this vLLM or this machine does not need it.\n"
    )
    if found.sites:
        _show_sites(found, out)
    report.table(out, f"vLLM {found.version}: plugin", ("", "state", "which means"), _state(found))


def _show_sites(found: VllmFinding, out: Console) -> None:
    """Those that are taken by default, and those that the plugin changes."""
    if all(one["taken"] == _NEVER for one in found.sites):
        out.print("vLLM has no NVFP4 kernels for this GPU: safealloc changes nothing here.\n")
        return
    rows = []
    for one in found.sites:
        optional = one["taken"] == _BY_OPTION
        if not optional or not one["change"].startswith("nothing"):
            taken = one["when"] if optional else ", ".join(filter(None, (one["taken"], one["when"])))
            rows.append((one["name"], taken, one["zeroes_padding"], one["change"]))
    headings = ("", "taken", "zeroes padding", "what changes")
    report.table(out, f"vLLM {found.version}: what safealloc changes here", headings, report.fine(rows))
    out.print(f"{len(found.sites) - len(rows)} more sites of scales, optional and left alone: see --json.\n")


def _state(found: VllmFinding) -> Iterable[tuple[Sequence[str], bool]]:
    state = found.plugin
    yield ("padding without it", *_padding(found.padding)), True
    reason = state.entry_point or ""
    if not reason and not state.allowed:
        reason = f"VLLM_PLUGINS={state.vllm_plugins} leaves it out"
    if not reason and not state.enabled:
        reason = f"{settings.ENABLED}=0 keeps it off"
    yield ("loaded by vLLM", "no" if reason else "yes", reason), not reason
    here = ("no", "vLLM's workers register the hooks when they load a model that may have FP4 layers")
    yield ("registered here", *(here if state.registered is None else (f"{len(state.registered)} hooks", ""))), True
    for linear in found.linear:
        yield (f"linear kernel on {linear.device}", linear.path or "-", linear.reason or ""), True


def _padding(padding: PaddingFinding) -> tuple[str, str]:
    if padding.allocation is None:
        return "-", f"{targets.SCALES.name} is not found"
    zeroed = "zeroed at each call" if padding.allocation == "zeros" else "its sources do not mention any zeroing"
    if padding.kernel_zeroes:
        zeroed = "its quantization kernel zeroes it, according to its sources; fused producers may not"
    return f"torch.{padding.allocation}", zeroed

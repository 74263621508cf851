"""What ``safealloc doctor`` tells about vLLM: which hooks fit, the plugin's state, and the linear kernel.

vLLM's sources are read, nothing of it is imported.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from rich.console import Console

from safealloc import _optional, settings
from safealloc.commands import report
from safealloc.integrations.vllm import kernel, plugin, targets
from safealloc.pool.guard import POISON, REPAIR, VERIFY, GuardSettings

_GUARD = (VERIFY, REPAIR, POISON)
_GROUP, _NAME, _ENTRY_POINT = "vllm.general_plugins", "safealloc", "safealloc.integrations.vllm.plugin:load"


@dataclass(frozen=True, slots=True)
class HookFinding:
    """One hook.

    Attributes:
        name: what the log calls it too.
        status: "hooked" where it fits; "changed" or "missing" where vLLM's own path is left as it is;
            "not yet there" where vLLM is older than what it hooks.
        reason: why it would not be registered even where it fits, or finds nothing to replace, or ``None``.
    """

    name: str
    status: str
    reason: str | None


@dataclass(frozen=True, slots=True)
class PaddingFinding:
    """Who zeroes padding in a vLLM without the plugin.

    Attributes:
        allocation: what vLLM allocates scales with, "zeros" or "empty"; ``None`` if its function is not found.
        kernel_zeroes: whether its sources say that its quantization kernel zeroes padding.
    """

    allocation: str | None
    kernel_zeroes: bool | None


@dataclass(frozen=True, slots=True)
class PluginFinding:
    """What decides whether vLLM's processes register the hooks, and how.

    Attributes:
        entry_point: why vLLM does not find the plugin, or ``None``.
        allowed: whether ``VLLM_PLUGINS`` lets vLLM load it.
        enabled: whether ``SAFEALLOC`` leaves it on.
        strict: ``SAFEALLOC_STRICT``.
        linear_first: ``SAFEALLOC_LINEAR``.
        max_rows: ``SAFEALLOC_MAX_ROWS``, or ``None`` for vLLM's configuration.
        environment: these variables, and those of the pool's guard, as they are set.
        registered: the hooks that are registered in this process, or ``None``.
    """

    entry_point: str | None
    allowed: bool
    enabled: bool
    strict: bool
    linear_first: bool
    max_rows: int | None
    environment: dict[str, str]
    registered: Sequence[str] | None


@dataclass(frozen=True, slots=True)
class LinearFinding:
    """The linear kernel on one CUDA device.

    Attributes:
        device: as PyTorch names it; "cuda" where there is none.
        path: the GEMM it would run, "trtllm" or "triton", or ``None``.
        reason: why it cannot run, or why not on trtllm, or ``None``.
    """

    device: str
    path: str | None
    reason: str | None


@dataclass(frozen=True, slots=True)
class VllmFinding:
    """The installed vLLM.

    Attributes:
        version: of it, or ``None``.
        reason: why it cannot be hooked, or ``None``.
        note: that its version is not one that was checked, or ``None``.
        hooks: what would be registered; empty without vLLM's sources.
        padding: who zeroes it in vLLM.
        plugin: the state of the plugin.
        linear: one a CUDA device.
    """

    version: str | None
    reason: str | None
    note: str | None
    hooks: Sequence[HookFinding]
    padding: PaddingFinding
    plugin: PluginFinding
    linear: Sequence[LinearFinding]


def look(broken: str | None) -> VllmFinding:
    """Look at the installed vLLM.

    Args:
        broken: why it cannot be imported, or ``None``.
    """
    version, reason, note = None, None, None
    hooks: list[HookFinding] = []
    padding = PaddingFinding(None, None)
    try:
        found = targets.installed()
        if found is None:
            reason = broken or "it is there without a version that could be told"
        else:
            version, source = found
            reason, note = broken, _note(version)
            hooks = [_hook(one) for one in targets.check(version, source)]
            padding = PaddingFinding(targets.own_allocation(source), targets.kernel_zeroes_padding(source))
    except Exception as error:  # an installation may be broken in any way
        reason = f"looking at its sources failed: {type(error).__name__}: {error}"
    return VllmFinding(version, reason, note, hooks, padding, _plugin(), _linear())


def _hook(found: targets.Finding) -> HookFinding:
    reason = found.detail or None
    if found.status == "hooked" and found.target.module == targets.MM.module:
        lacking = _optional.missing("flashinfer")
        reason = None if lacking is None else f"there to be replaced with FlashInfer only: {lacking}"
    if found.status == "hooked" and found.target is targets.STEP and not settings.watching():
        reason = f"registered with {VERIFY} only, which is not set"
    return HookFinding(found.target.name, found.status, reason)


def _note(version: str) -> str | None:
    oldest, newest = targets.SUPPORTED
    numbers = targets.release(version)
    if not numbers:
        return f"its version tells no release; its sources were compared with {oldest} to {newest}"
    if numbers < targets.release(oldest):
        return f"older than {oldest}, the oldest release that was checked"
    if numbers > targets.release(newest):
        return f"newer than {newest}, the newest release that was checked"
    return None


def _plugin() -> PluginFinding:
    allowed = os.environ.get("VLLM_PLUGINS")
    names = ("SAFEALLOC", "SAFEALLOC_STRICT", "SAFEALLOC_LINEAR", "SAFEALLOC_MAX_ROWS", *_GUARD, "VLLM_PLUGINS")
    return PluginFinding(
        entry_point=_entry_point(),
        allowed=allowed is None or _NAME in allowed.split(","),
        enabled=settings.enabled(),
        strict=settings.strict(),
        linear_first=settings.linear(),
        max_rows=settings.max_rows(),
        environment={name: os.environ[name] for name in names if name in os.environ},
        registered=plugin.registered(),
    )


def _entry_point() -> str | None:
    """Why vLLM does not find the plugin, or ``None``."""
    try:
        found = {entry.value for entry in importlib.metadata.entry_points(group=_GROUP, name=_NAME)}
    except Exception as error:  # of any other package, whose metadata may be broken
        return f"reading entry points failed: {type(error).__name__}: {error}"
    if not found:
        return f"no installed distribution has the entry point {_NAME} in {_GROUP}: safealloc is on the path, not installed"
    if _ENTRY_POINT not in found:
        return f"the entry point {_NAME} in {_GROUP} is another one: {', '.join(sorted(found))}"
    return None


def _linear() -> list[LinearFinding]:
    if not torch.cuda.is_available():
        return [LinearFinding("cuda", None, kernel.refusal(None))]
    return [_linear_on(torch.device("cuda", index)) for index in range(torch.cuda.device_count())]


def _linear_on(device: torch.device) -> LinearFinding:
    major, minor = torch.cuda.get_device_capability(device)
    refusal = kernel.refusal(10 * major + minor)
    if refusal is not None:
        return LinearFinding(str(device), None, refusal)
    trtllm = kernel.trtllm_refusal(device)
    return LinearFinding(str(device), "triton" if trtllm else "trtllm", trtllm)


def show(found: VllmFinding, out: Console) -> None:
    """Print it: one line where there is no vLLM."""
    if found.version is None:
        out.print(f"vLLM: {found.reason}.\n")
        return
    for why in filter(None, (found.reason, found.note)):
        out.print(f"vLLM {found.version}: {why}.\n")
    rows = (((hook.name, _registers(hook), hook.reason or ""), _fine(hook)) for hook in found.hooks)
    report.table(out, f"vLLM {found.version}: hooks", ("", "would register", "why not"), rows)
    report.table(out, f"vLLM {found.version}: plugin", ("", "state", "which means"), _state(found))


def _registers(hook: HookFinding) -> str:
    fits = "yes" if hook.reason is None else "-"
    return {"hooked": fits, "not yet there": "-"}.get(hook.status, f"no: {hook.status}")


def _fine(hook: HookFinding) -> bool:
    return hook.status in ("hooked", "not yet there")


def _state(found: VllmFinding) -> Iterable[tuple[Sequence[str], bool]]:
    state, set_to = found.plugin, found.plugin.environment
    yield ("padding without it", *_padding(found.padding)), True
    reason = state.entry_point or ("" if state.allowed else f"VLLM_PLUGINS={set_to['VLLM_PLUGINS']} leaves it out")
    yield ("loaded by vLLM", "no" if reason else "yes", reason), not reason
    registered = "no" if state.registered is None else f"{len(state.registered)} hooks"
    yield (
        ("registered here", registered, "vLLM's processes do that when they start" if registered == "no" else ""),
        True,
    )
    for name, says in (
        ("SAFEALLOC", f"the plugin is {'on' if state.enabled else 'off'}"),
        ("SAFEALLOC_STRICT", f"a pool error is {'raised' if state.strict else 'logged, and vLLM allocates'}"),
        ("SAFEALLOC_LINEAR", f"the linear kernel comes {'before' if state.linear_first else 'behind'} all others"),
        ("SAFEALLOC_MAX_ROWS", _max_rows(state.max_rows, set_to.get("SAFEALLOC_MAX_ROWS"))),
    ):
        yield (name, set_to.get(name, "not set"), says), True
    for name in _GUARD:
        says, fine = _guard(name, set_to)
        yield (name, set_to.get(name, "not set"), says), fine
    for linear in found.linear:
        yield (f"linear kernel on {linear.device}", linear.path or "-", linear.reason or ""), True


def _padding(padding: PaddingFinding) -> tuple[str, str]:
    if padding.allocation is None:
        return "-", f"{targets.SCALES.name} is not found"
    zeroed = (
        "zeroed at each call" if padding.allocation == "zeros" else "its sources do not say that anything zeroes it"
    )
    if padding.kernel_zeroes:
        zeroed = "its quantization kernel zeroes it, its sources say; fused producers may not"
    return f"torch.{padding.allocation}", zeroed


def _guard(name: str, set_to: Mapping[str, str]) -> tuple[str, bool]:
    """What one variable of the pool's guard means, and whether pools take it."""
    try:
        settings = GuardSettings.of({name: set_to[name]} if name in set_to else {})
    except ValueError as error:
        return f"no pool can be made: {error}", False
    often = f"once in {settings.every} calls or replays" if settings.every > 1 else "at each call and replay"
    means = {
        VERIFY: f"padding is checked {often}" if settings.every else "padding is not checked",
        REPAIR: f"what {VERIFY} finds is {'zeroed and logged' if settings.repair else 'raised'}",
        POISON: f"the real bytes of new buffers are {'NaN' if settings.poison else 'undefined'}",
    }
    return means[name], True


def _max_rows(rows: int | None, text: str | None) -> str:
    if rows:
        return f"the pool serves up to {rows} rows"
    ignored = "" if text is None else "it is no positive number, and ignored; "
    return f"{ignored}the pool serves up to vLLM's largest captured batch or max_num_seqs"

"""What ``safealloc doctor`` reports on SGLang, whose sources are read, not imported."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from rich.console import Console

from safealloc import settings
from safealloc.commands import report
from safealloc.integrations import drift
from safealloc.integrations.sglang import sites, targets

_GROUP, _NAME = "sglang.srt.plugins", "safealloc"


@dataclass(frozen=True, slots=True)
class SGLangFinding:
    """The hooks, the plugin and the allocation sites."""

    version: str | None  # ``None`` where SGLang is not installed
    note: str | None = None  # why the hooks may not be as the table says, or ``None``
    plugin: str | None = None  # why SGLang does not load the plugin, or ``None``
    hooks: Sequence[Mapping[str, str]] = field(default_factory=list)  # name, status and reason
    sites: Sequence[Mapping[str, str]] = field(default_factory=list)


def look() -> SGLangFinding:
    """Read the installed SGLang."""
    found = targets.installed()
    if found is None:
        return SGLangFinding(None)
    version, source = found
    oldest, newest = map(drift.release, targets.SUPPORTED)
    known = oldest <= drift.release(version) <= newest
    note = None if known else f"only {targets.SUPPORTED[0]} to {targets.SUPPORTED[1]} were checked"
    reason = None if settings.enabled() else f"{settings.ENABLED}=0 keeps it off"
    if not importlib.metadata.entry_points(group=_GROUP, name=_NAME):
        reason = "safealloc is not installed with its entry point: pip install it beside SGLang"
    hooks = [
        {"name": one.target.name, "status": one.status, "reason": one.detail} for one in targets.check(version, source)
    ]
    found_sites = [
        {
            "name": site.name,
            "scales": site.scales,
            "when": site.when,
            "zeroes_padding": site.zeroed_by(version),
            "change": site.change(version),
        }
        for site in sites.SITES
        if site.exists(version)
    ]
    return SGLangFinding(version, note, reason, hooks, found_sites)


def show(found: SGLangFinding, out: Console) -> None:
    """Tables, where SGLang is installed."""
    if found.version is None:
        return
    title = f"SGLang {found.version}: loaded by SGLang: {found.plugin or 'yes'}"
    rows = [(hook["name"], hook["status"], hook["reason"]) for hook in found.hooks]
    report.table(out, title, ("", "hook", "reason"), report.fine(rows))
    places = [(site["name"], site["when"], site["zeroes_padding"], site["change"]) for site in found.sites]
    report.table(
        out, "what safealloc changes there", ("", "when", "zeroes padding", "what changes"), report.fine(places)
    )
    if found.note:
        out.print(f"{found.note}\n")

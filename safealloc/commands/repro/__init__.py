"""``safealloc repro``: the published NaN tables again, what causes them, and the same calls through safealloc."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console

from safealloc._checks import checked_device
from safealloc.commands import report
from safealloc.commands.repro import replay
from safealloc.commands.repro.columns import columns
from safealloc.commands.repro.operands import Section, ours
from safealloc.commands.repro.published import published
from safealloc.commands.repro.through_pool import through_pool
from safealloc.formats.layout import SfLayout
from safealloc.ops.backends import GEMMS, Call


@dataclass(frozen=True, slots=True)
class Options:
    """What to run, checked.

    Attributes:
        device: where.
        backend: one of ours or of FlashInfer's; "auto" is ours.
        seed: of operands and orders.
        replays: of each CUDA graph.
    """

    device: torch.device
    backend: str
    seed: int
    replays: int


@dataclass(frozen=True, slots=True)
class Result:
    """What came out."""

    options: Options
    device_name: str
    versions: dict[str, str | None]
    sections: Sequence[Section]
    not_run: dict[str, str]
    """Sections that cannot run here, and why."""

    @property
    def as_stated(self) -> bool:
        return all(section.as_stated for section in self.sections)

    def as_dict(self) -> dict[str, Any]:
        """For JSON: each section's rows under its name, what is said of it under ``sections``."""
        about = {
            section.name: {
                "as_stated": section.as_stated,
                "backend": section.backend,
                "text": section.text,
                "failure": section.failure,
            }
            for section in self.sections
        }
        return {
            "command": "safealloc repro",
            "as_stated": self.as_stated,
            "device": str(self.options.device),
            "device_name": self.device_name,
            "versions": self.versions,
            "seed": self.options.seed,
            "sections": about,
            "not_run": self.not_run,
            **{section.name: section.as_dicts() for section in self.sections},
        }


def checked_options(device: str | None, backend: str, seed: int, replays: int) -> Options:
    """What the user asked for.

    Raises:
        UsageError: no such device or backend, or the backend cannot run there.
    """
    if device is not None and not re.fullmatch(r"cpu|cuda(:\d{1,2})?", device):  # of an index PyTorch keeps 8 bits
        raise report.UsageError(f"--device must be cpu, cuda or cuda:N, got {device!r}")
    try:
        where = checked_device(device)
        GEMMS.choose(backend, Call(where, SfLayout.layout_128x4, torch.bfloat16))
    except ValueError as error:
        raise report.UsageError(str(error)) from error
    return Options(where, backend, seed, replays)


def run(options: Options, say: report.Say) -> Result:
    """Run all sections that can run on the device."""
    device, seed = options.device, options.seed
    own = ours(device, options.backend)
    vendor = options.backend in GEMMS and GEMMS[options.backend].package is not None
    sections, not_run = [], {}
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        say("published")
        sections.append(published(device, own, seed))
        say("columns")
        sections.append(columns(device, own, seed))
        say("safealloc")
        sections.append(through_pool(device, options.backend if vendor else own, own, seed))
        reason = replay.refusal(device)
        if reason is None:
            sections.append(replay.replay(device, seed, options.replays, say))
        else:
            not_run["replay"] = reason
    return Result(options, report.device_name(device), report.versions(), sections, not_run)


def show(result: Result, out: Console) -> None:
    """Print a result."""
    versions = ", ".join(f"{name} {version}" for name, version in result.versions.items() if version is not None)
    out.print(f"{result.options.device} ({result.device_name}), {versions}, seed {result.options.seed}\n")
    for section in result.sections:
        headings = (*section.rows[0].HEADINGS, "as stated") if section.rows else ()
        rows = (((*row.cells(), "yes" if row.as_stated else "NO"), row.as_stated) for row in section.rows)
        report.table(out, f"{section.name}: {section.title} ({section.backend})", headings, rows)
        out.print(f"{section.text}\n")
        if section.failure is not None:
            out.print(f"{section.failure}\n", style="bold red")
    for name, reason in result.not_run.items():
        out.print(f"{name}: not run, {reason}\n")
    failed = [section.name for section in result.sections if not section.as_stated]
    out.print("Every row came out as stated." if not failed else f"NOT as stated: {', '.join(failed)}.", style="bold")

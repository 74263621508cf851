"""``safealloc repro``: the published NaN tables again, what causes them, and the same calls through safealloc."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console

from safealloc._checks import checked_device
from safealloc.commands import machine, report
from safealloc.commands.repro import replay
from safealloc.commands.repro.columns import columns
from safealloc.commands.repro.operands import Section, ours
from safealloc.commands.repro.published import published
from safealloc.commands.repro.through_pool import through_pool
from safealloc.formats.layout import SfLayout
from safealloc.ops.backends import GEMMS, Call

SUMMARY = "the published NaN tables again, what causes them, and the same calls through safealloc"


@dataclass(frozen=True, slots=True)
class Result:
    """What came out."""

    device: torch.device  # where it was run
    device_name: str  # its model
    versions: dict[str, str | None]  # of the packages
    seed: int  # of operands and orders
    sections: Sequence[Section]  # those that ran
    not_run: dict[str, str]  # sections that cannot run here, and why

    @property
    def as_stated(self) -> bool:
        return all(section.as_stated for section in self.sections)

    def as_dict(self) -> dict[str, Any]:
        """For JSON: each section's rows under its name, its summary under ``sections``."""
        keys = ("as_stated", "backend", "text", "failure")
        about = {section.name: {key: getattr(section, key) for key in keys} for section in self.sections}
        return {
            "command": "safealloc repro",
            "as_stated": self.as_stated,
            "device": str(self.device),
            "device_name": self.device_name,
            "versions": self.versions,
            "seed": self.seed,
            "sections": about,
            "not_run": self.not_run,
            **{section.name: section.as_dicts() for section in self.sections},
        }


def check_backend(device: torch.device, backend: str) -> None:
    """Raises: UsageError: the backend cannot run on the device."""
    reason = None if backend == "auto" else GEMMS[backend].refusal(Call(device, SfLayout.layout_128x4, torch.bfloat16))
    if reason is not None:
        raise report.UsageError(f"backend {backend!r} cannot run this: {reason}")


def run(device: torch.device, backend: str, seed: int, replays: int, progress: report.Progress) -> Result:
    """Run all sections that can run on the device; a backend of FlashInfer's multiplies where safealloc is called."""
    own = ours(device, backend)
    not_run = {}
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        progress("published", 0.0)
        sections = [published(device, own, seed)]
        progress("columns", 0.25)
        sections.append(columns(device, own, seed))
        progress("safealloc", 0.5)
        sections.append(through_pool(device, own if backend == "auto" else backend, own, seed))
        if reason := replay.refusal(device):
            not_run["replay"] = reason
        else:
            sections.append(replay.replay(device, seed, replays, lambda what, done: progress(what, 0.75 + done / 4)))
    return Result(device, machine.device_name(device), machine.versions(), seed, sections, not_run)


def show(result: Result, out: Console) -> None:
    """Print a result."""
    versions = ", ".join(f"{name} {version}" for name, version in result.versions.items() if version is not None)
    out.print(f"{result.device} ({result.device_name}), {versions}, seed {result.seed}\n")
    for section in result.sections:
        headings = (*section.rows[0].cells(), "as stated") if section.rows else ()
        rows = (([*map(_cell, (*row.cells().values(), row.as_stated))], row.as_stated) for row in section.rows)
        report.table(out, f"{section.name}: {section.title} ({section.backend})", headings, rows)
        out.print(f"{section.text}\n")
        if section.failure is not None:
            out.print(f"{section.failure}\n", style="bold red")
    for name, reason in result.not_run.items():
        out.print(f"{name}: not run, {reason}\n")
    failed = [section.name for section in result.sections if not section.as_stated]
    out.print("Every row came out as stated." if not failed else f"NOT as stated: {', '.join(failed)}.", style="bold")


def _cell(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "NO"
    return "-" if value is None else str(value)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = f"{SUMMARY[0].upper()}{SUMMARY[1:]}. Exit code 1: a row did not come out as stated."
    report.add_device(parser)
    vendors = [name for name in GEMMS if name not in ("triton", "reference")]
    about = (
        "of the products (%(default)s): auto, triton or reference, which are ours; in the section that goes through "
    )
    about += f"safealloc also FlashInfer's {', '.join(vendors)}"
    parser.add_argument("--backend", choices=("auto", *GEMMS), default="auto", metavar="NAME", help=about)
    about = "of the random operands and orders (%(default)s)"
    parser.add_argument("--seed", type=report.integer(0), default=0, metavar="N", help=about)
    about = "of each CUDA graph, on a CUDA device (%(default)s)"
    parser.add_argument("--replays", type=report.integer(1), default=200, metavar="N", help=about)


def main(given: argparse.Namespace) -> int:
    """Run all sections and print them; exit code 1 where a row did not come out as stated."""
    report.check_environment()
    report.check_writable(given.json)
    with contextlib.redirect_stdout(sys.stderr):  # whatever a package prints when it is imported
        device = checked_device(given.device)
        check_backend(device, given.backend)
        with report.progress("repro") as progress:
            result = run(device, given.backend, given.seed, given.replays, progress)
    report.deliver(given.json, result.as_dict(), lambda out: show(result, out))
    return 0 if result.as_stated else 1

"""The command ``python -m benchmarks``: arguments, which parts run, the JSON, exit codes."""

from __future__ import annotations

import argparse
import functools
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import optional, tables
from benchmarks.memory import memory
from safealloc.commands import machine, report
from safealloc.commands.report import Progress, UsageError
from safealloc.formats.layout import SfLayout
from safealloc.ops.backends import Call, triton_refusal

PARTS = ("quantize", "decode", "host", "moe", "guard")
"""Modules of ``benchmarks``; the ``run`` of each measures one part."""

COMMAND = "python -m benchmarks"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write the JSON, print the tables, draw the pictures.

    Args:
        arguments: without the program's name; ``None`` is ``sys.argv[1:]``.

    Returns:
        0; 130 after an interrupt.

    Raises:
        SystemExit: after ``--help``, and with code 2 where the request cannot be met.
    """
    parser = _parser()
    given = parser.parse_args(arguments)
    parts = PARTS if given.part == "all" else (given.part,)
    try:
        report.check_environment()
        report.check_writable(given.json)
        if given.plot is not None and isinstance(reason := optional.load("matplotlib"), str):
            raise UsageError(f"--plot: {reason} (pip install safealloc[plot])")
        device = checked_device()
        if given.plot is not None:
            make_folder(given.plot)
        with report.progress("benchmarks") as progress:
            result = run(parts, device, given.quick, progress)
        report.deliver(given.json, result, functools.partial(tables.show, result))
        if given.plot is not None:
            pictures = draw(result, given.plot)
            out = sys.stderr if given.json == report.STANDARD_OUTPUT else sys.stdout
            print(*(f"wrote {picture}" for picture in pictures), sep="\n", file=out)
    except UsageError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        print(f"{COMMAND}: interrupted", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=COMMAND,
        description="What each way to keep padding zero costs on this machine's GPU, side by side in one run.",
    )
    parser.add_argument(
        "part",
        nargs="?",
        choices=(*PARTS, "all"),
        default="all",
        metavar="PART",
        help="quantize: kernels; decode: a model's decode step; host: time on the CPU; "
        "moe: grouped quantization; guard: verify_every; all (%(default)s)",
    )
    parser.add_argument("--quick", action="store_true", help="fewer shapes and rounds")
    parser.add_argument("--plot", type=Path, metavar="FOLDER", help="draw pictures there too (needs matplotlib)")
    report.add_json(parser)
    return parser


def checked_device() -> torch.device:
    """The current CUDA device.

    Raises:
        UsageError: there is none, or our Triton kernels cannot run on it.
    """
    needed = "it needs a CUDA device of compute capability 8.9 or more, and Triton"
    if not torch.cuda.is_available():
        raise UsageError(f"{needed}: torch {torch.__version__} sees no CUDA device")
    device = torch.device("cuda", torch.cuda.current_device())
    if reason := triton_refusal(Call(device, SfLayout.layout_128x4)):
        raise UsageError(f"{needed}: {reason}")
    return device


def make_folder(folder: Path) -> None:
    """Make the folder for pictures, before the work starts.

    Raises:
        UsageError: nothing can be written there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--plot {folder}: {error.strerror or error}") from error
    if not os.access(folder, os.W_OK):
        raise UsageError(f"--plot {folder}: not writable")


def run(parts: Sequence[str], device: torch.device, quick: bool, progress: Progress) -> dict[str, Any]:
    """Measure one part after the other.

    Args:
        parts: some of ``PARTS``.
        device: a CUDA device of compute capability 8.9 or more.
        quick: fewer shapes and rounds.
        progress: called with the part and what it measures.

    Returns:
        The result as the JSON has it.
    """
    measured = {}
    for number, part in enumerate(parts):

        def progress_of_part(what: str, done: float, number: int = number, part: str = part) -> None:
            progress(f"{part}: {what}", (number + done) / len(parts))

        module = importlib.import_module(f"benchmarks.{part}")  # not before: it imports Triton
        measured[part] = module.run(device, quick, progress_of_part)
    return {
        "command": COMMAND,
        "device": str(device),
        "device_name": machine.device_name(device),
        "capability": machine.capability(device) if device.type == "cuda" else None,
        "versions": machine.versions() | {"CUDA driver": machine.driver()[0]},
        "quick": quick,
        **measured,
        "memory": memory(),
    }


def draw(result: dict[str, Any], folder: Path) -> list[Path]:
    """Draw the pictures of a result.

    Returns:
        The files.

    Raises:
        UsageError: one cannot be written.
    """
    from benchmarks import plots

    try:
        return plots.draw(result, folder)
    except OSError as error:
        raise UsageError(f"--plot {folder}: {error.strerror or error}") from error

"""What the commands share: the console, the JSON file, versions and names of machines."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import platform
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import rich.progress
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from safealloc import _optional
from safealloc._checks import checked_device
from safealloc._version import __version__
from safealloc.pool.guard import GuardSettings

Progress = Callable[[str, float], None]
"""Told what is being done, and which share of all (0 to 1) is done."""

STANDARD_OUTPUT = Path("-")
"""As a file that a result goes to: it is printed instead of the tables."""

Say = Callable[[str], None]  # to be replaced by Progress

_UNBOUNDED = 10_000  # columns: where nobody looks at it, no line is wrapped and no cell cut


class UsageError(Exception):
    """What was asked for cannot be done; the message is one line for the user."""


def add_device(parser: argparse.ArgumentParser) -> None:
    """``--device``: a checked device, or ``None`` for the default."""
    parser.add_argument(
        "--device", type=_device, help="cpu, cuda or cuda:N (default: cuda where there is one, else cpu)"
    )


def _device(text: str) -> torch.device:
    if not re.fullmatch(r"cpu|cuda(:\d{1,2})?", text):  # torch.device keeps 8 bits of an index
        raise argparse.ArgumentTypeError(f"must be cpu, cuda or cuda:N, got {text!r}")
    try:
        return checked_device(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Leave to :func:`printing` what rich would exit for, with a code that a command gives another meaning."""
        raise


def console() -> Console:
    """Standard output: rich on a terminal, else plain text with one line a row."""
    options: dict[str, Any] = {"markup": False, "emoji": False, "highlight": False}
    found = _Console(**options)
    return found if found.is_terminal else _Console(width=_UNBOUNDED, soft_wrap=True, **options)


@contextlib.contextmanager
def printing() -> Iterator[None]:
    """While a result is printed: whoever reads it may leave early.

    Raises:
        UsageError: standard output cannot be written.
    """
    out = sys.stdout
    try:
        yield
        if out is not None:  # closed from the beginning
            out.flush()
    except OSError as error:
        with contextlib.suppress(OSError):  # the rest, else Python would fail to write it at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), out.fileno())
        if not isinstance(error, BrokenPipeError):
            raise UsageError(f"standard output: {error.strerror or error}") from error


def one_line(text: str) -> str:
    """Text with everything escaped that is not printed as a character: ends of lines, terminals' control codes."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def check_environment() -> None:
    """See before the work starts that pools can be made.

    Raises:
        UsageError: an environment variable of theirs has a value that it cannot have.
    """
    try:
        GuardSettings.of(os.environ)
    except ValueError as error:
        raise UsageError(str(error)) from error


def table(out: Console, title: str, headings: Sequence[str], rows: Iterable[tuple[Sequence[str], bool]]) -> None:
    """Print a table; a row comes with whether it is fine, and is marked where it is not."""
    out.print(Text(one_line(title), style="bold"))
    looks: dict[str, Any] = {"padding": (0, 2, 0, 0), "box": None}
    if out.is_terminal:
        looks = {"padding": (0, 1, 0, 0), "box": box.SIMPLE_HEAD}
    drawn = Table(*headings, **looks)
    for cells, fine in rows:
        drawn.add_row(*map(one_line, cells), style="" if fine else "bold red")
    if out.is_terminal:
        out.print(drawn)
        return
    with out.capture() as plain:
        out.print(drawn)
    out.print("\n".join(line.rstrip() for line in plain.get().splitlines()), end="\n\n")


@contextlib.contextmanager
def progress(command: str) -> Iterator[Progress]:
    """A bar on standard error if that is a terminal; gone afterwards."""
    out = Console(stderr=True)
    if not out.is_terminal:
        yield lambda what, done: None
        return
    with rich.progress.Progress(console=out, transient=True) as bar:
        task = bar.add_task(command, total=1.0)
        yield lambda what, done: bar.update(task, description=f"{command}: {what}", completed=done)


@contextlib.contextmanager
def status(command: str) -> Iterator[Say]:
    """What is being done, on standard error if that is a terminal; gone afterwards."""
    out = Console(stderr=True)
    if not out.is_terminal:
        yield lambda message: None
        return
    with out.status(command) as spinner:
        yield lambda message: spinner.update(f"{command}: {message}")


def check_writable(path: Path | None, flag: str = "--json") -> None:
    """See before the work starts whether its result can be written; nothing is touched.

    Raises:
        UsageError: it cannot.
    """
    if path is None or path == STANDARD_OUTPUT:
        return
    try:
        if path.is_dir():
            raise UsageError(f"{flag} {path}: is a directory")
        if not path.parent.is_dir():
            raise UsageError(f"{flag} {path}: there is no directory {path.parent}")
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            raise UsageError(f"{flag} {path}: not writable")
    except OSError as error:  # a name that is too long, a folder that may not be searched
        raise UsageError(f"{flag} {path}: {error.strerror or error}") from error


def check_apart(result: Path | None, other: Path | None, flag: str, others: str) -> None:
    """See before the work starts that a result does not take the place of something else.

    Raises:
        UsageError: both names stand for one file.
    """
    if result is None or other is None:
        return
    try:
        same = os.path.samefile(result, other) and result.is_file()
    except OSError:  # one of them is not there yet
        same = os.path.realpath(result) == os.path.realpath(other)
    if same:
        raise UsageError(f"{flag} {result}: {others} is the same")


def write_json(path: Path | None, result: dict[str, Any]) -> None:
    """Write a result; a number that is none becomes null, since JSON has no NaN.

    Raises:
        UsageError: as :func:`write`.
    """
    if path is not None:
        write(path, json.dumps(_finite(result), indent=1, allow_nan=False) + "\n", "--json")


def write(path: Path, text: str, flag: str) -> None:
    """Write a file, or print where the path is ``-``.

    Raises:
        UsageError: it cannot be written; what there is of it is removed.
    """
    if path == STANDARD_OUTPUT:
        with printing():
            print(text, end="")
        return
    try:
        file = path.open("w", encoding="utf-8", errors="backslashreplace")
        try:
            with file:
                file.write(text)
        except BaseException:
            if path.is_file():  # and no device
                path.resolve().unlink()
            raise
    except OSError as error:
        raise UsageError(f"{flag} {path}: {error.strerror or error}") from error


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def versions() -> dict[str, str | None]:
    """Of what the numbers depend on; ``None`` where it is not there."""
    triton = _optional.load("triton")
    return {
        "safealloc": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": None if isinstance(triton, str) else str(getattr(triton, "__version__", "unknown")),
    }


def device_name(device: torch.device) -> str:
    """The model of a GPU or of this machine's CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()

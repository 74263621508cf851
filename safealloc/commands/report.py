"""What the commands share: arguments, the console and its tables, progress, and the files that results go to."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
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

from safealloc import settings
from safealloc._checks import checked_device

Progress = Callable[[str, float], None]
"""Told what is being done, and which share of all (0 to 1) is done."""

STANDARD_OUTPUT = Path("-")
"""As a file that a result goes to: it is printed instead of the tables."""

_UNBOUNDED = 10_000  # columns: piped output is neither wrapped nor cut


class UsageError(Exception):
    """What was asked for cannot be done; the message is one line for the user."""


def add_json(parser: argparse.ArgumentParser) -> None:
    """``--json``, which every command has."""
    text = "write the result there too; - prints it instead of the tables"
    parser.add_argument("--json", type=Path, metavar="FILE", help=text)


def add_device(parser: argparse.ArgumentParser) -> None:
    """``--device``: a checked device, or ``None`` for the default."""
    text = "cpu, cuda or cuda:N (default: cuda where there is one, else cpu)"
    parser.add_argument("--device", type=_device, help=text)


def _device(text: str) -> torch.device:
    if not re.fullmatch(r"cpu|cuda(:\d{1,2})?", text):  # torch.device keeps 8 bits of an index
        raise argparse.ArgumentTypeError(f"must be cpu, cuda or cuda:N, got {text!r}")
    try:
        return checked_device(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def integer(least: int, most: int = 2**63 - 1) -> Callable[[str], int]:
    """The type of an argument that is an integer in a range."""

    def parse(text: str) -> int:
        number = int(text)
        if not least <= number <= most:
            raise argparse.ArgumentTypeError(f"must be an integer from {least} to {most}, got {text}")
        return number

    parse.__name__ = "integer"  # argparse names it where the text is not one
    return parse


def check_environment() -> None:
    """Raises: UsageError: a ``SAFEALLOC_*`` variable has a value with which no default pool can be made."""
    try:
        settings.watch()
    except ValueError as error:
        raise UsageError(str(error)) from error


def console() -> Console:
    """Standard output: rich on a terminal, else plain text with one line per row."""
    options: dict[str, Any] = {"markup": False, "emoji": False, "highlight": False}
    found = Console(**options)
    return found if found.is_terminal else Console(width=_UNBOUNDED, soft_wrap=True, **options)


@contextlib.contextmanager
def printing() -> Iterator[None]:
    """While a result is printed: its reader may leave early, as in ``safealloc doctor | head -1``."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes the rest when it exits
    except SystemExit:
        pass  # rich's answer to the same, with an exit code of its own


def one_line(text: str) -> str:
    """Text with line ends and control characters escaped."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def fine(rows: Iterable[Sequence[str]]) -> Iterator[tuple[Sequence[str], bool]]:
    """Rows of a :func:`table` none of which is marked."""
    return ((cells, True) for cells in rows)


def table(
    out: Console, title: str, headings: Sequence[str], rows: Iterable[tuple[Sequence[str], bool]], *, names: int = 1
) -> None:
    """Print a table of rows: cells, and whether the row is fine; one that is not is marked.

    The first columns, as many as ``names``, hold names that an option takes: a narrow terminal neither cuts nor wraps them.
    """
    out.print(Text(one_line(title), style="bold"))
    terminal = out.is_terminal
    drawn = Table(padding=(0, 1 if terminal else 2, 0, 0), box=box.SIMPLE_HEAD if terminal else None)
    for column, heading in enumerate(headings):
        drawn.add_column(heading, no_wrap=column < names)
    for cells, fine in rows:
        drawn.add_row(*map(one_line, cells), style="" if fine else "bold red")
    if terminal:
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


def check_writable(path: Path | None, flag: str = "--json") -> None:
    """See before the work starts whether its result can be written; nothing is touched. Raises: UsageError: it cannot."""
    if path is None or path == STANDARD_OUTPUT:
        return
    if path.is_dir():
        raise UsageError(f"{flag} {path}: is a directory")
    if not path.parent.is_dir():
        raise UsageError(f"{flag} {path}: there is no directory {path.parent}")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UsageError(f"{flag} {path}: not writable")


def deliver(path: Path | None, result: dict[str, Any], show: Callable[[Console], None]) -> None:
    """Write a result as JSON if a path is given, and print its tables unless the JSON is printed; raises as :func:`write`."""
    write_json(path, result)
    if path != STANDARD_OUTPUT:
        with printing():
            show(console())


def write_json(path: Path | None, result: dict[str, Any]) -> None:
    """Write a result if a path is given; NaN and infinities become null, since JSON has none; raises as :func:`write`."""
    if path is not None:
        write(path, json.dumps(_finite(result), indent=1, allow_nan=False) + "\n", "--json")


def write(path: Path, text: str, flag: str) -> None:
    """Write a file, or print where the path is ``-``. Raises: UsageError: it cannot be written."""
    if path == STANDARD_OUTPUT:
        with printing():
            print(text, end="")
        return
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{flag} {path}: {error.strerror or error}") from error


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

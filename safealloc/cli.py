"""The command ``safealloc``: which command, and exit codes. A command adds its own arguments."""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Sequence
from typing import NoReturn

from safealloc._version import __version__
from safealloc.commands import audit, doctor, report
from safealloc.commands.plan import command as plan
from safealloc.commands.repro import command as repro

_COMMANDS = {"repro": repro, "doctor": doctor, "plan": plan, "audit": audit}
"""Modules with ``SUMMARY``, ``add_arguments(parser)`` and ``main(given)``, which returns the exit code."""


class _Help(argparse.HelpFormatter):
    def _split_lines(self, text: str, width: int) -> list[str]:
        """Names such as cute-dsl stay whole."""
        return textwrap.wrap(text, width, break_on_hyphens=False)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, exit code 2."""
        self.exit(2, f"{self.prog}: {report.one_line(message)} ({self.prog} --help lists what is accepted)\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command with these arguments (``None``: ``sys.argv[1:]``); without a command, print help.

    Returns:
        0, also for help; 130 after an interrupt; other codes are in the help of each command.

    Raises:
        SystemExit: after ``--help`` and ``--version``, and with code 2 after bad arguments.
    """
    about = "NVFP4 scale buffers whose padding is zero at every CUDA graph replay."
    parser = _Parser(prog="safealloc", description=about)
    parser.add_argument("--version", action="version", version=f"safealloc {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=_Parser)
    parsers = {}
    for name, command in _COMMANDS.items():
        about = f"{command.SUMMARY[0].upper()}{command.SUMMARY[1:]}."
        parsers[name] = subparsers.add_parser(name, help=command.SUMMARY, description=about, formatter_class=_Help)
        command.add_arguments(parsers[name])
        report.add_json(parsers[name])
    given = parser.parse_args(arguments)
    if given.command is None:
        parser.print_help()
        return 0
    try:
        code: int = _COMMANDS[given.command].main(given)
        return code
    except report.UsageError as error:
        parsers[given.command].error(str(error))
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted", file=sys.stderr)
        return 130

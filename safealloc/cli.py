"""The command ``safealloc``: arguments, which command, exit codes. What a command imports, it imports when it runs."""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from safealloc._version import __version__

_MOST_ROWS = 1 << 20  # in one batch


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, exit code 2."""
        from safealloc.commands.report import one_line

        super().exit(2, f"{self.prog}: {one_line(message)} ({self.prog} --help tells what is accepted)\n")

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        """After ``--help`` and ``--version``, which may lie in standard output's buffer still."""
        from safealloc.commands import report

        try:
            with report.printing():
                pass
        except report.UsageError as error:
            self.error(str(error))
        super().exit(status, message)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: without the program's name; ``None`` is ``sys.argv[1:]``.

    Returns:
        0; 1 where ``repro`` does not come out as stated, or ``audit`` finds something unsafe that vLLM would choose, or was
        stopped by a kernel that made the device unusable; 3 where ``audit`` could judge nothing.

    Raises:
        SystemExit: after ``--help`` and ``--version``, and with code 2 after bad arguments.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # of what its encoding lacks
    parser, commands = _parsers()
    if any("\0" in argument for argument in arguments or ()):
        parser.error("an argument has a NUL character in it")
    given = parser.parse_args(arguments)
    from safealloc.commands.report import UsageError

    try:
        return _COMMANDS[given.command](given)
    except UsageError as error:
        commands[given.command].error(str(error))
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted", file=sys.stderr)
        return 130


def _repro(given: argparse.Namespace) -> int:
    from safealloc.commands import report, repro

    report.check_environment()
    report.check_writable(given.json)
    options = repro.checked_options(given.device, given.backend, given.seed, given.replays)
    with report.status("repro") as say:
        result = repro.run(options, say)
    report.write_json(given.json, result.as_dict())
    with report.printing():
        repro.show(result, report.console())
    return 0 if result.as_stated else 1


def _doctor(given: argparse.Namespace) -> int:
    from safealloc.commands import doctor, report

    report.check_writable(given.json)
    with report.status("doctor") as say:
        result = doctor.run(say)
    report.write_json(given.json, result.as_dict())
    with report.printing():
        doctor.show(result, report.console())
    return 0


def _plan(given: argparse.Namespace) -> int:
    from safealloc.commands import plan, report

    report.check_writable(given.json)
    report.check_apart(given.json, plan.config_file(given.config), "--json", "CONFIG")
    sizes = given.sizes or plan.vllm_sizes(given.max_size)
    result = plan.run(given.config, given.tensor_parallel, sizes, given.layout, expert_parallel=given.expert_parallel)
    report.write_json(given.json, result.as_dict())
    with report.printing():
        plan.show(result, report.console())
    return 0


def _audit(given: argparse.Namespace) -> int:
    from safealloc.commands import audit

    return audit.main(given)


_COMMANDS = {"repro": _repro, "doctor": _doctor, "plan": _plan, "audit": _audit}


def _parsers() -> tuple[_Parser, dict[str, _Parser]]:
    parser = _Parser(
        prog="safealloc", description="NVFP4 scale buffers whose padding is zero at every CUDA graph replay."
    )
    parser.add_argument("--version", action="version", version=f"safealloc {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)

    summary = "the published NaN tables again, what causes them, and the same calls through safealloc"
    repro = subparsers.add_parser(
        "repro",
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}. Exits 1 where a row does not come out as stated.",
    )
    repro.add_argument("--device", help="cpu, cuda or cuda:N (cuda where there is one, else cpu)")
    repro.add_argument(
        "--backend",
        default="auto",
        help="of the products: auto (ours), triton, reference, or a FlashInfer backend for the section that goes through "
        "safealloc (%(default)s)",
    )
    repro.add_argument("--seed", type=_seed, default=0, help="of the random operands and orders (%(default)s)")
    repro.add_argument(
        "--replays",
        type=_at_least_1,
        default=200,
        metavar="N",
        help="of each CUDA graph, on a CUDA device (%(default)s)",
    )

    doctor = subparsers.add_parser(
        "doctor",
        help="what is installed, which backends and vLLM hooks work here, and why the others do not",
        description="What is installed, which backends run on each device, which hooks fit the installed vLLM, and why the "
        "others do not.",
    )
    plan = subparsers.add_parser(
        "plan",
        help="every buffer a pool will hold for a model in vLLM, and its bytes",
        description="Every buffer that a pool will hold on each rank for a model in vLLM, from its Hugging Face "
        "configuration.",
    )
    plan.add_argument("config", type=Path, metavar="CONFIG", help="a config.json, or the folder it is in")
    plan.add_argument(
        "--tensor-parallel",
        "--tp",
        type=_at_least_1,
        default=1,
        metavar="N",
        help="ranks a layer is split over (%(default)s)",
    )
    plan.add_argument(
        "--expert-parallel",
        action="store_true",
        help="the ranks share out whole routed experts (vLLM's --enable-expert-parallel); without it they split each",
    )
    captured = plan.add_mutually_exclusive_group()
    captured.add_argument(
        "--max-size",
        type=_rows,
        default=512,
        metavar="N",
        help="largest of vLLM's default batch sizes; vLLM's own is 1024 on compute capability 10.x (%(default)s)",
    )
    captured.add_argument(
        "--sizes", type=_sizes, metavar="N,N,...", help="captured batch sizes, instead of vLLM's default"
    )
    plan.add_argument(
        "--layout", choices=("128x4", "trtllm"), default="128x4", help="trtllm: 8x4 for up to 32 rows (%(default)s)"
    )
    from safealloc.commands import audit as audit_command

    audit = subparsers.add_parser("audit", help=audit_command.SUMMARY)
    audit_command.add_arguments(audit)
    commands = {"repro": repro, "doctor": doctor, "plan": plan, "audit": audit}
    for command in commands.values():
        command.add_argument("--json", type=Path, metavar="FILE", help="write the result there too")
    return parser, commands


def _seed(text: str) -> int:
    return _integer(text, 0)


def _at_least_1(text: str) -> int:
    return _integer(text, 1)


def _integer(text: str, least: int) -> int:
    """Of 63 bits at most, 19 digits: thousands of them ``int`` refuses with an error of its own."""
    if not (text.isascii() and text.isdecimal() and len(text) <= 19 and least <= int(text) < 2**63):
        raise argparse.ArgumentTypeError(f"must be an integer from {least} to 2**63 - 1, got {text!r}")
    return int(text)


def _rows(text: str) -> int:
    rows = _at_least_1(text)
    if rows > _MOST_ROWS:
        raise argparse.ArgumentTypeError(f"must be at most {_MOST_ROWS}, got {text}")
    return rows


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(_rows(part.strip()) for part in text.split(","))

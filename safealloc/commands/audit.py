"""``safealloc audit``: which producers leave padding dirty on this machine, which GEMMs read it, and what goes together."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import re
import shlex
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.console import Console
from rich.progress import Progress

from safealloc import ScalePool
from safealloc._checks import checked_device
from safealloc.audit.combinations import AuditedConsumer, AuditedProducer, Combination, combine, combine_in_pool, pairs
from safealloc.audit.consumers import CONSUMER_SHAPES, audit_consumer
from safealloc.audit.findings import CANNOT_RUN, Finding, groups
from safealloc.audit.known import CONSUMERS, PRODUCERS, KnownConsumer, KnownProducer
from safealloc.audit.producers import PRODUCER_SHAPES, audit_producer, synchronize
from safealloc.commands import machine, report
from safealloc.formats.layout import SfLayout, short

QUICK_SHAPES = ((5, 480), (40, 512))
"""``(rows, k)`` with padding rows and columns, and across a tile of 8 rows."""

HEADINGS = ("", "layout", "shapes", "verdict", "details")


class Tell(Protocol):
    """Tells whoever waits what is audited, and how many of how many steps are done."""

    def __call__(self, what: str, done: int, steps: int) -> None: ...


@dataclass(frozen=True, slots=True)
class Options:
    """What to audit, checked.

    Attributes:
        device: where.
        with_pool: judge combinations in pool buffers, and run them there.
        quick: two shapes only.
        skip: names of producers and consumers that are left out.
    """

    device: torch.device
    with_pool: bool
    quick: bool
    skip: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Refusal:
    """What cannot run on this machine at any shape.

    Attributes:
        name: of the producer or consumer.
        layouts: in which it cannot, for the same reason.
        reason: a sentence.
    """

    name: str
    layouts: tuple[SfLayout, ...]
    reason: str

    def cells(self) -> tuple[str, str, str, str, str]:
        return self.name, ", ".join(map(short, self.layouts)), "-", CANNOT_RUN, self.reason


@dataclass(frozen=True, slots=True)
class Loss:
    """Something made the device unusable, for this process: after an illegal memory access every later call fails as well.

    Attributes:
        name: of the producer or consumer.
        what: where that was, and the error.
    """

    name: str
    what: str


@dataclass(frozen=True, slots=True)
class Side:
    """All producers, or all consumers: what ran, and what could not."""

    findings: Sequence[Finding]
    refusals: Sequence[Refusal]

    def rows(self) -> list[tuple[tuple[str, ...], bool]]:
        """The table's: what ran first, and whether a row is fine."""
        ran = [(group.cells(), group.fine) for group in groups(self.findings)]
        return [*ran, *((refusal.cells(), True) for refusal in self.refusals)]

    def as_dicts(self) -> list[dict[str, Any]]:
        refused = [
            {"name": refusal.name, "layout": short(layout), "verdict": CANNOT_RUN, "details": refusal.reason}
            for refusal in self.refusals
            for layout in refusal.layouts
        ]
        return [finding.as_dict() for finding in self.findings] + refused


@dataclass(frozen=True, slots=True)
class Result:
    """What was found.

    Attributes:
        not_judged: what vLLM uses on this machine, but was left out or failed at each shape, in words.
        loss: what ended the audit early.
    """

    options: Options
    machine: Mapping[str, str | None]
    versions: Mapping[str, str | None]
    producers: Side
    consumers: Side
    combinations: Sequence[Combination]
    not_judged: Sequence[str] = ()
    loss: Loss | None = None

    @property
    def chosen(self) -> list[Combination]:
        """Those that vLLM would choose."""
        return [combination for combination in self.combinations if combination.vllm]

    @property
    def safe(self) -> bool:
        """Whether all that vLLM would choose here is; so it is where nothing of that can run. An early end is not."""
        return self.loss is None and all(combination.safe for combination in self.chosen)

    @property
    def summary(self) -> str:
        if self.loss is not None:
            return f"STOPPED: {self.loss.what}. --skip {shlex.quote(self.loss.name)} audits the rest."
        if self.not_judged:
            return f"{self._verdict} Not judged: {'; '.join(self.not_judged)}."
        return self._verdict

    @property
    def _verdict(self) -> str:
        where = "in a pool" if self.options.with_pool else "without a pool"
        if not self.chosen:
            return "No producer and consumer that vLLM would choose for NVFP4 can run here: nothing to judge."
        unsafe = [combination for combination in self.chosen if not combination.safe]
        if not unsafe:
            return f"All {len(self.chosen)} combinations that vLLM would choose here are safe {where}."
        return f"UNSAFE {where}: {len(unsafe)} of the {len(self.chosen)} combinations that vLLM would choose here."

    def as_dict(self) -> dict[str, Any]:
        return {
            "command": "safealloc audit",
            "machine": dict(self.machine),
            "versions": dict(self.versions),
            "with_pool": self.options.with_pool,
            "quick": self.options.quick,
            "safe": self.safe,
            "summary": self.summary,
            "not_judged": list(self.not_judged),
            "stopped": None if self.loss is None else asdict(self.loss),
            "producers": self.producers.as_dicts(),
            "consumers": self.consumers.as_dicts(),
            "combinations": [combination.as_dict() for combination in self.combinations],
        }


def checked_options(device: str | None, with_pool: bool, quick: bool, skip: Iterable[str] = ()) -> Options:
    """What the user asked for.

    Raises:
        UsageError: no such device, or nothing of a name to skip.
    """
    left_out = frozenset(skip)
    names = {one.name for one in PRODUCERS} | {one.name for one in CONSUMERS}
    if unknown := left_out - names:
        raise report.UsageError(f"--skip must be one of {', '.join(sorted(names))}, got {min(unknown)!r}")
    if device is not None and not re.fullmatch(r"cpu|cuda(:\d{1,2})?", device):  # of an index PyTorch keeps 8 bits
        raise report.UsageError(f"--device must be cpu, cuda or cuda:N, got {device!r}")
    try:
        return Options(checked_device(device), with_pool, quick, left_out)
    except ValueError as error:
        raise report.UsageError(str(error)) from error


@contextlib.contextmanager
def progress() -> Iterator[Tell]:
    """A bar on standard error if that is a terminal; gone afterwards."""
    out = Console(stderr=True)
    if not out.is_terminal:
        yield lambda what, done, steps: None
        return
    with Progress(console=out, transient=True) as bar:
        task = bar.add_task("audit")

        def tell(what: str, done: int, steps: int) -> None:
            bar.update(task, description=what, completed=done, total=steps)

        yield tell


def run(options: Options, tell: Tell) -> Result:
    """Audit all that is known, until something makes the device unusable; what a package prints goes to standard error."""
    device = options.device
    here = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    everything: tuple[KnownProducer | KnownConsumer, ...] = (*PRODUCERS, *CONSUMERS)
    rows = [(known, layout) for known in everything for layout in known.layouts]
    audited: list[AuditedProducer | AuditedConsumer] = []
    refused: dict[tuple[str, str, str], list[SfLayout]] = {}
    not_judged: list[str] = []
    loss: Loss | None = None
    with contextlib.redirect_stdout(sys.stderr), here:
        description, versions = (
            machine.describe(device),
            machine.versions(),
        )  # before the device can become unusable
        for done, (known, layout) in enumerate(rows):
            row = f"{known.name}, {short(layout)}"
            tell(row, done, len(rows) + 1)
            refusal = known.refusal(device, layout)
            reason = refusal or _left_out(known.name, options, loss)
            if reason is not None:
                refused.setdefault((type(known).__name__, known.name, reason), []).append(layout)
            else:
                one = _audited(known, layout, options)
                audited.append(one)
                loss = _loss(device, one)
                if all(finding.verdict == CANNOT_RUN for finding in one.findings):
                    reason = "it failed"
            if layout in known.vllm and refusal is None and reason is not None:
                not_judged.append(f"{row} ({reason})")
        tell("combinations", len(rows), len(rows) + 1)
        producers = [one for one in audited if isinstance(one, AuditedProducer)]
        consumers = [one for one in audited if isinstance(one, AuditedConsumer)]
        combinations: list[Combination] = []
        if not options.with_pool:
            combinations = [combine(*pair) for pair in pairs(producers, consumers)]
        elif loss is None:
            combinations, loss = _in_a_pool(device, pairs(producers, consumers))
    return Result(
        options,
        description,
        versions,
        Side([finding for producer in producers for finding in producer.findings], _refusals(refused, KnownProducer)),
        Side([finding for consumer in consumers for finding in consumer.findings], _refusals(refused, KnownConsumer)),
        combinations,
        not_judged,
        loss,
    )


def _left_out(name: str, options: Options, loss: Loss | None) -> str | None:
    """Why something that could run here is not tried."""
    if name in options.skip:
        return "left out by --skip"
    return None if loss is None else f"not tried: {options.device} is unusable since {loss.name}"


def _audited(
    known: KnownProducer | KnownConsumer, layout: SfLayout, options: Options
) -> AuditedProducer | AuditedConsumer:
    name, device = known.name, options.device
    if isinstance(known, KnownProducer):
        shapes = QUICK_SHAPES if options.quick else PRODUCER_SHAPES
        made = audit_producer(known.fn, name=name, layout=layout, shapes=shapes, device=device, of=known.of)
        return AuditedProducer(known, layout, made)
    shapes = QUICK_SHAPES if options.quick else CONSUMER_SHAPES
    read = audit_consumer(known.fn, name=name, layout=layout, shapes=shapes, device=device)
    return AuditedConsumer(known, layout, read)


def _in_a_pool(
    device: torch.device, every: Iterable[tuple[AuditedProducer, AuditedConsumer]]
) -> tuple[list[Combination], Loss | None]:
    """Run pairs through a pool, until one makes the device unusable."""
    combinations = []
    pool = ScalePool(device)
    for producer, consumer in every:
        combination = combine_in_pool(producer, consumer, pool)
        combinations.append(combination)
        if not combination.safe and not _usable(device):  # the pool goes with the process: closing it would fail
            pair = f"{combination.producer} with {combination.consumer}, {short(combination.layout)}"
            return combinations, Loss(combination.consumer, f"{device} is unusable since {pair}: {combination.why}")
    pool.close()
    return combinations, None


def _loss(device: torch.device, one: AuditedProducer | AuditedConsumer) -> Loss | None:
    """If the device is unusable: the shape since which nothing ran."""
    findings: Sequence[Finding] = one.findings
    last = list(itertools.takewhile(lambda finding: finding.verdict == CANNOT_RUN, reversed(findings)))
    if not last or _usable(device):
        return None
    return Loss(one.known.name, f"{device} is unusable since {last[-1]}")


def _usable(device: torch.device) -> bool:
    try:
        synchronize(device)
    except Exception:
        return False
    return True


def show(result: Result, out: Console) -> None:
    """Print a result."""
    out.print(f"{_title(result)}\n")
    report.table(out, "Producers", HEADINGS, result.producers.rows())
    report.table(out, "Consumers", HEADINGS, result.consumers.rows())
    if result.combinations:
        rows = ((cells, combination.safe) for combination, cells in _combination_cells(result))
        report.table(out, _combinations_title(result), _COMBINATION_HEADINGS, rows)
    out.print(result.summary, style="bold")


def markdown(result: Result) -> str:
    """The tables for a bug report."""
    lines = [f"`safealloc audit`: {_title(result)}", ""]
    lines += _markdown_table("Producers", HEADINGS, (cells for cells, _ in result.producers.rows()))
    lines += _markdown_table("Consumers", HEADINGS, (cells for cells, _ in result.consumers.rows()))
    if result.combinations:
        combinations = (cells for _, cells in _combination_cells(result))
        lines += _markdown_table(_combinations_title(result), _COMBINATION_HEADINGS, combinations)
    return "\n".join([*lines, result.summary, ""])


_COMBINATION_HEADINGS = ("producer", "consumer", "layout", "vLLM", "safe", "why not")


def _combinations_title(result: Result) -> str:
    return f"Combinations, {'in a pool' if result.options.with_pool else 'without a pool'}"


def _combination_cells(result: Result) -> list[tuple[Combination, tuple[str, ...]]]:
    return [
        (
            found,
            (
                found.producer,
                found.consumer,
                short(found.layout),
                "yes" if found.vllm else "-",
                "yes" if found.safe else "NO",
                found.why,
            ),
        )
        for found in result.combinations
    ]


def _title(result: Result) -> str:
    machine = ", ".join(f"{name} {value}" for name, value in result.machine.items() if name not in ("device", "name"))
    versions = ", ".join(f"{name} {version}" for name, version in result.versions.items() if version is not None)
    where = f"{result.machine['device']} ({result.machine['name']})"
    return ", ".join(part for part in (where, machine, versions) if part)


def _markdown_table(title: str, headings: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [f"### {title}", "", _markdown_row(headings), _markdown_row(["---"] * len(headings))]
    return [*lines, *map(_markdown_row, rows), ""]


def _markdown_row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _refusals(found: Mapping[tuple[str, str, str], list[SfLayout]], kind: type) -> list[Refusal]:
    return [
        Refusal(name, tuple(layouts), reason) for (of, name, reason), layouts in found.items() if of == kind.__name__
    ]


SUMMARY = "which producers here leave padding dirty, which GEMMs read it, and in which layout"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="cpu, cuda or cuda:N (cuda where there is one, else cpu)")
    parser.add_argument(
        "--with-pool", action="store_true", help="judge combinations in pool buffers, and run each of them there"
    )
    parser.add_argument("--quick", action="store_true", help="two shapes only")
    parser.add_argument(
        "--skip",
        action="append",
        default=[],
        metavar="NAME",
        help="leave out the producer and the consumer of this name, as the tables have it; may be given several times",
    )
    parser.add_argument(
        "--markdown", type=Path, metavar="FILE", help="write the tables there for a bug report; - prints them"
    )


def main(given: argparse.Namespace) -> int:
    report.check_environment()
    report.check_writable(given.json)
    report.check_writable(given.markdown, "--markdown")
    options = checked_options(given.device, given.with_pool, given.quick, given.skip)
    with progress() as tell:
        result = run(options, tell)
    report.write_json(given.json, result.as_dict())
    if given.markdown is not None:
        report.write(given.markdown, markdown(result), "--markdown")
    if report.STANDARD_OUTPUT not in (given.json, given.markdown):
        with report.printing():
            show(result, report.console())
    return 0 if result.safe else 1

"""``safealloc audit``: which producers leave padding dirty on this machine, which GEMMs read it, and what goes together."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import shlex
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from safealloc import ScalePool, _optional
from safealloc._checks import checked_device
from safealloc.audit.combinations import Audited, AuditedConsumer, AuditedProducer, Combination, combine, pairs
from safealloc.audit.findings import CANNOT_RUN, LEGEND, Finding, table_rows
from safealloc.audit.known import CONSUMERS, PRODUCERS, Known, KnownConsumer, KnownProducer
from safealloc.audit.producers import synchronize
from safealloc.commands import machine, report
from safealloc.formats.layout import SfLayout, short
from safealloc.integrations.startup import Launch
from safealloc.integrations.vllm.proof import Finding as Compared
from safealloc.integrations.vllm.proof import prove
from safealloc.integrations.vllm.replace import DENSE, EXPERTS, OPS, SILU, SILU_EXPERTS, Op
from safealloc.ops.backends import QUANTIZERS, call_for

SUMMARY = "which producers here leave padding dirty, which GEMMs read it, and in which layout"

QUICK_SHAPES = ((5, 480), (40, 512))
"""``(rows, k)`` with padding rows and columns, and across a tile of 8 rows."""

QUANTIZED = (
    (DENSE, (4096, 8192), 0, (1, 8, 32, 256)),
    (SILU, (14336,), 0, (1, 8, 32, 256)),
    (EXPERTS, (7168,), 256, (8, 64, 512)),
    (SILU_EXPERTS, (2048,), 256, (8, 64, 512)),
)
"""Where our quantizers are compared with vLLM's: op, k, experts and row counts."""

EXIT_CODES = {True: 0, False: 1, None: 3}
"""By whether all that vLLM would choose is safe; 2 is the exit code of bad arguments."""


@dataclass(frozen=True, slots=True)
class Loss:
    """Something made the device unusable, for this process: after an illegal memory access every later call fails as well."""

    name: str  # of the producer or consumer
    what: str  # where that was, and the error


@dataclass(frozen=True, slots=True)
class Side:
    """All producers, or all consumers."""

    audited: list[Audited[Any]] = field(default_factory=list)  # what ran
    # a known one and the reason why it was not run, to the layouts for which that is so
    refusals: dict[tuple[Known, str], list[SfLayout]] = field(default_factory=dict)

    @property
    def findings(self) -> list[Finding]:
        return [finding for one in self.audited for finding in one.findings]

    def rows(self) -> list[tuple[tuple[str, ...], bool]]:
        """The table's: what ran first, and whether a row is fine."""
        refused = self.refusals.items()
        not_run = [
            (known.name, f"{', '.join(map(short, layouts))} {known.format.name}", "-", "-", CANNOT_RUN, why)
            for (known, why), layouts in refused
        ]
        return table_rows(self.findings) + [(cells, True) for cells in not_run]

    def as_dicts(self) -> list[dict[str, Any]]:
        refused = [
            {
                "name": known.name,
                "layout": short(layout),
                "format": known.format.name,
                "verdict": CANNOT_RUN,
                "details": reason,
            }
            for (known, reason), layouts in self.refusals.items()
            for layout in layouts
        ]
        return [finding.as_dict() for finding in self.findings] + refused


@dataclass(frozen=True, slots=True)
class Result:
    """What was found."""

    with_pool: bool  # combinations are judged in pool buffers, and ran there
    quick: bool  # two shapes only
    machine: Mapping[str, str | None]
    versions: Mapping[str, str | None]
    producers: Side
    consumers: Side
    combinations: Sequence[Combination]
    compared: Sequence[Compared]  # quantizers of vLLM that ours would replace
    not_compared: Mapping[str, str]  # of these, what cannot run, and why
    not_judged: Sequence[str]  # what vLLM uses on this machine, but was left out or failed at each shape, in words
    loss: Loss | None  # what ended the audit early

    @property
    def chosen(self) -> list[Combination]:
        """Those that vLLM would choose."""
        return [combination for combination in self.combinations if combination.vllm]

    @property
    def safe(self) -> bool | None:
        """Whether all of these are, which nobody knows after an early end; ``None`` where there are none."""
        if self.loss is not None or not all(combination.safe for combination in self.chosen):
            return False
        return True if self.chosen else None

    @property
    def summary(self) -> str:
        if self.loss is not None:
            return f"STOPPED: {self.loss.what}. --skip {shlex.quote(self.loss.name)} audits the rest."
        where = "in a pool" if self.with_pool else "without a pool"
        chosen = f"{len(self.chosen)} combinations that vLLM would choose here"
        unsafe = sum(not combination.safe for combination in self.chosen)
        verdict = f"UNSAFE {where}: {unsafe} of the {chosen}." if unsafe else f"All {chosen} are safe {where}."
        if self.safe is None:
            verdict = "No producer and consumer that vLLM would choose can run here: nothing to judge."
        return f"{verdict} Not judged: {'; '.join(self.not_judged)}." if self.not_judged else verdict

    def as_dict(self) -> dict[str, Any]:
        return {
            "command": "safealloc audit",
            "machine": dict(self.machine),
            "versions": dict(self.versions),
            "with_pool": self.with_pool,
            "quick": self.quick,
            "safe": self.safe,
            "summary": self.summary,
            "not_judged": list(self.not_judged),
            "stopped": None if self.loss is None else asdict(self.loss),
            "producers": self.producers.as_dicts(),
            "consumers": self.consumers.as_dicts(),
            "replaced": [found.as_dict() for found in self.compared],
            "not_replaced": dict(self.not_compared),
            "combinations": [combination.as_dict() for combination in self.combinations],
        }


def run(
    device: torch.device, progress: report.Progress, *, with_pool: bool, quick: bool, skip: Collection[str] = ()
) -> Result:
    """Audit all that is known but ``skip``, until something makes the device unusable; packages print to standard error."""
    shapes = QUICK_SHAPES if quick else None
    here = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    everything: tuple[KnownProducer | KnownConsumer, ...] = (*PRODUCERS, *CONSUMERS)
    rows = [(known, layout) for known in everything for layout in known.layouts]
    producers, consumers = Side(), Side()
    not_judged: list[str] = []
    loss: Loss | None = None
    with contextlib.redirect_stdout(sys.stderr), here:
        description, versions = machine.describe(device), machine.versions()  # before the device may become unusable
        for done, (known, layout) in enumerate(rows):
            row = f"{known.name}, {short(layout)}"
            progress(row, done / (len(rows) + 2))
            side = producers if isinstance(known, KnownProducer) else consumers
            refusal = reason = known.refusal(device, layout)
            if refusal is None and known.name in skip:
                reason = "left out by --skip"
            elif refusal is None and loss is not None:
                reason = f"not tried: {device} is unusable since {loss.name}"
            if reason is not None:
                side.refusals.setdefault((known, reason), []).append(layout)
            else:
                one: Audited[Any] = Audited(known, layout, known.audit(layout, shapes, device))
                side.audited.append(one)
                loss = _loss(device, one.findings)
                reason = None if one.ran else "it failed"
            if layout in known.vllm and refusal is None and reason is not None:
                not_judged.append(f"{row} ({reason})")
        progress("combinations", len(rows) / (len(rows) + 2))
        every = pairs(producers.audited, consumers.audited)
        combinations: list[Combination] = []
        if not with_pool:
            combinations = [combine(*pair) for pair in every]
        elif loss is None:
            combinations, loss = _in_a_pool(device, every)
        progress("quantizers", (len(rows) + 1) / (len(rows) + 2))
        compared: list[Compared] = []
        not_compared: dict[str, str] = {}
        if loss is None:
            compared, not_compared, loss = _compare(device, quick=quick, skip=skip)
    sides = producers, consumers, combinations, compared, not_compared
    return Result(with_pool, quick, description, versions, *sides, not_judged, loss)


def _compare(
    device: torch.device, *, quick: bool, skip: Collection[str]
) -> tuple[list[Compared], dict[str, str], Loss | None]:
    """Our quantizers beside those of vLLM that they would replace, until one makes the device unusable."""
    refusal = QUANTIZERS["vllm"].why_not(call_for(device, SfLayout.layout_128x4))
    if refusal is None:
        _optional.require("vllm._custom_ops")  # defines the ops
    found: list[Compared] = []
    refused = {}
    for op, all_k, experts, rows in QUANTIZED:
        name = op_name(op)
        reason = refusal or ("left out by --skip" if name in skip else None)
        reason = reason or (f"this vLLM has no {op.name}" if op.overload() is None else op.changed())
        if reason is not None:
            refused[name] = reason
            continue
        launches = {Launch(op.name, k, torch.bfloat16, experts): rows[:1] if quick else rows for k in all_k}
        found += prove(launches, device).findings
        if not _usable(device):
            return found, refused, Loss(name, f"{device} is unusable since {name} and our kernel ran side by side")
    return found, refused, None


def op_name(op: Op) -> str:
    """Of an op of vLLM, as the tables have it."""
    return f"vllm {op.name.partition('.')[0]}"


def _in_a_pool(
    device: torch.device, every: Iterable[tuple[AuditedProducer, AuditedConsumer]]
) -> tuple[list[Combination], Loss | None]:
    """Run pairs through a pool, until one makes the device unusable."""
    combinations = []
    pool = ScalePool(device)
    for producer, consumer in every:
        combination = combine(producer, consumer, pool)
        combinations.append(combination)
        if not combination.safe and not _usable(device):  # the pool ends with the process: closing it would fail
            pair = f"{combination.producer} with {combination.consumer}, {short(combination.layout)}"
            return combinations, Loss(combination.consumer, f"{device} is unusable since {pair}: {combination.why}")
    pool.close()
    return combinations, None


def _loss(device: torch.device, findings: Sequence[Finding]) -> Loss | None:
    """If the device is unusable: the shape since which nothing ran."""
    last = list(itertools.takewhile(lambda finding: finding.verdict == CANNOT_RUN, reversed(findings)))
    if not last or _usable(device):
        return None
    return Loss(last[-1].name, f"{device} is unusable since {last[-1]}")


def _usable(device: torch.device) -> bool:
    try:
        synchronize(device)
    except Exception:
        return False
    return True


# --- Output ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Table:
    """A table of a report, and the columns that a terminal shows in a row's first line, where nothing is wrapped or cut."""

    title: str
    headings: tuple[str, ...]
    rows: Sequence[tuple[tuple[str, ...], bool]]  # with whether it is fine
    legend: Mapping[str, str]
    first: tuple[int, ...]


def show(result: Result, out: Console) -> None:
    """Print a result."""
    out.print(f"{_title(result)}\n")
    for table in _tables(result):
        if out.is_terminal:
            _show_wrapped(table, out)
        else:
            report.table(out, table.title, table.headings, table.rows)
        for word, meaning in table.legend.items():
            out.print(f"{word}: {meaning}")
        out.print()
    out.print(result.summary, style="bold")


def _show_wrapped(table: _Table, out: Console) -> None:
    """The first columns on a line, and below it the others, which may need several."""
    lines = [(table.headings, True), *table.rows]
    widths = {column: max(len(cells[column]) for cells, _ in lines) for column in table.first}
    out.print(Text(table.title, style="bold"))
    for cells, fine in lines:
        style = "" if fine else "bold red"
        first = "  ".join(cells[column].ljust(width) for column, width in widths.items())
        out.print(Text(first.rstrip(), style), soft_wrap=True)
        rest = [
            f"{heading}: {cell}"
            for column, (heading, cell) in enumerate(zip(table.headings, cells, strict=True))
            if column not in table.first and cell not in ("", "-", heading)
        ]
        if rest:
            out.print(Padding(Text("; ".join(rest), style), (0, 0, 0, 4)))
    out.print()


def markdown(result: Result) -> str:
    """The tables for a bug report."""
    lines = [f"`safealloc audit`: {_title(result)}", ""]
    for table in _tables(result):
        rows = [table.headings, ("---",) * len(table.headings), *(cells for cells, _ in table.rows)]
        lines += [f"### {table.title}", ""]
        lines += [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |" for cells in rows]
        lines += ["", *(f"- {word}: {meaning}" for word, meaning in table.legend.items()), ""]
    return "\n".join([*lines, result.summary, ""])


def _tables(result: Result) -> list[_Table]:
    tables = []
    names = {op.name: op_name(op) for op in OPS}
    compared: list[tuple[tuple[str, ...], bool]] = [
        (_cells(names[found.launch.op], found), not found.differs) for found in result.compared
    ]
    compared += [((name, *"-----", CANNOT_RUN, why), True) for name, why in result.not_compared.items()]
    for title, side, found in (("Producers", result.producers, "wrote"), ("Consumers", result.consumers, "read")):
        rows = side.rows()
        verdicts = {cells[4] for cells, _ in rows}
        legend = {verdict: meaning for verdict, meaning in LEGEND.items() if verdict in verdicts}
        headings = ("name", "scales", found, "shapes", "verdict", "details")
        tables.append(_Table(title, headings, rows, legend, (0, 1, 4)))
    if result.combinations:
        title = f"Combinations, {'in a pool' if result.with_pool else 'without a pool'}"
        headings = ("producer", "consumer", "scales", "vLLM", "safe", "why not")
        rows = [(pair.cells(), pair.safe) for pair in result.combinations]
        legend = {"vLLM": "whether vLLM would choose the pair here for some model"}
        tables.append(_Table(title, headings, rows, legend, (4, 0, 1)))
    if compared:
        title = "vLLM's quantizers that SAFEALLOC_QUANTIZER=safealloc would replace"
        columns = ("name", "rows", "k", "us", "vLLM us", "factor", "bytes", "details")
        legend = {"us": "a call of ours as a graph node", "factor": "how many times faster ours is"}
        tables.append(_Table(title, columns, compared, legend, (0, 1, 2, 6)))
    return tables


def _cells(name: str, found: Compared) -> tuple[str, ...]:
    times = ("-", "-", "-")
    if found.factor is not None:
        times = (f"{found.ours_us:.2f}", f"{found.theirs_us:.2f}", f"{found.factor:.2f}")
    return (name, str(found.rows), str(found.launch.k), *times, "differ" if found.differs else "equal", found.differs)


def _title(result: Result) -> str:
    described = (f"{name} {value}" for name, value in result.machine.items() if name not in ("device", "name"))
    versions = (f"{name} {version}" for name, version in result.versions.items() if version is not None)
    return ", ".join((f"{result.machine['device']} ({result.machine['name']})", *described, *versions))


# --- Command line ---------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Which producers of NVFP4 and MX scales on this machine leave the padding of scale buffers dirty, which GEMMs read "
        "it, and in which layout and format scales are written and read. Exit code 0: all combinations that vLLM would "
        "choose here are safe; 1: one is unsafe, or a kernel made the device unusable; 2: bad arguments; 3: nothing that "
        "vLLM would choose can run here, so that nothing was judged."
    )
    report.add_device(parser)
    about = "judge combinations in pool buffers, and run each of them there"
    parser.add_argument("--with-pool", action="store_true", help=about)
    parser.add_argument("--quick", action="store_true", help="two shapes only")
    names = sorted({known.name for known in (*PRODUCERS, *CONSUMERS)} | set(map(op_name, OPS)))
    about = "leave out the producer and the consumer of this name, as the tables have it; may be given several times"
    parser.add_argument("--skip", action="append", choices=names, default=[], metavar="NAME", help=about)
    about = "write the tables there for a bug report; - prints them instead of the plain ones"
    parser.add_argument("--markdown", type=Path, metavar="FILE", help=about)


def main(given: argparse.Namespace) -> int:
    """Run the command; :data:`EXIT_CODES`."""
    report.check_environment()
    printed = (given.json, given.markdown).count(report.STANDARD_OUTPUT)
    if printed > 1:
        raise report.UsageError("--json - and --markdown - cannot be given together: there is one standard output")
    report.check_writable(given.json)
    report.check_writable(given.markdown, "--markdown")
    device = checked_device(given.device)
    with report.progress("audit") as progress:
        result = run(device, progress, with_pool=given.with_pool, quick=given.quick, skip=given.skip)
    report.write_json(given.json, result.as_dict())
    if given.markdown is not None:
        report.write(given.markdown, markdown(result), "--markdown")
    if not printed:
        with report.printing():
            show(result, report.console())
    return EXIT_CODES[result.safe]

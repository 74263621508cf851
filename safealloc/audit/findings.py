"""What an audit finds: verdicts, with the numbers they rest on, in words and for JSON."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from safealloc.formats.layout import SfLayout, short

ZEROES = "zeroes padding"
NO_PADDING = "no padding"
LEAVES = "leaves padding"
DIRTIES = "dirties padding"
BEYOND = "writes beyond"
WRONG_SCALES = "wrong scales"
WRONG_DATA = "wrong data"

ISOLATES = "isolates"
READS = "reads padding"
WRONG_LAYOUT = "wrong layout"
WRONG_RESULT = "wrong result"

CANNOT_RUN = "cannot run"

SAFE_PRODUCER = (ZEROES, NO_PADDING)
POOL_PRODUCER = (*SAFE_PRODUCER, LEAVES)
SAFE_CONSUMER = (ISOLATES,)
POOL_CONSUMER = (*SAFE_CONSUMER, READS)
"""The verdicts that are all right: on memory that anybody wrote before, and with padding that a pool keeps at zero."""

KINDS = ("rows", "columns")
"""Padding rows are whole scale rows behind the matrix; padding columns lie beside its real rows."""


@dataclass(frozen=True, slots=True)
class PaddingState:
    """What became of padding bytes of one kind.

    Attributes:
        zeroed, left, dirtied: how many bytes are zero afterwards, are as they were, hold something else.
    """

    zeroed: int
    left: int
    dirtied: int


@dataclass(frozen=True, slots=True)
class ProducerFinding:
    """One producer at one shape.

    Attributes:
        name, layout, rows, k: what was run.
        verdict: one of the verdicts above, the worst that applies.
        details: why, in words.
        padding_rows, padding_columns: what became of them; ``None`` where it could not run.
        beyond: bytes written outside the scale and data buffers.
        scales_off: real scales that are one e4m3 step off the reference's; more than a step is a verdict.
        data_off: e2m1 values that are one step off.
        returned: whether it allocated its results by itself.
    """

    name: str
    layout: SfLayout
    rows: int
    k: int
    verdict: str
    details: str
    padding_rows: PaddingState | None = None
    padding_columns: PaddingState | None = None
    beyond: int = 0
    scales_off: int = 0
    data_off: int = 0
    returned: bool = False

    @property
    def leaves(self) -> frozenset[str]:
        """Kinds of padding of which bytes were left as they were."""
        return frozenset(kind for kind, state in self._states() if state.left)

    @property
    def dirties(self) -> frozenset[str]:
        """Kinds of padding in which it wrote something else than zero."""
        return frozenset(kind for kind, state in self._states() if state.dirtied)

    def _states(self) -> list[tuple[str, PaddingState]]:
        both = zip(KINDS, (self.padding_rows, self.padding_columns), strict=True)
        return [(kind, state) for kind, state in both if state is not None]

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "layout": short(self.layout)}

    def __str__(self) -> str:
        return _words(self.name, self.layout, self.rows, self.k, self.verdict, self.details)


@dataclass(frozen=True, slots=True)
class Change:
    """Real outputs that changed when padding was poisoned.

    Attributes:
        kind: "rows" or "columns".
        byte: what the padding held instead of zero.
        rows: output rows that changed.
        nan_rows: how many of them became NaN or infinite.
        largest: largest finite difference over the largest correct output.
    """

    kind: str
    byte: int
    rows: tuple[int, ...]
    nan_rows: int
    largest: float


@dataclass(frozen=True, slots=True)
class ConsumerFinding:
    """One consumer at one shape.

    Attributes:
        name, layout, rows, k: what was run; the layout is the one it was told.
        verdict: one of the verdicts above, the worst that applies.
        details: why, in words.
        changes: what poisoned padding changed.
        reads: layouts in which it reads the scales, as far as this shape tells them apart; empty: none that is known, or
            ``None`` where it could not run.
        error: largest difference to the reference with clean padding, over the largest correct output.
        noise: largest difference between runs on the same operands, in the same unit.
    """

    name: str
    layout: SfLayout
    rows: int
    k: int
    verdict: str
    details: str
    changes: tuple[Change, ...] = ()
    reads: tuple[SfLayout, ...] | None = None
    error: float = 0.0
    noise: float = 0.0

    @property
    def reads_padding(self) -> frozenset[str]:
        """Kinds of padding that reach a real output."""
        return frozenset(change.kind for change in self.changes)

    def as_dict(self) -> dict[str, Any]:
        reads = None if self.reads is None else [short(layout) for layout in self.reads]
        return {**asdict(self), "layout": short(self.layout), "reads": reads}

    def __str__(self) -> str:
        return _words(self.name, self.layout, self.rows, self.k, self.verdict, self.details)


Finding = ProducerFinding | ConsumerFinding


def _words(name: str, layout: SfLayout, rows: int, k: int, verdict: str, details: str) -> str:
    return f"{name}, {short(layout)}, {rows} x {k}: {verdict}{f' ({details})' if details else ''}"


@dataclass(frozen=True, slots=True)
class Group:
    """Findings of the same name, layout and verdict: a row of the table.

    Attributes:
        findings: at least one; the longest details stand for all.
    """

    findings: tuple[Finding, ...]

    @property
    def fine(self) -> bool:
        return self.findings[0].verdict in (*SAFE_PRODUCER, *SAFE_CONSUMER, CANNOT_RUN)

    def cells(self) -> tuple[str, str, str, str, str]:
        """Name, layout, shapes, verdict, details."""
        first = self.findings[0]
        shapes = ", ".join(f"{found.rows}x{found.k}" for found in self.findings)
        most = max(self.findings, key=lambda found: len(found.details))
        details = most.details
        if len({found.details for found in self.findings}) > 1:
            details = f"{most.rows}x{most.k}: {details}"
        return first.name, short(first.layout), shapes, first.verdict, details


def groups(findings: Iterable[Finding]) -> list[Group]:
    """Findings merged where they say the same."""
    found: dict[tuple[Any, ...], list[Finding]] = {}
    for finding in findings:
        key: tuple[Any, ...] = (type(finding), finding.name, finding.layout, finding.verdict)
        if finding.verdict == CANNOT_RUN:  # the reason is all that there is to it
            key = (*key, finding.details)
        found.setdefault(key, []).append(finding)
    return [Group(tuple(same)) for same in found.values()]


def spans(numbers: Sequence[int]) -> str:
    """``"0, 4-7"`` for 0, 4, 5, 6, 7: at most four spans."""
    found: list[list[int]] = []
    for number in sorted(numbers):
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    texts = [str(first) if first == last else f"{first}-{last}" for first, last in found]
    return ", ".join(texts[:4]) + (", ..." if len(texts) > 4 else "")


def indices(where: Tensor) -> tuple[int, ...]:
    """Where a one-dimensional mask is True."""
    return tuple(int(index) for index in where.nonzero().view(-1))

"""What an audit finds: verdicts, with the numbers they rest on, in words and for JSON."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from safealloc.formats.format import ScaleFormat
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
WRONG_FORMAT = "wrong format"
WRONG_RESULT = "wrong result"

CANNOT_RUN = "cannot run"

LEGEND = {
    ZEROES: "every padding byte is zero afterwards",
    NO_PADDING: "these shapes have no padding in this layout",
    LEAVES: "padding bytes keep their old contents; a pool keeps them at zero",
    DIRTIES: "writes nonzero bytes into padding, where a pool does not help",
    BEYOND: "writes outside the buffers that it was given",
    WRONG_SCALES: "scales are over one e4m3 step off the reference (MX: not equal), or misplaced",
    WRONG_DATA: "values are over one step off the reference",
    ISOLATES: "no padding byte changes a valid output",
    READS: "padding bytes change valid outputs; safe where they are zero",
    WRONG_LAYOUT: "reads the scales in another layout than it was told",
    WRONG_FORMAT: "reads the scales as another format than it was told",
    WRONG_RESULT: "the result is wrong even with zero padding",
    CANNOT_RUN: "for the reason in the details",
}
"""What each verdict means."""

SAFE_PRODUCER = (ZEROES, NO_PADDING)
POOL_PRODUCER = (*SAFE_PRODUCER, LEAVES)
SAFE_CONSUMER = (ISOLATES,)
POOL_CONSUMER = (*SAFE_CONSUMER, READS)
"""The verdicts that are all right: on memory with any contents, and with padding that a pool keeps at zero."""

KINDS = ("rows", "columns")
"""Padding rows are whole scale rows below the matrix; padding columns lie to the right of its rows."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What was found of a producer or a consumer at one shape."""

    name: str
    layout: SfLayout  # that it was told
    rows: int
    k: int
    verdict: str  # one of LEGEND, the worst that applies
    details: str  # why, in words
    format: ScaleFormat = field(default=ScaleFormat.nvfp4, kw_only=True)  # that it was told
    found_format: ScaleFormat | None = field(default=None, kw_only=True)  # that it wrote or read; None: not known

    @property
    def found_layouts(self) -> tuple[SfLayout, ...]:
        """Layouts that it wrote or read: more than one where they are the same bytes at this shape, none where not known."""
        return ()

    def as_dict(self) -> dict[str, Any]:
        found_format = None if self.found_format is None else self.found_format.name
        return {**asdict(self), "layout": short(self.layout), "format": self.format.name, "found_format": found_format}

    def __str__(self) -> str:
        details = f" ({self.details})" if self.details else ""
        format = "" if self.format is ScaleFormat.nvfp4 else f" {self.format.name}"
        return f"{self.name}, {short(self.layout)}{format}, {self.rows} x {self.k}: {self.verdict}{details}"


@dataclass(frozen=True, slots=True)
class PaddingState:
    """How many padding bytes of one kind are zero afterwards, are as they were, and hold something else."""

    zeroed: int
    left: int
    dirtied: int


@dataclass(frozen=True, slots=True)
class ProducerFinding(Finding):
    """One producer at one shape.

    Attributes:
        padding_rows, padding_columns: what became of them; ``None`` where it could not run.
        beyond: bytes written outside the scale and data buffers.
        scales_off: valid scales that are one e4m3 step off the reference's; more than a step is a verdict.
        data_off: e2m1 values that are one step off.
        returned: whether it allocated its results by itself.
        writes: layouts in which its scales lie, as far as this shape tells them apart; empty: no known one, or ``None``
            where it could not run.
    """

    padding_rows: PaddingState | None = None
    padding_columns: PaddingState | None = None
    beyond: int = 0
    scales_off: int = 0
    data_off: int = 0
    returned: bool = False
    writes: tuple[SfLayout, ...] | None = None

    @property
    def found_layouts(self) -> tuple[SfLayout, ...]:
        return self.writes or ()

    def as_dict(self) -> dict[str, Any]:
        return {**Finding.as_dict(self), "writes": None if self.writes is None else [short(one) for one in self.writes]}

    @property
    def leaves(self) -> frozenset[str]:
        """Kinds of padding of which bytes were left as they were."""
        return frozenset(kind for kind, state in self._states() if state.left)

    @property
    def dirties(self) -> frozenset[str]:
        """Kinds of padding in which it wrote something other than zero."""
        return frozenset(kind for kind, state in self._states() if state.dirtied)

    def _states(self) -> list[tuple[str, PaddingState]]:
        both = zip(KINDS, (self.padding_rows, self.padding_columns), strict=True)
        return [(kind, state) for kind, state in both if state is not None]


@dataclass(frozen=True, slots=True)
class Change:
    """Valid outputs that changed when padding was poisoned."""

    kind: str  # of padding
    byte: int  # what it held instead of zero
    rows: tuple[int, ...]  # output rows that changed
    nan_rows: int  # how many of them became NaN or infinite
    largest: float  # finite difference, over the largest correct output


@dataclass(frozen=True, slots=True)
class ConsumerFinding(Finding):
    """One consumer at one shape.

    Attributes:
        changes: what poisoned padding changed.
        reads: layouts in which it reads the scales, as far as this shape tells them apart; empty: no known one, or
            ``None`` where it could not run.
        error: largest difference to the reference with clean padding, over the largest correct output.
        noise: largest difference between runs on the same operands, in the same unit.
    """

    changes: tuple[Change, ...] = ()
    reads: tuple[SfLayout, ...] | None = None
    error: float = 0.0
    noise: float = 0.0

    @property
    def found_layouts(self) -> tuple[SfLayout, ...]:
        return self.reads or ()

    @property
    def reads_padding(self) -> frozenset[str]:
        """Kinds of padding that reach a valid output."""
        return frozenset(change.kind for change in self.changes)

    def as_dict(self) -> dict[str, Any]:
        return {**Finding.as_dict(self), "reads": None if self.reads is None else [short(one) for one in self.reads]}


def assert_verdicts(found: Iterable[Finding], fine: Sequence[str]) -> None:
    """Raise an AssertionError with each finding that is not fine, in words."""
    wrong = [str(finding) for finding in found if finding.verdict not in fine]
    if wrong:
        raise AssertionError("\n".join(wrong))


def table_rows(findings: Iterable[Finding]) -> list[tuple[tuple[str, ...], bool]]:
    """Rows of name, scales told and found, shapes, verdict and details, each with whether it is safe on any memory.

    Findings of the same name, layout, format and verdict are one row, with the longest of their details. Where these shapes
    do not tell two layouts apart, both are found.
    """
    merged: dict[tuple[str, str, str, str], list[Finding]] = {}
    for found in findings:
        reason = found.details if found.verdict == CANNOT_RUN else ""
        told = named((found.layout,), found.format)
        merged.setdefault((found.name, told, found.verdict, reason), []).append(found)
    rows: list[tuple[tuple[str, ...], bool]] = []
    for (name, told, verdict, _), same in merged.items():
        longest = max(same, key=lambda found: len(found.details))
        details = longest.details
        if any(found.details != details for found in same):
            details = f"{longest.rows}x{longest.k}: {details}"
        shapes = ", ".join(f"{found.rows}x{found.k}" for found in same)
        fine = verdict in (*SAFE_PRODUCER, *SAFE_CONSUMER, CANNOT_RUN)
        rows.append(((name, told, _found(same), shapes, verdict, details), fine))
    return rows


def named(layouts: Iterable[SfLayout], format: ScaleFormat | None) -> str:
    """``"128x4 or 8x4 mxfp8"``; ``"-"`` for no layout."""
    words = " or ".join(map(short, layouts))
    return f"{words} {format.name}" if words and format is not None else words or "-"


def _found(same: Sequence[Finding]) -> str:
    """What was written or read at all these shapes, or, where they differ, at each."""
    layouts = [layout for layout in SfLayout if all(layout in found.found_layouts for found in same)]
    if layouts and len({found.found_format for found in same}) == 1:
        return named(layouts, same[0].found_format)
    return ", ".join(dict.fromkeys(named(found.found_layouts, found.found_format) for found in same))


def first_line(error: Exception) -> str:
    """An error's type and the first line of its message."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


def spans(numbers: Sequence[int]) -> str:
    """``"0, 4-7"`` for 0, 4, 5, 6, 7: at most four spans."""
    consecutive = itertools.groupby(enumerate(sorted(numbers)), key=lambda pair: pair[1] - pair[0])
    runs = [[number for _, number in run] for _, run in consecutive]
    texts = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    return ", ".join(texts[:4]) + (", ..." if len(texts) > 4 else "")


def indices(where: Tensor) -> tuple[int, ...]:
    """Where a one-dimensional mask is True."""
    return tuple(int(index) for index in where.nonzero().view(-1))

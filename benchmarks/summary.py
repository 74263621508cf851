"""Medians, quartiles and targets, as the JSON has them."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any


def summary(samples: Sequence[float]) -> dict[str, Any]:
    """``{"us": median, "quartiles": [lower, upper]}`` of microseconds, one per round.

    Quartiles are interpolated between samples; the lowest and the highest sample are the ends (NumPy's default).
    """
    lower, median, upper = statistics.quantiles(samples, n=4, method="inclusive") if len(samples) > 1 else 3 * samples
    return {"us": round(median, 4), "quartiles": [round(lower, 4), round(upper, 4)]}


def at_most(name: str, target: float, values: Iterable[float]) -> dict[str, Any]:
    """A target that the largest value must not exceed; without a value it is not met."""
    return _target(name, target, max(values, default=None), -1)


def at_least(name: str, target: float, values: Iterable[float]) -> dict[str, Any]:
    """A target that the smallest value must reach; without a value it is not met."""
    return _target(name, target, min(values, default=None), 1)


def _target(name: str, target: float, reached: float | None, sign: int) -> dict[str, Any]:
    met = reached is not None and sign * reached >= sign * target
    return {"name": name, "target": target, "reached": None if reached is None else round(reached, 4), "met": met}

"""Which producers leave the padding of scale buffers dirty and which GEMMs read it, on this machine.

:func:`audit_producer` and :func:`audit_consumer` audit a callable and return findings; :func:`assert_producer` and
:func:`assert_consumer` do the same in a test and raise. ``safealloc audit`` runs them over all that is known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from safealloc.audit.consumers import CONSUMER_SHAPES, audit_consumer
from safealloc.audit.findings import (
    POOL_CONSUMER,
    POOL_PRODUCER,
    SAFE_CONSUMER,
    SAFE_PRODUCER,
    ConsumerFinding,
    Finding,
    ProducerFinding,
)
from safealloc.audit.probing import Consumer, Probe, probe
from safealloc.audit.producers import PRODUCER_SHAPES, Producer, audit_producer
from safealloc.formats.layout import SfLayout

__all__ = [
    "CONSUMER_SHAPES",
    "PRODUCER_SHAPES",
    "Consumer",
    "ConsumerFinding",
    "Probe",
    "Producer",
    "ProducerFinding",
    "assert_consumer",
    "assert_producer",
    "audit_consumer",
    "audit_producer",
    "probe",
]


def assert_producer(
    fn: Producer,
    *,
    name: str | None = None,
    layout: SfLayout = SfLayout.layout_128x4,
    shapes: Sequence[tuple[int, int]] | None = None,
    device: torch.device | str | None = None,
    of: Callable[[Tensor], Tensor] | None = None,
    with_pool: bool = False,
) -> None:
    """For tests: :func:`audit_producer`, and an error unless it zeroes all padding.

    Args:
        fn, name, layout, shapes, device, of: as there.
        with_pool: it writes into pool buffers, so that it may leave padding as it is.

    Raises:
        AssertionError: with each finding that is not fine, in words; one that could not run is not.
    """
    found = audit_producer(fn, name=name, layout=layout, shapes=shapes, device=device, of=of)
    _assert_verdicts(found, POOL_PRODUCER if with_pool else SAFE_PRODUCER)


def assert_consumer(
    fn: Consumer,
    *,
    name: str | None = None,
    layout: SfLayout = SfLayout.layout_128x4,
    shapes: Sequence[tuple[int, int]] | None = None,
    device: torch.device | str | None = None,
    with_pool: bool = False,
) -> None:
    """For tests: :func:`audit_consumer`, and an error unless no padding reaches a real output.

    Args:
        fn, name, layout, shapes, device: as there.
        with_pool: its scales come from a pool, so that it may read padding.

    Raises:
        AssertionError: with each finding that is not fine, in words; one that could not run is not.
    """
    found = audit_consumer(fn, name=name, layout=layout, shapes=shapes, device=device)
    _assert_verdicts(found, POOL_CONSUMER if with_pool else SAFE_CONSUMER)


def _assert_verdicts(found: Iterable[Finding], fine: Sequence[str]) -> None:
    wrong = [str(finding) for finding in found if finding.verdict not in fine]
    if wrong:
        raise AssertionError("\n".join(wrong))

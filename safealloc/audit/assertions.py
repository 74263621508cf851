"""Audits as assertions, for the tests of a kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from safealloc.audit.consumers import audit_consumer
from safealloc.audit.findings import POOL_CONSUMER, POOL_PRODUCER, SAFE_CONSUMER, SAFE_PRODUCER, Finding
from safealloc.audit.probing import Consumer
from safealloc.audit.producers import Producer, audit_producer
from safealloc.formats.layout import SfLayout


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
    """Assert that a quantizer zeroes all padding.

    Args:
        fn, name, layout, shapes, device, of: as :func:`audit_producer` takes them.
        with_pool: it writes into pool buffers, so that it may leave padding as it is.

    Raises:
        AssertionError: with each finding that is not fine, in words; a shape that cannot run is not.
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
    """Assert that no padding reaches a valid output of a GEMM.

    Args:
        fn, name, layout, shapes, device: as :func:`audit_consumer` takes them.
        with_pool: its scales come from a pool, so that it may read padding.

    Raises:
        AssertionError: with each finding that is not fine, in words; a shape that cannot run is not.
    """
    found = audit_consumer(fn, name=name, layout=layout, shapes=shapes, device=device)
    _assert_verdicts(found, POOL_CONSUMER if with_pool else SAFE_CONSUMER)


def _assert_verdicts(found: Iterable[Finding], fine: Sequence[str]) -> None:
    wrong = [str(finding) for finding in found if finding.verdict not in fine]
    if wrong:
        raise AssertionError("\n".join(wrong))

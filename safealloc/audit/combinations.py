"""Producers and consumers together: which pairs are safe on memory that others wrote, and which in a pool.

A pair is a producer and a consumer of one layout that can both run here. "Those that vLLM would choose" are the pairs of
which vLLM uses both in that layout, as the table of known ones says: which of them a model gets depends on the model, on
vLLM's options and on its version, so that all of them count.

On any memory a pair is unsafe if the producer does not zero a kind of padding that the consumer reads; in a pool, only if it
writes something else there. A byte written outside the buffer, wrong values and a wrong layout are unsafe in either case:
no padding mends them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from safealloc.audit.consumers import TOLERANCE, product, weight
from safealloc.audit.findings import (
    BEYOND,
    CANNOT_RUN,
    WRONG_DATA,
    WRONG_LAYOUT,
    WRONG_RESULT,
    WRONG_SCALES,
    ConsumerFinding,
    ProducerFinding,
)
from safealloc.audit.known import KnownConsumer, KnownProducer
from safealloc.audit.producers import activation, synchronize
from safealloc.errors import PaddingCorruptionError
from safealloc.formats.layout import SfLayout, short
from safealloc.pool.pool import ScalePool


@dataclass(frozen=True, slots=True)
class Combination:
    """One producer with one consumer.

    Attributes:
        producer, consumer: their names.
        layout: of the scales between them.
        vllm: whether vLLM would choose it.
        why: what makes it unsafe, in words; empty where it is safe.
        tried: shapes ``(rows, k)`` at which both ran through a pool buffer.
    """

    producer: str
    consumer: str
    layout: SfLayout
    vllm: bool
    why: str
    tried: tuple[tuple[int, int], ...] = ()

    @property
    def safe(self) -> bool:
        return not self.why

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "layout": short(self.layout), "safe": self.safe}


@dataclass(frozen=True, slots=True)
class AuditedProducer:
    """A known producer with what was found of it in one layout."""

    known: KnownProducer
    layout: SfLayout
    findings: Sequence[ProducerFinding]


@dataclass(frozen=True, slots=True)
class AuditedConsumer:
    """A known consumer with what was found of it in one layout."""

    known: KnownConsumer
    layout: SfLayout
    findings: Sequence[ConsumerFinding]


def pairs(
    producers: Sequence[AuditedProducer], consumers: Sequence[AuditedConsumer]
) -> Iterator[tuple[AuditedProducer, AuditedConsumer]]:
    """Those of one layout that can run at some shape, vLLM's with vLLM's and others with others."""
    for producer in producers:
        for consumer in consumers:
            layout = producer.layout
            if layout is not consumer.layout or not (_runs(producer.findings) and _runs(consumer.findings)):
                continue
            if (layout in producer.known.vllm) == (layout in consumer.known.vllm):
                yield producer, consumer


def combine(producer: AuditedProducer, consumer: AuditedConsumer) -> Combination:
    """Whether a pair is safe on any memory: by its findings."""
    return _combination(producer, consumer, _defects(producer, consumer, _exposed))


def combine_in_pool(producer: AuditedProducer, consumer: AuditedConsumer, pool: ScalePool) -> Combination:
    """Whether a pair is safe in pool buffers: by its findings, and by running it there at each shape of the consumer's."""
    why = _defects(producer, consumer, _dirtied)
    if why:  # not run: what writes or reads elsewhere would do so in the pool
        return _combination(producer, consumer, why)
    tried = []
    for found in _runs(consumer.findings):
        shape = found.rows, found.k
        try:
            wrong = _through(producer, consumer, *shape, pool)
        except Exception as error:
            if isinstance(error, _ProducerRefusesError):
                continue
            wrong = f"{type(error).__name__}: {error}".splitlines()[0]
        tried.append(shape)
        if wrong is not None and not why:
            why = f"at {shape[0]}x{shape[1]}: {wrong}"
    if not tried:
        why = "there is no shape at which both run"
    return _combination(producer, consumer, why, tuple(tried))


def _runs(findings: Sequence[Any]) -> list[Any]:
    return [found for found in findings if found.verdict != CANNOT_RUN]


def _combination(
    producer: AuditedProducer, consumer: AuditedConsumer, why: str, tried: tuple[tuple[int, int], ...] = ()
) -> Combination:
    vllm = producer.layout in producer.known.vllm and producer.layout in consumer.known.vllm
    return Combination(producer.known.name, consumer.known.name, producer.layout, vllm, why, tried)


def _defects(
    producer: AuditedProducer,
    consumer: AuditedConsumer,
    exposed: Callable[[ProducerFinding], frozenset[str]],
) -> str:
    """What the findings have against a pair, in words: what no padding mends, then padding that is read and not zero."""
    for made in _runs(producer.findings):
        if made.verdict in (BEYOND, WRONG_SCALES, WRONG_DATA):
            return f"the producer: {made.verdict}"
    for read in _runs(consumer.findings):
        if read.verdict in (WRONG_LAYOUT, WRONG_RESULT):
            return f"the consumer: {read.verdict}"
    not_zero = frozenset[str]().union(*(exposed(found) for found in _runs(producer.findings)))
    reads = frozenset[str]().union(*(found.reads_padding for found in _runs(consumer.findings)))
    both = sorted(not_zero & reads, reverse=True)
    verb = "dirties" if exposed is _dirtied else "does not zero"
    return f"the producer {verb} padding {' and '.join(both)}, which the consumer reads" if both else ""


def _exposed(found: ProducerFinding) -> frozenset[str]:
    return found.leaves | found.dirties


def _dirtied(found: ProducerFinding) -> frozenset[str]:
    return found.dirties


class _ProducerRefusesError(Exception):
    """The producer cannot run the shape, which its findings tell."""


def _through(producer: AuditedProducer, consumer: AuditedConsumer, rows: int, k: int, pool: ScalePool) -> str | None:
    """Quantize into a pool buffer whose real bytes are stale, multiply, and say what is wrong."""
    layout = producer.layout
    x, global_scale = activation(rows, k, pool.device)
    x_fp4 = torch.empty((rows, k // 2), dtype=torch.uint8, device=pool.device)
    scales = pool.acquire(rows, k, layout)
    offsets = layout.offsets(rows, k, pool.device)
    scales.view(-1)[offsets] = 0x7F
    try:
        returned = producer.known.fn(x, global_scale, x_fp4, scales, layout)
        synchronize(pool.device)
    except Exception as error:
        raise _ProducerRefusesError from error
    if returned is not None:  # as safealloc's own backend "flashinfer" takes it over: the real bytes
        data, their_scales = (tensor.view(torch.uint8) for tensor in returned)
        x_fp4 = data.reshape(rows, -1)
        scales.view(-1)[offsets] = their_scales.reshape(-1)[offsets]
    b, b_descale, b_global_scale = weight(k, pool.device)
    alpha = 1 / (global_scale * b_global_scale)
    out = consumer.known.fn(x_fp4, b, scales, b_descale, alpha, layout).float()
    synchronize(pool.device)
    right = product(x_fp4, b, _clean(scales, layout, rows, k), b_descale, alpha, layout)
    wrong = None
    if not bool(((out - right).abs() <= TOLERANCE * right.abs().max()).all()):
        wrong = "the result is wrong"
    try:
        pool.verify()
    except PaddingCorruptionError as error:
        wrong = str(error).splitlines()[0]
        pool.verify(repair=True)
    return wrong


def _clean(scales: Tensor, layout: SfLayout, rows: int, k: int) -> Tensor:
    return layout.swizzle(layout.unswizzle(scales, rows, k))

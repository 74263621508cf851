"""Producers and consumers together: which pairs are safe on memory with any contents, and which in a pool.

A pair is a producer and a consumer of one layout and format that can both run here. vLLM would choose it if vLLM uses both
in that layout: which of them a model gets depends on the model, on vLLM's options and on its version, so that all count.

Outside a pool a pair is unsafe if the producer does not zero a kind of padding that the consumer reads; in a pool, only if it
writes something other than zero there. Bytes outside the buffer, wrong values and a wrong layout are unsafe either way.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Generic, TypeVar

import torch

from safealloc.audit import findings
from safealloc.audit.consumers import TOLERANCE, product, weight
from safealloc.audit.findings import ConsumerFinding, Finding, ProducerFinding, first_line, named
from safealloc.audit.known import Known
from safealloc.audit.probing import call, data_for_gemm
from safealloc.audit.producers import activation, synchronize
from safealloc.errors import PaddingCorruptionError
from safealloc.formats.format import ScaleFormat
from safealloc.formats.layout import SfLayout, short
from safealloc.pool.pool import ScalePool

FindingT = TypeVar("FindingT", bound=Finding)


@dataclass(frozen=True, slots=True)
class Combination:
    """One producer with one consumer."""

    producer: str
    consumer: str
    layout: SfLayout  # of the scales between them
    vllm: bool  # whether vLLM would choose it
    why: str  # it is unsafe, in words; empty where it is safe
    tried: tuple[tuple[int, int], ...] = ()  # shapes (rows, k) at which both ran through a pool buffer
    format: ScaleFormat = ScaleFormat.nvfp4  # of the scales between them

    @property
    def safe(self) -> bool:
        return not self.why

    def cells(self) -> tuple[str, ...]:
        """Producer, consumer, layout, whether vLLM would choose it, whether it is safe, and why not."""
        vllm, safe = "yes" if self.vllm else "-", "yes" if self.safe else "NO"
        return self.producer, self.consumer, named((self.layout,), self.format), vllm, safe, self.why

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "layout": short(self.layout), "format": self.format.name, "safe": self.safe}


@dataclass(frozen=True, slots=True)
class Audited(Generic[FindingT]):
    """A known producer or consumer with what was found of it in one layout."""

    known: Known
    layout: SfLayout
    findings: Sequence[FindingT]

    @property
    def ran(self) -> list[FindingT]:
        """The findings at shapes that it can run."""
        return [found for found in self.findings if found.verdict != findings.CANNOT_RUN]

    @property
    def vllm(self) -> bool:
        return self.layout in self.known.vllm


AuditedProducer = Audited[ProducerFinding]
AuditedConsumer = Audited[ConsumerFinding]


def pairs(
    producers: Sequence[AuditedProducer], consumers: Sequence[AuditedConsumer]
) -> Iterator[tuple[AuditedProducer, AuditedConsumer]]:
    """Those of one layout and format that can run at some shape, vLLM's with vLLM's and others with others."""
    for producer in producers:
        for consumer in consumers:
            fit = producer.layout is consumer.layout and producer.known.format is consumer.known.format
            if fit and producer.vllm == consumer.vllm and producer.ran and consumer.ran:
                yield producer, consumer


def combine(producer: AuditedProducer, consumer: AuditedConsumer, pool: ScalePool | None = None) -> Combination:
    """Whether a pair is safe, by its findings: on memory with any contents, or in a pool.

    With a pool, it also runs there, at each shape of the consumer's.
    """
    why = _defects(producer, consumer, in_pool=pool is not None)
    tried = []
    if pool is not None and not why:  # a pair with defects would write or read elsewhere in the pool
        for rows, k in ((found.rows, found.k) for found in consumer.ran):
            try:
                wrong = _run(producer, consumer, rows, k, pool)
            except Exception as error:
                wrong = first_line(error)
            if wrong is not None:
                tried.append((rows, k))
            if wrong and not why:
                why = f"at {rows}x{k}: {wrong}"
        why = why if tried else "there is no shape at which both run"
    names, vllm = (producer.known.name, consumer.known.name), producer.vllm and consumer.vllm
    return Combination(*names, producer.layout, vllm, why, tuple(tried), producer.known.format)


def _defects(producer: AuditedProducer, consumer: AuditedConsumer, *, in_pool: bool) -> str:
    """What makes a pair unsafe by its findings, in words: what is wrong with any padding, then padding that is read."""
    for made in producer.ran:
        if made.verdict in (findings.BEYOND, findings.WRONG_SCALES, findings.WRONG_DATA):
            return f"the producer: {made.verdict}"
    for read in consumer.ran:
        if read.verdict in (findings.WRONG_LAYOUT, findings.WRONG_FORMAT, findings.WRONG_RESULT):
            return f"the consumer: {read.verdict}"
    not_zero = {kind for made in producer.ran for kind in (made.dirties if in_pool else made.leaves | made.dirties)}
    reads = {kind for read in consumer.ran for kind in read.reads_padding}
    both = " and ".join(sorted(not_zero & reads, reverse=True))
    verb = "dirties" if in_pool else "does not zero"
    return f"the producer {verb} padding {both}, which the consumer reads" if both else ""


def _run(producer: AuditedProducer, consumer: AuditedConsumer, rows: int, k: int, pool: ScalePool) -> str | None:
    """Quantize into a pool buffer with stale valid scales, and multiply.

    Returns what is wrong with the product or, afterwards, with the pool; ``None`` if the producer refuses the shape.
    """
    layout, format = producer.layout, producer.known.format
    is_nvfp4 = format is ScaleFormat.nvfp4
    x, global_scale = activation(rows, k, pool.device)
    data = torch.empty(format.data_shape(rows, k), dtype=torch.uint8, device=pool.device)
    scales = pool.acquire(rows, k, layout, format=format)
    offsets = layout.offsets(rows, k, pool.device, format=format)
    scales.view(-1)[offsets] = format.nan_bytes[0]
    try:
        returned = producer.known.fn(x, *([global_scale] if is_nvfp4 else []), data, scales, layout)
        synchronize(pool.device)
    except Exception:
        return None
    if returned is not None:  # copy its valid scales, as safealloc's own backend "flashinfer" does
        data, their_scales = (tensor.view(torch.uint8) for tensor in returned)
        data = data.reshape(rows, -1)
        scales.view(-1)[offsets] = their_scales.reshape(-1)[offsets]
    a = data_for_gemm(data, format)
    b, b_descale, b_global_scale = weight(k, pool.device, format)
    alpha = 1 / (global_scale * b_global_scale) if is_nvfp4 else None
    out = call(consumer.known.fn, a, b, scales, b_descale, alpha, layout, format).float()
    synchronize(pool.device)
    clean = layout.swizzle(layout.unswizzle(scales, rows, k, format=format))
    right = product(a, b, clean, b_descale, alpha, layout, format)
    try:
        pool.verify()
    except PaddingCorruptionError as error:
        pool.verify(repair=True)
        return str(error).splitlines()[0]
    return "" if bool(((out - right).abs() <= TOLERANCE * right.abs().max()).all()) else "the result is wrong"

"""Audits of the planted faults and of the correct ones, alone and as parts of a table of known ones."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import pytest
from support.audit_faults import (
    CORRECT_CONSUMERS,
    CORRECT_PRODUCERS,
    FAULTY_CONSUMERS,
    FAULTY_PRODUCERS,
    SHAPES,
    Planted,
)

from safealloc.audit import audit_consumer, audit_producer
from safealloc.audit.combinations import Audited, AuditedConsumer, AuditedProducer
from safealloc.audit.findings import SAFE_CONSUMER, SAFE_PRODUCER, Finding
from safealloc.audit.known import KnownConsumer, KnownProducer
from safealloc.commands import audit as command

FAULTY = (*FAULTY_PRODUCERS, *FAULTY_CONSUMERS)
CORRECT = (*CORRECT_PRODUCERS, *CORRECT_CONSUMERS)
SAFE_VERDICTS = (*SAFE_PRODUCER, *SAFE_CONSUMER)

VALID_ONLY = "writes valid scales only"
AS_HARDWARE = "multiplies padding columns as the hardware does"
LEAKS = "leaks a padding row into the first"


def planted(name: str) -> Planted:
    (found,) = (one for one in (*FAULTY, *CORRECT) if one.name == name)
    return found


def audited(one: Planted, device: str = "cpu") -> Sequence[Finding]:
    return _audited(one, device)


@functools.cache
def _audited(one: Planted, device: str) -> Sequence[Finding]:
    run: Callable[..., Sequence[Finding]] = audit_producer
    if one in (*FAULTY_CONSUMERS, *CORRECT_CONSUMERS):
        run = audit_consumer
    return run(one.fn, name=one.name, layout=one.layout, shapes=SHAPES, device=device)


def is_named(fault: Planted, findings: Sequence[Finding]) -> bool:
    """Whether a fault was found for what it is, and for nothing else."""
    verdicts = {finding.verdict for finding in findings}
    of_5_rows = [finding for finding in findings if finding.rows == 5]
    explained = all(text in finding.details for finding in of_5_rows for text in fault.says)
    return bool(of_5_rows) and explained and fault.verdict in verdicts and verdicts <= {fault.verdict, *SAFE_VERDICTS}


def is_alarm(findings: Sequence[Finding]) -> bool:
    return any(finding.verdict not in SAFE_VERDICTS for finding in findings)


def sensitivity(device: str = "cpu") -> tuple[list[str], list[str]]:
    """Planted faults that were not named, and correct ones that gave an alarm, with what was found."""
    faulty = [(fault, audited(fault, device)) for fault in FAULTY]
    correct = [(one, audited(one, device)) for one in CORRECT]
    missed = [f"{fault.name}: {found}" for fault, found in faulty if not is_named(fault, found)]
    return missed, [f"{one.name}: {found}" for one, found in correct if is_alarm(found)]


def sentence(missed: list[str], alarms: list[str]) -> str:
    """The two numbers, as the README has them."""
    found = f"{len(FAULTY) - len(missed)} of {len(FAULTY)} planted faults named"
    return f"{found}, {len(alarms)} alarms on {len(CORRECT)} correct ones"


def known_producer(name: str, vllm: bool = True) -> KnownProducer:
    one = planted(name)
    layouts = (one.layout,)
    return KnownProducer(one.name, layouts, one.fn, lambda device, layout: None, layouts if vllm else ())


def known_consumer(name: str, vllm: bool = True) -> KnownConsumer:
    one = planted(name)
    layouts = (one.layout,)
    return KnownConsumer(one.name, layouts, one.fn, lambda device, layout: None, layouts if vllm else ())


def producer(name: str, vllm: bool = True) -> AuditedProducer:
    return Audited(known_producer(name, vllm), planted(name).layout, audited(planted(name)))


def consumer(name: str, vllm: bool = True) -> AuditedConsumer:
    return Audited(known_consumer(name, vllm), planted(name).layout, audited(planted(name)))


def make_known(monkeypatch: pytest.MonkeyPatch, *these: KnownProducer | KnownConsumer) -> None:
    """``safealloc audit`` knows these and no others."""
    monkeypatch.setattr(command, "PRODUCERS", [one for one in these if isinstance(one, KnownProducer)])
    monkeypatch.setattr(command, "CONSUMERS", [one for one in these if isinstance(one, KnownConsumer)])

"""Which producers leave the padding of scale buffers dirty and which GEMMs read it, on this machine.

:func:`audit_producer` and :func:`audit_consumer` audit a callable and return findings; :func:`assert_producer` and
:func:`assert_consumer` do the same in a test and raise. ``safealloc audit`` runs them over every known quantizer and GEMM.
"""

from safealloc.audit.consumers import CONSUMER_SHAPES, assert_consumer, audit_consumer
from safealloc.audit.findings import ConsumerFinding, ProducerFinding
from safealloc.audit.probing import Consumer, Probe, probe
from safealloc.audit.producers import PRODUCER_SHAPES, Producer, assert_producer, audit_producer

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

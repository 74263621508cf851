"""What a pool tells of itself."""

from __future__ import annotations

from dataclasses import dataclass

from safealloc.formats.spec import ScaleSpec


class CaptureGrowthWarning(UserWarning):
    """A capture needed a buffer that nobody reserved, and recorded a ``torch.zeros`` instead."""


@dataclass(frozen=True, slots=True)
class PoolStats:
    """Counters of one pool.

    Attributes:
        buffers: buffers the pool holds.
        bytes: their bytes.
        live: those that somebody holds a tensor of.
        captured: those that captures of living graphs were given.
        hits: acquires answered with an existing buffer.
        misses: acquires that had to make one.
        evictions: cached buffers given up for others.
        capture_fallbacks: misses in a capture, answered with a recorded ``torch.zeros``.
    """

    buffers: int
    bytes: int
    live: int
    captured: int
    hits: int
    misses: int
    evictions: int
    capture_fallbacks: int


@dataclass(frozen=True, slots=True)
class GraphReport:
    """What one captured graph uses.

    Attributes:
        buffers: shape of each pool buffer the capture was given, once a buffer.
        bytes: their bytes.
        nodes: the graph's nodes by type (``"kernel"``, ``"memset"``, ...), or ``None`` without ``cuda.bindings``.
    """

    buffers: tuple[ScaleSpec, ...]
    bytes: int
    nodes: dict[str, int] | None

"""What can go wrong, by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from safealloc.formats.spec import ScaleSpec


class SafeAllocError(RuntimeError):
    """Base of every error that safealloc raises on its own account.

    Wrong arguments (dtype, device, shape, contiguity) are plain ``ValueError`` or ``TypeError``.
    """


class LayoutMismatchError(SafeAllocError, ValueError):
    """A call contradicts the layout or the row count that a scale buffer was written in."""


@dataclass(frozen=True, slots=True)
class Corruption:
    """A buffer whose padding is not zero.

    Attributes:
        spec: shape and layout of the buffer.
        address: device address of its first byte.
        row, column: the first byte that is not zero, in scale rows and columns of the padded matrix.
        value: that byte.
        count: how many padding bytes are not zero.
        handed_to: who was given the buffer last, where a guard (:mod:`safealloc.pool.guard`) watches.
    """

    spec: ScaleSpec
    address: int
    row: int
    column: int
    value: int
    count: int
    handed_to: str | None = None

    def __str__(self) -> str:
        last = "" if self.handed_to is None else f"; last handed to {self.handed_to}"
        return (
            f"buffer at 0x{self.address:x} ({self.spec}): {self.count} padding bytes are not zero, first 0x{self.value:02X} "
            f"at scale row {self.row}, column {self.column}{last}"
        )


class PaddingCorruptionError(SafeAllocError):
    """Padding that must be zero is not: somebody wrote it.

    Attributes:
        corruptions: a :class:`Corruption` for each such buffer.
    """

    def __init__(self, corruptions: Sequence[Corruption]) -> None:
        self.corruptions = tuple(corruptions)
        super().__init__("\n".join(map(str, self.corruptions)))


class CaptureGrowthError(SafeAllocError):
    """A CUDA graph capture needs a buffer that does not exist yet."""


class PoolExhaustedError(SafeAllocError):
    """A buffer would take the pool beyond its ``max_bytes``."""


class PoolClosedError(SafeAllocError):
    """The pool was closed, or belongs to the parent of this forked process."""


class PoolPicklingError(SafeAllocError, TypeError):
    """A pool owns device memory of one process and cannot be pickled or copied."""

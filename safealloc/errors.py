"""What can go wrong, by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from safealloc.pool.verify import Corruption


class SafeAllocError(RuntimeError):
    """Base of every error that safealloc raises on its own account.

    Wrong arguments (dtype, device, shape, contiguity) are plain ``ValueError`` or ``TypeError``.
    """


class LayoutMismatchError(SafeAllocError, ValueError):
    """A call contradicts the layout or the row count that a scale buffer was written in."""


class PaddingCorruptionError(SafeAllocError):
    """Padding that must be zero is not: somebody wrote it.

    Attributes:
        corruptions: a :class:`safealloc.pool.verify.Corruption` for each such buffer.
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

"""What can go wrong, by name."""


class SafeAllocError(RuntimeError):
    """Base of every error that safealloc raises on its own account.

    Wrong arguments (dtype, device, shape, contiguity) are plain ``ValueError`` or ``TypeError``.
    """


class LayoutMismatchError(SafeAllocError, ValueError):
    """A call contradicts the layout or the row count that a scale buffer was written in."""


class PaddingCorruptionError(SafeAllocError):
    """Padding that must be zero is not: somebody wrote it."""


class CaptureGrowthError(SafeAllocError):
    """A CUDA graph capture needs a buffer that does not exist yet."""


class PoolExhaustedError(SafeAllocError):
    """A buffer would take the pool beyond its ``max_bytes``."""


class PoolClosedError(SafeAllocError):
    """The pool was closed, or belongs to the parent of this forked process."""


class PoolPicklingError(SafeAllocError, TypeError):
    """A pool owns device memory of one process and cannot be pickled or copied."""

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
    """A buffer whose padding is not zero, or around which somebody wrote.

    Attributes:
        spec: shape and layout of the buffer.
        address: device address of its first byte.
        row, column: the first byte that is not zero, in scale rows and columns of the padded matrix; 0 outside of it.
        value: that byte.
        count: how many such bytes there are.
        outside: in a red zone, where the first such byte lies: bytes from the buffer's first one if negative, else from its
            end; ``None`` for padding.
        handed_to: who was given the buffer last, where a guard (:mod:`safealloc.pool.guard`) watches.
    """

    spec: ScaleSpec
    address: int
    row: int
    column: int
    value: int
    count: int
    outside: int | None = None
    handed_to: str | None = None

    def __str__(self) -> str:
        last = "" if self.handed_to is None else f"; last handed to {self.handed_to}"
        if self.outside is not None:
            side = f"{-self.outside} bytes before it" if self.outside < 0 else f"{self.outside} bytes behind its end"
            return (
                f"buffer at 0x{self.address:x} ({self.spec}): {self.count} bytes outside of it were written, first 0x"
                f"{self.value:02X} {side}{last}"
            )
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


@dataclass(frozen=True, slots=True)
class NotFinite:
    """The first NaN, or infinity, that entered a quantizer since the last look.

    Attributes:
        kind: ``"NaN"`` or ``"infinity"``.
        layer: the layer whose global scale the quantizer was handed, or who called it where no model is known.
        row, rows: where it was in the quantizer's input, and how many rows that has.
        column: of that input.
        step: how many steps the pool had counted; in vLLM, calls of ``execute_model``.
        batch: tokens of the batch that its graph was captured for, or the rows.
        order: which quantizer of its graph it was, from 1; 0 in an eager call.
        count: how many elements of this kind entered quantizers since the last look.
    """

    kind: str
    layer: str
    row: int
    rows: int
    column: int
    step: int
    batch: int
    order: int
    count: int

    def __str__(self) -> str:
        call = f"quantizer {self.order} of its graph of batch {self.batch}" if self.order else "eager call"
        return (
            f"first {self.kind} in {self.layer}, row {self.row} of {self.rows}, column {self.column}, step {self.step}, "
            f"{call}; {self.count} in all since the last look"
        )


class NanError(SafeAllocError):
    """A NaN entered a quantizer, and ``SAFEALLOC_STRICT=1``.

    Attributes:
        first: where the first one was, a :class:`NotFinite`.
    """

    def __init__(self, first: NotFinite) -> None:
        self.first = first
        super().__init__(str(first))


class CaptureGrowthError(SafeAllocError):
    """A CUDA graph capture needs a buffer that does not exist yet."""


class PoolExhaustedError(SafeAllocError):
    """A buffer would take the pool beyond its ``max_bytes``."""


class PoolClosedError(SafeAllocError):
    """The pool was closed, or belongs to the parent of this forked process."""


class PoolPicklingError(SafeAllocError, TypeError):
    """A pool owns device memory of one process and cannot be pickled or copied."""

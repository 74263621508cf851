"""What the sections of ``repro`` share: operands, quantization into memory that no pool made, and the type of a section."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from safealloc import mm_fp4, set_foreign_scales
from safealloc.formats.format import BLOCK_SIZE
from safealloc.formats.layout import SfLayout
from safealloc.kernels import vendors
from safealloc.ops.backends import QUANTIZERS, Call, triton_refusal

ONE = 0x38
"""1.0 as e4m3."""


class Row(Protocol):
    """One row of a section: a dataclass whose fields are what was measured and what was stated."""

    @property
    def as_stated(self) -> bool:
        """Whether what was measured is what was stated."""

    def cells(self) -> Mapping[str, object]:
        """The row as printed, by heading: yes and NO for booleans, a dash for ``None``."""


@dataclass(frozen=True, slots=True)
class Section:
    """One section of ``repro``."""

    name: str  # its key in the JSON
    title: str  # its headline
    backend: str  # of the products
    text: str  # one or two sentences: what the rows show
    rows: Sequence[Row]  # what was measured
    failure: str | None = None  # what went wrong apart from any row, or ``None``

    @property
    def as_stated(self) -> bool:
        return self.failure is None and bool(self.rows) and all(row.as_stated for row in self.rows)

    def as_dicts(self) -> list[dict[str, Any]]:
        """The rows for JSON."""
        return [{**asdict(row), "as_stated": row.as_stated} for row in self.rows]  # type: ignore[call-overload]


@dataclass(frozen=True, slots=True)
class Weight:
    """An NVFP4 weight: random values, scales of 1.0."""

    fp4: Tensor  # uint8 ``[n, k // 2]``
    scales: Tensor  # uint8, layout_128x4 for ``[n, k]``
    alpha: Tensor  # float32 1.0; serves as the activation's global scale as well

    @classmethod
    def random(cls, n: int, k: int, device: torch.device, generator: torch.Generator) -> Weight:
        """Drawn on the CPU, so that a seed means the same weight on every device."""
        fp4 = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, generator=generator)
        scales = SfLayout.layout_128x4.swizzle(torch.full((n, k // BLOCK_SIZE), ONE, dtype=torch.uint8))
        return cls(fp4.to(device), scales.to(device), torch.ones(1, device=device))

    def shuffled(self) -> Weight:
        """As FlashInfer's trtllm takes it."""
        return Weight(*vendors.shuffle_for_trtllm(self.fp4, self.scales), self.alpha)

    def multiply(self, x_fp4: Tensor, scales: Tensor, backend: str, *, use_8x4: bool | None) -> Tensor:
        """``mm_fp4`` of an activation and this weight, bfloat16 ``[m, n]``."""
        return mm_fp4(x_fp4, self.fp4.T, scales, self.scales.T, self.alpha, use_8x4_sf_layout=use_8x4, backend=backend)


def random_activation(rows: int, k: int, device: torch.device, generator: torch.Generator) -> Tensor:
    """bfloat16 ``[rows, k]`` of a standard normal distribution."""
    return torch.randn(rows, k, generator=generator).to(torch.bfloat16).to(device)


def quantize(
    x: Tensor, layout: SfLayout, backend: str, global_scale: Tensor, scales: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Quantize with scales in a buffer that no pool knows, a zeroed one by default; only valid scales are written."""
    if scales is None:
        scales = torch.zeros(layout.padded_shape(*x.shape), dtype=torch.uint8, device=x.device)
    x_fp4 = torch.empty((x.shape[0], x.shape[1] // 2), dtype=torch.uint8, device=x.device)
    QUANTIZERS[backend].run(x, global_scale, x_fp4, scales, layout, None)
    return x_fp4, scales


@contextlib.contextmanager
def foreign_scales(mode: Literal["zero", "trust", "error"]) -> Iterator[None]:
    """:func:`safealloc.set_foreign_scales` until the end of the block."""
    previous = set_foreign_scales(mode)
    try:
        yield
    finally:
        set_foreign_scales(previous)


def ours(device: torch.device, backend: str) -> str:
    """Which of our backends quantizes and multiplies where ``backend`` was asked for."""
    if backend in ("reference", "triton"):
        return backend
    return "reference" if triton_refusal(Call(device, SfLayout.layout_128x4)) else "triton"


def nan_rows(y: Tensor) -> int:
    """How many rows hold a NaN."""
    return int(y.isnan().any(1).sum())


def max_diff(y: Tensor, other: Tensor) -> float:
    """Largest absolute difference; NaN where there is one."""
    return float((y.float() - other.float()).abs().max())

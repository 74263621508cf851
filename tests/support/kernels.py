"""What the tests of Triton kernels share: where they run, activations, operands, and a comparison of bytes.

They run on a GPU, or with TRITON_INTERPRET=1 in Triton's interpreter on the CPU, over fewer and smaller shapes.
"""

from __future__ import annotations

import os
import zlib

import pytest
import torch
from torch import Tensor

from safealloc.formats.format import NAN_SCALE
from safealloc.formats.layout import SfLayout

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
MARKS = [] if INTERPRETED else [pytest.mark.gpu]
GUARD = 64
"""Bytes behind each output that nobody may touch."""

ROWS = (1, 7, 8, 9, 33, 128, 130) if INTERPRETED else (1, 2, 7, 8, 9, 31, 32, 33, 64, 127, 128, 129, 256, 513)
K = (16, 48, 64, 496, 512) if INTERPRETED else (16, 32, 48, 64, 80, 496, 512, 4096, 7184, 8192, 28672)

layouts = pytest.mark.parametrize("layout", list(SfLayout), ids=lambda layout: layout.name)
gpu_only = pytest.mark.skipif(INTERPRETED, reason="too large for the interpreter, or has no meaning there")


def generator(*key: object) -> torch.Generator:
    """A seed of its own for each case, the same in each run."""
    return torch.Generator(device=DEVICE).manual_seed(zlib.crc32(repr(key).encode()))


def activations(rows: int, k: int, dtype: torch.dtype) -> Tensor:
    """Blocks of different magnitude, some zero, with values that lie on ties of e2m1."""
    rng = generator(rows, k, dtype)
    blocks = torch.randn(rows, k // 16, 16, generator=rng, device=DEVICE)
    ties = torch.randint(-24, 25, blocks.shape, generator=rng, device=DEVICE) / 4
    choice = torch.randint(0, 8, (rows, k // 16, 1), generator=rng, device=DEVICE)
    blocks = torch.where(choice < 2, ties, blocks) * torch.exp2(2.0 * choice - 8) * (choice != 5)
    return blocks.view(rows, k).to(dtype)


def scalar(value: float) -> Tensor:
    return torch.tensor([value], dtype=torch.float32, device=DEVICE)


def assert_same_bytes(actual: Tensor, expected: Tensor, what: str) -> None:
    if not torch.equal(actual, expected):
        different = (actual != expected).nonzero()
        first = tuple(different[0].tolist())
        raise AssertionError(
            f"{what}: {len(different)} of {expected.numel()} bytes differ, the first at {first}: "
            f"{actual[first].item():#04x}, expected {expected[first].item():#04x}"
        )


class Operand:
    """Random NVFP4 data. Padding rows hold NaN, padding columns zero; all may be overwritten in ``logical``."""

    def __init__(self, rows: int, k: int, layout: SfLayout) -> None:
        rng = generator(rows, k, layout)
        self.layout, self.cols = layout, k // 16
        self.data = torch.randint(0, 256, (rows, k // 2), generator=rng, device=DEVICE).to(torch.uint8)
        shape = layout.padded_shape(rows, k)
        self.logical = torch.full(shape, NAN_SCALE, dtype=torch.uint8, device=DEVICE)
        self.logical[:rows] = 0
        # 0.25 to 2, and some negative and zero
        scales = torch.randint(0x28, 0x41, (rows, self.cols), generator=rng, device=DEVICE)
        sign = torch.randint(0, 16, scales.shape, generator=rng, device=DEVICE)
        scales = torch.where(sign == 0, 0, torch.where(sign == 1, scales + 0x80, scales))
        self.logical[:rows, : self.cols] = scales.to(torch.uint8)

    @property
    def scales(self) -> Tensor:
        """In a buffer that is larger than need be, as a pool's may be for another layout."""
        buffer = self.layout.swizzle(self.logical)
        return torch.cat((buffer.view(-1), torch.full((512,), NAN_SCALE, dtype=torch.uint8, device=DEVICE)))

    def magnitudes(self) -> Operand:
        copy = object.__new__(Operand)
        copy.layout, copy.cols = self.layout, self.cols
        copy.data, copy.logical = self.data & 0x77, self.logical & 0x7F
        return copy

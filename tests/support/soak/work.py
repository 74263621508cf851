"""What the walk quantizes and multiplies, in static memory, and what the plain-torch reference says of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from support.soak.oracle import NAN

from safealloc import (
    ScalePool,
    SfLayout,
    mm_fp4,
    nvfp4_quantize,
    nvfp4_quantize_grouped,
    silu_and_mul_nvfp4_quantize_grouped,
)
from safealloc.kernels import reference, reference_grouped

if TYPE_CHECKING:
    from support.soak.walk import Soak

SWIZZLED = (SfLayout.layout_128x4, SfLayout.layout_8x4)
ROWS = (1, 2, 5, 8, 17, 33, 64, 129, 200)
KS = (64, 80, 208, 512, 1008)
N = 32  # of every GEMM


class Dense:
    """Quantize a static input and multiply it; everything it saw is kept in static memory."""

    def __init__(self, soak: Soak, pool: ScalePool) -> None:
        numbers = soak.numbers
        self.soak, self.pool = soak, pool
        self.rows, self.k, self.layout = numbers.choice(ROWS), numbers.choice(KS), numbers.choice(SWIZZLED)
        self.x = torch.empty(self.rows, self.k, dtype=torch.bfloat16, device=soak.device)
        self.data = torch.empty(self.rows, self.k // 2, dtype=torch.uint8, device=soak.device)
        self.scales = torch.empty(self.layout.padded_shape(self.rows, self.k), dtype=torch.uint8, device=soak.device)
        self.y = torch.empty(self.rows, N, dtype=torch.bfloat16, device=soak.device)
        self.valid = torch.empty(1, dtype=torch.int32, device=soak.device) if numbers.random() < 0.3 else None
        self.renew()

    def renew(self) -> None:
        """Another input in the same place. In a padded batch other rows are valid, and the rest hold NaN."""
        self.x.copy_(self.soak.random(self.rows, self.k))
        if self.valid is not None:
            valid = self.soak.numbers.randint(0, self.rows)
            self.valid.fill_(valid)
            self.x[valid:] = float("nan")
        for seen in (self.data, self.scales, self.y):
            seen.fill_(NAN)

    def run(self) -> None:
        soak = self.soak
        x_fp4, scales = nvfp4_quantize(
            self.x, soak.global_scale, layout=self.layout, pool=self.pool, valid_rows=self.valid
        )
        self.data.copy_(x_fp4)
        self.scales.copy_(scales)
        weight, weight_scale = soak.weights[self.k]
        mm_fp4(x_fp4, weight.T, scales, weight_scale.T, soak.alpha, out=self.y)

    def wrong(self) -> str | None:
        """What of the last run is not the reference's, including the padding that the GEMM saw."""
        soak = self.soak
        data, scales, y = torch.empty_like(self.data), torch.zeros_like(self.scales), torch.empty_like(self.y)
        x = self.x if self.valid is None else self.x.nan_to_num(0.0)  # rows of zeros have zero scales
        reference.quantize(x, soak.global_scale, data, scales, self.layout)
        weight, weight_scale = soak.weights[self.k]
        reference.mm(data, weight, scales, weight_scale, soak.alpha, y, self.layout)
        if not torch.equal(self.data, data):
            return f"{self}: data"
        if not torch.equal(self.scales, scales):
            return f"{self}: {int((self.scales != scales).sum())} of {scales.numel()} scale bytes"
        if not torch.allclose(self.y, y, rtol=2**-7, atol=1e-3 * float(y.abs().max())):
            return f"{self}: the GEMM's result"
        return None

    def __str__(self) -> str:
        return f"[{self.rows}, {self.k}] in {self.layout.name}"


class Grouped:
    """Quantize rows of a MoE layer, with another routing after each renewal; some rows are routed nowhere."""

    def __init__(self, soak: Soak, pool: ScalePool) -> None:
        numbers = soak.numbers
        self.soak, self.pool = soak, pool
        self.rows, self.k = numbers.choice((3, 16, 40)), numbers.choice((80, 208))
        self.layout = SfLayout.layout_128x4
        self.experts, self.silu = numbers.choice((4, 7)), numbers.random() < 0.5
        device = soak.device
        self.x = torch.empty(self.rows, self.k * (1 + self.silu), dtype=torch.bfloat16, device=device)
        self.global_scales = torch.rand(self.experts, device=device, generator=soak.generator) * 100 + 1
        self.offsets = [torch.zeros(self.experts + 1, dtype=torch.int32, device=device) for _ in range(2)]
        self.data = torch.empty(self.rows, self.k // 2, dtype=torch.uint8, device=device)
        shape = (self.layout.grouped_rows(self.rows, self.experts), self.layout.padded_shape(1, self.k)[1])
        self.scales = torch.empty(shape, dtype=torch.uint8, device=device)
        self.renew()

    def renew(self) -> None:
        """Another input and another routing, in the same place."""
        numbers = self.soak.numbers
        self.x.copy_(self.soak.random(*self.x.shape))
        counts = [0] * self.experts
        for _ in range(numbers.randint(0, self.rows)):
            counts[numbers.randrange(self.experts)] += 1
        starts, places = [0], [0]
        for count in counts:
            starts.append(starts[-1] + count)
            places.append(places[-1] + -(-count // 128) * 128)
        for offset, values in zip(self.offsets, (starts, places), strict=True):
            offset.copy_(torch.tensor(values, dtype=torch.int32))
        for seen in (self.data, self.scales):
            seen.fill_(NAN)

    def run(self) -> None:
        quantize = silu_and_mul_nvfp4_quantize_grouped if self.silu else nvfp4_quantize_grouped
        x_fp4, scales = quantize(self.x, self.global_scales, *self.offsets, layout=self.layout, pool=self.pool)
        self.data.copy_(x_fp4)
        self.scales.copy_(scales)

    def wrong(self) -> str | None:
        """What of the last run is not the reference's."""
        data, scales = torch.empty_like(self.data), torch.zeros_like(self.scales)
        given = (self.x, self.global_scales, data, scales, self.layout, None, *self.offsets)
        reference_grouped.quantize(*given, silu_and_mul=self.silu)
        for what, ours, theirs in (("data", self.data, data), ("scales", self.scales, scales)):
            if not torch.equal(ours, theirs):
                return f"{self.rows} rows of {self.k} for {self.experts} experts: {what}"
        return None


Work = Dense | Grouped

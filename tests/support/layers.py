"""One NVFP4 layer in static memory, as a captured decode step has it."""

from __future__ import annotations

import torch

from safealloc import ScalePool, SfLayout, mm_fp4, nvfp4_quantize
from safealloc.kernels import reference
from safealloc.ops.backends import GEMMS


class Layer:
    """Quantize a static input, multiply by a weight, into a static output."""

    def __init__(self, rows: int, k: int, n: int, layout: SfLayout, pool: ScalePool, seed: int = 0) -> None:
        generator = torch.Generator("cuda").manual_seed(seed)
        self.rows, self.k, self.n, self.layout, self.pool = rows, k, n, layout, pool
        self.x = torch.randn(rows, k, device="cuda", generator=generator, dtype=torch.bfloat16)
        weight = torch.randn(n, k, device="cuda", generator=generator, dtype=torch.bfloat16)
        self.global_scale = torch.tensor([448 * 6 / 5.0], device="cuda")
        self.alpha = 1 / (self.global_scale * self.global_scale)
        with ScalePool("cuda") as weights:
            self.weight_fp4, scales = nvfp4_quantize(weight, self.global_scale, pool=weights)
            self.weight_scale = scales.clone()
        self.y = torch.empty(rows, n, device="cuda", dtype=torch.bfloat16)

    def run(self) -> None:
        x_fp4, scales = nvfp4_quantize(self.x, self.global_scale, layout=self.layout, pool=self.pool)
        mm_fp4(x_fp4, self.weight_fp4.T, scales, self.weight_scale.T, self.alpha, out=self.y, backend="triton")

    def multiply(self, x_fp4: torch.Tensor, scales: torch.Tensor) -> None:
        """The GEMM alone, on any scale buffer as it is."""
        GEMMS["triton"].run(x_fp4, self.weight_fp4, scales, self.weight_scale, self.alpha, self.y, self.layout)

    def expected(self) -> torch.Tensor:
        """The same through the plain-torch reference, on zeroed memory of its own."""
        x_fp4 = torch.empty(self.rows, self.k // 2, dtype=torch.uint8, device="cuda")
        scales = torch.zeros(self.layout.padded_shape(self.rows, self.k), dtype=torch.uint8, device="cuda")
        reference.quantize(self.x, self.global_scale, x_fp4, scales, self.layout)
        y = torch.empty_like(self.y)
        reference.mm(x_fp4, self.weight_fp4, scales, self.weight_scale, self.alpha, y, self.layout)
        return y

    def check(self) -> None:
        expected = self.expected()
        assert not self.y.isnan().any()
        torch.testing.assert_close(self.y, expected, rtol=2**-7, atol=1e-3 * float(expected.abs().max()))

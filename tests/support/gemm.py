"""What the tests of ``mm_fp4`` multiply, and how they check what it refuses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from safealloc import LayoutMismatchError, ScalePool, SfLayout, mm_fp4, nvfp4_quantize, set_foreign_scales
from safealloc.kernels import reference

M, N, K = 9, 24, 80
ONE = torch.ones(1)
FLASHINFER_NAMES = ["cudnn", "trtllm", "cutlass", "cute-dsl", "cutedsl_low_latency", "b12x", "cake"]


@pytest.fixture
def pool() -> Iterator[ScalePool]:
    with ScalePool("cpu") as pool:
        yield pool


@pytest.fixture
def foreign() -> Iterator[Callable[[Any], Any]]:
    """``set_foreign_scales``, undone afterwards."""
    before = set_foreign_scales("zero")
    yield set_foreign_scales
    set_foreign_scales(before)


class FakeFlashInfer:
    """Records the arguments of ``mm_fp4``, bound to FlashInfer's parameter names, and computes the product."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def mm_fp4(
        self,
        a: Tensor,
        b: Tensor,
        a_descale: Tensor,
        b_descale: Tensor,
        alpha: Tensor | None = None,
        out_dtype: torch.dtype = torch.bfloat16,
        out: Tensor | None = None,
        block_size: int = 16,
        use_8x4_sf_layout: bool = False,
        backend: str = "auto",
        use_nvfp4: bool = True,
        enable_pdl: bool = True,
        *,
        skip_check: bool = False,
    ) -> Tensor:
        call = dict(locals())
        del call["self"]
        self.calls.append(call)
        if out is None:
            out = torch.empty(a.shape[0], b.shape[1], dtype=out_dtype)
        if block_size == 32:
            values = mxfp4_values(a, a_descale), mxfp4_values(b.T, b_descale.T)
            return out.copy_(values[0] @ values[1].T * (1 if alpha is None else alpha))
        layout = SfLayout.layout_8x4 if use_8x4_sf_layout else SfLayout.layout_128x4
        a_bytes, scale_bytes = a.view(torch.uint8), a_descale.view(torch.uint8)
        reference.mm(a_bytes, b.T.view(torch.uint8), scale_bytes, b_descale.T.view(torch.uint8), alpha, out, layout)
        return out


def mxfp4_values(data: Tensor, scales: Tensor) -> Tensor:
    """The values of MXFP4 data and its scales in layout_128x4, float32 ``[rows, whole tiles of k]``.

    As tensor cores read them: zero data in padding columns is multiplied by the scales there too.
    """
    rows, half = data.shape
    magnitudes = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    nibbles = torch.stack([data.view(torch.uint8) & 15, data.view(torch.uint8) >> 4], dim=2).view(rows, 2 * half).long()
    values = magnitudes[nibbles & 7] * (1 - 2 * (nibbles >> 3))
    exponents = SfLayout.layout_128x4.logical(scales, rows, half)[:rows]  # half of k, since it counts blocks of 16
    factors = torch.where(exponents == 255, torch.nan, torch.exp2(exponents.float() - 127))
    values = torch.nn.functional.pad(values, (0, 32 * factors.shape[1] - 2 * half))
    return values * factors.repeat_interleave(32, dim=1)


class Operands:
    """An activation and a weight, quantized; the pool holds both buffers."""

    def __init__(
        self, pool: ScalePool, layout: SfLayout = SfLayout.layout_128x4, m: int = M, n: int = N, k: int = K
    ) -> None:
        generator = torch.Generator().manual_seed(m * 1000 + k)
        x = torch.randn(m, k, generator=generator).bfloat16()
        w = torch.randn(n, k, generator=generator).bfloat16()
        self.layout = layout
        self.a, self.a_descale = nvfp4_quantize(x, ONE, layout=layout, pool=pool, backend="reference")
        self.w, self.w_scales = nvfp4_quantize(w, ONE, pool=pool, backend="reference")
        self.values = reference.dequantize(self.a, self.a_descale, layout)
        self.w_values = reference.dequantize(self.w, self.w_scales, SfLayout.layout_128x4)

    @property
    def arguments(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.a, self.w.T, self.a_descale, self.w_scales.T

    def exact(self) -> Tensor:
        return self.values.double() @ self.w_values.double().T

    def foreign_scales(self, padding: int) -> Tensor:
        """The activation's scales in memory of no pool, with this byte in the padding."""
        scales = self.a_descale.clone()
        rows, k = self.a.shape[0], 2 * self.a.shape[1]
        scales.view(-1)[self.layout.padding_mask(rows, k)] = padding
        return scales


def close(result: Tensor, exact: Tensor) -> None:
    tolerance = {torch.bfloat16: 2**-8, torch.float16: 2**-10, torch.float32: 2**-20}[result.dtype]
    torch.testing.assert_close(result.double(), exact, rtol=tolerance, atol=1e-3)


def check_refused(pool: ScalePool, error: type[Exception], message: str, *arguments: Any, **keywords: Any) -> None:
    """``mm_fp4`` raises, and leaves the pool, the scales and ``out`` as they were."""
    scales = [argument for argument in arguments[2:4] if isinstance(argument, Tensor) and argument.device.type == "cpu"]
    copies, stats = [tensor.clone() for tensor in scales], pool.stats()
    out = keywords.get("out")
    if isinstance(out, Tensor) and out.device.type == "cpu":
        out.fill_(42)
    with pytest.raises(error, match=message) as caught:
        mm_fp4(*arguments, **keywords)
    assert isinstance(caught.value, LayoutMismatchError) == (error is LayoutMismatchError)
    assert pool.stats() == stats
    for tensor, copy in zip(scales, copies, strict=True):
        as_bytes = torch.uint8 if tensor.element_size() == 1 else tensor.dtype  # float8 cannot be compared
        assert torch.equal(tensor.view(as_bytes), copy.view(as_bytes))
    if isinstance(out, Tensor) and out.device.type == "cpu":
        assert bool((out == 42).all())

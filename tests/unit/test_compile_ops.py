"""The ops in ``torch.ops.safealloc``: schemas, fake implementations, and a pool under fake tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.compiled import ALPHA, CPU, ONE, W_FP4, W_SCALES, K, N, activation, compiled_code, fresh, ops, pool  # noqa: F401
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from safealloc import (
    SafeAllocError,
    ScalePool,
    SfLayout,
    nvfp4_linear,
    nvfp4_quantize,
)

layouts = pytest.mark.parametrize("layout", list(SfLayout), ids=lambda layout: layout.name)
pytestmark = pytest.mark.filterwarnings("ignore:dynamo_pgo force disabled")


def check_op(op: Any, *arguments: Any) -> None:
    torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))


@layouts
@pytest.mark.parametrize("padded_k", [None, 80, 128, 192])
def test_opcheck_acquire(pool: ScalePool, layout: SfLayout, padded_k: int | None) -> None:
    check_op(ops.acquire.default, 9, K, int(layout), CPU, padded_k)


@layouts
@pytest.mark.parametrize("valid", [None, 4])
def test_opcheck_quantize(pool: ScalePool, layout: SfLayout, valid: int | None) -> None:
    count = None if valid is None else torch.tensor([valid], dtype=torch.int32)
    check_op(ops.nvfp4_quantize.default, activation(9), ONE, int(layout), "auto", count)


@pytest.mark.parametrize("layout", [SfLayout.layout_128x4, SfLayout.layout_8x4], ids=lambda layout: layout.name)
def test_opcheck_mm(pool: ScalePool, layout: SfLayout) -> None:
    """With the layout in the flag: opcheck calls the op on copies, which are of no pool."""
    a, scales = nvfp4_quantize(activation(9), ONE, layout=layout)
    for a_descale in (scales, scales.clone()):
        for out_dtype, alpha in ((torch.bfloat16, None), (torch.float32, ALPHA), (torch.float16, torch.ones(9))):
            rest = (alpha, out_dtype, layout is SfLayout.layout_8x4, "reference", True, False)
            check_op(ops.mm_fp4.default, a, W_FP4.T, a_descale, W_SCALES.T, *rest, a_descale)


@pytest.mark.parametrize("shape", [(9, K), (K,), (2, 3, K), (40, K)], ids=str)
def test_opcheck_linear(pool: ScalePool, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape).bfloat16()
    for layout, out_dtype, alpha in (
        (None, torch.bfloat16, None),
        (0, torch.float16, ALPHA),
        (1, torch.float32, ALPHA),
    ):
        check_op(ops.nvfp4_linear.default, x, W_FP4, W_SCALES, ONE, alpha, layout, out_dtype, "auto")


@layouts
@pytest.mark.parametrize("rows", [1, 9, 130])
def test_fake_outputs_are_shaped_like_real_ones(pool: ScalePool, layout: SfLayout, rows: int) -> None:
    real = [
        ops.acquire(rows, K, int(layout), CPU),
        ops.acquire(rows, K, int(layout), CPU, 192),
        *ops.nvfp4_quantize(activation(rows), ONE, int(layout), "auto", None),
        nvfp4_linear(activation(rows), W_FP4, W_SCALES, ONE, None, out_dtype=torch.float16),
    ]
    with FakeTensorMode() as mode:
        x, one, w, w_scales = (mode.from_tensor(tensor) for tensor in (activation(rows), ONE, W_FP4, W_SCALES))
        x_fp4, scales = ops.nvfp4_quantize(x, one, int(layout), "auto", None)
        fake = [
            ops.acquire(rows, K, int(layout), CPU),
            ops.acquire(rows, K, int(layout), CPU, 192),
            x_fp4,
            scales,
            ops.nvfp4_linear(x, w, w_scales, one, None, None, torch.float16, "auto"),
        ]
        product = ops.mm_fp4(x_fp4, w.T, scales, w_scales.T, None, torch.float32, None, "auto", True, False, scales)
    for got, expected in zip(fake, real, strict=True):
        assert (got.shape, got.dtype, got.device) == (expected.shape, expected.dtype, expected.device)
        assert (got.stride(), got.storage_offset()) == (expected.stride(), expected.storage_offset())
    assert (product.shape, product.dtype) == ((rows, N), torch.float32)
    assert pool.stats().live == 3  # those of ``real``: a fake call asks no pool


@pytest.mark.parametrize("warm", [False, True], ids=["a buffer to make", "a buffer at hand"])
def test_a_pool_under_fake_tensors(warm: bool) -> None:
    """Says what to call instead, whether or not there is a buffer that could be handed out."""
    with ScalePool("cpu") as pool:
        if warm:
            pool.acquire(9, K, SfLayout.layout_8x4)
        with FakeTensorMode(), pytest.raises(SafeAllocError, match=r"torch\.ops\.safealloc\.acquire"):
            pool.acquire(9, K, SfLayout.layout_8x4)
        with FakeTensorMode(), pytest.raises(SafeAllocError, match="fake tensors"):
            pool.reserve(9, K, SfLayout.layout_8x4)
        assert pool.stats().buffers == int(warm)
        assert pool.acquire(9, K, SfLayout.layout_8x4).shape == (16, 8)


def test_two_equal_acquires_stay_two(pool: ScalePool) -> None:
    def model(x: Tensor) -> Tensor:
        first, second = ops.acquire(5, 64, 0, CPU), ops.acquire(5, 64, 0, CPU)
        return torch.ops.safealloc_tests.same_memory(first, second) + x

    result, code = compiled_code(model, torch.zeros(1))
    assert result.tolist() == [0.0]
    assert code.count("torch.ops.safealloc.acquire.default(") == 2
    assert pool.stats().buffers == 2


def test_an_unused_acquire_is_harmless(pool: ScalePool) -> None:
    def model(x: Tensor) -> Tensor:
        ops.acquire(5, 64, 0, CPU)
        return x + 1

    result, _ = compiled_code(model, torch.zeros(1))
    assert result.tolist() == [1.0]
    assert pool.stats().live == 0
    assert pool.verify() == pool.stats().buffers

"""torch.compile on a CPU: dynamic rows, and a GEMM that declares which scales it may write."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch._dynamo as dynamo
from support.compiled import ALPHA, CPU, ONE, W_FP4, W_SCALES, K, N, activation, fresh, ops, pool, produced, total  # noqa: F401
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from safealloc import (
    LayoutMismatchError,
    ScalePool,
    ScaleSpec,
    SfLayout,
    mm_fp4,
    nvfp4_linear,
    nvfp4_quantize,
    use_pool,
)
from safealloc.formats.format import NAN_SCALE

ROWS = (5, 9, 2, 32, 33, 128, 140)

layouts = pytest.mark.parametrize("layout", list(SfLayout), ids=lambda layout: layout.name)
pytestmark = pytest.mark.filterwarnings("ignore:dynamo_pgo force disabled")


# --- dynamic rows ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["dynamic", "mark_dynamic"])
def test_linear_with_dynamic_rows(pool: ScalePool, how: str) -> None:
    """One compilation, although 8x4 becomes 128x4 beyond 32 rows: that is decided inside the op."""

    def model(x: Tensor) -> Tensor:
        return nvfp4_linear(x * 2, W_FP4, W_SCALES, ONE, ALPHA) + 1

    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True if how == "dynamic" else None)
    for rows in ROWS:
        x = activation(rows)
        if how == "mark_dynamic":
            dynamo.mark_dynamic(x, 0)
        assert torch.equal(compiled(x), model(x))
    assert counter.frame_count == 1
    assert torch.equal(compiled(activation(1)), model(activation(1)))  # 0 and 1 may be specialized on
    assert pool.verify() == pool.stats().buffers
    assert pool.stats().live == 0


@layouts
def test_quantize_and_mm_with_dynamic_rows(pool: ScalePool, layout: SfLayout) -> None:
    def model(x: Tensor) -> Tensor:
        x_fp4, scales = nvfp4_quantize(x * 2, ONE, layout=layout)
        return mm_fp4(x_fp4, W_FP4.T, scales, W_SCALES.T, ALPHA)

    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    for rows in ROWS:
        assert torch.equal(compiled(activation(rows)), model(activation(rows)))
    assert counter.frame_count == 1
    assert pool.verify() == pool.stats().buffers
    assert pool.stats().live == 0


@pytest.mark.parametrize("padded_k", [None, 128, 192])
@pytest.mark.parametrize("layout", [SfLayout.layout_128x4, SfLayout.layout_8x4], ids=lambda layout: layout.name)
def test_acquire_with_symbolic_numbers(pool: ScalePool, layout: SfLayout, padded_k: int | None) -> None:
    """A fused producer that mutates the buffer writes the pool's memory, not a copy of Inductor's."""

    def model(x: Tensor) -> tuple[Tensor, int, int]:
        rows, k = x.shape
        wider = None if padded_k is None else k + (padded_k - K)
        scales = ops.acquire(rows, k, int(layout), CPU, wider)
        torch.ops.safealloc_tests.produce(x, scales)
        return total(scales), scales.shape[0], scales.shape[1]

    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    for rows, k in ((5, 80), (9, 80), (130, 80), (33, 48)):
        wider = None if padded_k is None else k + padded_k - K
        assert compiled(activation(rows, k)) == (
            torch.tensor([0x38 * rows * k / 16]),
            *layout.padded_shape(rows, k, padded_k=wider),
        )
        assert produced.pop() == ScaleSpec(rows, k, layout, wider)
    assert counter.frame_count == 1
    assert pool.verify() == 4


def test_valid_rows_may_be_traced(pool: ScalePool) -> None:
    def model(x: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        x_fp4, scales = nvfp4_quantize(x, ONE, layout=SfLayout.layout_8x4, valid_rows=valid)
        return x_fp4, scales

    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    for rows, valid in ((9, 4), (9, 9), (17, 0)):
        count = torch.tensor([valid], dtype=torch.int32)
        for got, expected in zip(compiled(activation(rows), count), model(activation(rows), count), strict=True):
            assert torch.equal(got, expected)


def test_the_pool_is_chosen_at_the_call() -> None:
    compiled = torch.compile(
        lambda x: nvfp4_linear(x, W_FP4, W_SCALES, ONE, None), backend="aot_eager", fullgraph=True, dynamic=False
    )
    for _ in range(2):
        with ScalePool("cpu") as pool, use_pool(pool):
            compiled(activation(9))
            assert pool.stats().misses == 1


def test_a_pool_argument_is_refused(pool: ScalePool) -> None:
    compiled = torch.compile(lambda x: nvfp4_quantize(x, ONE, pool=pool), backend="aot_eager", fullgraph=True)
    with pytest.raises(Exception, match="leave pool out, and choose it by use_pool"):
        compiled(activation(9))


def test_out_is_written(pool: ScalePool) -> None:
    def model(x: Tensor, out: Tensor) -> Tensor:
        x_fp4, scales = nvfp4_quantize(x, ONE)
        return mm_fp4(x_fp4, W_FP4.T, scales, W_SCALES.T, None, torch.bfloat16, out)

    out, expected = torch.zeros(9, N, dtype=torch.bfloat16), torch.zeros(9, N, dtype=torch.bfloat16)
    model(activation(9), expected)
    result = torch.compile(model, fullgraph=True)(activation(9), out)
    assert torch.equal(out, expected)
    assert torch.equal(result, expected)


def test_wrong_arguments_raise_at_the_call(pool: ScalePool) -> None:
    weight, scales = torch.zeros(N, 36, dtype=torch.uint8), torch.zeros(128, 8, dtype=torch.uint8)
    compiled = torch.compile(lambda x: nvfp4_linear(x, weight, scales, ONE, None), backend="aot_eager", fullgraph=True)
    with pytest.raises(ValueError, match="multiple of 16"):
        compiled(activation(9, 72))
    assert pool.stats().misses == 0


def test_a_contradicting_flag_raises_at_the_call(pool: ScalePool) -> None:
    def model(x: Tensor) -> Tensor:
        x_fp4, scales = nvfp4_quantize(x, ONE, layout=SfLayout.layout_8x4)
        return mm_fp4(x_fp4, W_FP4.T, scales, W_SCALES.T, use_8x4_sf_layout=False)

    with pytest.raises(LayoutMismatchError, match="written in layout_8x4"):
        torch.compile(model, fullgraph=True)(activation(128))


# --- mm_fp4 declares that it may write a_descale -----------------------------------------------------------------------


def test_foreign_scales_are_zeroed_in_place(pool: ScalePool) -> None:
    def model(a: Tensor, scales: Tensor) -> Tensor:
        return mm_fp4(a, W_FP4.T, scales, W_SCALES.T)

    a, scales = nvfp4_quantize(activation(9), ONE)
    dirty = scales.clone()
    dirty.view(-1)[SfLayout.layout_128x4.padding_mask(9, K)] = NAN_SCALE
    assert torch.equal(torch.compile(model, fullgraph=True)(a, dirty), model(a, scales))
    assert torch.equal(dirty, scales)


def _read_before(x_fp4: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    checksum = scales.float().sum()
    return mm_fp4(x_fp4, W_FP4.T, scales, W_SCALES.T), checksum


def _read_after(x_fp4: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    product = mm_fp4(x_fp4, W_FP4.T, scales, W_SCALES.T)
    return product, scales.float().sum()


def _two_products(x_fp4: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    product = mm_fp4(x_fp4, W_FP4.T, scales, W_SCALES.T)
    return product, mm_fp4(x_fp4, W_FP4.T, scales.view(torch.float8_e4m3fn), W_SCALES.T, ALPHA)


def _read_between(x_fp4: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    product = mm_fp4(x_fp4, W_FP4.T, scales, W_SCALES.T)
    return product + scales.float().sum(), mm_fp4(x_fp4, W_FP4.T, scales, W_SCALES.T, ALPHA)


@pytest.mark.parametrize("use", [_read_before, _read_after, _two_products, _read_between])
@pytest.mark.parametrize("rows", [5, 128])
@pytest.mark.parametrize("backend", ["inductor", "aot_eager"])
def test_the_gemm_gets_the_pool_buffer_itself(
    pool: ScalePool, use: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], rows: int, backend: str
) -> None:
    """A copy that a compiler makes, for the sake of another reader, is no pool buffer and knows no layout.

    128 rows take as many bytes in both layouts, so that a wrong one shows in the numbers only.
    """

    def model(x: Tensor) -> tuple[Tensor, Tensor]:
        return use(*nvfp4_quantize(x, ONE, layout=SfLayout.layout_8x4))

    got = torch.compile(model, backend=backend, fullgraph=True)(activation(rows))
    for result, expected in zip(got, model(activation(rows)), strict=True):
        torch.testing.assert_close(result, expected)

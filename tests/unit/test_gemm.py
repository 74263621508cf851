"""``mm_fp4``: results, and the layout that is bound to the buffer."""

from __future__ import annotations

import inspect

import pytest
import torch
import torch.nn.functional as F
from support.gemm import ONE, K, M, N, Operands, check_refused, close, pool  # noqa: F401
from torch import Tensor

from safealloc import (
    LayoutMismatchError,
    SafeAllocError,
    ScalePool,
    SfLayout,
    _optional,
    mm_fp4,
)
from safealloc.formats.format import NAN_SCALE
from safealloc.kernels import reference

FP4 = torch.float4_e2m1fn_x2
FP8 = torch.float8_e4m3fn

layouts = pytest.mark.parametrize("layout", list(SfLayout), ids=lambda layout: layout.name)
swizzles = pytest.mark.parametrize(
    "layout", [SfLayout.layout_128x4, SfLayout.layout_8x4], ids=lambda layout: layout.name
)


# --- results ----------------------------------------------------------------------------------------------------


@layouts
@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float16, torch.float32], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("shape", [(1, 8, 16), (9, 24, 80), (33, 130, 64), (128, 16, 176)], ids=str)
def test_result_is_close_to_the_exact_product(
    pool: ScalePool, layout: SfLayout, out_dtype: torch.dtype, backend: str, shape: tuple[int, int, int]
) -> None:
    operands = Operands(pool, layout, *shape)
    out = mm_fp4(*operands.arguments, None, out_dtype, backend=backend)
    assert out.shape == shape[:2]
    assert out.dtype == out_dtype
    close(out, operands.exact())
    pool.verify()


def test_bfloat16_is_the_default(pool: ScalePool) -> None:
    assert mm_fp4(*Operands(pool).arguments).dtype == torch.bfloat16


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (M,), (M, 1)], ids=str)
def test_alpha_scales_the_result_or_each_row(pool: ScalePool, shape: tuple[int, ...]) -> None:
    operands = Operands(pool)
    alpha = torch.rand(shape) + 0.5
    out = mm_fp4(*operands.arguments, alpha, torch.float32, backend="reference")
    close(out, operands.exact() * alpha.double().reshape(-1, 1))


def test_out_is_written_and_returned(pool: ScalePool) -> None:
    operands = Operands(pool)
    out = torch.full((M, N), float("nan"), dtype=torch.float16)
    assert mm_fp4(*operands.arguments, None, torch.float16, out) is out
    assert torch.equal(out, mm_fp4(*operands.arguments, None, torch.float16))


def test_fp4_and_fp8_dtypes_are_accepted(pool: ScalePool) -> None:
    """FP4 and FP8 dtypes, as frameworks carry them, in every position."""
    operands = Operands(pool, SfLayout.layout_8x4)
    expected = mm_fp4(*operands.arguments)
    a, b, a_descale, b_descale = operands.arguments
    assert torch.equal(mm_fp4(a.view(FP4), b, a_descale, b_descale), expected)
    assert torch.equal(mm_fp4(a, operands.w.view(FP4).T, a_descale, b_descale), expected)
    assert torch.equal(mm_fp4(a, b, a_descale.view(FP8), operands.w_scales.view(FP8).T), expected)
    assert torch.equal(mm_fp4(a, b, a_descale.view(-1), b_descale), expected)
    assert torch.equal(mm_fp4(a, b, a_descale.view(FP8).view(1, -1), b_descale, use_8x4_sf_layout=True), expected)


def test_signature_is_flashinfers() -> None:
    """Names, order and defaults of flashinfer.mm_fp4 (0.7.2); ``skip_check`` is its decorator's keyword."""
    theirs = {
        "a": inspect.Parameter.empty,
        "b": inspect.Parameter.empty,
        "a_descale": inspect.Parameter.empty,
        "b_descale": inspect.Parameter.empty,
        "alpha": None,
        "out_dtype": torch.bfloat16,
        "out": None,
        "block_size": 16,
        "use_8x4_sf_layout": False,
        "backend": "auto",
        "use_nvfp4": True,
        "enable_pdl": True,
    }
    ours = inspect.signature(mm_fp4).parameters
    positional = {name: p.default for name, p in ours.items() if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD}
    assert list(positional) == list(theirs)
    assert positional == theirs | {"use_8x4_sf_layout": None}
    assert {name: p.default for name, p in ours.items() if name not in positional} == {"skip_check": False}
    assert ours["skip_check"].kind is inspect.Parameter.KEYWORD_ONLY


def test_signature_matches_the_installed_flashinfer() -> None:
    flashinfer = _optional.load("flashinfer")
    if isinstance(flashinfer, str):
        pytest.skip(f"compares with flashinfer.mm_fp4: {flashinfer}")
    theirs = inspect.signature(flashinfer.mm_fp4).parameters
    ours = inspect.signature(mm_fp4).parameters
    assert [name for name in ours if name != "skip_check"] == [name for name in theirs if name != "skip_check"]


# --- the layout is bound to the buffer ----------------------------------------------------------------------


@layouts
def test_the_flag_may_be_left_out_or_agree(pool: ScalePool, layout: SfLayout) -> None:
    operands = Operands(pool, layout)
    expected = mm_fp4(*operands.arguments, use_8x4_sf_layout=None)
    close(expected, operands.exact())
    if layout is not SfLayout.layout_linear:
        assert torch.equal(mm_fp4(*operands.arguments, use_8x4_sf_layout=layout is SfLayout.layout_8x4), expected)


@pytest.mark.parametrize(
    ("layout", "flag"),
    [
        (SfLayout.layout_128x4, True),
        (SfLayout.layout_8x4, False),
        (SfLayout.layout_linear, True),
        (SfLayout.layout_linear, False),
    ],
)
@pytest.mark.parametrize("m", [M, 128])
def test_a_contradicting_flag_is_refused(pool: ScalePool, layout: SfLayout, flag: bool, m: int) -> None:
    """128 rows of k = 64 take as many bytes in each layout: no size check can see that contradiction."""
    operands = Operands(pool, layout, m, N, 64)
    for dtype in (torch.uint8, FP8):
        a, b, a_descale, b_descale = operands.arguments
        check_refused(
            pool,
            LayoutMismatchError,
            f"was written in {layout.name}, and use_8x4_sf_layout={flag}",
            *(a, b, a_descale.view(dtype), b_descale),
            out=torch.empty(m, N, dtype=torch.bfloat16),
            use_8x4_sf_layout=flag,
        )


def test_mismatch_is_also_a_value_error(pool: ScalePool) -> None:
    with pytest.raises(ValueError, match="written in layout_8x4") as caught:
        mm_fp4(*Operands(pool, SfLayout.layout_8x4).arguments, use_8x4_sf_layout=False)
    assert isinstance(caught.value, SafeAllocError)


@layouts
@pytest.mark.parametrize("m", [M - 1, M + 1, 1, 128])
def test_another_row_count_is_refused(pool: ScalePool, layout: SfLayout, m: int) -> None:
    """Also where the buffer would have the same size: the script of vLLM issue 37563 does that."""
    operands = Operands(pool, layout)
    a = torch.zeros(m, K // 2, dtype=torch.uint8)
    check_refused(pool, LayoutMismatchError, f"was written for {M} rows, a has {m}", a, *operands.arguments[1:])


@layouts
@pytest.mark.parametrize("k", [64, 144, 16])
def test_another_k_is_refused(pool: ScalePool, layout: SfLayout, k: int) -> None:
    operands, other = Operands(pool, layout), Operands(pool, layout, M, N, k)
    check_refused(
        pool,
        LayoutMismatchError,
        rf"scale columns \(rows={M}, k={K}, {layout.name}\), a has k={k}",
        *(other.a, other.w.T, operands.a_descale, other.w_scales.T),
    )


def padded_weight(n: int, k: int, padded_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """A weight whose columns from k on are zero, with NaN-free scales there, and its values."""
    w = F.pad(torch.randn(n, k), (0, padded_k - k)).bfloat16()
    w_fp4 = torch.empty(n, padded_k // 2, dtype=torch.uint8)
    w_scales = torch.zeros(SfLayout.layout_128x4.padded_shape(n, padded_k), dtype=torch.uint8)
    reference.quantize(w, ONE, w_fp4, w_scales, SfLayout.layout_128x4)
    return w_fp4, w_scales, reference.dequantize(w_fp4, w_scales, SfLayout.layout_128x4)


@swizzles
@pytest.mark.parametrize("padded_k", [96, 112, 128])
def test_a_may_be_padded_in_k_after_quantization(pool: ScalePool, layout: SfLayout, padded_k: int) -> None:
    """Any k whose scale columns round up to the buffer's."""
    operands = Operands(pool, layout)
    w_fp4, w_scales, w_values = padded_weight(N, K, padded_k)
    a = F.pad(operands.a, (0, (padded_k - K) // 2))
    out = mm_fp4(a, w_fp4.T, operands.a_descale, w_scales.T)
    close(out, operands.values.double() @ w_values[:, :K].double().T)


@layouts
@pytest.mark.parametrize("padded_k", [128, 192, 256])
def test_a_buffer_acquired_for_a_padded_k_is_read(pool: ScalePool, layout: SfLayout, padded_k: int) -> None:
    scales = pool.acquire(M, K, layout, padded_k=padded_k)
    x = torch.randn(M, K).bfloat16()
    a = torch.empty(M, K // 2, dtype=torch.uint8)
    reference.quantize(x, ONE, a, scales, layout)
    w_fp4, w_scales, w_values = padded_weight(N, K, padded_k)
    out = mm_fp4(F.pad(a, (0, (padded_k - K) // 2)), w_fp4.T, scales, w_scales.T)
    linear = layout.unswizzle(scales, M, K, padded_k=padded_k)
    close(out, reference.dequantize(a, linear, SfLayout.layout_linear).double() @ w_values[:, :K].double().T)
    unpadded = Operands(pool, layout)
    message = f"padded_k={padded_k}"
    if layout.padded_shape(M, K) != scales.shape:
        check_refused(pool, LayoutMismatchError, message, a, unpadded.w.T, scales, unpadded.w_scales.T)


@layouts
def test_part_of_a_buffer_is_refused(pool: ScalePool, layout: SfLayout) -> None:
    operands = Operands(pool, layout, 130)
    a, b, a_descale, b_descale = operands.arguments
    part = a_descale[: -layout.tile.rows] if layout is SfLayout.layout_linear else a_descale[:-1]
    message = "written for 129 rows" if layout is SfLayout.layout_linear else "no whole number of row tiles"
    check_refused(pool, LayoutMismatchError, message, a, b, part, b_descale)
    check_refused(pool, ValueError, "contiguous", a, b, a_descale[:, :4], b_descale)


def test_the_layout_outlives_the_pool() -> None:
    """Scales that somebody still holds know their layout after their pool was closed."""
    pool = ScalePool("cpu")
    operands = Operands(pool, SfLayout.layout_8x4)
    expected = mm_fp4(*operands.arguments)
    pool.close()
    assert torch.equal(mm_fp4(*operands.arguments), expected)
    with pytest.raises(LayoutMismatchError, match="written in layout_8x4"):
        mm_fp4(*operands.arguments, use_8x4_sf_layout=False)


def test_nan_in_a_pool_buffers_padding_is_seen(pool: ScalePool) -> None:
    """The promise is the pool's: mm_fp4 neither zeroes its buffers again nor hides what is in them."""
    operands = Operands(pool, SfLayout.layout_8x4)
    operands.a_descale.view(-1)[SfLayout.layout_8x4.offsets(M, 128)[3, 6]] = NAN_SCALE
    out = mm_fp4(*operands.arguments)
    assert out.isnan().any(1).nonzero().flatten().tolist() == [3]

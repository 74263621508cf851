"""``mm_fp4``: results, the layout that is bound to the buffer, scales from elsewhere, FlashInfer, bad input."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from safealloc import (
    LayoutMismatchError,
    SafeAllocError,
    ScalePool,
    SfLayout,
    _optional,
    mm_fp4,
    nvfp4_quantize,
    set_foreign_scales,
)
from safealloc.kernels import reference
from safealloc.ops import backends

M, N, K = 9, 24, 80
ONE = torch.ones(1)
NAN = 0x7F
FP4 = torch.float4_e2m1fn_x2
FP8 = torch.float8_e4m3fn
L128, L8, LINEAR = SfLayout.layout_128x4, SfLayout.layout_8x4, SfLayout.layout_linear

layouts = pytest.mark.parametrize("layout", list(SfLayout), ids=lambda layout: layout.name)
swizzles = pytest.mark.parametrize("layout", [L128, L8], ids=lambda layout: layout.name)


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


class Operands:
    """An activation and a weight, quantized; the pool holds both buffers."""

    def __init__(self, pool: ScalePool, layout: SfLayout = L128, m: int = M, n: int = N, k: int = K) -> None:
        generator = torch.Generator().manual_seed(m * 1000 + k)
        x = torch.randn(m, k, generator=generator).bfloat16()
        w = torch.randn(n, k, generator=generator).bfloat16()
        self.layout = layout
        self.a, self.a_descale = nvfp4_quantize(x, ONE, layout=layout, pool=pool, backend="reference")
        self.w, self.w_scales = nvfp4_quantize(w, ONE, pool=pool, backend="reference")
        self.values = reference.dequantize(self.a, self.a_descale, layout)
        self.w_values = reference.dequantize(self.w, self.w_scales, L128)

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


# --- results ----------------------------------------------------------------------------------------------------------


@layouts
@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float16, torch.float32], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("shape", [(1, 8, 16), (9, 24, 80), (33, 130, 64), (128, 16, 176)], ids=str)
def test_result(
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
def test_alpha(pool: ScalePool, shape: tuple[int, ...]) -> None:
    operands = Operands(pool)
    alpha = torch.rand(shape) + 0.5
    out = mm_fp4(*operands.arguments, alpha, torch.float32, backend="reference")
    close(out, operands.exact() * alpha.double().reshape(-1, 1))


def test_out_is_written_and_returned(pool: ScalePool) -> None:
    operands = Operands(pool)
    out = torch.full((M, N), float("nan"), dtype=torch.float16)
    assert mm_fp4(*operands.arguments, None, torch.float16, out) is out
    assert torch.equal(out, mm_fp4(*operands.arguments, None, torch.float16))


def test_dtype_views(pool: ScalePool) -> None:
    """FP4 and FP8 dtypes, as frameworks carry them, in every position."""
    operands = Operands(pool, L8)
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


def test_signature_against_the_installed_flashinfer() -> None:
    flashinfer = _optional.load("flashinfer")
    if isinstance(flashinfer, str):
        pytest.skip(f"compares with flashinfer.mm_fp4: {flashinfer}")
    theirs = inspect.signature(flashinfer.mm_fp4).parameters
    ours = inspect.signature(mm_fp4).parameters
    assert [name for name in ours if name != "skip_check"] == [name for name in theirs if name != "skip_check"]


# --- the layout is bound to the buffer --------------------------------------------------------------------------------


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


@layouts
def test_the_flag_may_be_left_out_or_agree(pool: ScalePool, layout: SfLayout) -> None:
    operands = Operands(pool, layout)
    expected = mm_fp4(*operands.arguments, use_8x4_sf_layout=None)
    close(expected, operands.exact())
    if layout is not LINEAR:
        assert torch.equal(mm_fp4(*operands.arguments, use_8x4_sf_layout=layout is L8), expected)


@pytest.mark.parametrize(("layout", "flag"), [(L128, True), (L8, False), (LINEAR, True), (LINEAR, False)])
@pytest.mark.parametrize("m", [M, 128])
def test_a_contradicting_flag(pool: ScalePool, layout: SfLayout, flag: bool, m: int) -> None:
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
        mm_fp4(*Operands(pool, L8).arguments, use_8x4_sf_layout=False)
    assert isinstance(caught.value, SafeAllocError)


@layouts
@pytest.mark.parametrize("m", [M - 1, M + 1, 1, 128])
def test_another_row_count(pool: ScalePool, layout: SfLayout, m: int) -> None:
    """Also where the buffer would have the same size: the script of vLLM issue 37563 does that."""
    operands = Operands(pool, layout)
    a = torch.zeros(m, K // 2, dtype=torch.uint8)
    check_refused(pool, LayoutMismatchError, f"was written for {M} rows, a has {m}", a, *operands.arguments[1:])


@layouts
@pytest.mark.parametrize("k", [64, 144, 16])
def test_another_k(pool: ScalePool, layout: SfLayout, k: int) -> None:
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
    w_scales = torch.zeros(L128.padded_shape(n, padded_k), dtype=torch.uint8)
    reference.quantize(w, ONE, w_fp4, w_scales, L128)
    return w_fp4, w_scales, reference.dequantize(w_fp4, w_scales, L128)


@swizzles
@pytest.mark.parametrize("padded_k", [96, 112, 128])
def test_a_padded_in_k_after_quantization(pool: ScalePool, layout: SfLayout, padded_k: int) -> None:
    """Any k whose scale columns round up to the buffer's."""
    operands = Operands(pool, layout)
    w_fp4, w_scales, w_values = padded_weight(N, K, padded_k)
    a = F.pad(operands.a, (0, (padded_k - K) // 2))
    out = mm_fp4(a, w_fp4.T, operands.a_descale, w_scales.T)
    close(out, operands.values.double() @ w_values[:, :K].double().T)


@layouts
@pytest.mark.parametrize("padded_k", [128, 192, 256])
def test_a_buffer_acquired_for_a_padded_k(pool: ScalePool, layout: SfLayout, padded_k: int) -> None:
    scales = pool.acquire(M, K, layout, padded_k=padded_k)
    x = torch.randn(M, K).bfloat16()
    a = torch.empty(M, K // 2, dtype=torch.uint8)
    reference.quantize(x, ONE, a, scales, layout)
    w_fp4, w_scales, w_values = padded_weight(N, K, padded_k)
    out = mm_fp4(F.pad(a, (0, (padded_k - K) // 2)), w_fp4.T, scales, w_scales.T)
    linear = layout.unswizzle(scales, M, K, padded_k=padded_k)
    close(out, reference.dequantize(a, linear, LINEAR).double() @ w_values[:, :K].double().T)
    unpadded = Operands(pool, layout)
    message = f"padded_k={padded_k}"
    if layout.padded_shape(M, K) != scales.shape:
        check_refused(pool, LayoutMismatchError, message, a, unpadded.w.T, scales, unpadded.w_scales.T)


@layouts
def test_part_of_a_buffer(pool: ScalePool, layout: SfLayout) -> None:
    operands = Operands(pool, layout, 130)
    a, b, a_descale, b_descale = operands.arguments
    check_refused(pool, ValueError, "must be the whole buffer", a, b, a_descale[:-1], b_descale)
    check_refused(pool, ValueError, "contiguous", a, b, a_descale[:, :4], b_descale)


def test_the_layout_outlives_the_pool() -> None:
    """Scales that somebody still holds know their layout after their pool was closed."""
    pool = ScalePool("cpu")
    operands = Operands(pool, L8)
    expected = mm_fp4(*operands.arguments)
    pool.close()
    assert torch.equal(mm_fp4(*operands.arguments), expected)
    with pytest.raises(LayoutMismatchError, match="written in layout_8x4"):
        mm_fp4(*operands.arguments, use_8x4_sf_layout=False)


def test_nan_in_a_pool_buffers_padding_is_seen(pool: ScalePool) -> None:
    """The promise is the pool's: mm_fp4 neither zeroes its buffers again nor hides what is in them."""
    operands = Operands(pool, L8)
    operands.a_descale.view(-1)[L8.offsets(M, 128)[3, 6]] = NAN
    out = mm_fp4(*operands.arguments)
    assert out.isnan().any(1).nonzero().flatten().tolist() == [3]


# --- scales from elsewhere --------------------------------------------------------------------------------------------


@swizzles
@pytest.mark.parametrize("m", [1, 7, 8, M, 33, 130])
@pytest.mark.parametrize("dtype", [torch.uint8, FP8], ids=str)
def test_foreign_scales_are_zeroed(
    pool: ScalePool, foreign: Callable[[Any], Any], layout: SfLayout, m: int, dtype: torch.dtype
) -> None:
    operands = Operands(pool, layout, m)
    scales = operands.foreign_scales(NAN)
    a, b, _, b_descale = operands.arguments
    out = mm_fp4(a, b, scales.view(dtype), b_descale, use_8x4_sf_layout=layout is L8)
    assert torch.equal(out, mm_fp4(*operands.arguments))
    assert torch.equal(scales, operands.a_descale), "real bytes must stay, padding must be zero"


def test_foreign_scales_without_a_flag_are_128x4(pool: ScalePool, foreign: Callable[[Any], Any]) -> None:
    """FlashInfer's default."""
    operands = Operands(pool)
    a, b, _, b_descale = operands.arguments
    assert torch.equal(mm_fp4(a, b, operands.foreign_scales(NAN), b_descale), mm_fp4(*operands.arguments))


@swizzles
def test_foreign_scales_trusted(pool: ScalePool, foreign: Callable[[Any], Any], layout: SfLayout) -> None:
    operands = Operands(pool, layout)
    a, b, _, b_descale = operands.arguments
    flag = layout is L8
    assert foreign("trust") == "zero"
    clean = operands.foreign_scales(0)
    assert torch.equal(mm_fp4(a, b, clean, b_descale, use_8x4_sf_layout=flag), mm_fp4(*operands.arguments))
    dirty = operands.foreign_scales(NAN)
    before = dirty.clone()
    assert bool(mm_fp4(a, b, dirty, b_descale, use_8x4_sf_layout=flag).isnan().all())
    assert torch.equal(dirty, before)


@swizzles
def test_foreign_scales_refused(pool: ScalePool, foreign: Callable[[Any], Any], layout: SfLayout) -> None:
    operands = Operands(pool, layout)
    a, b, _, b_descale = operands.arguments
    foreign("error")
    keywords = {"use_8x4_sf_layout": layout is L8, "out": torch.empty(M, N, dtype=torch.bfloat16)}
    check_refused(pool, SafeAllocError, "is from no pool", a, b, operands.foreign_scales(NAN), b_descale, **keywords)
    mm_fp4(*operands.arguments)


@pytest.mark.parametrize("mode", ["zeros", "", None, 0, ["zero"]])
def test_no_such_mode(foreign: Callable[[Any], Any], mode: Any) -> None:
    with pytest.raises(ValueError, match='mode must be "zero", "trust" or "error"'):
        foreign(mode)
    assert foreign("zero") == "zero"


@pytest.mark.parametrize("mode", ["zero", "trust"])
@pytest.mark.parametrize(
    ("layout", "flag", "fits"),
    [
        (L8, False, "layout_8x4"),
        (L8, None, "layout_8x4"),
        (L128, True, "layout_128x4"),
        (LINEAR, None, "layout_linear"),
    ],
)
def test_foreign_scales_of_another_layouts_size(
    pool: ScalePool, foreign: Callable[[Any], Any], mode: str, layout: SfLayout, flag: bool | None, fits: str
) -> None:
    operands = Operands(pool, layout)
    a, b, _, b_descale = operands.arguments
    foreign(mode)
    scales = operands.foreign_scales(NAN)
    check_refused(pool, LayoutMismatchError, f"which fits {fits}", a, b, scales, b_descale, use_8x4_sf_layout=flag)


@swizzles
@pytest.mark.parametrize("mode", ["zero", "trust", "error"])
@pytest.mark.parametrize("change", [-512, -1, 1, 512])
def test_foreign_scales_too_small_or_too_large(
    pool: ScalePool, foreign: Callable[[Any], Any], layout: SfLayout, mode: str, change: int
) -> None:
    operands = Operands(pool, layout, 130)
    a, b, _, b_descale = operands.arguments
    foreign(mode)
    scales = torch.full((operands.a_descale.numel() + change,), NAN, dtype=torch.uint8)
    message = f"has {operands.a_descale.numel()} bytes, got {len(scales)}"
    check_refused(pool, ValueError, message, a, b, scales, b_descale, use_8x4_sf_layout=layout is L8)


def test_weight_scales_are_not_touched(pool: ScalePool, foreign: Callable[[Any], Any]) -> None:
    """NaN in the weight's own padding is the caller's, and shows."""
    operands = Operands(pool)
    w_scales = operands.w_scales.clone()
    w_scales.view(-1)[L128.offsets(N, 128)[5, 7]] = NAN
    before = w_scales.clone()
    out = mm_fp4(operands.a, operands.w.T, operands.a_descale, w_scales.T)
    assert out.isnan().any(0).nonzero().flatten().tolist() == [5]
    assert torch.equal(w_scales, before)


# --- FlashInfer, with a stand-in for the package ----------------------------------------------------------------------


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
        if block_size != 16:
            return a
        if out is None:
            out = torch.empty(a.shape[0], b.shape[1], dtype=out_dtype)
        layout = L8 if use_8x4_sf_layout else L128
        a_bytes, scale_bytes = a.view(torch.uint8), a_descale.view(torch.uint8)
        reference.mm(a_bytes, b.T.view(torch.uint8), scale_bytes, b_descale.T.view(torch.uint8), alpha, out, layout)
        return out


NAMES = ["cudnn", "trtllm", "cutlass", "cute-dsl", "cutedsl_low_latency", "b12x", "cake"]
ROW_ALPHA = {"flashinfer", "auto", "cute-dsl", "cake"}


@pytest.fixture
def flashinfer(monkeypatch: pytest.MonkeyPatch) -> FakeFlashInfer:
    """FlashInfer on a GPU that can run it, as far as the table of backends sees."""
    fake = FakeFlashInfer()
    real = _optional.load
    monkeypatch.setattr(_optional, "load", lambda name: fake if name == "flashinfer" else real(name))
    monkeypatch.setattr(backends, "_blackwell", lambda call, package, runs_on: _optional.missing(package))
    return fake


def same(got: dict[str, Any], expected: dict[str, Any]) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert got[name] is value or (not isinstance(value, Tensor) and got[name] == value), name


@pytest.mark.parametrize("name", ["auto", "flashinfer", *NAMES])
@pytest.mark.parametrize("dtypes", [(torch.uint8, torch.uint8), (FP4, FP8)], ids=str)
def test_flashinfer_gets_its_arguments(
    pool: ScalePool, flashinfer: FakeFlashInfer, name: str, dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    operands = Operands(pool)
    expected_product = mm_fp4(*operands.arguments, backend="reference")
    a, b = operands.a.view(dtypes[0]), operands.w.view(dtypes[0]).T
    a_descale, b_descale = operands.a_descale.view(dtypes[1]), operands.w_scales.view(dtypes[1]).T
    out = torch.empty(M, N, dtype=torch.bfloat16)
    alpha = torch.ones(M) if name == "cake" else ONE
    result = mm_fp4(
        a, b, a_descale, b_descale, alpha, torch.bfloat16, out, backend=name, enable_pdl=False, skip_check=True
    )
    assert result is out
    assert torch.equal(out, expected_product)
    (call,) = flashinfer.calls
    same(
        call,
        {
            "a": a,
            "b": b,
            "a_descale": a_descale,
            "b_descale": b_descale,
            "alpha": alpha,
            "out_dtype": torch.bfloat16,
            "out": out,
            "block_size": 16,
            "use_8x4_sf_layout": False,
            "backend": "auto" if name == "flashinfer" else name,
            "use_nvfp4": True,
            "enable_pdl": False,
            "skip_check": True,
        },
    )
    if name != "cake":
        mm_fp4(a, b, a_descale, b_descale, None, torch.bfloat16, backend=name, use_8x4_sf_layout=False)
        defaults = {name: flashinfer.calls[1][name] for name in ("alpha", "out", "enable_pdl", "skip_check")}
        assert defaults == {"alpha": None, "out": None, "enable_pdl": True, "skip_check": False}


@pytest.mark.parametrize("name", ["flashinfer", *NAMES])
def test_8x4_goes_to_trtllm_only(pool: ScalePool, flashinfer: FakeFlashInfer, name: str) -> None:
    operands = Operands(pool, L8)
    if name == "trtllm":
        out = mm_fp4(*operands.arguments, backend=name)
        assert torch.equal(out, mm_fp4(*operands.arguments, backend="reference"))
        assert [call["use_8x4_sf_layout"] for call in flashinfer.calls] == [True]
    else:
        message = "it reads layout_128x4, the scales are in layout_8x4"
        check_refused(pool, ValueError, message, *operands.arguments, backend=name)
        assert not flashinfer.calls


@pytest.mark.parametrize("name", ["flashinfer", *NAMES])
def test_linear_goes_to_none_of_them(pool: ScalePool, flashinfer: FakeFlashInfer, name: str) -> None:
    check_refused(pool, ValueError, "the scales are in layout_linear", *Operands(pool, LINEAR).arguments, backend=name)
    assert not flashinfer.calls


@pytest.mark.parametrize("name", ["flashinfer", *NAMES])
def test_one_alpha_per_row_where_the_backend_takes_it(pool: ScalePool, flashinfer: FakeFlashInfer, name: str) -> None:
    operands, alpha = Operands(pool), torch.rand(M)
    if name in ROW_ALPHA:
        mm_fp4(*operands.arguments, alpha, backend=name)
        assert flashinfer.calls[0]["alpha"] is alpha
    else:
        message = "takes one alpha, not one per row"
        check_refused(pool, ValueError, message, *operands.arguments, alpha, backend=name)
        assert not flashinfer.calls


@pytest.mark.parametrize("alpha", [None, ONE])
def test_cake_takes_no_single_alpha(pool: ScalePool, flashinfer: FakeFlashInfer, alpha: Tensor | None) -> None:
    message = "takes one alpha per row, not one"
    check_refused(pool, ValueError, message, *Operands(pool).arguments, alpha, backend="cake")
    assert not flashinfer.calls


@pytest.mark.parametrize("name", ["flashinfer", *NAMES])
def test_the_alpha_of_a_single_row_is_both(pool: ScalePool, flashinfer: FakeFlashInfer, name: str) -> None:
    mm_fp4(*Operands(pool, m=1).arguments, ONE, backend=name)
    assert flashinfer.calls[0]["alpha"] is ONE


def test_a_backend_of_another_capability_launches_nothing(
    pool: ScalePool, flashinfer: FakeFlashInfer, foreign: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even the zeroing of a foreign buffer."""
    monkeypatch.setattr(backends, "_blackwell", lambda call, package, runs_on: f"it runs on {runs_on} only")
    operands = Operands(pool)
    a, b, _, b_descale = operands.arguments
    scales = operands.foreign_scales(NAN)
    message = r"backend 'b12x' cannot run this: it runs on \(120, 121\) only"
    check_refused(pool, ValueError, message, a, b, scales, b_descale, backend="b12x")
    assert not flashinfer.calls


@pytest.mark.parametrize("name", ["flashinfer", *NAMES])
def test_float32_goes_to_none_of_them(pool: ScalePool, flashinfer: FakeFlashInfer, name: str) -> None:
    arguments = (*Operands(pool).arguments, None, torch.float32)
    check_refused(pool, ValueError, r"it returns torch\.bfloat16.*, not torch\.float32", *arguments, backend=name)
    assert not flashinfer.calls


def test_auto_falls_back_to_ours(pool: ScalePool, flashinfer: FakeFlashInfer) -> None:
    """What FlashInfer's own choice cannot read or return."""
    for layout, out_dtype in ((L8, torch.bfloat16), (LINEAR, torch.bfloat16), (L128, torch.float32)):
        operands = Operands(pool, layout)
        close(mm_fp4(*operands.arguments, None, out_dtype), operands.exact())
    assert not flashinfer.calls


def test_foreign_scales_are_zeroed_for_flashinfer_too(
    pool: ScalePool, flashinfer: FakeFlashInfer, foreign: Callable[[Any], Any]
) -> None:
    operands = Operands(pool, L8)
    a, b, _, b_descale = operands.arguments
    scales = operands.foreign_scales(NAN)
    out = mm_fp4(a, b, scales, b_descale, use_8x4_sf_layout=True, backend="trtllm")
    assert flashinfer.calls[0]["a_descale"] is scales
    assert torch.equal(scales, operands.a_descale)
    assert torch.equal(out, mm_fp4(*operands.arguments, backend="reference"))


@pytest.mark.parametrize("flag", [None, False, True])
def test_mxfp4_passes_through_untouched(
    flashinfer: FakeFlashInfer, foreign: Callable[[Any], Any], flag: bool | None
) -> None:
    """Nothing of it is ours: no check, no zeroing, whatever the arguments are."""
    foreign("error")
    scales = torch.full((77,), NAN, dtype=torch.uint8)
    a, b, b_descale, out = torch.ones(3, 5), torch.ones(7), torch.ones(2), torch.ones(1)
    result = mm_fp4(a, b, scales, b_descale, ONE, torch.float16, out, 32, flag, "cudnn", False, False, skip_check=True)
    assert result is a
    assert bool((scales == NAN).all())
    same(
        flashinfer.calls[0],
        {
            "a": a,
            "b": b,
            "a_descale": scales,
            "b_descale": b_descale,
            "alpha": ONE,
            "out_dtype": torch.float16,
            "out": out,
            "block_size": 32,
            "use_8x4_sf_layout": bool(flag),
            "backend": "cudnn",
            "use_nvfp4": False,
            "enable_pdl": False,
            "skip_check": True,
        },
    )


def test_mxfp4_without_flashinfer(monkeypatch: pytest.MonkeyPatch, pool: ScalePool) -> None:
    """A backend that cannot run is a ValueError that says why, here as elsewhere."""
    real = _optional.load
    reason = "flashinfer is not installed"
    monkeypatch.setattr(_optional, "load", lambda name: reason if name == "flashinfer" else real(name))
    with pytest.raises(ValueError, match=reason):
        mm_fp4(*Operands(pool).arguments, block_size=32, use_nvfp4=False)


# --- bad input --------------------------------------------------------------------------------------------------------


def _change(name: str, value: Callable[[Operands], Any]) -> Callable[[Operands], dict[str, Any]]:
    return lambda operands: {name: value(operands)}


NO_TRITON = pytest.mark.skipif(backends.interpreting(), reason="Triton's interpreter runs on a CPU")
BAD = [
    ("a a list", _change("a", lambda o: [1]), TypeError, r"a must be a tensor \[m, k // 2\], got list"),
    ("a bfloat16", _change("a", lambda o: o.a.bfloat16()), TypeError, "a must be torch.uint8 or"),
    ("a int8", _change("a", lambda o: o.a.view(torch.int8)), TypeError, "a must be"),
    ("a 1-D", _change("a", lambda o: o.a[0]), ValueError, r"a must be \[m, k // 2\], got shape \(40,\)"),
    ("a 3-D", _change("a", lambda o: o.a[None]), ValueError, "a must be"),
    ("a without rows", _change("a", lambda o: o.a[:0]), ValueError, "m of at least 1"),
    ("a strided", _change("a", lambda o: o.a.repeat(1, 2)[:, :40]), ValueError, "a must be contiguous"),
    ("a transposed", _change("a", lambda o: o.a.T.contiguous().T), ValueError, "a must be contiguous"),
    ("a on meta", _change("a", lambda o: o.a.to("meta")), ValueError, "on cpu, the other tensors are on meta"),
    ("b None", _change("b", lambda o: None), TypeError, "b must be a tensor"),
    ("b float32", _change("b", lambda o: o.w.T.float()), TypeError, "b must be torch.uint8 or"),
    ("b not transposed", _change("b", lambda o: o.w), ValueError, "b.T must be contiguous"),
    ("b row-major", _change("b", lambda o: o.w.T.contiguous()), ValueError, "b.T must be contiguous"),
    ("b of another k", _change("b", lambda o: o.w[:, :32].contiguous().T), ValueError, "the weight.s scales"),
    ("b without columns", _change("b", lambda o: o.w[:0].T), ValueError, "n of at least 1"),
    ("b on meta", _change("b", lambda o: o.w.to("meta").T), ValueError, "b is on meta"),
    ("a_descale None", _change("a_descale", lambda o: None), TypeError, "a_descale must be a tensor"),
    ("a_descale float32", _change("a_descale", lambda o: o.a_descale.float()), TypeError, "a_descale must be"),
    ("a_descale int32", _change("a_descale", lambda o: o.a_descale.view(torch.int32)), TypeError, "a_descale must be"),
    ("a_descale on meta", _change("a_descale", lambda o: o.a_descale.to("meta")), ValueError, "a_descale is on meta"),
    ("a_descale transposed", _change("a_descale", lambda o: o.a_descale.T), ValueError, "a_descale must be contiguous"),
    ("a_descale empty", _change("a_descale", lambda o: o.a_descale[:0]), ValueError, r"bytes, got 0|whole buffer"),
    ("b_descale None", _change("b_descale", lambda o: None), TypeError, "b_descale must be a tensor"),
    ("b_descale float32", _change("b_descale", lambda o: o.w_scales.T.float()), TypeError, "b_descale must be"),
    ("b_descale 1-D", _change("b_descale", lambda o: o.w_scales.view(-1)), ValueError, "b_descale must be"),
    ("b_descale not transposed", _change("b_descale", lambda o: o.w_scales), ValueError, "b_descale.T must be"),
    ("b_descale too small", _change("b_descale", lambda o: o.w_scales[:64].T), ValueError, "layout_128x4"),
    ("b_descale too large", _change("b_descale", lambda o: o.w_scales.repeat(2, 1).T), ValueError, "layout_128x4"),
    ("b_descale on meta", _change("b_descale", lambda o: o.w_scales.to("meta").T), ValueError, "b_descale is on meta"),
    ("alpha a number", _change("alpha", lambda o: 1.0), TypeError, "alpha must be a float32 tensor, got float"),
    ("alpha float64", _change("alpha", lambda o: ONE.double()), TypeError, "alpha must be a float32 tensor"),
    ("alpha of two", _change("alpha", lambda o: torch.ones(2)), ValueError, "one element or one per row"),
    ("alpha of none", _change("alpha", lambda o: torch.ones(0)), ValueError, "one element or one per row"),
    ("alpha on meta", _change("alpha", lambda o: ONE.to("meta")), ValueError, r"one per row \(m=9\) on cpu"),
    ("out_dtype float64", _change("out_dtype", lambda o: torch.float64), TypeError, "out_dtype must be"),
    ("out_dtype a string", _change("out_dtype", lambda o: "bfloat16"), TypeError, "out_dtype must be"),
    ("out a list", _change("out", lambda o: []), TypeError, "out must be a tensor"),
    ("out of another dtype", _change("out", lambda o: torch.empty(M, N)), TypeError, "out must be torch.bfloat16"),
    ("out too small", _change("out", lambda o: torch.empty(M - 1, N).bfloat16()), ValueError, r"out must be \(9, 24\)"),
    ("out too large", _change("out", lambda o: torch.empty(M, N + 1).bfloat16()), ValueError, r"out must be \(9, 24\)"),
    ("out 1-D", _change("out", lambda o: torch.empty(M * N).bfloat16()), ValueError, "out must be"),
    ("out strided", _change("out", lambda o: torch.empty(N, M).bfloat16().T), ValueError, "out must be contiguous"),
    ("out on meta", _change("out", lambda o: torch.empty(M, N, device="meta").bfloat16()), ValueError, "out is on meta"),
    ("unknown backend", _change("backend", lambda o: "marlin"), ValueError, "backend must be one of auto, flashinfer"),
    ("backend None", _change("backend", lambda o: None), TypeError, "backend must be a string"),
    ("triton on a CPU", _change("backend", lambda o: "triton"), ValueError, "backend 'triton' cannot run this"),
    *(
        (f"{name} on a CPU", _change("backend", lambda o, name=name: name), ValueError, f"'{name}' cannot run this")
        for name in ("flashinfer", *NAMES)
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [pytest.param(*case[1:], id=case[0], marks=[NO_TRITON] if case[0].startswith("triton") else []) for case in BAD],
)
@pytest.mark.parametrize("whose", ["pool", "foreign"])
def test_bad_input(
    pool: ScalePool,
    foreign: Callable[[Any], Any],
    changes: Callable[[Operands], dict[str, Any]],
    error: type[Exception],
    message: str,
    whose: str,
) -> None:
    """Nothing is written, not even the padding of scales from elsewhere."""
    operands = Operands(pool)
    if whose == "foreign":
        operands.a_descale = operands.foreign_scales(NAN)
    names = ("a", "b", "a_descale", "b_descale")
    keywords = dict(zip(names, operands.arguments, strict=True))
    keywords |= {"out": torch.empty(M, N, dtype=torch.bfloat16)} | changes(operands)
    before = operands.a_descale.clone()
    check_refused(pool, error, message, *(keywords.pop(name) for name in names), **keywords)
    assert torch.equal(operands.a_descale, before)


@pytest.mark.parametrize("k", [0, 8, 24, 72])
def test_k_is_a_multiple_of_16(pool: ScalePool, k: int) -> None:
    a, w = torch.zeros(M, k // 2, dtype=torch.uint8), torch.zeros(N, k // 2, dtype=torch.uint8)
    scales = torch.full((128, 8), NAN, dtype=torch.uint8)
    check_refused(pool, ValueError, "k a multiple of 16", a, w.T, scales, torch.zeros(8, 128, dtype=torch.uint8).T)

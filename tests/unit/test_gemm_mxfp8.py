"""``mm_mxfp8``: FlashInfer's call, with the checks and the treatment of padding that ``mm_fp4`` has."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.gemm import foreign, pool  # noqa: F401
from torch import Tensor

from safealloc import (
    LayoutMismatchError,
    SafeAllocError,
    ScaleFormat,
    ScalePool,
    SfLayout,
    _optional,
    mm_mxfp8,
    mxfp4_quantize,
    mxfp8_quantize,
    nvfp4_quantize,
)
from safealloc.ops import backends

M, N, K = 9, 128, 160  # 5 scale columns, padded to 8
NAN = 0xFF  # as an e8m0 scale
FORMAT = ScaleFormat.mxfp8
L128, L8, LINEAR = SfLayout.layout_128x4, SfLayout.layout_8x4, SfLayout.layout_linear
NAMES = ["cudnn", "trtllm", "cutlass", "cute-dsl", "cutedsl_low_latency", "b12x"]


def data_of(rows: int, k: int = K) -> Tensor:
    return torch.randn(rows, k, generator=torch.Generator().manual_seed(rows + 1)).to(torch.float8_e4m3fn)


def linear_of(rows: int, k: int = K) -> Tensor:
    """Scale bytes in matrix order, uint8 ``[rows, k // 32]``."""
    return torch.randint(120, 129, (rows, k // 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(rows))


def scales_of(rows: int, k: int = K, layout: SfLayout = L128, padding: int = 0) -> Tensor:
    """The same in a layout, with this byte in the padding, uint8 ``[padded_rows, padded_cols]``."""
    scales = layout.swizzle(linear_of(rows, k))
    scales.view(-1)[layout.padding_mask(rows, k, format=FORMAT)] = padding
    return scales


def values_of(rows: int, k: int = K) -> Tensor:
    factors = torch.exp2(linear_of(rows, k).double() - 127)
    return data_of(rows, k).double() * factors.repeat_interleave(32, 1)


def exact(m: int = M, k: int = K) -> Tensor:
    return values_of(m, k) @ values_of(N, k).T


def operands(m: int = M, k: int = K, layout: SfLayout = L128, padding: int = 0) -> dict[str, Any]:
    scales = scales_of(m, k, layout, padding)
    return {"a": data_of(m, k), "b": data_of(N, k).T, "a_descale": scales, "b_descale": scales_of(N, k).view(-1)}


def close(result: Tensor, expected: Tensor) -> None:
    tolerance = {torch.bfloat16: 2**-8, torch.float16: 2**-10, torch.float32: 2**-19}[result.dtype]
    torch.testing.assert_close(result.double(), expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


class FakeFlashInfer:
    """Records the arguments of ``mm_mxfp8``, bound to FlashInfer's parameter names, and computes the product."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def mm_mxfp8(
        self,
        a: Tensor,
        b: Tensor,
        a_descale: Tensor,
        b_descale: Tensor,
        out: Tensor | None = None,
        out_dtype: torch.dtype = torch.bfloat16,
        use_8x4_sf_layout: bool = False,
        backend: str = "auto",
        *,
        skip_check: bool = False,
    ) -> Tensor:
        call = dict(locals())
        del call["self"]
        self.calls.append(call)
        assert (a_descale.ndim, b_descale.ndim, a_descale.dtype, b_descale.dtype) == (1, 1, torch.uint8, torch.uint8)
        (m, k), n = a.shape, b.shape[1]
        values = []
        for data, scales, layout in ((a, a_descale, L8 if use_8x4_sf_layout else L128), (b.T, b_descale, L128)):
            padded_k = -(-k // 128) * 128
            rows = data.shape[0]
            assert scales.numel() == layout.nbytes(rows, k, format=FORMAT)
            bytes_read = layout.unswizzle(scales, rows, padded_k, format=FORMAT)
            factors = torch.where(bytes_read == NAN, torch.nan, torch.exp2(bytes_read.double() - 127))
            padded = torch.nn.functional.pad(data.double(), (0, padded_k - k))
            values.append(padded * factors.repeat_interleave(32, 1))
        out = torch.empty(m, n, dtype=out_dtype) if out is None else out
        return out.copy_(values[0] @ values[1].T)


@pytest.fixture
def flashinfer(monkeypatch: pytest.MonkeyPatch) -> FakeFlashInfer:
    """FlashInfer on a GPU that can run it, as far as the table of backends sees."""
    fake = FakeFlashInfer()
    real = _optional.load
    monkeypatch.setattr(_optional, "load", lambda name: fake if name == "flashinfer" else real(name))
    monkeypatch.setattr(backends, "package_refusal", lambda call, package, runs_on: _optional.missing(package))
    return fake


def refused(flashinfer: FakeFlashInfer, error: type[Exception], message: str, given: dict[str, Any]) -> None:
    """``mm_mxfp8`` raises before FlashInfer gets the call, and writes nothing."""
    scales = given["a_descale"]
    before = scales.clone() if scales.device.type == "cpu" else None
    out = torch.full((M, N), 42.0).bfloat16()
    with pytest.raises(error, match=message) as caught:
        mm_mxfp8(**{"out": out} | given)
    assert isinstance(caught.value, LayoutMismatchError) == (error is LayoutMismatchError)
    assert not flashinfer.calls
    assert bool((out == 42).all())
    if before is not None:
        assert torch.equal(scales.view(torch.uint8), before.view(torch.uint8))


# --- The reference --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", list(SfLayout), ids=lambda layout: layout.name)
@pytest.mark.parametrize(("m", "k"), [(1, 32), (9, 160), (40, 416), (130, 128), (5, 2880)])
def test_the_reference_is_the_product_of_the_values(pool: ScalePool, layout: SfLayout, m: int, k: int) -> None:
    given = operands(m, k)
    given["a_descale"] = pool.acquire(m, k, layout, format=FORMAT).copy_(scales_of(m, k, layout))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        close(mm_mxfp8(**given, out_dtype=dtype, backend="reference"), exact(m, k))
    assert torch.equal(mm_mxfp8(**given, out_dtype=dtype), mm_mxfp8(**given, out_dtype=dtype, backend="reference"))


@pytest.mark.parametrize("layout", list(SfLayout), ids=lambda layout: layout.name)
def test_what_mxfp8_quantize_gives_is_multiplied(pool: ScalePool, layout: SfLayout) -> None:
    x, w = (torch.randn(rows, 2880, generator=torch.Generator().manual_seed(rows)).bfloat16() for rows in (M, 24))
    a, a_descale = mxfp8_quantize(x, layout=layout, pool=pool)
    b, b_descale = mxfp8_quantize(w, pool=pool)
    y = mm_mxfp8(a, b.T, a_descale, b_descale, out_dtype=torch.float32)
    unquantized = x.float() @ w.float().T
    assert (y - unquantized).norm() < 0.06 * unquantized.norm()
    for form in (b_descale.view(-1), b_descale.T, b_descale.view(torch.float8_e8m0fnu)):
        assert torch.equal(mm_mxfp8(a, b.T, a_descale, form, out_dtype=torch.float32), y)


@pytest.mark.parametrize("layout", [L128, L8], ids=lambda layout: layout.name)
def test_nan_in_a_padding_column_reaches_its_row_and_a_padding_row_none(pool: ScalePool, layout: SfLayout) -> None:
    """At k = 2880, 90 scales lie in 92 columns."""
    k = 2880
    scales = pool.acquire(M, k, layout, format=FORMAT).copy_(scales_of(M, k, layout))
    offsets = layout.offsets(layout.tile.rows, k + 64, format=FORMAT)
    scales.view(-1)[offsets[3, 91]] = NAN
    if layout is L128:
        scales.view(-1)[offsets[M, 0]] = NAN
    y = mm_mxfp8(**operands(M, k) | {"a_descale": scales}, backend="reference")
    assert y.isnan().all(1).nonzero().flatten().tolist() == [3]
    assert int(y.isnan().any(1).sum()) == 1
    scales.copy_(scales_of(M, k, layout))


def test_nan_in_a_padding_column_of_the_weight_reaches_its_column() -> None:
    given = operands()
    given["b_descale"][L128.offsets(N, 256, format=FORMAT)[5, 7]] = NAN
    assert mm_mxfp8(**given, backend="reference").isnan().any(0).nonzero().flatten().tolist() == [5]


def test_finite_padding_is_multiplied_by_zero() -> None:
    given = operands()
    clean = mm_mxfp8(**given, out_dtype=torch.float32)
    given["b_descale"][L128.padding_mask(N, K, format=FORMAT)] = 0xFE  # 2^127
    assert torch.equal(mm_mxfp8(**given, out_dtype=torch.float32), clean)


def test_data_may_be_padded_in_k_after_quantization(pool: ScalePool) -> None:
    scales = pool.acquire(M, K, L128, padded_k=256, format=FORMAT)
    scales.copy_(scales_of(M))
    a, b = (torch.zeros(rows, 256).to(torch.float8_e4m3fn) for rows in (M, N))
    a[:, :K], b[:, :K] = data_of(M), data_of(N)
    close(mm_mxfp8(a, b.T, scales, scales_of(N).view(-1), out_dtype=torch.float32), exact())


def test_whole_row_tiles_of_a_buffer_serve_their_rows_and_other_views_none(pool: ScalePool) -> None:
    a, scales = mxfp8_quantize(torch.randn(150, K).bfloat16(), pool=pool)
    b, b_descale = data_of(N).T, scales_of(N).view(-1)
    whole = mm_mxfp8(a, b, scales, b_descale)
    assert torch.equal(mm_mxfp8(a[128:], b, scales[128:], b_descale), whole[128:])
    with pytest.raises(LayoutMismatchError, match="no whole number of row tiles"):
        mm_mxfp8(a[64:], b, scales[64:192], b_descale)


# --- Scales that no pool made ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [L128, L8], ids=lambda layout: layout.name)
@pytest.mark.parametrize(("m", "k"), [(1, K), (8, K), (130, K), (M, 2880), (128, 2880)])
def test_padding_of_foreign_scales_is_zeroed_in_place(
    flashinfer: FakeFlashInfer, foreign: Callable[[Any], Any], layout: SfLayout, m: int, k: int
) -> None:
    given = operands(m, k, layout, NAN)
    flag, backend = layout is L8, "trtllm" if layout is L8 else "auto"
    y = mm_mxfp8(**given, use_8x4_sf_layout=flag or None, backend=backend)
    assert flashinfer.calls[0]["a_descale"].data_ptr() == given["a_descale"].data_ptr()
    close(y, exact(m, k))
    assert torch.equal(given["a_descale"], scales_of(m, k, layout)), "valid scales must stay, padding must be zero"


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e8m0fnu], ids=str)
def test_flat_scales_are_foreign_scales_too(foreign: Callable[[Any], Any], dtype: torch.dtype) -> None:
    given = operands(padding=NAN)
    scales = given["a_descale"]
    close(mm_mxfp8(**given | {"a_descale": scales.view(-1).view(dtype)}), exact())
    assert torch.equal(scales, scales_of(M))


def test_scales_inside_a_larger_storage_are_copied(foreign: Callable[[Any], Any]) -> None:
    storage = torch.cat([scales_of(M, padding=NAN), scales_of(128)])
    before = storage.clone()
    close(mm_mxfp8(**operands() | {"a_descale": storage[:128]}), exact())
    assert torch.equal(storage, before)


def test_trust_reads_padding_as_it_is(flashinfer: FakeFlashInfer, foreign: Callable[[Any], Any]) -> None:
    foreign("trust")
    given = operands(padding=NAN)
    assert bool(mm_mxfp8(**given).isnan().all())
    assert len(flashinfer.calls) == 1
    assert torch.equal(given["a_descale"], scales_of(M, padding=NAN))


def test_error_refuses_them(flashinfer: FakeFlashInfer, foreign: Callable[[Any], Any]) -> None:
    foreign("error")
    message = r"take it from safealloc.mxfp8_quantize.*acquire\(rows, k, layout, format=ScaleFormat.mxfp8\)"
    refused(flashinfer, SafeAllocError, message, operands(padding=NAN))


# --- What is refused ------------------------------------------------------------------------------------------------


def of_nvfp4(rows: int) -> Tensor:
    return L128.swizzle(torch.ones(rows, K // 16, dtype=torch.uint8))


BAD = [
    ("a bfloat16", {"a": data_of(M).bfloat16()}, TypeError, "a must be torch.float8_e4m3fn, got torch.bfloat16"),
    ("a of bytes", {"a": data_of(M).view(torch.uint8)}, TypeError, "a must be torch.float8_e4m3fn, got torch.uint8"),
    ("a e5m2", {"a": data_of(M).view(torch.float8_e5m2)}, TypeError, "a must be torch.float8_e4m3fn"),
    ("a no tensor", {"a": [[1.0]]}, TypeError, r"a must be a tensor \[m, k\]"),
    ("a 1-D", {"a": data_of(M)[0]}, ValueError, r"a must be \[m, k\]"),
    ("a strided", {"a": data_of(M).T.contiguous().T}, ValueError, "a must be contiguous"),
    ("a of another k", {"a": data_of(M, 128)}, ValueError, r"the k of b, \[k, n\] = \(160, 128\), got \(9, 128\)"),
    ("no rows", {"a": data_of(M)[:0]}, ValueError, "m of at least 1"),
    ("b not transposed", {"b": data_of(N)}, ValueError, r"pass weight\.T"),
    ("b float32", {"b": data_of(N).float().T}, TypeError, "b must be torch.float8_e4m3fn"),
    ("k no multiple of 32", {"b": data_of(N, 176).T, "a": data_of(M, 176)}, ValueError, "k a multiple of 32"),
    ("b_descale in linear", {"b_descale": linear_of(N)}, ValueError, r"layout_128x4, \(128, 8\), got \(128, 5\)"),
    ("b_descale linear, transposed", {"b_descale": linear_of(N).T}, ValueError, "b_descale must be contiguous"),
    ("b_descale transposed", {"b_descale": scales_of(N).T.contiguous()}, ValueError, r"\(128, 8\), got \(8, 128\)"),
    ("b_descale of blocks of 16", {"b_descale": of_nvfp4(N)}, ValueError, r"\(128, 8\), got \(128, 12\)"),
    ("b_descale e4m3", {"b_descale": scales_of(N).view(torch.float8_e4m3fn)}, TypeError, "b_descale must be torch.uint8"),
    ("b_descale on meta", {"b_descale": scales_of(N).to("meta")}, ValueError, "b_descale is on meta"),
    ("a_descale of blocks of 16", {"a_descale": of_nvfp4(M)}, ValueError, "layout_128x4 has 1024 bytes, got 1536"),
    ("a_descale in 8x4", {"a_descale": scales_of(M, layout=L8)}, LayoutMismatchError, "which fits layout_8x4"),
    ("a_descale in linear", {"a_descale": linear_of(M)}, LayoutMismatchError, "which fits layout_linear"),
    ("a_descale e4m3", {"a_descale": scales_of(M).view(torch.float8_e4m3fn)}, TypeError, "a_descale must be torch.uint8"),
    ("a_descale transposed", {"a_descale": scales_of(M).T}, ValueError, "a_descale must be contiguous"),
    ("out_dtype int8", {"out_dtype": torch.int8}, TypeError, "out_dtype must be"),
    ("out too small", {"out": torch.empty(M - 1, N).bfloat16()}, ValueError, r"out must be \(9, 128\)"),
    ("out float16", {"out": torch.empty(M, N).half()}, TypeError, "out must be torch.bfloat16"),
    ("out strided", {"out": torch.empty(N, M).bfloat16().T}, ValueError, "out must be contiguous"),
    ("an unknown backend", {"backend": "marlin"}, ValueError, "backend must be one of auto, flashinfer, reference, cudnn"),
    ("a backend of mm_fp4", {"backend": "triton"}, ValueError, "backend must be one of"),
    *(
        (f"float32 by {name}", {"out_dtype": torch.float32, "out": None, "backend": name}, ValueError, "not torch.float32")
        for name in ("flashinfer", *NAMES)
    ),
    ("float16 by trtllm", {"out_dtype": torch.half, "out": None, "backend": "trtllm"}, ValueError, "not torch.float16"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "error", "message"), [pytest.param(*case[1:], id=case[0]) for case in BAD])
def test_every_wrong_argument_is_refused_before_flashinfer_gets_the_call(
    flashinfer: FakeFlashInfer, foreign: Callable[[Any], Any], changes: dict[str, Any], error: Any, message: str
) -> None:
    refused(flashinfer, error, message, operands(padding=NAN) | changes)


@pytest.mark.parametrize("backend", ["flashinfer", *NAMES])
def test_small_products_are_none_of_flashinfers(
    flashinfer: FakeFlashInfer, foreign: Callable[[Any], Any], backend: str
) -> None:
    given = operands(padding=NAN)
    given |= {"b": data_of(24).T, "b_descale": scales_of(24), "backend": backend, "out": None}
    refused(flashinfer, ValueError, "n and k are at least 128", given)
    close(mm_mxfp8(**given | {"backend": "auto"}), values_of(M) @ values_of(24).T)
    assert not flashinfer.calls


@pytest.mark.parametrize("backend", ["flashinfer", *NAMES])
@pytest.mark.parametrize("layout", [L8, LINEAR], ids=lambda layout: layout.name)
def test_8x4_is_read_by_trtllm_alone_and_linear_by_none(
    pool: ScalePool, flashinfer: FakeFlashInfer, backend: str, layout: SfLayout
) -> None:
    scales = pool.acquire(M, K, layout, format=FORMAT).copy_(scales_of(M, layout=layout))
    given = operands() | {"a_descale": scales, "backend": backend}
    if (backend, layout) == ("trtllm", L8):
        close(mm_mxfp8(**given), exact())
        assert flashinfer.calls[0]["use_8x4_sf_layout"] is True
    else:
        refused(flashinfer, ValueError, f"it reads layout_128x4.*, the scales are in {layout.name}", given)
        close(mm_mxfp8(**given | {"backend": "auto"}), exact())
        assert not flashinfer.calls


@pytest.mark.parametrize("which", ["a_descale", "b_descale"])
@pytest.mark.parametrize("format", ["nvfp4", "mxfp4"])
def test_a_pools_scales_of_another_format_are_refused_though_their_bytes_fit(
    pool: ScalePool, flashinfer: FakeFlashInfer, foreign: Callable[[Any], Any], which: str, format: str
) -> None:
    """NVFP4 scales of 80 columns are as many bytes as MX scales of 160."""
    foreign("trust")
    rows = M if which == "a_descale" else N
    if format == "nvfp4":
        _, known = nvfp4_quantize(torch.randn(rows, K // 2).bfloat16(), torch.ones(1), pool=pool, backend="reference")
    else:
        _, known = mxfp4_quantize(torch.randn(rows, K).bfloat16(), pool=pool)
    assert known.numel() == operands()[which].numel()
    message = rf"{which}.* {format.upper()} scales .*reads it as MXFP8 scales"
    refused(flashinfer, LayoutMismatchError, message, operands() | {which: known})
    assert pool.verify() == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": 8}, "written for 8 rows, a has 9"),
        ({"layout": L8}, "written in layout_8x4, and use_8x4_sf_layout=False"),
        ({"layout": LINEAR}, "written in layout_linear, and use_8x4_sf_layout=False"),
        ({"k": 320}, "a_descale has 12 scale columns"),
    ],
    ids=["rows", "8x4", "linear", "columns"],
)
def test_a_pools_scales_that_contradict_are_refused(
    pool: ScalePool, flashinfer: FakeFlashInfer, changes: dict[str, Any], message: str
) -> None:
    shape = {"rows": M, "k": K, "layout": L128, "format": FORMAT}
    right = pool.acquire(**shape).copy_(scales_of(M))
    close(mm_mxfp8(**operands() | {"a_descale": right}, use_8x4_sf_layout=False), exact())
    flashinfer.calls.clear()
    wrong = pool.acquire(**shape | changes)
    given = operands() | {"a_descale": wrong, "use_8x4_sf_layout": False}
    refused(flashinfer, LayoutMismatchError, message, given)


def test_weight_scales_of_a_pool_in_another_layout_or_of_other_rows_are_refused(
    pool: ScalePool, flashinfer: FakeFlashInfer
) -> None:
    for rows, layout in ((N, L8), (100, L128)):
        known = pool.acquire(rows, K, layout, format=FORMAT)
        message = f"b_descale holds scales of rows={rows}, k=160, {layout.name}"
        refused(flashinfer, LayoutMismatchError, message, operands() | {"b_descale": known})


def test_without_flashinfer_the_reference_runs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    real = _optional.load
    monkeypatch.setattr(
        _optional, "load", lambda name: "flashinfer is not installed" if name == "flashinfer" else real(name)
    )
    for backend in ("flashinfer", "cutlass"):
        with pytest.raises(ValueError, match="flashinfer is not installed"):
            mm_mxfp8(**operands(), backend=backend)
    close(mm_mxfp8(**operands(), out_dtype=torch.float32), exact())


# --- FlashInfer's and compiled calls --------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["auto", "flashinfer", *NAMES])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e8m0fnu], ids=str)
def test_flashinfer_gets_its_arguments(
    pool: ScalePool, flashinfer: FakeFlashInfer, backend: str, dtype: torch.dtype
) -> None:
    given, out = operands(), torch.empty(M, N, dtype=torch.bfloat16)
    given["a_descale"] = pool.acquire(M, K, L128, format=FORMAT).copy_(scales_of(M)).view(dtype)
    given["b_descale"] = scales_of(N).view(dtype)
    assert mm_mxfp8(**given, out=out, backend=backend, skip_check=True) is out
    close(out, exact())
    (call,) = flashinfer.calls
    for name, tensor in given.items():
        assert call[name].data_ptr() == tensor.data_ptr(), name
    assert call["b"].stride() == (1, K)
    expected = {"out": out, "out_dtype": torch.bfloat16, "use_8x4_sf_layout": False, "skip_check": True}
    expected["backend"] = "auto" if backend == "flashinfer" else backend
    assert {name: call[name] for name in expected} == expected
    mm_mxfp8(*given.values(), None, torch.bfloat16, False, backend)  # FlashInfer's order
    assert flashinfer.calls[1]["skip_check"] is False


def test_the_signature_is_that_of_the_installed_flashinfer() -> None:
    flashinfer = _optional.load("flashinfer")
    if isinstance(flashinfer, str):
        pytest.skip(f"compares with flashinfer.mm_mxfp8: {flashinfer}")
    theirs, ours = (inspect.signature(function).parameters for function in (flashinfer.mm_mxfp8, mm_mxfp8))
    assert list(theirs) == [name for name in ours if name != "skip_check"]  # which its decorator adds
    assert {name: one.default for name, one in theirs.items()} == {
        name: False if name == "use_8x4_sf_layout" else ours[name].default for name in theirs
    }


def test_compiled_code_treats_scales_as_eager_code_does(
    flashinfer: FakeFlashInfer, foreign: Callable[[Any], Any]
) -> None:
    given = operands(padding=NAN)

    def product(scales: Tensor) -> Tensor:
        return mm_mxfp8(given["a"], given["b"], scales, given["b_descale"])

    compiled = torch.compile(product, backend="aot_eager", fullgraph=True)
    close(compiled(given["a_descale"]), exact())
    assert torch.equal(given["a_descale"], scales_of(M)), "the zeroing of foreign padding must reach the argument"
    with pytest.raises(ValueError, match="got 1536"):
        compiled(of_nvfp4(M))


def test_compiled_code_knows_a_pools_buffer(pool: ScalePool, flashinfer: FakeFlashInfer) -> None:
    given = operands()
    scales = pool.acquire(M, K, L8, format=FORMAT).copy_(scales_of(M, layout=L8))

    def product(scales: Tensor, out: Tensor, flag: bool | None) -> Tensor:
        return mm_mxfp8(given["a"], given["b"], scales, given["b_descale"], out, use_8x4_sf_layout=flag)

    compiled, out = torch.compile(product, backend="aot_eager", fullgraph=True), torch.empty(M, N).bfloat16()
    close(compiled(scales, out, None), exact())
    close(out, exact())
    with pytest.raises(LayoutMismatchError, match="written in layout_8x4"):
        compiled(scales, out, False)
    assert not flashinfer.calls

"""``mm_fp4`` of MXFP4: the checks and the treatment of padding that NVFP4 has, for scales of blocks of 32 columns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.gemm import FLASHINFER_NAMES, FakeFlashInfer, foreign, mxfp4_values  # noqa: F401
from torch import Tensor

from safealloc import (
    LayoutMismatchError,
    SafeAllocError,
    ScaleFormat,
    ScalePool,
    SfLayout,
    _optional,
    mm_fp4,
    mxfp4_quantize,
    nvfp4_quantize,
)
from safealloc.ops import backends

M, N, K = 9, 24, 160  # 5 scale columns, padded to 8
NAN = 0xFF  # as an e8m0 scale
MX = {"block_size": 32, "use_nvfp4": False}
LAYOUT = SfLayout.layout_128x4


def scales_of(rows: int, k: int = K, padding: int = 0) -> Tensor:
    """Scales of ``[rows, k]`` in blocks of 32, uint8 ``[padded_rows, padded_cols]``, with this byte in the padding."""
    linear = torch.randint(120, 130, (rows, k // 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(rows))
    scales = LAYOUT.swizzle(linear)
    scales.view(-1)[LAYOUT.padding_mask(rows, k // 2)] = padding
    return scales


def data_of(rows: int, k: int = K) -> Tensor:
    return torch.randint(0, 256, (rows, k // 2), dtype=torch.uint8, generator=torch.Generator().manual_seed(rows + 1))


def operands(padding: int = 0, m: int = M) -> dict[str, Any]:
    a, w = data_of(m), data_of(N)
    return {"a": a, "b": w.T, "a_descale": scales_of(m, padding=padding), "b_descale": scales_of(N).T}


def exact(m: int = M) -> Tensor:
    return mxfp4_values(data_of(m), scales_of(m)) @ mxfp4_values(data_of(N), scales_of(N)).T


@pytest.fixture
def flashinfer(monkeypatch: pytest.MonkeyPatch) -> FakeFlashInfer:
    """FlashInfer on a GPU that can run it, as far as the table of backends sees."""
    fake = FakeFlashInfer()
    real = _optional.load
    monkeypatch.setattr(_optional, "load", lambda name: fake if name == "flashinfer" else real(name))
    monkeypatch.setattr(backends, "package_refusal", lambda call, package, runs_on: _optional.missing(package))
    return fake


@pytest.mark.parametrize("backend", ["auto", "flashinfer", "cudnn", "cute-dsl", "cutedsl_low_latency", "b12x"])
def test_flashinfer_gets_what_was_checked(flashinfer: FakeFlashInfer, backend: str) -> None:
    given, alpha, out = operands(), torch.full((1,), 0.5), torch.empty(M, N, dtype=torch.float16)
    options = {"backend": backend, "enable_pdl": False, "skip_check": True}
    result = mm_fp4(**given, alpha=alpha, out_dtype=torch.float16, out=out, **options, **MX)
    assert result is out
    torch.testing.assert_close(out.float(), 0.5 * exact(), rtol=2**-9, atol=2**-20)
    (call,) = flashinfer.calls
    for name, tensor in given.items():
        assert (call[name].data_ptr(), call[name].stride()) == (tensor.data_ptr(), tensor.stride())
    expected = {"alpha": alpha, "out": out, "out_dtype": torch.float16, "use_8x4_sf_layout": False, **options, **MX}
    expected["backend"] = "auto" if backend == "flashinfer" else backend
    assert {name: call[name] for name in expected} == expected


@pytest.mark.parametrize("m", [1, 7, 32, 128, 130])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e4m3fn, torch.float8_e8m0fnu], ids=str)
def test_padding_of_scales_that_are_all_of_their_storage_is_zeroed_in_place(
    flashinfer: FakeFlashInfer, foreign: Callable[[Any], Any], m: int, dtype: torch.dtype
) -> None:
    given = operands(NAN, m)
    scales = given["a_descale"]
    y = mm_fp4(**given | {"a_descale": scales.view(dtype)}, **MX)
    assert flashinfer.calls[0]["a_descale"].data_ptr() == scales.data_ptr()
    torch.testing.assert_close(y.float(), exact(m), rtol=2**-7, atol=2**-20)
    assert torch.equal(scales, scales_of(m)), "valid scales must stay, padding must be zero"


def test_scales_inside_a_larger_storage_are_copied_and_nothing_of_it_is_written(
    flashinfer: FakeFlashInfer, foreign: Callable[[Any], Any]
) -> None:
    given = operands(NAN)
    storage = torch.cat([given["a_descale"], scales_of(128)])
    before = storage.clone()
    y = mm_fp4(**given | {"a_descale": storage[:128]}, **MX)
    torch.testing.assert_close(y.float(), exact(), rtol=2**-7, atol=2**-20)
    assert torch.equal(storage, before)


def test_trust_reads_padding_as_it_is(flashinfer: FakeFlashInfer, foreign: Callable[[Any], Any]) -> None:
    foreign("trust")
    given = operands(NAN)
    assert bool(mm_fp4(**given, **MX).isnan().all())
    assert torch.equal(given["a_descale"], scales_of(M, padding=NAN))


def test_error_refuses_them(flashinfer: FakeFlashInfer, foreign: Callable[[Any], Any]) -> None:
    foreign("error")
    refused(flashinfer, SafeAllocError, "take it from safealloc.mxfp4_quantize", operands(NAN))


def refused(flashinfer: FakeFlashInfer, error: type[Exception], message: str, given: dict[str, Any]) -> None:
    """``mm_fp4`` raises before FlashInfer gets the call, and writes nothing."""
    scales = given.get("a_descale")
    before = scales.clone() if isinstance(scales, Tensor) and scales.device.type == "cpu" else None
    out = torch.full((M, N), 42.0).bfloat16()
    with pytest.raises(error, match=message) as caught:
        mm_fp4(**{"out": out} | MX | given)
    assert isinstance(caught.value, LayoutMismatchError) == (error is LayoutMismatchError)
    assert not flashinfer.calls
    assert bool((out == 42).all())
    if before is not None:
        assert torch.equal(scales.view(torch.uint8), before.view(torch.uint8))


def of_nvfp4(rows: int) -> Tensor:
    return LAYOUT.swizzle(torch.ones(rows, K // 16, dtype=torch.uint8))


BAD = [
    ("a bfloat16", {"a": data_of(M).bfloat16()}, TypeError, "a must be torch.uint8 or"),
    ("a 1-D", {"a": data_of(M)[0]}, ValueError, r"a must be \[m, k // 2\]"),
    ("a strided", {"a": data_of(M).T.contiguous().T}, ValueError, "a must be contiguous"),
    ("a of another k", {"a": data_of(M, 128)}, ValueError, "the k of b"),
    ("a on meta", {"a": data_of(M).to("meta")}, ValueError, "b is on cpu, the other tensors are on meta"),
    ("b not transposed", {"b": data_of(N)}, ValueError, r"pass weight\.T"),
    ("b float32", {"b": data_of(N).float().T}, TypeError, "b must be"),
    ("k no multiple of 32", {"b": data_of(N, 176).T, "a": data_of(M, 176)}, ValueError, "k a multiple of 32"),
    ("b_descale not transposed", {"b_descale": scales_of(N)}, ValueError, r"pass weight_scales\.T"),
    ("b_descale of blocks of 16", {"b_descale": of_nvfp4(N).T}, ValueError, r"layout_128x4, \(128, 8\), got \(128, 12\)"),
    ("b_descale on meta", {"b_descale": scales_of(N).to("meta").T}, ValueError, "b_descale is on meta"),
    ("a_descale of blocks of 16", {"a_descale": of_nvfp4(M)}, ValueError, "layout_128x4 has 1024 bytes, got 1536"),
    ("a_descale in 8x4", {"a_descale": scales_of(M)[:16]}, LayoutMismatchError, "which fits layout_8x4"),
    ("a_descale int32", {"a_descale": scales_of(M).view(torch.int32)}, TypeError, "a_descale must be"),
    ("a_descale transposed", {"a_descale": scales_of(M).T}, ValueError, "a_descale must be contiguous"),
    ("alpha float64", {"alpha": torch.ones(1).double()}, TypeError, "alpha must be a float32 tensor"),
    ("alpha of two", {"alpha": torch.ones(2)}, ValueError, "one element or one per row"),
    ("float32", {"out_dtype": torch.float32, "out": None, "backend": "flashinfer"}, ValueError, "not torch.float32"),
    ("out too small", {"out": torch.empty(M - 1, N).bfloat16()}, ValueError, r"out must be \(9, 24\)"),
    ("out float16", {"out": torch.empty(M, N).half()}, TypeError, "out must be torch.bfloat16"),
    ("block_size 32 as NVFP4", {"use_nvfp4": True}, ValueError, "32 with use_nvfp4=False, got 32 with use_nvfp4=True"),
    ("block_size 16 as MXFP4", {"block_size": 16}, ValueError, "got 16 with use_nvfp4=False"),
    ("block_size 64", {"block_size": 64}, ValueError, "got 64 with use_nvfp4=False"),
    ("an unknown backend", {"backend": "marlin"}, ValueError, "backend must be one of"),
    *(
        (f"{name} reads blocks of 16 only", {"backend": name}, ValueError, "does not read scales of blocks of 32 columns")
        for name in ("trtllm", "cutlass", "cake", "triton")
    ),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "error", "message"), [pytest.param(*case[1:], id=case[0]) for case in BAD])
def test_every_wrong_argument_is_refused_before_flashinfer_gets_the_call(
    flashinfer: FakeFlashInfer, foreign: Callable[[Any], Any], changes: dict[str, Any], error: Any, message: str
) -> None:
    refused(flashinfer, error, message, operands(NAN) | changes)


@pytest.mark.parametrize("backend", ["flashinfer", *FLASHINFER_NAMES])
def test_8x4_is_read_by_no_backend_of_flashinfer(
    flashinfer: FakeFlashInfer, foreign: Callable[[Any], Any], backend: str
) -> None:
    scales = torch.full((16, 8), NAN, dtype=torch.uint8)
    changes = {"a_descale": scales, "use_8x4_sf_layout": True, "backend": backend}
    refused(flashinfer, ValueError, "layout_8x4|blocks of 32", operands() | changes)


@pytest.mark.parametrize("which", ["a_descale", "b_descale"])
@pytest.mark.parametrize("rows", [slice(None), slice(0, 128), slice(8, 136)], ids=["whole", "row tile", "any view"])
def test_a_pools_nvfp4_scales_are_refused_by_name(
    flashinfer: FakeFlashInfer, foreign: Callable[[Any], Any], which: str, rows: slice
) -> None:
    """Of 80 columns: as many bytes as MXFP4 scales of 160 have."""
    with ScalePool("cpu") as pool:
        foreign("trust")
        x = torch.randn(M if rows == slice(None) else 150, K // 2).bfloat16()
        _, known = nvfp4_quantize(x, torch.ones(1), pool=pool, backend="reference")
        view = known[rows] if which == "a_descale" else known[rows].T
        message = rf"{which}.* holds NVFP4 scales \(rows="
        refused(flashinfer, LayoutMismatchError, message, operands() | {which: view})
        assert pool.verify() == 1


def test_without_flashinfer_the_reference_runs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    real = _optional.load
    reason = "flashinfer is not installed"
    monkeypatch.setattr(_optional, "load", lambda name: reason if name == "flashinfer" else real(name))
    for backend in ("flashinfer", "cudnn"):
        with pytest.raises(ValueError, match=reason):
            mm_fp4(**operands(), backend=backend, **MX)
    torch.testing.assert_close(mm_fp4(**operands(), out_dtype=torch.float32, **MX), exact(), rtol=2**-20, atol=2**-20)


def test_compiled_code_checks_it_too(flashinfer: FakeFlashInfer, foreign: Callable[[Any], Any]) -> None:
    given = operands(NAN)

    def product(scales: Tensor) -> Tensor:
        return mm_fp4(given["a"], given["b"], scales, given["b_descale"], **MX)

    compiled = torch.compile(product, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(given["a_descale"]).float(), exact(), rtol=2**-7, atol=2**-20)
    with pytest.raises(ValueError, match="got 1536"):
        compiled(of_nvfp4(M))


@pytest.mark.parametrize("layout", list(SfLayout), ids=lambda layout: layout.name)
@pytest.mark.parametrize(("m", "k"), [(1, 32), (9, 160), (40, 416), (130, 128)])
def test_the_reference_multiplies_what_mxfp4_quantize_gives(layout: SfLayout, m: int, k: int) -> None:
    generator = torch.Generator().manual_seed(k)
    x, w = (torch.randn(rows, k, generator=generator).bfloat16() for rows in (m, N))
    with ScalePool("cpu") as pool:
        a, a_descale = mxfp4_quantize(x, layout=layout, pool=pool)
        b, b_descale = mxfp4_quantize(w, pool=pool)
        alpha = torch.full((m,), 0.5)
        y = mm_fp4(a, b.T, a_descale, b_descale.T, alpha, torch.float32, backend="reference", **MX)
        in_128x4 = LAYOUT.swizzle(layout.unswizzle(a_descale, m, k, format=ScaleFormat.mxfp4))
        expected = 0.5 * mxfp4_values(a, in_128x4) @ mxfp4_values(b, b_descale).T
        torch.testing.assert_close(y, expected, rtol=2**-18, atol=2**-18)
        unquantized = 0.5 * x.float() @ w.float().T
        assert (y - unquantized).norm() < 0.4 * unquantized.norm()


def test_nan_in_a_padding_column_reaches_its_row_in_the_reference() -> None:
    given = operands()
    at = LAYOUT.offsets(M, K + 32, format=ScaleFormat.mxfp4)[3, K // 32]
    with ScalePool("cpu") as pool:
        a_descale = pool.acquire(M, K, LAYOUT, format=ScaleFormat.mxfp4)
        a_descale.copy_(given["a_descale"])
        a_descale.view(-1)[at] = NAN
        y = mm_fp4(**given | {"a_descale": a_descale}, backend="reference", **MX)
        assert y.isnan().all(1).nonzero().view(-1).tolist() == [3]
        assert not bool(y[:3].isnan().any() | y[4:].isnan().any())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": 8}, "written for 8 rows, a has 9"),
        ({"layout": SfLayout.layout_8x4}, "written in layout_8x4, and use_8x4_sf_layout=False"),
        ({"format": ScaleFormat.mxfp8}, "holds MXFP8 scales .* reads it as MXFP4 scales"),
        ({"k": 320}, "a_descale has 12 scale columns"),
    ],
    ids=["rows", "layout", "format", "columns"],
)
def test_a_pools_mx_scales_that_contradict_are_refused(
    flashinfer: FakeFlashInfer, foreign: Callable[[Any], Any], changes: dict[str, Any], message: str
) -> None:
    with ScalePool("cpu") as pool:
        shape = {"rows": M, "k": K, "layout": LAYOUT, "format": ScaleFormat.mxfp4}
        right = pool.acquire(**shape)
        mm_fp4(**operands() | {"a_descale": right}, use_8x4_sf_layout=False, **MX)
        flashinfer.calls.clear()
        wrong = pool.acquire(**shape | changes)
        refused(flashinfer, LayoutMismatchError, message, operands() | {"a_descale": wrong, "use_8x4_sf_layout": False})

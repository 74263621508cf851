"""``nvfp4_linear``: quantize and multiply in one call."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from safealloc import (
    PoolClosedError,
    ScalePool,
    ScaleSpec,
    SfLayout,
    _optional,
    mm_fp4,
    nvfp4_linear,
    nvfp4_quantize,
    use_pool,
)
from safealloc.kernels import reference
from safealloc.ops import backends

N, K = 24, 80
G = torch.tensor([20.0])
ALPHA = torch.tensor([0.05])
FP8 = torch.float8_e4m3fn


def quantized_weight(n: int = N, k: int = K) -> tuple[Tensor, Tensor]:
    w = torch.randn(n, k, generator=torch.Generator().manual_seed(n)).bfloat16()
    fp4, scales = (
        torch.empty(n, k // 2, dtype=torch.uint8),
        torch.zeros(SfLayout.layout_128x4.padded_shape(n, k), dtype=torch.uint8),
    )
    reference.quantize(w, torch.ones(1), fp4, scales, SfLayout.layout_128x4)
    return fp4, scales


W_FP4, W_SCALES = quantized_weight()


@pytest.fixture
def pool() -> Iterator[ScalePool]:
    with ScalePool("cpu") as pool, use_pool(pool):
        yield pool


@pytest.mark.parametrize("layout", [None, *SfLayout], ids=str)
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_result_equals_quantize_and_mm(
    pool: ScalePool, layout: SfLayout | None, backend: str, dtype: torch.dtype, out_dtype: torch.dtype
) -> None:
    """Bit for bit what the two calls give, and near the exact product."""
    x = torch.randn(9, K).to(dtype)
    y = nvfp4_linear(x, W_FP4, W_SCALES, G, ALPHA, layout=layout, out_dtype=out_dtype, backend=backend)
    used = SfLayout.layout_8x4 if layout is None else layout
    x_fp4, scales = nvfp4_quantize(x, G, layout=used, backend=backend)
    assert torch.equal(y, mm_fp4(x_fp4, W_FP4.T, scales, W_SCALES.T, ALPHA, out_dtype, backend=backend))
    values = (
        reference.dequantize(x_fp4, scales, used).double()
        @ reference.dequantize(W_FP4, W_SCALES, SfLayout.layout_128x4).double().T
    )
    tolerance = {torch.bfloat16: 2**-8, torch.float16: 2**-10, torch.float32: 2**-18}[out_dtype]
    torch.testing.assert_close(y.double(), values * 0.05, rtol=tolerance, atol=1e-2)
    pool.verify()


@pytest.mark.parametrize("shape", [(K,), (1, K), (33, K), (2, 3, K), (2, 1, 4, K)], ids=str)
def test_leading_dimensions_are_kept(pool: ScalePool, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape).bfloat16()
    y = nvfp4_linear(x, W_FP4, W_SCALES, G, ALPHA)
    assert y.shape == (*shape[:-1], N)
    assert torch.equal(y.view(-1, N), nvfp4_linear(x.view(-1, K), W_FP4, W_SCALES, G, ALPHA))


def test_alpha_may_be_none_or_one_per_row(pool: ScalePool) -> None:
    x = torch.randn(9, K).bfloat16()
    one = nvfp4_linear(x, W_FP4, W_SCALES, G, torch.ones(1), out_dtype=torch.float32)
    assert torch.equal(nvfp4_linear(x, W_FP4, W_SCALES, G, None, out_dtype=torch.float32), one)
    alpha = torch.rand(9)
    rows = nvfp4_linear(x, W_FP4, W_SCALES, G, alpha, out_dtype=torch.float32)
    assert torch.equal(rows, one * alpha[:, None])


def test_float8_weight_scales_are_accepted(pool: ScalePool) -> None:
    x = torch.randn(9, K).bfloat16()
    expected = nvfp4_linear(x, W_FP4, W_SCALES, G, ALPHA)
    assert torch.equal(nvfp4_linear(x, W_FP4, W_SCALES.view(FP8), G, ALPHA), expected)


@pytest.mark.parametrize(
    ("rows", "layout"),
    [(1, SfLayout.layout_8x4), (32, SfLayout.layout_8x4), (33, SfLayout.layout_128x4), (140, SfLayout.layout_128x4)],
)
def test_few_rows_use_8x4(pool: ScalePool, rows: int, layout: SfLayout) -> None:
    """Where the backend reads it, and the reference does."""
    pool.reserve(rows, K, SfLayout.layout_8x4)
    pool.reserve(rows, K, SfLayout.layout_128x4)
    before = pool.stats()
    address = pool.acquire(rows, K, layout).data_ptr()
    seen: list[int] = []
    real = backends.GEMMS["reference"].run

    def spy(a: Tensor, b: Tensor, a_scales: Tensor, *rest: Any, **options: Any) -> None:
        seen.append(a_scales.data_ptr())
        real(a, b, a_scales, *rest, **options)

    row = backends.Backend("reference", lambda call: None, spy)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(backends.GEMMS, "reference", row)
        nvfp4_linear(torch.randn(rows, K).bfloat16(), W_FP4, W_SCALES, G, ALPHA, backend="reference")
    assert seen == [address]
    assert pool.stats().misses == before.misses


def test_the_scales_are_free_afterwards(pool: ScalePool) -> None:
    x = torch.randn(9, K).bfloat16()
    for _ in range(3):
        nvfp4_linear(x, W_FP4, W_SCALES, G, ALPHA)
    stats = pool.stats()
    assert (stats.buffers, stats.live, stats.hits, stats.misses) == (1, 0, 2, 1)


def test_nan_stays_in_its_row(pool: ScalePool) -> None:
    x = torch.randn(9, K).bfloat16()
    clean = nvfp4_linear(x, W_FP4, W_SCALES, G, ALPHA)
    x[4, 7] = float("nan")
    dirty = nvfp4_linear(x, W_FP4, W_SCALES, G, ALPHA)
    assert bool(dirty[4].isnan().all())
    dirty[4] = clean[4]
    assert torch.equal(dirty, clean)


# --- FlashInfer, with a stand-in --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backend", "rows", "layout"),
    [
        ("trtllm", 9, SfLayout.layout_8x4),
        ("trtllm", 33, SfLayout.layout_128x4),
        ("cutlass", 9, SfLayout.layout_128x4),
        ("cute-dsl", 33, SfLayout.layout_128x4),
        ("auto", 9, SfLayout.layout_128x4),
    ],
)
def test_flashinfer_gets_the_weight_transposed(
    monkeypatch: pytest.MonkeyPatch, pool: ScalePool, backend: str, rows: int, layout: SfLayout
) -> None:
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def mm(*arguments: Any, **keywords: Any) -> Tensor:
        calls.append((arguments, keywords | {"spec": pool.spec(arguments[2])}))
        return arguments[6].zero_()

    fake, real = SimpleNamespace(mm_fp4=mm), _optional.load
    monkeypatch.setattr(_optional, "load", lambda name: fake if name == "flashinfer" else real(name))
    monkeypatch.setattr(backends, "package_refusal", lambda call, package, runs_on: _optional.missing(package))
    nvfp4_linear(torch.randn(rows, K).bfloat16(), W_FP4, W_SCALES, G, ALPHA, backend=backend)
    ((arguments, keywords),) = calls
    a, b, a_descale, b_descale, alpha, out_dtype, out = arguments
    assert a.shape == (rows, K // 2)
    assert (b.shape, b.stride(), b.data_ptr()) == ((K // 2, N), (1, K // 2), W_FP4.data_ptr())
    assert (b_descale.shape, b_descale.stride(), b_descale.data_ptr()) == ((8, 128), (1, 8), W_SCALES.data_ptr())
    assert a_descale.shape == layout.padded_shape(rows, K)
    assert alpha is ALPHA
    assert out_dtype == torch.bfloat16
    assert (out.shape, out.dtype) == ((rows, N), torch.bfloat16)
    assert keywords == {
        "use_8x4_sf_layout": layout is SfLayout.layout_8x4,
        "backend": backend,
        "enable_pdl": True,
        "skip_check": False,
        "spec": ScaleSpec(rows, K, layout),
    }


# --- bad input --------------------------------------------------------------------------------------------------------


X = torch.ones(9, K, dtype=torch.bfloat16)
NO_TRITON = pytest.mark.skipif(backends.interpreting(), reason="Triton's interpreter runs on a CPU")
BAD = {
    "x a list": ({"x": [1.0]}, TypeError, "x must be a tensor, got list"),
    "x float32": ({"x": X.float()}, TypeError, "x must be torch.bfloat16 or torch.float16"),
    "x strided": ({"x": X.repeat(1, 2)[:, :K]}, ValueError, r"x must be \[..., k\] and contiguous"),
    "x without dimensions": ({"x": torch.tensor(1.0).bfloat16()}, ValueError, "x must be"),
    "x without rows": ({"x": X[:0]}, ValueError, "at least 1"),
    "x without rows, 3-D": ({"x": X[None][:, :0]}, ValueError, "at least 1"),
    "k 0": ({"x": X[:, :0].contiguous(), "weight_fp4": W_FP4[:, :0].contiguous()}, ValueError, "16"),
    "k 72": ({"x": X[:, :72].contiguous(), "weight_fp4": W_FP4[:, :36].contiguous()}, ValueError, "multiple of 16"),
    "k differs": ({"x": X[:, :64].contiguous()}, ValueError, r"weight_fp4 must be \[n, 32\]"),
    "x on meta": ({"x": X.to("meta")}, ValueError, "meta"),
    "weight_fp4 None": ({"weight_fp4": None}, TypeError, "weight_fp4 must be a tensor"),
    "weight_fp4 float32": ({"weight_fp4": W_FP4.float()}, TypeError, "torch.uint8"),
    "weight_fp4 1-D": ({"weight_fp4": W_FP4[0]}, ValueError, "weight_fp4 must be"),
    "weight_fp4 transposed": ({"weight_fp4": W_FP4.T.contiguous().T}, ValueError, "contiguous"),
    "weight_fp4 without rows": ({"weight_fp4": W_FP4[:0]}, ValueError, "at least 1"),
    "weight_fp4 on meta": ({"weight_fp4": W_FP4.to("meta")}, ValueError, "meta"),
    "weight_scale None": ({"weight_scale": None}, TypeError, "weight_scale must be a tensor"),
    "weight_scale float32": ({"weight_scale": W_SCALES.float()}, TypeError, "torch.uint8"),
    "weight_scale 1-D": ({"weight_scale": W_SCALES.view(-1)}, ValueError, "padded_n"),
    "weight_scale too small": ({"weight_scale": W_SCALES[:64]}, ValueError, "layout_128x4"),
    "weight_scale transposed": ({"weight_scale": W_SCALES.T}, ValueError, "contiguous"),
    "weight_scale on meta": ({"weight_scale": W_SCALES.to("meta")}, ValueError, "meta"),
    "global scale a number": ({"input_global_scale": 1.0}, TypeError, "torch.float32 tensor"),
    "global scale float16": ({"input_global_scale": G.half()}, TypeError, "torch.float32"),
    "global scale of two": ({"input_global_scale": G.repeat(2)}, ValueError, "one element"),
    "global scale on meta": ({"input_global_scale": G.to("meta")}, ValueError, "meta"),
    "alpha a number": ({"alpha": 1.0}, TypeError, "alpha must be a float32 tensor"),
    "alpha bfloat16": ({"alpha": ALPHA.bfloat16()}, TypeError, "alpha must be a float32 tensor"),
    "alpha of two": ({"alpha": ALPHA.repeat(2)}, ValueError, "alpha must have one element"),
    "alpha on meta": ({"alpha": ALPHA.to("meta")}, ValueError, "alpha must have one element"),
    "layout 3": ({"layout": 3}, ValueError, "layout must be one of"),
    "layout a string": ({"layout": "8x4"}, TypeError, "layout must be"),
    "out_dtype int8": ({"out_dtype": torch.int8}, TypeError, "out_dtype must be"),
    "unknown backend": ({"backend": "marlin"}, ValueError, "backend must be one of"),
    "backend None": ({"backend": None}, TypeError, "backend must be a string"),
    "triton on a CPU": ({"backend": "triton"}, ValueError, "backend 'triton' cannot run this"),
    "trtllm on a CPU": ({"backend": "trtllm"}, ValueError, "backend 'trtllm' cannot run this"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        pytest.param(*case, id=name, marks=[NO_TRITON] if name.startswith("triton") else [])
        for name, case in BAD.items()
    ],
)
def test_wrong_arguments_are_refused(
    pool: ScalePool, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    """Raised before anything runs: the pool has not even been asked."""
    before = pool.stats()
    names = ("x", "weight_fp4", "weight_scale", "input_global_scale", "alpha")
    arguments: dict[str, Any] = dict(zip(names, (X, W_FP4, W_SCALES, G, ALPHA), strict=True)) | changes
    with pytest.raises(error, match=message):
        nvfp4_linear(*[arguments.pop(name) for name in names], **arguments)
    assert pool.stats() == before


def test_a_closed_pool_is_refused() -> None:
    pool = ScalePool("cpu")
    with use_pool(pool):
        pool.close()
        with pytest.raises(PoolClosedError):
            nvfp4_linear(X, W_FP4, W_SCALES, G, ALPHA)

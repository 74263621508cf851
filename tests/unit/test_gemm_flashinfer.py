"""``mm_fp4`` through FlashInfer, with a stand-in for the package."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.gemm import FLASHINFER_NAMES, ONE, FakeFlashInfer, M, N, Operands, check_refused, close, foreign, pool  # noqa: F401
from torch import Tensor

from safealloc import (
    ScalePool,
    SfLayout,
    _optional,
    mm_fp4,
)
from safealloc.formats.format import NAN_SCALE
from safealloc.ops import backends

FP4 = torch.float4_e2m1fn_x2
FP8 = torch.float8_e4m3fn


ROW_ALPHA = {"flashinfer", "auto", "cute-dsl", "cake"}


@pytest.fixture
def flashinfer(monkeypatch: pytest.MonkeyPatch) -> FakeFlashInfer:
    """FlashInfer on a GPU that can run it, as far as the table of backends sees."""
    fake = FakeFlashInfer()
    real = _optional.load
    monkeypatch.setattr(_optional, "load", lambda name: fake if name == "flashinfer" else real(name))
    monkeypatch.setattr(backends, "package_refusal", lambda call, package, runs_on: _optional.missing(package))
    return fake


def same(got: dict[str, Any], expected: dict[str, Any]) -> None:
    """The same numbers, and the same memory seen in the same way."""
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert _identity(got[name]) == _identity(value), name


def _identity(value: Any) -> Any:
    return (value.data_ptr(), value.dtype, value.shape, value.stride()) if isinstance(value, Tensor) else value


@pytest.mark.parametrize("name", ["auto", "flashinfer", *FLASHINFER_NAMES])
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
        defaults = {name: flashinfer.calls[1][name] for name in ("alpha", "enable_pdl", "skip_check")}
        assert defaults == {"alpha": None, "enable_pdl": True, "skip_check": False}


@pytest.mark.parametrize("name", ["flashinfer", *FLASHINFER_NAMES])
def test_only_trtllm_reads_8x4(pool: ScalePool, flashinfer: FakeFlashInfer, name: str) -> None:
    operands = Operands(pool, SfLayout.layout_8x4)
    if name == "trtllm":
        out = mm_fp4(*operands.arguments, backend=name)
        assert torch.equal(out, mm_fp4(*operands.arguments, backend="reference"))
        assert [call["use_8x4_sf_layout"] for call in flashinfer.calls] == [True]
    else:
        message = "it reads layout_128x4, the scales are in layout_8x4"
        check_refused(pool, ValueError, message, *operands.arguments, backend=name)
        assert not flashinfer.calls


@pytest.mark.parametrize("name", ["flashinfer", *FLASHINFER_NAMES])
def test_linear_scales_are_refused(pool: ScalePool, flashinfer: FakeFlashInfer, name: str) -> None:
    check_refused(
        pool,
        ValueError,
        "the scales are in layout_linear",
        *Operands(pool, SfLayout.layout_linear).arguments,
        backend=name,
    )
    assert not flashinfer.calls


@pytest.mark.parametrize("name", ["flashinfer", *FLASHINFER_NAMES])
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


@pytest.mark.parametrize("name", ["flashinfer", *FLASHINFER_NAMES])
def test_the_alpha_of_a_single_row_is_accepted_everywhere(
    pool: ScalePool, flashinfer: FakeFlashInfer, name: str
) -> None:
    mm_fp4(*Operands(pool, m=1).arguments, ONE, backend=name)
    assert flashinfer.calls[0]["alpha"] is ONE


def test_a_backend_of_another_capability_launches_nothing(
    pool: ScalePool, flashinfer: FakeFlashInfer, foreign: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even the zeroing of a foreign buffer."""
    monkeypatch.setattr(backends, "package_refusal", lambda call, package, runs_on: f"it runs on {runs_on} only")
    operands = Operands(pool)
    a, b, _, b_descale = operands.arguments
    scales = operands.foreign_scales(NAN_SCALE)
    message = r"backend 'b12x' cannot run this: it runs on \(120, 121\) only"
    check_refused(pool, ValueError, message, a, b, scales, b_descale, backend="b12x")
    assert not flashinfer.calls


@pytest.mark.parametrize("name", ["flashinfer", *FLASHINFER_NAMES])
def test_a_float32_result_is_refused(pool: ScalePool, flashinfer: FakeFlashInfer, name: str) -> None:
    arguments = (*Operands(pool).arguments, None, torch.float32)
    check_refused(pool, ValueError, r"it returns torch\.bfloat16.*, not torch\.float32", *arguments, backend=name)
    assert not flashinfer.calls


def test_auto_falls_back_to_ours(pool: ScalePool, flashinfer: FakeFlashInfer) -> None:
    """What FlashInfer's own choice cannot read or return."""
    for layout, out_dtype in (
        (SfLayout.layout_8x4, torch.bfloat16),
        (SfLayout.layout_linear, torch.bfloat16),
        (SfLayout.layout_128x4, torch.float32),
    ):
        operands = Operands(pool, layout)
        close(mm_fp4(*operands.arguments, None, out_dtype), operands.exact())
    assert not flashinfer.calls


def test_foreign_scales_are_zeroed_for_flashinfer_too(
    pool: ScalePool, flashinfer: FakeFlashInfer, foreign: Callable[[Any], Any]
) -> None:
    operands = Operands(pool, SfLayout.layout_8x4)
    a, b, _, b_descale = operands.arguments
    scales = operands.foreign_scales(NAN_SCALE)
    out = mm_fp4(a, b, scales, b_descale, use_8x4_sf_layout=True, backend="trtllm")
    assert flashinfer.calls[0]["a_descale"] is scales
    assert torch.equal(scales, operands.a_descale)
    assert torch.equal(out, mm_fp4(*operands.arguments, backend="reference"))

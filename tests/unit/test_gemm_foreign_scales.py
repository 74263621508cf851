"""``mm_fp4`` of scales that no pool made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.gemm import M, N, Operands, check_refused, foreign, pool  # noqa: F401

from safealloc import (
    LayoutMismatchError,
    SafeAllocError,
    ScalePool,
    SfLayout,
    mm_fp4,
)
from safealloc.formats.format import NAN_SCALE

FP8 = torch.float8_e4m3fn

swizzles = pytest.mark.parametrize(
    "layout", [SfLayout.layout_128x4, SfLayout.layout_8x4], ids=lambda layout: layout.name
)


@swizzles
@pytest.mark.parametrize("m", [1, 7, 8, M, 33, 130])
@pytest.mark.parametrize("dtype", [torch.uint8, FP8], ids=str)
def test_padding_is_zeroed_in_place(
    pool: ScalePool, foreign: Callable[[Any], Any], layout: SfLayout, m: int, dtype: torch.dtype
) -> None:
    operands = Operands(pool, layout, m)
    scales = operands.foreign_scales(NAN_SCALE)
    a, b, _, b_descale = operands.arguments
    out = mm_fp4(a, b, scales.view(dtype), b_descale, use_8x4_sf_layout=layout is SfLayout.layout_8x4)
    assert torch.equal(out, mm_fp4(*operands.arguments))
    assert torch.equal(scales, operands.a_descale), "valid scales must stay, padding must be zero"


def test_without_a_flag_the_layout_is_128x4(pool: ScalePool, foreign: Callable[[Any], Any]) -> None:
    """FlashInfer's default."""
    operands = Operands(pool)
    a, b, _, b_descale = operands.arguments
    assert torch.equal(mm_fp4(a, b, operands.foreign_scales(NAN_SCALE), b_descale), mm_fp4(*operands.arguments))


@swizzles
def test_trust_reads_padding_as_it_is(pool: ScalePool, foreign: Callable[[Any], Any], layout: SfLayout) -> None:
    operands = Operands(pool, layout)
    a, b, _, b_descale = operands.arguments
    flag = layout is SfLayout.layout_8x4
    assert foreign("trust") == "zero"
    clean = operands.foreign_scales(0)
    assert torch.equal(mm_fp4(a, b, clean, b_descale, use_8x4_sf_layout=flag), mm_fp4(*operands.arguments))
    dirty = operands.foreign_scales(NAN_SCALE)
    before = dirty.clone()
    assert bool(mm_fp4(a, b, dirty, b_descale, use_8x4_sf_layout=flag).isnan().all())
    assert torch.equal(dirty, before)


@swizzles
def test_error_refuses_them(pool: ScalePool, foreign: Callable[[Any], Any], layout: SfLayout) -> None:
    operands = Operands(pool, layout)
    a, b, _, b_descale = operands.arguments
    foreign("error")
    keywords = {"use_8x4_sf_layout": layout is SfLayout.layout_8x4, "out": torch.empty(M, N, dtype=torch.bfloat16)}
    check_refused(
        pool, SafeAllocError, "is from no pool", a, b, operands.foreign_scales(NAN_SCALE), b_descale, **keywords
    )
    mm_fp4(*operands.arguments)


@pytest.mark.parametrize("mode", ["zeros", "", None, 0, ["zero"]])
def test_an_unknown_mode_is_refused(foreign: Callable[[Any], Any], mode: Any) -> None:
    with pytest.raises(ValueError, match='mode must be "zero", "trust" or "error"'):
        foreign(mode)
    assert foreign("zero") == "zero"


@pytest.mark.parametrize("mode", ["zero", "trust"])
@pytest.mark.parametrize(
    ("layout", "flag", "fits"),
    [
        (SfLayout.layout_8x4, False, "layout_8x4"),
        (SfLayout.layout_8x4, None, "layout_8x4"),
        (SfLayout.layout_128x4, True, "layout_128x4"),
        (SfLayout.layout_linear, None, "layout_linear"),
    ],
)
def test_the_size_of_another_layout_is_refused(
    pool: ScalePool, foreign: Callable[[Any], Any], mode: str, layout: SfLayout, flag: bool | None, fits: str
) -> None:
    operands = Operands(pool, layout)
    a, b, _, b_descale = operands.arguments
    foreign(mode)
    scales = operands.foreign_scales(NAN_SCALE)
    check_refused(pool, LayoutMismatchError, f"which fits {fits}", a, b, scales, b_descale, use_8x4_sf_layout=flag)


@swizzles
@pytest.mark.parametrize("mode", ["zero", "trust", "error"])
@pytest.mark.parametrize("change", [-512, -1, 1, 512])
def test_another_size_is_refused(
    pool: ScalePool, foreign: Callable[[Any], Any], layout: SfLayout, mode: str, change: int
) -> None:
    operands = Operands(pool, layout, 130)
    a, b, _, b_descale = operands.arguments
    foreign(mode)
    scales = torch.full((operands.a_descale.numel() + change,), NAN_SCALE, dtype=torch.uint8)
    message = f"has {operands.a_descale.numel()} bytes, got {len(scales)}"
    check_refused(pool, ValueError, message, a, b, scales, b_descale, use_8x4_sf_layout=layout is SfLayout.layout_8x4)


def test_weight_scales_are_not_touched(pool: ScalePool, foreign: Callable[[Any], Any]) -> None:
    """NaN in the weight's own padding is the caller's, and shows."""
    operands = Operands(pool)
    w_scales = operands.w_scales.clone()
    w_scales.view(-1)[SfLayout.layout_128x4.offsets(N, 128)[5, 7]] = NAN_SCALE
    before = w_scales.clone()
    out = mm_fp4(operands.a, operands.w.T, operands.a_descale, w_scales.T)
    assert out.isnan().any(0).nonzero().flatten().tolist() == [5]
    assert torch.equal(w_scales, before)

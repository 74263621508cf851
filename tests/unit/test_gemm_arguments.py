"""``mm_fp4`` refuses wrong arguments before anything is launched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.gemm import FLASHINFER_NAMES, ONE, M, N, Operands, check_refused, foreign, pool  # noqa: F401

from safealloc import (
    ScalePool,
)
from safealloc.formats.format import NAN_SCALE
from safealloc.ops import backends


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
    ("b not transposed", _change("b", lambda o: o.w), ValueError, r"the weight transposed.*pass weight\.T"),
    ("b row-major", _change("b", lambda o: o.w.T.contiguous()), ValueError, r"pass weight\.T"),
    ("b of another k", _change("b", lambda o: o.w[:, :32].contiguous().T), ValueError, "the weight.s scales"),
    ("b without columns", _change("b", lambda o: o.w[:0].T), ValueError, "n of at least 1"),
    ("b on meta", _change("b", lambda o: o.w.to("meta").T), ValueError, "b is on meta"),
    ("a_descale None", _change("a_descale", lambda o: None), TypeError, "a_descale must be a tensor"),
    ("a_descale float32", _change("a_descale", lambda o: o.a_descale.float()), TypeError, "a_descale must be"),
    ("a_descale int32", _change("a_descale", lambda o: o.a_descale.view(torch.int32)), TypeError, "a_descale must be"),
    ("a_descale on meta", _change("a_descale", lambda o: o.a_descale.to("meta")), ValueError, "a_descale is on meta"),
    ("a_descale transposed", _change("a_descale", lambda o: o.a_descale.T), ValueError, "a_descale must be contiguous"),
    ("a_descale empty", _change("a_descale", lambda o: o.a_descale[:0]), ValueError, "bytes, got 0"),
    ("b_descale None", _change("b_descale", lambda o: None), TypeError, "b_descale must be a tensor"),
    ("b_descale float32", _change("b_descale", lambda o: o.w_scales.T.float()), TypeError, "b_descale must be"),
    ("b_descale 1-D", _change("b_descale", lambda o: o.w_scales.view(-1)), ValueError, "b_descale must be"),
    ("b_descale not transposed", _change("b_descale", lambda o: o.w_scales), ValueError, r"pass weight_scales\.T"),
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
        for name in ("flashinfer", *FLASHINFER_NAMES)
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [pytest.param(*case[1:], id=case[0], marks=[NO_TRITON] if case[0].startswith("triton") else []) for case in BAD],
)
@pytest.mark.parametrize("whose", ["pool", "foreign"])
def test_wrong_arguments_write_nothing(
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
        operands.a_descale = operands.foreign_scales(NAN_SCALE)
    names = ("a", "b", "a_descale", "b_descale")
    keywords = dict(zip(names, operands.arguments, strict=True))
    keywords |= {"out": torch.empty(M, N, dtype=torch.bfloat16)} | changes(operands)
    before = operands.a_descale.clone()
    check_refused(pool, error, message, *(keywords.pop(name) for name in names), **keywords)
    assert torch.equal(operands.a_descale, before)


@pytest.mark.parametrize("k", [0, 8, 24, 72])
def test_k_must_be_a_multiple_of_16(pool: ScalePool, k: int) -> None:
    a, w = torch.zeros(M, k // 2, dtype=torch.uint8), torch.zeros(N, k // 2, dtype=torch.uint8)
    scales = torch.full((128, 8), NAN_SCALE, dtype=torch.uint8)
    check_refused(pool, ValueError, "k a multiple of 16", a, w.T, scales, torch.zeros(8, 128, dtype=torch.uint8).T)

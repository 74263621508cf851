"""``mm_mxfp8``: FlashInfer's call, with the layout bound to the buffer and zero padding."""

from __future__ import annotations

import torch
from torch import Tensor

from safealloc._checks import FP8, check_contiguous, check_tensor
from safealloc.formats.format import ScaleFormat
from safealloc.ops.backends import MXFP8_GEMMS, call_for
from safealloc.ops.gemm import (
    SCALE_DTYPES,
    check_result,
    check_weight,
    layout_of,
    scales_of_op,
    treat_foreign,
    untransposed,
)
from safealloc.ops.library import register
from safealloc.pool.contents import forget_declared, note_of

_FORMAT = ScaleFormat.mxfp8


def mm_mxfp8(
    a: Tensor,
    b: Tensor,
    a_descale: Tensor,
    b_descale: Tensor,
    out: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    use_8x4_sf_layout: bool | None = None,
    backend: str = "auto",
    *,
    skip_check: bool = False,
) -> Tensor:
    """MXFP8 GEMM ``a @ b``, called as ``flashinfer.mm_mxfp8``.

    Args:
        a: float8_e4m3fn ``[m, k]``, contiguous; k a multiple of 32.
        b: the weight ``[n, k]`` transposed, ``weight.T``: ``[k, n]``, column-major.
        a_descale: scales of ``a``, uint8 or float8_e8m0fnu, contiguous, flat or ``[padded_rows, padded_cols]``. From a pool:
            layout and rows are known, and ``a`` may have been padded in k as far as the buffer's columns go. From
            elsewhere: see :func:`set_foreign_scales`; two dimensions are read as 128x4 as well, not as linear.
        b_descale: the weight's scales in layout_128x4, flat or ``[padded_n, padded_cols]``; a pool's buffer may be
            transposed, as :func:`mm_fp4` takes it.
        out: result ``[m, n]``, contiguous; ``None`` makes one.
        out_dtype: bfloat16 or float16; float32 too for "reference".
        use_8x4_sf_layout: layout of ``a_descale``; ``None`` takes the buffer's, or 128x4 for one from elsewhere.
        backend: "reference" (any device, each layout, ``b`` not shuffled), or one of FlashInfer's names: 128x4, and 8x4 for
            "trtllm" alone, which takes ``b`` shuffled and runs by its name only. "auto" takes FlashInfer's choice where it
            can run, else "reference". FlashInfer needs n and k of at least 128.
        skip_check: as in FlashInfer; what safealloc checks it always checks.

    Returns:
        ``out``, ``[m, n]``.

    Raises:
        LayoutMismatchError: the flag, the rows, the columns or the format contradict the buffer.
        SafeAllocError: scales from elsewhere, in mode ``"error"``.
        TypeError, ValueError: an argument is wrong, or the backend cannot run it. Nothing was launched in either case.
    """
    if torch.compiler.is_compiling():
        options = use_8x4_sf_layout, backend, skip_check
        result: Tensor = torch.ops.safealloc.mm_mxfp8(a, b, a_descale, b_descale, out_dtype, *options, a_descale)
        return result if out is None else out.copy_(result)
    check_tensor("a", a, FP8, "[m, k]")
    check_contiguous("a", a)
    check_tensor("b", b, FP8, "[k, n]", a.device)
    weight = untransposed("b", b, "weight")
    check_tensor("b_descale", b_descale, SCALE_DTYPES[_FORMAT], None, a.device)
    if b_descale.ndim == 2 and not b_descale.is_contiguous() and note_of(b_descale) is not None:
        b_descale = b_descale.T
    n, k = check_weight(weight, b_descale, a.device, "b.T", "b_descale", _FORMAT)
    m = a.shape[0]
    if m < 1 or a.shape[1] != k:
        raise ValueError(
            f"a must be [m, k] with m of at least 1 and the k of b, [k, n] = {tuple(b.shape)}, got {tuple(a.shape)}"
        )
    check_result(m, n, None, out_dtype, out, a.device)
    layout, foreign = layout_of(a_descale, m, k, use_8x4_sf_layout, a.device, _FORMAT)
    call = call_for(a.device, layout, out_dtype, format=_FORMAT, below_128=min(n, k) < 128)
    row = MXFP8_GEMMS.choose(backend, call)
    if foreign is not None:
        a_descale = treat_foreign(a_descale, foreign)
    if out is not None:
        forget_declared(out)
    else:
        out = torch.empty((m, n), dtype=out_dtype, device=a.device)
    row.run(a, weight, a_descale, b_descale, None, out, layout, skip_check=skip_check, format=_FORMAT)
    return out


def _op(
    a: Tensor,
    b: Tensor,
    a_descale: Tensor,
    b_descale: Tensor,
    out_dtype: torch.dtype,
    use_8x4_sf_layout: bool | None,
    backend: str,
    skip_check: bool,
    foreign_descale: Tensor,
) -> Tensor:
    scales = scales_of_op(a_descale, foreign_descale)
    return mm_mxfp8(a, b, scales, b_descale, None, out_dtype, use_8x4_sf_layout, backend, skip_check=skip_check)


register(
    "mm_mxfp8(Tensor a, Tensor b, Tensor a_descale, Tensor b_descale, ScalarType out_dtype, bool? use_8x4_sf_layout, "
    "str backend, bool skip_check, Tensor(a!) foreign_descale) -> Tensor",
    _op,
    lambda a, b, a_descale, b_descale, out_dtype, *rest: a.new_empty((a.shape[0], b.shape[1]), dtype=out_dtype),
)

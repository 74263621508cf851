"""``mm_fp4``: FlashInfer's call, with the layout bound to the buffer and zero padding."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from safealloc._checks import BYTES, FP4, FP8, check_contiguous, check_tensor
from safealloc.errors import LayoutMismatchError, SafeAllocError
from safealloc.formats.format import ScaleFormat
from safealloc.formats.layout import SfLayout
from safealloc.formats.spec import ScaleSpec
from safealloc.ops.backends import GEMMS, Call, call_for, zero_padding
from safealloc.ops.library import register
from safealloc.pool.contents import (
    DECLARED,
    Note,
    forget_declared,
    is_whole_storage,
    note_of,
    remember,
    remember_declared,
)

SCALE_DTYPES = {
    ScaleFormat.nvfp4: BYTES,
    ScaleFormat.mxfp4: (*BYTES, torch.float8_e8m0fnu),
    ScaleFormat.mxfp8: (torch.uint8, torch.float8_e8m0fnu),
}
"""What the scales of an operand may be given as."""

ForeignScales = Literal["zero", "trust", "error"]
_foreign_scales: ForeignScales = "zero"


def set_foreign_scales(mode: ForeignScales) -> ForeignScales:
    """Set what :func:`mm_fp4` and :func:`mm_mxfp8` do with activation scales that no pool made, declared or not.

    Args:
        mode: ``"zero"`` zeroes their padding in place by one small kernel, ``"trust"`` reads them as they are,
            ``"error"`` refuses them.

    Returns:
        The previous mode.

    Raises:
        ValueError: no such mode.
    """
    global _foreign_scales
    if mode not in ("zero", "trust", "error"):
        raise ValueError(f'mode must be "zero", "trust" or "error", got {mode!r}')
    previous, _foreign_scales = _foreign_scales, mode
    return previous


def mm_fp4(
    a: Tensor,
    b: Tensor,
    a_descale: Tensor,
    b_descale: Tensor,
    alpha: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    out: Tensor | None = None,
    block_size: int = 16,
    use_8x4_sf_layout: bool | None = None,
    backend: str = "auto",
    use_nvfp4: bool = True,
    enable_pdl: bool = True,
    *,
    skip_check: bool = False,
) -> Tensor:
    """NVFP4 or MXFP4 GEMM ``alpha * (a @ b)``, called as ``flashinfer.mm_fp4``.

    Args:
        a: uint8 or float4_e2m1fn_x2 ``[m, k // 2]``, contiguous.
        b: the weight ``[n, k // 2]`` transposed, ``weight.T``: ``[k // 2, n]``, column-major.
        a_descale: scales of ``a``, uint8 or float8_e4m3fn, contiguous. From a pool, or declared: layout and rows are known,
            and ``a`` may have been padded in k as far as the buffer's columns go. From no pool: see
            :func:`set_foreign_scales`.
        b_descale: the weight's scales in layout_128x4, ``[padded_n, padded_cols]``, transposed likewise; checked where they
            are known.
        alpha: float32 of one element, or of one per row where the backend takes it; ``None`` is 1.
        out_dtype: bfloat16 or float16; float32 too for "reference" and "triton".
        out: result ``[m, n]``, contiguous; ``None`` makes one.
        block_size: columns for each scale: 16 is NVFP4; 32, with ``use_nvfp4=False``, is MXFP4.
        use_8x4_sf_layout: layout of ``a_descale``; ``None`` takes the buffer's, or 128x4 for one from elsewhere.
        backend: "reference" and "triton" (``b`` not shuffled; "triton" for NVFP4 alone), or one of FlashInfer's names; "auto"
            takes FlashInfer's choice where it can run, else ours. Neither choice is ever "trtllm", which takes ``b``
            shuffled: it runs by its name only. With "auto", 8x4 scales of NVFP4 go to "triton".
        use_nvfp4: False is MXFP4.
        enable_pdl, skip_check: as in FlashInfer; what safealloc checks it always checks.

    Returns:
        ``out``, ``[m, n]``.

    Raises:
        LayoutMismatchError: the flag, the rows, the columns or the format contradict the buffer.
        SafeAllocError: scales from elsewhere, in mode ``"error"``.
        TypeError, ValueError: an argument is wrong, or the backend cannot run it. Nothing was launched in either case.
    """
    format = ScaleFormat.nvfp4 if use_nvfp4 else ScaleFormat.mxfp4
    if block_size != format.block_size:
        raise ValueError(
            f"block_size must be 16, or 32 with use_nvfp4=False, got {block_size} with use_nvfp4={use_nvfp4}"
        )
    if torch.compiler.is_compiling():
        options = use_8x4_sf_layout, backend, enable_pdl, skip_check
        result: Tensor = torch.ops.safealloc.mm_fp4(
            a, b, a_descale, b_descale, alpha, out_dtype, *options, a_descale, block_size
        )
        return result if out is None else out.copy_(result)
    check_tensor("a", a, FP4, "[m, k // 2]")
    check_contiguous("a", a)
    check_tensor("b", b, FP4, "[k // 2, n]", a.device)
    check_tensor("b_descale", b_descale, SCALE_DTYPES[format], "[padded_cols, padded_n]", a.device)
    weight, weight_scales = untransposed("b", b, "weight"), untransposed("b_descale", b_descale, "weight_scales")
    n, k = check_weight(weight, weight_scales, a.device, "b.T", "b_descale.T", format)
    m = a.shape[0]
    if m < 1 or 2 * a.shape[1] != k:
        raise ValueError(
            f"a must be [m, k // 2] with m of at least 1 and the k of b, [k // 2, n] = {tuple(b.shape)}, got {tuple(a.shape)}"
        )
    check_result(m, n, alpha, out_dtype, out, a.device)
    layout, foreign = layout_of(a_descale, m, k, use_8x4_sf_layout, a.device, format)
    row = GEMMS.choose(backend, call_of(layout, alpha, out_dtype, a.device, m, format))
    if foreign is not None:
        a_descale = treat_foreign(a_descale, foreign)
    if out is not None:
        forget_declared(out)
    else:
        out = torch.empty((m, n), dtype=out_dtype, device=a.device)
    other = {} if use_nvfp4 else {"format": format}  # which not every row takes
    row.run(
        a, weight, a_descale, weight_scales, alpha, out, layout, enable_pdl=enable_pdl, skip_check=skip_check, **other
    )
    return out


def untransposed(name: str, tensor: Tensor, original: str) -> Tensor:
    """The original of a transposed operand; raises ValueError if it is not column-major."""
    transposed = tensor.T
    if not transposed.is_contiguous():
        raise ValueError(
            f"{name} must be the {original.replace('_', ' ')} transposed, a column-major view: pass {original}.T, "
            f"got shape {tuple(tensor.shape)} with strides {tensor.stride()}"
        )
    return transposed


def check_weight(
    weight: Tensor,
    scales: Tensor,
    device: torch.device,
    weight_name: str = "weight_fp4",
    scales_name: str = "weight_scale",
    format: ScaleFormat = ScaleFormat.nvfp4,
) -> tuple[int, int]:
    """N and k of a weight ``[n, k // 2]``, of MXFP8 ``[n, k]``, with its scales in layout_128x4.

    Raises:
        TypeError, ValueError: they are not that.
    """
    mxfp8 = format is ScaleFormat.mxfp8
    shape = "[n, k]" if mxfp8 else "[n, k // 2]"
    check_tensor(weight_name, weight, FP8 if mxfp8 else FP4, shape, device)
    check_contiguous(weight_name, weight)
    n, k = weight.shape[0], weight.shape[1] * format.values_per_byte
    if n < 1 or k < format.block_size or k % format.block_size:
        raise ValueError(
            f"{weight_name} must be {shape} with n of at least 1 and k a multiple of {format.block_size}, got n={n}, "
            f"k={k}"
        )
    check_tensor(scales_name, scales, SCALE_DTYPES[format], None if mxfp8 else "[padded_n, padded_cols]", device)
    check_contiguous(scales_name, scales)
    spec = ScaleSpec(n, k, SfLayout.layout_128x4, format=format)
    if scales.numel() != spec.scale_bytes or (mxfp8 and scales.ndim != 1 and scales.shape != spec.padded_shape):
        raise ValueError(
            f"{scales_name} must be the weight's scales in layout_128x4, {spec.padded_shape}, got {tuple(scales.shape)}"
        )
    known = _known_spec(scales_name, scales, format)
    if known is not None and (known.experts is not None or (known.rows, known.layout) != (n, spec.layout)):
        raise LayoutMismatchError(f"{scales_name} holds scales of {known}, a weight of {spec} was given with them")
    return n, k


def check_result(
    m: int, n: int, alpha: Tensor | None, out_dtype: torch.dtype, out: Tensor | None, device: torch.device
) -> None:
    """Raises: TypeError, ValueError: ``alpha``, ``out_dtype`` or ``out`` do not fit a result ``[m, n]``."""
    if out_dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise TypeError(f"out_dtype must be torch.bfloat16, torch.float16 or torch.float32, got {out_dtype}")
    if out is not None:
        check_tensor("out", out, (out_dtype,), "[m, n]", device)
        check_contiguous("out", out)
        if out.shape != (m, n):
            raise ValueError(f"out must be {(m, n)}, got {tuple(out.shape)}")
    if alpha is not None:
        if not isinstance(alpha, Tensor) or alpha.dtype != torch.float32:
            raise TypeError(f"alpha must be a float32 tensor, got {getattr(alpha, 'dtype', type(alpha).__name__)}")
        if alpha.numel() not in (1, m) or alpha.device != device:
            raise ValueError(
                f"alpha must have one element or one per row (m={m}) on {device}, got shape {tuple(alpha.shape)} on "
                f"{alpha.device}"
            )


def call_of(
    layout: SfLayout,
    alpha: Tensor | None,
    out_dtype: torch.dtype,
    device: torch.device,
    m: int | None = None,
    format: ScaleFormat = ScaleFormat.nvfp4,
) -> Call:
    """What a requirement of a GEMM of FP4 looks at; ``m``: rows, where they are known."""
    row_alpha = None if m == 1 and alpha is not None else alpha is not None and alpha.numel() > 1
    return call_for(device, layout, out_dtype, False, row_alpha, format=format)


def layout_of(
    a_descale: Tensor, m: int, k: int, use_8x4_sf_layout: bool | None, device: torch.device, format: ScaleFormat
) -> tuple[SfLayout, ScaleSpec | None]:
    """The layout of the scales, and, where no pool made them, what they are by declaration or by the call."""
    check_tensor("a_descale", a_descale, SCALE_DTYPES[format], None, device)
    check_contiguous("a_descale", a_descale)
    asked = None
    if use_8x4_sf_layout is not None:
        asked = SfLayout.layout_8x4 if use_8x4_sf_layout else SfLayout.layout_128x4
    spec = _known_spec("a_descale", a_descale, format)
    if spec is not None:
        check_agrees(spec, m, k, asked, format)
        note = note_of(a_descale)
        return spec.layout, spec if note is not None and note.pool == DECLARED else None
    layout = SfLayout.layout_128x4 if asked is None else asked
    needed = layout.nbytes(m, k, format=format)
    if a_descale.numel() != needed:
        others = [other.name for other in SfLayout if other.nbytes(m, k, format=format) == a_descale.numel()]
        kind = LayoutMismatchError if others else ValueError
        raise kind(
            f"a_descale for m={m}, k={k} in {layout.name} has {needed} bytes, got {a_descale.numel()}"
            + (f", which fits {' and '.join(others)}" if others else "")
        )
    return layout, ScaleSpec(m, k, layout, format=format)


def _known_spec(name: str, scales: Tensor, format: ScaleFormat) -> ScaleSpec | None:
    """What scales hold, if that is known: a buffer of a pool or what was declared, or whole row tiles of one.

    Raises:
        LayoutMismatchError: any other view of it, whose bytes are no matrix of their own, or scales of another format.
    """
    note = note_of(scales)
    if note is None or not scales.numel():
        return None
    _check_format(name, note.spec, format)
    spec = note.spec_in(scales)
    if spec is None:
        raise LayoutMismatchError(
            f"{name} is a view inside of {_holder(note)} ({note}) that is no whole number of row tiles: give the "
            f"buffer, or rows of it from a multiple of {note.spec.layout.tile.rows} on"
        )
    return spec


def _holder(note: Note) -> str:
    return "declared scales" if note.pool == DECLARED else "a pool's buffer"


def _check_format(name: str, spec: ScaleSpec, format: ScaleFormat) -> None:
    held = spec.format
    if held is not format:
        raise LayoutMismatchError(
            f"{name} holds {held.name.upper()} scales ({spec}), one for each {held.block_size} columns, and "
            f"the GEMM reads it as {format.name.upper()} scales, one for each {format.block_size}"
        )


def check_agrees(
    spec: ScaleSpec, m: int, k: int, asked: SfLayout | None, format: ScaleFormat = ScaleFormat.nvfp4
) -> None:
    """Refuse a GEMM that would not read a buffer as it was written.

    Its activation is ``[m, k]``, where k may have been padded as far as the buffer's columns go; ``asked`` is the layout that
    the GEMM is told to read, if it is told one; ``format`` is what it reads. Raises LayoutMismatchError.
    """
    _check_format("a_descale", spec, format)
    if asked is not None and asked is not spec.layout:
        raise LayoutMismatchError(
            f"a_descale was written in {spec.layout.name}, and use_8x4_sf_layout={asked is SfLayout.layout_8x4} asks the "
            f"GEMM to read it as {asked.name}; use_8x4_sf_layout=None takes the buffer's layout"
        )
    if spec.experts is not None:
        raise LayoutMismatchError(
            f"a_descale holds rows grouped by expert ({spec.experts} experts), which only a grouped GEMM reads"
        )
    if spec.rows != m:
        raise LayoutMismatchError(
            f"a_descale was written for {spec.rows} rows, a has {m}: quantize the rows that are multiplied"
        )
    padded_cols = spec.padded_shape[1]
    if spec.layout.round_up(m, k // spec.format.block_size)[1] != padded_cols:
        raise LayoutMismatchError(
            f"a_descale has {padded_cols} scale columns ({spec}), a has k={k}: pad a to a k that rounds up to them, or "
            "acquire the buffer with padded_k"
        )


def treat_foreign(a_descale: Tensor, spec: ScaleSpec) -> Tensor:
    """Scales that no pool made, with zero padding: themselves, or a copy where their storage holds more than them."""
    if _foreign_scales == "error":
        name = spec.format.name
        further = "" if spec.format is ScaleFormat.nvfp4 else f", format={spec.format}"
        raise SafeAllocError(
            f"a_descale is from no pool, and set_foreign_scales is 'error': take it from safealloc.{name}_quantize, or have "
            f"the producer write into pool.acquire(rows, k, layout{further})"
        )
    if _foreign_scales == "trust" or not spec.padding_views(a_descale.view(torch.uint8)):
        return a_descale
    if not is_whole_storage(a_descale):
        a_descale = a_descale.clone()  # what is padding here may be another matrix's scales
    note = note_of(a_descale)
    zero_padding(a_descale, spec)
    if note is not None:  # it still holds what was declared, though it was written
        remember_declared(a_descale, spec, origin=note.origin)
    return a_descale


def scales_of_op(a_descale: Tensor, foreign_descale: Tensor) -> Tensor:
    """Which of its scales an op reads.

    A compiler may copy a tensor that an op writes, and a copy is no pool buffer. So the scales come twice: ``a_descale``, by
    which what is known is recognized, and ``foreign_descale``, which is zeroed and read where no pool made them.
    """
    note = note_of(a_descale)
    spec = None if note is None else note.spec_in(a_descale)
    declared = note is not None and note.pool == DECLARED
    if spec is not None and foreign_descale.data_ptr() != a_descale.data_ptr() and is_whole_storage(foreign_descale):
        # It is a copy, which later ops of the graph may get.
        remember_declared(foreign_descale, spec) if declared else remember(foreign_descale, spec)
    return foreign_descale if note is None or (declared and spec is not None) else a_descale


def _op(
    a: Tensor,
    b: Tensor,
    a_descale: Tensor,
    b_descale: Tensor,
    alpha: Tensor | None,
    out_dtype: torch.dtype,
    use_8x4_sf_layout: bool | None,
    backend: str,
    enable_pdl: bool,
    skip_check: bool,
    foreign_descale: Tensor,
    block_size: int = 16,
) -> Tensor:
    return mm_fp4(
        a,
        b,
        scales_of_op(a_descale, foreign_descale),
        b_descale,
        alpha,
        out_dtype,
        block_size=block_size,
        use_8x4_sf_layout=use_8x4_sf_layout,
        backend=backend,
        use_nvfp4=block_size == ScaleFormat.nvfp4.block_size,
        enable_pdl=enable_pdl,
        skip_check=skip_check,
    )


register(
    "mm_fp4(Tensor a, Tensor b, Tensor a_descale, Tensor b_descale, Tensor? alpha, ScalarType out_dtype, "
    "bool? use_8x4_sf_layout, str backend, bool enable_pdl, bool skip_check, Tensor(a!) foreign_descale, int block_size=16) "
    "-> Tensor",
    _op,
    lambda a, b, a_descale, b_descale, alpha, out_dtype, *rest: a.new_empty((a.shape[0], b.shape[1]), dtype=out_dtype),
)

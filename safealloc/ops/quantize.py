"""NVFP4 quantization into pool buffers."""

from __future__ import annotations

import torch
from torch import Tensor

from safealloc._checks import check_contiguous, check_scalar, check_tensor
from safealloc.formats.format import ScaleFormat
from safealloc.formats.layout import SfLayout, checked_layout
from safealloc.ops.backends import QUANTIZERS, Backend, call_for, checked_arithmetic, run_watched
from safealloc.ops.inductor import forbid_reuse
from safealloc.ops.library import empty_scales, register
from safealloc.pool.default import checked_pool, default_pool
from safealloc.pool.pool import ScalePool


def nvfp4_quantize(
    x: Tensor,
    global_scale: Tensor,
    *,
    layout: SfLayout = SfLayout.layout_128x4,
    pool: ScalePool | None = None,
    backend: str = "auto",
    valid_rows: Tensor | None = None,
    arithmetic: str = "exact",
) -> tuple[Tensor, Tensor]:
    """Quantize to NVFP4, with the scales in a pool buffer whose padding is zero.

    Args:
        x: bfloat16 or float16 ``[rows, k]``, contiguous; k a multiple of 16.
        global_scale: float32, one element: what the scales are multiplied by, 448 * 6 / max|x| for the full range.
        layout: order of the scale bytes.
        pool: where the scales come from; ``None`` is the default pool.
        backend: ``"reference"`` (any device), ``"triton"`` (compute capability 8.9 and up), ``"flashinfer"`` or ``"vllm"``
            (10.0 and up), ``"auto"`` for ours.
        valid_rows: int32, one element on the device: rows at or beyond it, a graph's padded batch, get zero data and zero
            scales whatever they hold. ``None``: all are valid.
        arithmetic: ``"exact"`` gives the result of vLLM's ``ref_nvfp4_quant``, bit for bit; NaN and Inf stay in their row
            (:mod:`safealloc.kernels.reference`). ``"vllm"`` and ``"flashinfer"`` give that of vLLM 0.33's and FlashInfer
            0.7.2's CUDA kernels, bit for bit, on backend ``"triton"`` alone; a NaN there becomes +6 and does not make its
            scale NaN unless all of a block are.

    Returns:
        uint8 ``[rows, k // 2]`` (low nibble: even column) and the scales, uint8 ``[padded_rows, padded_cols]``.

    Raises:
        TypeError, ValueError: an argument is wrong, or the backend cannot run it; nothing was launched.
        SafeAllocError: as :meth:`ScalePool.acquire`.
    """
    return _quantize(x, global_scale, layout, backend, valid_rows, False, arithmetic, pool)


def silu_and_mul_nvfp4_quantize(
    x: Tensor,
    global_scale: Tensor,
    *,
    layout: SfLayout = SfLayout.layout_128x4,
    pool: ScalePool | None = None,
    backend: str = "auto",
    valid_rows: Tensor | None = None,
    arithmetic: str = "exact",
) -> tuple[Tensor, Tensor]:
    """Quantize ``silu(gate) * up``, as vLLM's ``silu_and_mul_nvfp4_quant``, in one launch.

    The product is rounded to the dtype of ``x`` before it is quantized.

    Args:
        x: bfloat16 or float16 ``[rows, 2 * k]``, contiguous: gate, then up; k a multiple of 16.
        global_scale, layout, pool, valid_rows: as in :func:`nvfp4_quantize`.
        backend: as in :func:`nvfp4_quantize`; ``"vllm"`` in 128x4, not ``"flashinfer"``.
        arithmetic: as in :func:`nvfp4_quantize`; the SiLU of ``"exact"`` gives the same bits on any device
            (:mod:`safealloc.kernels.reference`), that of ``"flashinfer"`` follows its source, and was not compared with its
            kernel.

    Returns:
        uint8 ``[rows, k // 2]`` and the scales.

    Raises:
        TypeError, ValueError, SafeAllocError: as :func:`nvfp4_quantize`.
    """
    return _quantize(x, global_scale, layout, backend, valid_rows, True, arithmetic, pool)


def _quantize(
    x: Tensor,
    global_scale: Tensor,
    layout: SfLayout | int,
    backend: str,
    valid_rows: Tensor | None,
    silu_and_mul: bool = False,  # defaults as in the schema below: what equals them may be left out
    arithmetic: str = "exact",
    pool: ScalePool | None = None,
) -> tuple[Tensor, Tensor]:
    if torch.compiler.is_compiling():
        if pool is not None:
            raise ValueError("compiled code quantizes into the default pool: leave pool out, and choose it by use_pool")
        result: tuple[Tensor, Tensor] = torch.ops.safealloc.nvfp4_quantize(
            x, global_scale, int(layout), backend, valid_rows, silu_and_mul, arithmetic
        )
        return result
    check_input(x, global_scale, silu_and_mul)
    if valid_rows is not None:
        check_scalar("valid_rows", valid_rows, torch.int32, x.device)
    layout = checked_layout(layout)
    arithmetic = checked_arithmetic(arithmetic)
    pool = default_pool(x.device) if pool is None else checked_pool(pool, x)
    call = call_for(x.device, layout, None, valid_rows is not None, False, silu_and_mul, arithmetic)
    row = QUANTIZERS.choose(backend, call)
    return quantize_into(pool, row, x, global_scale, layout, valid_rows, silu_and_mul, arithmetic)


def quantize_into(
    pool: ScalePool,
    row: Backend,
    x: Tensor,
    global_scale: Tensor,
    layout: SfLayout,
    valid_rows: Tensor | None = None,
    silu_and_mul: bool = False,
    arithmetic: str = "exact",
) -> tuple[Tensor, Tensor]:
    """:func:`nvfp4_quantize` of arguments that were checked, by a backend that was chosen."""
    rows, k = x.shape
    if silu_and_mul:
        k //= 2
    scales = pool.acquire(rows, k, layout)
    x_fp4 = torch.empty((rows, k // 2), dtype=torch.uint8, device=x.device)
    arguments = (x, global_scale, x_fp4, scales, layout, valid_rows, silu_and_mul, arithmetic)
    if pool.nan is None:
        row.run(*arguments)
    else:
        run_watched(row, pool.nan, x, global_scale, valid_rows, arguments)
    return x_fp4, scales


def check_input(x: Tensor, global_scale: Tensor, silu_and_mul: bool = False) -> tuple[int, int]:
    """Rows and k of what is to be quantized; raises TypeError, ValueError."""
    rows, k = check_matrix(x, silu_and_mul)
    check_scalar("global_scale", global_scale, torch.float32, x.device)
    return rows, k


def check_matrix(x: Tensor, silu_and_mul: bool = False, format: ScaleFormat = ScaleFormat.nvfp4) -> tuple[int, int]:
    """Rows and k of ``x``; raises TypeError, ValueError."""
    shape, twice = ("[rows, 2 * k]", 2) if silu_and_mul else ("[rows, k]", 1)
    check_tensor("x", x, (torch.bfloat16, torch.float16), shape)
    check_contiguous("x", x)
    rows, width = x.shape
    least = twice * format.block_size
    if rows < 1 or width < least or width % least:
        raise ValueError(
            f"x must be {shape} with at least 1 row and k a multiple of {format.block_size}, got shape {rows, width}"
        )
    return rows, width // twice


def _fake(
    x: Tensor,
    global_scale: Tensor,
    layout: int,
    backend: str,
    valid_rows: Tensor | None,
    silu_and_mul: bool = False,
    arithmetic: str = "exact",
) -> tuple[Tensor, Tensor]:
    forbid_reuse(torch.ops.safealloc.nvfp4_quantize.default)
    rows, k = x.shape
    if silu_and_mul:
        k //= 2
    return x.new_empty((rows, k // 2), dtype=torch.uint8), empty_scales(rows, k, checked_layout(layout), x.device)


register(
    "nvfp4_quantize(Tensor x, Tensor global_scale, int layout, str backend, Tensor? valid_rows, bool silu_and_mul=False, "
    'str arithmetic="exact") -> (Tensor, Tensor)',
    _quantize,
    _fake,
)

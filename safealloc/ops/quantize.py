"""NVFP4 quantization into pool buffers."""

from __future__ import annotations

import torch
from torch import Tensor

from safealloc._checks import check_contiguous, check_scalar, check_tensor
from safealloc.formats.format import BLOCK_SIZE
from safealloc.formats.layout import SfLayout, checked_layout
from safealloc.ops.backends import QUANTIZERS, Backend, call_for
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
) -> tuple[Tensor, Tensor]:
    """Quantize to NVFP4, with the scales in a pool buffer whose padding is zero.

    The result is that of vLLM's ``ref_nvfp4_quant``, bit for bit; NaN and Inf stay in their row (see
    :mod:`safealloc.kernels.reference`).

    Args:
        x: bfloat16 or float16 ``[rows, k]``, contiguous; k a multiple of 16.
        global_scale: float32, one element: what the scales are multiplied by, 448 * 6 / max|x| for the full range.
        layout: order of the scale bytes.
        pool: where the scales come from; ``None`` is the default pool.
        backend: ``"reference"`` (any device), ``"triton"`` (compute capability 8.9 and up), ``"flashinfer"`` or ``"vllm"``
            (10.0 and up), ``"auto"`` for ours.
        valid_rows: int32, one element on the device: rows at or beyond it, a graph's padded batch, get zero data and zero
            scales whatever they hold. ``None``: all are valid.

    Returns:
        uint8 ``[rows, k // 2]`` (low nibble: even column) and the scales, uint8 ``[padded_rows, padded_cols]``.

    Raises:
        TypeError, ValueError: an argument is wrong, or the backend cannot run it; nothing was launched.
        SafeAllocError: as :meth:`ScalePool.acquire`.
    """
    if torch.compiler.is_compiling():
        if pool is not None:
            raise ValueError("compiled code quantizes into the default pool: leave pool out, and choose it by use_pool")
        result: tuple[Tensor, Tensor] = torch.ops.safealloc.nvfp4_quantize(
            x, global_scale, int(layout), backend, valid_rows
        )
        return result
    check_input(x, global_scale)
    if valid_rows is not None:
        check_scalar("valid_rows", valid_rows, torch.int32, x.device)
    layout = checked_layout(layout)
    pool = default_pool(x.device) if pool is None else checked_pool(pool, x)
    row = QUANTIZERS.choose(backend, call_for(x.device, layout, None, valid_rows is not None))
    return quantize_into(pool, row, x, global_scale, layout, valid_rows)


def quantize_into(
    pool: ScalePool, row: Backend, x: Tensor, global_scale: Tensor, layout: SfLayout, valid_rows: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """:func:`nvfp4_quantize` of arguments that were checked, by a backend that was chosen."""
    rows, k = x.shape
    scales = pool.acquire(rows, k, layout)
    x_fp4 = torch.empty((rows, k // 2), dtype=torch.uint8, device=x.device)
    row.run(x, global_scale, x_fp4, scales, layout, valid_rows)
    return x_fp4, scales


def check_input(x: Tensor, global_scale: Tensor) -> tuple[int, int]:
    """Rows and k of what is to be quantized; raises TypeError, ValueError."""
    check_tensor("x", x, (torch.bfloat16, torch.float16), "[rows, k]")
    check_contiguous("x", x)
    rows, k = x.shape
    if rows < 1 or k < BLOCK_SIZE or k % BLOCK_SIZE:
        raise ValueError(f"x must be [rows, k] with rows of at least 1 and k a multiple of {BLOCK_SIZE}, got {rows, k}")
    check_scalar("global_scale", global_scale, torch.float32, x.device)
    return rows, k


def _fake(x: Tensor, global_scale: Tensor, layout: int, *rest: object) -> tuple[Tensor, Tensor]:
    forbid_reuse(torch.ops.safealloc.nvfp4_quantize.default)
    rows, k = x.shape
    return x.new_empty((rows, k // 2), dtype=torch.uint8), empty_scales(rows, k, checked_layout(layout), x.device)


register(
    "nvfp4_quantize(Tensor x, Tensor global_scale, int layout, str backend, Tensor? valid_rows) -> (Tensor, Tensor)",
    lambda x, global_scale, layout, backend, valid_rows: nvfp4_quantize(
        x, global_scale, layout=layout, backend=backend, valid_rows=valid_rows
    ),
    _fake,
)

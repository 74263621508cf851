"""MXFP8 and MXFP4 quantization into pool buffers."""

from __future__ import annotations

import torch
from torch import Tensor

from safealloc._checks import check_scalar
from safealloc.formats.format import ScaleFormat
from safealloc.formats.layout import SfLayout, checked_layout
from safealloc.ops.backends import MX_QUANTIZERS, call_for, run_watched
from safealloc.ops.inductor import forbid_reuse
from safealloc.ops.library import empty_scales, register
from safealloc.ops.quantize import check_matrix
from safealloc.pool.default import checked_pool, default_pool
from safealloc.pool.pool import ScalePool


def mxfp8_quantize(
    x: Tensor,
    *,
    layout: SfLayout = SfLayout.layout_128x4,
    pool: ScalePool | None = None,
    backend: str = "auto",
    valid_rows: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Quantize to MXFP8 (e4m3), with the scales in a pool buffer whose padding is zero.

    The arithmetic is that of FlashInfer 0.7.2's CUDA kernel, read from its source: scales round up, so that no finite value
    saturates. NaN becomes +448, and does not make its scale NaN unless all of a block are
    (:mod:`safealloc.kernels.reference_mx`).

    Args:
        x: bfloat16 or float16 ``[rows, k]``, contiguous; k a multiple of 32.
        layout: order of the scale bytes.
        pool: where the scales come from; ``None`` is the default pool.
        backend: ``"reference"`` (any device), ``"triton"`` (compute capability 8.9 and up), ``"auto"``.
        valid_rows: int32, one element on the device: rows at or beyond it, a graph's padded batch, get zero data and zero
            scales whatever they hold. ``None``: all are valid.

    Returns:
        float8_e4m3fn ``[rows, k]`` and the scales, e8m0 as uint8 ``[padded_rows, padded_cols]``.

    Raises:
        TypeError, ValueError: an argument is wrong, or the backend cannot run it; nothing was launched.
        SafeAllocError: as :meth:`ScalePool.acquire`.
    """
    return _quantize(x, ScaleFormat.mxfp8.name, layout, backend, valid_rows, pool)


def mxfp4_quantize(
    x: Tensor,
    *,
    layout: SfLayout = SfLayout.layout_128x4,
    pool: ScalePool | None = None,
    backend: str = "auto",
    valid_rows: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Quantize to MXFP4 (e2m1), with the scales in a pool buffer whose padding is zero.

    As :func:`mxfp8_quantize`, with 6 as the largest value.

    Args:
        x, layout, pool, backend, valid_rows: as in :func:`mxfp8_quantize`.

    Returns:
        uint8 ``[rows, k // 2]`` (low nibble: even column) and the scales, e8m0 as uint8 ``[padded_rows, padded_cols]``.

    Raises:
        TypeError, ValueError, SafeAllocError: as :func:`mxfp8_quantize`.
    """
    return _quantize(x, ScaleFormat.mxfp4.name, layout, backend, valid_rows, pool)


def _quantize(
    x: Tensor,
    format_name: str,
    layout: SfLayout | int,
    backend: str,
    valid_rows: Tensor | None,
    pool: ScalePool | None = None,
) -> tuple[Tensor, Tensor]:
    if torch.compiler.is_compiling():
        if pool is not None:
            raise ValueError("compiled code quantizes into the default pool: leave pool out, and choose it by use_pool")
        result: tuple[Tensor, Tensor] = torch.ops.safealloc.mx_quantize(
            x, format_name, int(layout), backend, valid_rows
        )
        return result
    format = ScaleFormat[format_name]
    rows, k = check_matrix(x, format=format)
    if valid_rows is not None:
        check_scalar("valid_rows", valid_rows, torch.int32, x.device)
    layout = checked_layout(layout)
    pool = default_pool(x.device) if pool is None else checked_pool(pool, x)
    row = MX_QUANTIZERS.choose(backend, call_for(x.device, layout, valid_rows=valid_rows is not None, format=format))
    scales = pool.acquire(rows, k, layout, format=format)
    data = torch.empty(format.data_shape(rows, k), dtype=torch.uint8, device=x.device)
    run_watched(row, pool.nan, x, None, valid_rows, (x, data, scales, layout, format, valid_rows))
    return data.view(_data_dtype(format)), scales


def _data_dtype(format: ScaleFormat) -> torch.dtype:
    return torch.float8_e4m3fn if format is ScaleFormat.mxfp8 else torch.uint8


def _fake(x: Tensor, format_name: str, layout: int, backend: str, valid_rows: Tensor | None) -> tuple[Tensor, Tensor]:
    forbid_reuse(torch.ops.safealloc.mx_quantize.default)
    format = ScaleFormat[format_name]
    rows, k = x.shape
    data = x.new_empty(format.data_shape(rows, k), dtype=_data_dtype(format))
    return data, empty_scales(rows, k, checked_layout(layout), x.device, format=format)


register(
    "mx_quantize(Tensor x, str format, int layout, str backend, Tensor? valid_rows) -> (Tensor, Tensor)",
    _quantize,
    _fake,
)

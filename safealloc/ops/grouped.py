"""NVFP4 quantization of rows grouped by expert (MoE), into pool buffers that keep no scales of an earlier step.

The cleaner beside another producer serves every format.
"""

from __future__ import annotations

import torch
from torch import Tensor

from safealloc._checks import BYTES, check_contiguous, check_scalar, check_tensor
from safealloc.formats.layout import SfLayout, checked_integer, checked_layout
from safealloc.formats.spec import ScaleSpec
from safealloc.ops.backends import CLEANERS, GROUPED_QUANTIZERS, call_for, checked_arithmetic, run_watched
from safealloc.ops.inductor import forbid_reuse
from safealloc.ops.library import empty_scales, register
from safealloc.ops.quantize import check_matrix
from safealloc.pool.contents import pool_spec_of
from safealloc.pool.default import checked_pool, default_pool
from safealloc.pool.pool import ScalePool


def nvfp4_quantize_grouped(
    x: Tensor,
    global_scales: Tensor,
    expert_offsets: Tensor,
    blockscale_offsets: Tensor,
    *,
    layout: SfLayout = SfLayout.layout_128x4,
    pool: ScalePool | None = None,
    backend: str = "auto",
    valid_rows: Tensor | None = None,
    row_tokens: Tensor | None = None,
    arithmetic: str = "exact",
) -> tuple[Tensor, Tensor]:
    """Quantize rows that are sorted by expert, as vLLM's ``scaled_fp4_experts_quant``, in one launch.

    Afterwards every byte that is not a scale of this call is zero, whatever the offsets of the previous call were. Offsets
    are read on the device and not checked there: a row whose scale row would lie beyond the buffer counts as outside of
    every group.

    Args:
        x: bfloat16 or float16 ``[rows, k]``, contiguous; the rows of expert ``e`` are ``expert_offsets[e]`` to
            ``expert_offsets[e + 1] - 1``. The data of rows outside of every group are zero.
        global_scales: float32 ``[experts]``: what the scales of each expert's rows are multiplied by.
        expert_offsets: int32 ``[experts + 1]`` on the device, not decreasing, from 0 to ``rows`` at most.
        blockscale_offsets: int32 ``[experts + 1]`` on the device: the first scale row of each expert, a multiple of the
            layout's tile: the sum of the groups before it, each rounded up to whole tiles.
        layout: order of the scale bytes.
        pool: where the scales come from; ``None`` is the default pool.
        backend: ``"reference"`` (any device), ``"triton"`` (compute capability 8.9 and up), ``"auto"``.
        valid_rows: int32, one element on the device: rows of tokens at or beyond it, a graph's padded batch, get zero data
            and zero scales whatever they hold. ``None``: all are valid.
        row_tokens: int32 ``[rows]`` on the device: the token of each row (vLLM's ``a_map``), for ``valid_rows``; ``None``:
            the number of the row.
        arithmetic: as in :func:`nvfp4_quantize`.

    Returns:
        uint8 ``[rows, k // 2]`` (low nibble: even column) and the scales, as :meth:`ScalePool.acquire_grouped` returns them.

    Raises:
        TypeError, ValueError: an argument is wrong, or the backend cannot run it; nothing was launched.
        SafeAllocError: as :meth:`ScalePool.acquire`.
    """
    offsets = (expert_offsets, blockscale_offsets)
    return _quantize(x, global_scales, *offsets, layout, backend, valid_rows, row_tokens, False, arithmetic, pool)


def silu_and_mul_nvfp4_quantize_grouped(
    x: Tensor,
    global_scales: Tensor,
    expert_offsets: Tensor,
    blockscale_offsets: Tensor,
    *,
    layout: SfLayout = SfLayout.layout_128x4,
    pool: ScalePool | None = None,
    backend: str = "auto",
    valid_rows: Tensor | None = None,
    row_tokens: Tensor | None = None,
    arithmetic: str = "exact",
) -> tuple[Tensor, Tensor]:
    """Quantize ``silu(gate) * up`` of rows sorted by expert, as vLLM's ``silu_and_mul_scaled_fp4_experts_quant``.

    The product is rounded to the dtype of ``x`` before it is quantized.

    Args:
        x: bfloat16 or float16 ``[rows, 2 * k]``, contiguous: gate, then up.
        global_scales, expert_offsets, blockscale_offsets, layout, pool, backend, valid_rows, row_tokens: as in
            :func:`nvfp4_quantize_grouped`.
        arithmetic: as in :func:`silu_and_mul_nvfp4_quantize`.

    Returns:
        uint8 ``[rows, k // 2]`` and the scales.

    Raises:
        TypeError, ValueError, SafeAllocError: as :func:`nvfp4_quantize_grouped`.
    """
    offsets = (expert_offsets, blockscale_offsets)
    return _quantize(x, global_scales, *offsets, layout, backend, valid_rows, row_tokens, True, arithmetic, pool)


def clean_grouped_scales(
    scales: Tensor,
    expert_offsets: Tensor,
    blockscale_offsets: Tensor,
    rows: int | None = None,
    *,
    backend: str = "auto",
) -> None:
    """Clear the scales that only the previous step wrote, beside a producer that writes valid scales only.

    One launch, whose cost follows the rows of both steps. It may run before or after the producer, on its stream, and must
    run before the GEMM. Only :meth:`ScalePool.verify` sees what a producer wrote elsewhere.

    Args:
        scales: of :meth:`ScalePool.acquire_grouped`, of any format, or a dtype view of it.
        expert_offsets, blockscale_offsets: as in :func:`nvfp4_quantize_grouped`.
        rows: of this step, in a group or not; ``None``: as many as the buffer is for.
        backend: ``"reference"`` or ``"triton"``, ``"auto"``.

    Raises:
        ValueError: ``scales`` are not of :meth:`ScalePool.acquire_grouped`, or an argument does not fit them; nothing was
            launched.
        TypeError: not a tensor, or of another dtype.
    """
    check_tensor("scales", scales, (*BYTES, torch.float8_e8m0fnu, torch.int32), None)
    spec = pool_spec_of(scales)
    if spec is None or spec.experts is None:
        raise ValueError(
            "scales must start at a buffer of ScalePool.acquire_grouped: other memory has no record of the previous step"
        )
    _check_offsets(expert_offsets, blockscale_offsets, spec.experts, scales.device)
    rows = spec.rows if rows is None else checked_integer(rows, "rows")
    if not 1 <= rows <= spec.rows:
        raise ValueError(f"rows must be 1 to {spec.rows}, which the buffer is for, got {rows}")
    row = CLEANERS.choose(backend, call_for(scales.device, spec.layout))
    buffer, record = whole_buffer(spec, scales.view(torch.uint8))
    row.run(buffer, spec.layout, spec.cols, record, expert_offsets, blockscale_offsets, rows)


def _quantize(
    x: Tensor,
    global_scales: Tensor,
    expert_offsets: Tensor,
    blockscale_offsets: Tensor,
    layout: SfLayout | int,
    backend: str,
    valid_rows: Tensor | None,
    row_tokens: Tensor | None,
    silu_and_mul: bool,
    arithmetic: str = "exact",
    pool: ScalePool | None = None,
) -> tuple[Tensor, Tensor]:
    offsets = (expert_offsets, blockscale_offsets)
    if torch.compiler.is_compiling():
        if pool is not None:
            raise ValueError("compiled code quantizes into the default pool: leave pool out, and choose it by use_pool")
        result: tuple[Tensor, Tensor] = torch.ops.safealloc.nvfp4_quantize_grouped(
            x, global_scales, *offsets, int(layout), backend, valid_rows, row_tokens, silu_and_mul, arithmetic
        )
        return result
    rows, k, experts = _check_input(x, global_scales, silu_and_mul)
    _check_offsets(expert_offsets, blockscale_offsets, experts, x.device)
    if valid_rows is not None:
        check_scalar("valid_rows", valid_rows, torch.int32, x.device)
    if row_tokens is not None:
        _check_vector("row_tokens", row_tokens, rows, x.device)
        if valid_rows is None:
            raise ValueError("row_tokens tells whose rows are valid: give valid_rows too")
    layout = checked_layout(layout)
    pool = default_pool(x.device) if pool is None else checked_pool(pool, x)
    call = call_for(x.device, layout, arithmetic=checked_arithmetic(arithmetic))
    row = GROUPED_QUANTIZERS.choose(backend, call)
    scales = pool.acquire_grouped(rows, k, experts, layout)
    spec = pool_spec_of(scales)
    assert spec is not None
    buffer, record = whole_buffer(spec, scales)
    x_fp4 = torch.empty((rows, k // 2), dtype=torch.uint8, device=x.device)
    arguments = (
        x,
        global_scales,
        x_fp4,
        buffer,
        layout,
        record,
        *offsets,
        valid_rows,
        row_tokens,
        silu_and_mul,
        arithmetic,
    )
    live_rows = valid_rows
    if pool.nan is not None and (valid_rows is None or row_tokens is not None):
        live_rows = expert_offsets[experts:]  # where the last group ends
    run_watched(row, pool.nan, x, global_scales, live_rows, arguments, by_expert=True)
    return x_fp4, scales


def whole_buffer(spec: ScaleSpec, scales: Tensor) -> tuple[Tensor, Tensor]:
    """All of the buffer, uint8 ``[padded_rows, padded_cols]``, and its record."""
    padded_rows, padded_cols = spec.padded_shape
    record = spec.record_in(scales)
    assert record is not None
    return scales.as_strided((padded_rows, padded_cols), (padded_cols, 1)), record


def _check_input(x: Tensor, global_scales: Tensor, silu_and_mul: bool) -> tuple[int, int, int]:
    """Rows, k and experts."""
    rows, k = check_matrix(x, silu_and_mul)
    check_tensor("global_scales", global_scales, (torch.float32,), "[experts]", x.device)
    check_contiguous("global_scales", global_scales)
    experts = global_scales.shape[0]
    if experts < 1:
        raise ValueError("global_scales must have one element for each expert, got none")
    return rows, k, experts


def _check_offsets(expert_offsets: Tensor, blockscale_offsets: Tensor, experts: int, device: torch.device) -> None:
    _check_vector("expert_offsets", expert_offsets, experts + 1, device)
    _check_vector("blockscale_offsets", blockscale_offsets, experts + 1, device)


def _check_vector(name: str, vector: Tensor, length: int, device: torch.device) -> None:
    check_tensor(name, vector, (torch.int32,), "[length]", device)
    check_contiguous(name, vector)
    if vector.shape[0] != length:
        raise ValueError(f"{name} must have {length} elements, got {vector.shape[0]}")


def _fake(
    x: Tensor,
    global_scales: Tensor,
    expert_offsets: Tensor,
    blockscale_offsets: Tensor,
    layout: int,
    backend: str,
    valid_rows: Tensor | None,
    row_tokens: Tensor | None,
    silu_and_mul: bool,
    arithmetic: str = "exact",
) -> tuple[Tensor, Tensor]:
    forbid_reuse(torch.ops.safealloc.nvfp4_quantize_grouped.default)
    sf_layout = checked_layout(layout)
    rows, width = x.shape
    k = width // 2 if silu_and_mul else width
    scale_rows = sf_layout.grouped_rows(rows, global_scales.shape[0])
    return x.new_empty((rows, k // 2), dtype=torch.uint8), empty_scales(scale_rows, k, sf_layout, x.device)


register(
    "nvfp4_quantize_grouped(Tensor x, Tensor global_scales, Tensor expert_offsets, Tensor blockscale_offsets, int layout, "
    'str backend, Tensor? valid_rows, Tensor? row_tokens, bool silu_and_mul, str arithmetic="exact") -> (Tensor, Tensor)',
    _quantize,
    _fake,
)

"""Rows grouped by expert (MoE), in plain torch, on any device: what the grouped kernels must reproduce, bit for bit.

The rows of ``x`` are sorted by expert: those of expert ``e`` are ``expert_offsets[e]`` to ``expert_offsets[e + 1] - 1``, and
their scales start at scale row ``blockscale_offsets[e]``, where a tile starts. Both offsets are vLLM's
(``get_cutlass_moe_mm_data``). Rows outside of every group have no scales.

A buffer's record (:class:`safealloc.formats.spec.ScaleSpec`) names the scale rows of the last step. These are valid, and
every other byte is zero: a step clears the rows that the record names and the step does not write itself, whatever the
offsets were. Nothing here synchronizes or copies from the host.
"""

from __future__ import annotations

import torch
from torch import Tensor

from safealloc.formats.format import BLOCK_SIZE
from safealloc.formats.layout import SfLayout
from safealloc.kernels.reference import encode, multiply


def quantize(
    x: Tensor,
    global_scales: Tensor,
    x_fp4: Tensor,
    scales: Tensor,
    layout: SfLayout,
    record: Tensor | None,
    expert_offsets: Tensor,
    blockscale_offsets: Tensor,
    valid_rows: Tensor | None = None,
    row_tokens: Tensor | None = None,
    silu_and_mul: bool = False,
    arithmetic: str = "exact",
) -> None:
    """Quantize rows grouped by expert, and clear the scales that only the previous step wrote.

    Args:
        x: bfloat16 or float16 ``[rows, k]``, with ``silu_and_mul`` ``[rows, 2 * k]``: gate, then up.
        global_scales: float32 ``[experts]``.
        x_fp4: uint8 ``[rows, k // 2]``, written; rows outside of every group or not valid are zero.
        scales: uint8 ``[padded_rows, padded_cols]``, all of the buffer.
        layout: order of the bytes in ``scales``.
        record: int32 ``[at least rows]``, updated; ``None`` for scales that are zeroed at each step, which have none.
        expert_offsets, blockscale_offsets: int32 ``[experts + 1]``, not decreasing; a row whose scale row would lie beyond
            the buffer counts as outside of every group.
        valid_rows: int32, one element: rows of tokens at or beyond it get zero data and zero scales.
        row_tokens: int32 ``[rows]``: the token of each row; without it, the number of the row.
        silu_and_mul: whether to quantize ``silu(gate) * up``.
        arithmetic: always ``"exact"``.
    """
    if silu_and_mul:
        x = multiply(x)
    rows, k = x.shape
    expert, place = places(rows, expert_offsets, blockscale_offsets, scales.shape[0])
    data, linear = encode(x, global_scales[expert.clamp(max=len(global_scales) - 1)][:, None])
    live = place >= 0
    if valid_rows is not None:
        token = torch.arange(rows, device=x.device) if row_tokens is None else row_tokens
        live &= token < valid_rows.reshape(())
    x_fp4.copy_(torch.where(live[:, None], data, 0))
    if record is not None:
        clean(scales, layout, k // BLOCK_SIZE, record, expert_offsets, blockscale_offsets, rows)
    # Rows without a place write to one byte behind the buffer, so that nothing depends on how many there are.
    padded_rows, padded_cols = scales.shape
    offsets = layout.offsets(padded_rows, k, x.device, padded_k=padded_cols * BLOCK_SIZE)
    at = torch.where((place >= 0)[:, None], offsets[place.clamp(min=0)], scales.numel())
    extended = torch.cat([scales.view(-1), scales.new_zeros(1)])
    extended[at] = torch.where(live[:, None], linear, 0)
    scales.view(-1).copy_(extended[:-1])


def clean(
    scales: Tensor,
    layout: SfLayout,
    cols: int,
    record: Tensor,
    expert_offsets: Tensor,
    blockscale_offsets: Tensor,
    rows: int,
) -> None:
    """Clear the scales that only the previous step wrote, and update the record.

    It may run before or after the scales of this step are written: those bytes are not touched.

    Args:
        scales, layout, record, expert_offsets, blockscale_offsets: as in :func:`quantize`.
        cols: valid scales of each row, of any format.
        rows: of this step, in a group or not.
    """
    padded_rows, padded_cols = scales.shape
    _, place = places(rows, expert_offsets, blockscale_offsets, padded_rows)
    # The last row stands for rows outside of every group.
    written = torch.zeros(padded_rows + 1, dtype=torch.bool, device=scales.device)
    previous = written.clone()
    written.index_fill_(0, torch.where(place < 0, padded_rows, place), True)
    known = (record >= 1) & (record <= padded_rows)
    previous.index_fill_(0, torch.where(known, record - 1, padded_rows).long(), True)
    cleared = (previous & ~written)[:padded_rows, None]
    offsets = layout.offsets(padded_rows, cols * BLOCK_SIZE, scales.device, padded_k=padded_cols * BLOCK_SIZE)
    flat = scales.view(-1)
    flat[offsets] = torch.where(cleared, 0, flat[offsets])
    record[:rows] = torch.where(place < 0, -1, place + 1)
    record[rows:] = 0


def places(rows: int, expert_offsets: Tensor, blockscale_offsets: Tensor, padded_rows: int) -> tuple[Tensor, Tensor]:
    """Expert and scale row of each row, int64 ``[rows]``; scale row -1 for a row outside of every group.

    Args:
        rows: in a group or not.
        expert_offsets, blockscale_offsets: int32 ``[experts + 1]``.
        padded_rows: of the buffer; a row that would lie beyond it counts as outside of every group.
    """
    row = torch.arange(rows, dtype=torch.int32, device=expert_offsets.device)
    expert = torch.searchsorted(expert_offsets[1:].contiguous(), row, right=True)  # how many groups end before it
    known = expert.clamp(max=len(expert_offsets) - 2)
    place = blockscale_offsets[known] + row - expert_offsets[known]
    grouped = (expert == known) & (row >= expert_offsets[known]) & (place < padded_rows)
    return expert, torch.where(grouped, place, -1).long()

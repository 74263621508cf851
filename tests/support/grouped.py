"""Rows grouped by expert: offsets, activations, and what a quantization of them must write."""

from __future__ import annotations

from collections.abc import Callable

import torch
from support.internals import inventory_of
from torch import Tensor

from safealloc import ScalePool, SfLayout, nvfp4_quantize_grouped
from safealloc.kernels import reference

K = 80  # 5 scale columns, of which tiles make 8


def offsets(counts: list[int], layout: SfLayout) -> tuple[Tensor, Tensor]:
    """Expert and scale offsets of groups of so many rows, as vLLM's ``get_cutlass_moe_mm_data`` computes them."""
    expert, scale = [0], [0]
    for count in counts:
        expert.append(expert[-1] + count)
        scale.append(scale[-1] + layout.round_up(count, 1)[0])
    return torch.tensor(expert, dtype=torch.int32), torch.tensor(scale, dtype=torch.int32)


def activation(rows: int, k: int = K, seed: int = 0) -> Tensor:
    """No block is zero, so that no scale is."""
    return torch.randn(rows, k, generator=torch.Generator().manual_seed(seed)).bfloat16() + 4


def expected(
    x: Tensor,
    global_scales: Tensor,
    counts: list[int],
    layout: SfLayout,
    dead: Callable[[int], bool] = lambda row: False,
) -> tuple[Tensor, Tensor]:
    """Data, and scales in matrix order for the worst case, from one call of the dense reference for each expert."""
    rows, k = x.shape
    data = torch.zeros(rows, k // 2, dtype=torch.uint8)
    logical = torch.zeros(layout.padded_shape(layout.grouped_rows(rows, len(counts)), k), dtype=torch.uint8)
    expert_offsets, scale_offsets = (values.tolist() for values in offsets(counts, layout))
    for expert, count in enumerate(counts):
        if not count:
            continue
        first, scale_row = expert_offsets[expert], scale_offsets[expert]
        own = x[first : first + count]
        linear = torch.empty(count, k // 16, dtype=torch.uint8)
        packed = torch.empty(count, k // 2, dtype=torch.uint8)
        reference.quantize(own, global_scales[expert : expert + 1], packed, linear, SfLayout.layout_linear)
        for row in range(count):
            if not dead(first + row):
                data[first + row] = packed[row]
                logical[scale_row + row, : k // 16] = linear[row]
    return data, logical


def logical(pool: ScalePool, scales: Tensor, layout: SfLayout, k: int = K) -> Tensor:
    """All of the buffer in matrix order, beyond what ``scales`` shows too."""
    base = inventory_of(pool).by_address[scales.data_ptr()].base
    return layout.logical(base, base.shape[0], k)


def check_quantize(
    pool: ScalePool, counts: list[int], layout: SfLayout, *, ungrouped: int = 0, seed: int = 0
) -> Tensor:
    """Quantize, and compare every byte of the buffer."""
    rows = sum(counts) + ungrouped
    x = activation(rows, seed=seed)
    global_scales = torch.arange(1, len(counts) + 1, dtype=torch.float32)
    data, scales = nvfp4_quantize_grouped(x, global_scales, *offsets(counts, layout), layout=layout, pool=pool)
    wanted_data, wanted = expected(x, global_scales, counts, layout)
    assert torch.equal(data, wanted_data)
    assert scales.shape == wanted.shape
    found = logical(pool, scales, layout)
    assert torch.equal(found[: len(wanted)], wanted)
    assert not found[len(wanted) :].any()
    return scales

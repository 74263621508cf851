"""Views of pool buffers, storages that hold more than one matrix's scales, and weights whose scales are known."""

from __future__ import annotations

import pytest
import torch
from support.gemm import pool  # noqa: F401
from torch import Tensor

from safealloc import LayoutMismatchError, ScalePool, SfLayout, mm_fp4, nvfp4_linear, nvfp4_quantize

ONE = torch.ones(1)
N, K = 128, 80


def matrix(rows: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, K, generator=torch.Generator().manual_seed(seed)).bfloat16()


def weight(pool: ScalePool, layout: SfLayout = SfLayout.layout_128x4) -> tuple[Tensor, Tensor]:
    return nvfp4_quantize(matrix(N, 1), ONE, layout=layout, pool=pool)


@pytest.mark.parametrize(
    ("layout", "rows", "part"),
    [
        (SfLayout.layout_128x4, 256, slice(128, 256)),
        (SfLayout.layout_128x4, 300, slice(256, 300)),
        (SfLayout.layout_128x4, 300, slice(0, 128)),
        (SfLayout.layout_8x4, 20, slice(8, 20)),
        (SfLayout.layout_8x4, 24, slice(16, 24)),
        (SfLayout.layout_linear, 20, slice(3, 9)),
    ],
)
def test_whole_row_tiles_of_a_buffer_serve_the_rows_that_lie_in_them(pool, layout, rows, part) -> None:
    x_fp4, scales = nvfp4_quantize(matrix(rows), ONE, layout=layout, pool=pool)
    w_fp4, w_scales = weight(pool)
    whole = mm_fp4(x_fp4, w_fp4.T, scales, w_scales.T, ONE, backend="reference")
    tile = layout.tile.rows
    view = scales[part.start : -(-part.stop // tile) * tile]
    y = mm_fp4(x_fp4[part], w_fp4.T, view, w_scales.T, ONE, backend="reference")
    assert torch.equal(y, whole[part])
    pool.verify()


@pytest.mark.parametrize(("start", "stop"), [(64, 192), (0, 64), (8, 136)])
def test_any_other_view_of_a_buffer_is_refused_and_nothing_is_written(pool, start, stop) -> None:
    x_fp4, scales = nvfp4_quantize(matrix(256), ONE, pool=pool)
    w_fp4, w_scales = weight(pool)
    before = scales.clone()
    with pytest.raises(LayoutMismatchError, match="no whole number of row tiles"):
        mm_fp4(x_fp4[start:stop], w_fp4.T, scales[start:stop], w_scales.T, ONE, backend="reference")
    assert torch.equal(scales, before)


def test_a_view_with_more_rows_than_the_activation_is_refused(pool) -> None:
    """The view's padding would be zeroed otherwise, which is another matrix's scales."""
    x_fp4, scales = nvfp4_quantize(matrix(256), ONE, pool=pool)
    w_fp4, w_scales = weight(pool)
    with pytest.raises(LayoutMismatchError, match="written for 128 rows, a has 17"):
        mm_fp4(x_fp4[128:145], w_fp4.T, scales[128:], w_scales.T, ONE, backend="reference")
    assert pool.verify() == pool.stats().buffers


@pytest.mark.parametrize("rows", [17, 128])
def test_scales_in_a_larger_storage_are_copied_not_zeroed(pool, rows) -> None:
    """Two matrices, one behind the other, in memory that no pool made."""
    layout = SfLayout.layout_128x4
    w_fp4, w_scales = weight(pool)
    x_fp4, known = nvfp4_quantize(matrix(rows), ONE, pool=pool)
    storage = torch.full((256, known.shape[1]), 0x38, dtype=torch.uint8)
    storage[:128].view(-1)[layout.offsets(rows, K)] = known.view(-1)[layout.offsets(rows, K)]
    before = storage.clone()
    y = mm_fp4(x_fp4, w_fp4.T, storage[:128], w_scales.T, ONE, backend="reference")
    assert torch.equal(y, mm_fp4(x_fp4, w_fp4.T, known, w_scales.T, ONE, backend="reference"))
    assert torch.equal(storage, before)


def test_scales_that_are_all_of_their_storage_are_zeroed_in_place(pool) -> None:
    x_fp4, known = nvfp4_quantize(matrix(17), ONE, pool=pool)
    w_fp4, w_scales = weight(pool)
    foreign = known.clone()
    mask = SfLayout.layout_128x4.padding_mask(17, K)
    foreign.view(-1)[mask] = 0x7F
    mm_fp4(x_fp4, w_fp4.T, foreign, w_scales.T, ONE, backend="reference")
    assert not foreign.view(-1)[mask].any()


@pytest.mark.parametrize("call", ["mm_fp4", "nvfp4_linear"])
def test_weight_scales_in_another_layout_are_refused(pool, call) -> None:
    w_fp4, w_scales = weight(pool, SfLayout.layout_8x4)
    x_fp4, scales = nvfp4_quantize(matrix(5), ONE, pool=pool)
    with pytest.raises(LayoutMismatchError, match="layout_8x4"):
        if call == "mm_fp4":
            mm_fp4(x_fp4, w_fp4.T, scales, w_scales.T, ONE, backend="reference")
        else:
            nvfp4_linear(matrix(5), w_fp4, w_scales, ONE, ONE, backend="reference")


def test_weight_scales_of_another_row_count_are_refused(pool) -> None:
    w_fp4, _ = weight(pool)
    _, w_scales = nvfp4_quantize(matrix(100, 1), ONE, pool=pool)
    x_fp4, scales = nvfp4_quantize(matrix(5), ONE, pool=pool)
    with pytest.raises(LayoutMismatchError, match="rows=100"):
        mm_fp4(x_fp4, w_fp4.T, scales, w_scales.T, ONE, backend="reference")


def test_a_part_of_a_stacked_weight_is_served(pool) -> None:
    """Gate and up in one buffer, multiplied one by one."""
    both_fp4, both = nvfp4_quantize(matrix(256, 1), ONE, pool=pool)
    x_fp4, scales = nvfp4_quantize(matrix(5), ONE, pool=pool)
    whole = mm_fp4(x_fp4, both_fp4.T, scales, both.T, ONE, backend="reference")
    for part in (slice(0, 128), slice(128, 256)):
        y = mm_fp4(x_fp4, both_fp4[part].T, scales, both[part].T, ONE, backend="reference")
        assert torch.equal(y, whole[:, part])
    with pytest.raises(LayoutMismatchError, match="b_descale"):
        mm_fp4(x_fp4, both_fp4[64:192].T, scales, both[64:192].T, ONE, backend="reference")


@pytest.mark.parametrize(
    "alpha",
    [
        torch.full((64,), 1e6).index_fill_(0, torch.tensor([7]), 0.5)[7:8].expand(16),
        torch.linspace(1, 2, 32)[::2],
        torch.rand(16, 2, generator=torch.Generator().manual_seed(0))[:, 1:],
        torch.rand(1, 4)[:, 2:3],
    ],
    ids=["expanded", "every other", "a column", "one element inside"],
)
def test_an_alpha_of_any_stride(pool, alpha, monkeypatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    x_fp4, scales = nvfp4_quantize(matrix(16), ONE, pool=pool, backend="reference")
    w_fp4, w_scales = nvfp4_quantize(matrix(N, 1), ONE, pool=pool, backend="reference")
    operands = x_fp4, w_fp4.T, scales, w_scales.T
    y = mm_fp4(*operands, alpha, torch.float32, backend="reference")
    assert torch.equal(y, mm_fp4(*operands, alpha.contiguous().clone(), torch.float32, backend="reference"))


def test_the_storage_of_linear_scales_ends_with_a_tile_of_16_rows(pool) -> None:
    """FlashInfer's TMA kernels write every row of their last tile."""
    scales = pool.acquire(1025, 1024, SfLayout.layout_linear)
    assert scales.shape == (1025, 64)
    assert scales.untyped_storage().nbytes() == 66_560

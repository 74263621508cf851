"""Buffers for rows grouped by expert, and wrong arguments of the functions that fill them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.grouped import K, activation, check_quantize, expected, offsets

import safealloc
from safealloc import (
    LayoutMismatchError,
    PaddingCorruptionError,
    PoolClosedError,
    PoolExhaustedError,
    ScalePool,
    ScaleSpec,
    SfLayout,
    mm_fp4,
    nvfp4_quantize_grouped,
    silu_and_mul_nvfp4_quantize_grouped,
)
from safealloc.pool import buffer


@pytest.fixture
def pool() -> Iterator[ScalePool]:
    with ScalePool("cpu") as pool:
        yield pool


# --- the pool ----------------------------------------------------------------------------------------------------------


def test_one_buffer_serves_all_row_counts(pool: ScalePool) -> None:
    pool.reserve(range(1, 41), K, SfLayout.layout_8x4, experts=3)
    assert pool.stats().buffers == 1
    assert pool.stats().bytes == ScaleSpec.grouped(40, K, SfLayout.layout_8x4, 3).nbytes
    addresses = set()
    for rows in (40, 1, 17, 3):
        scales = pool.acquire_grouped(rows, K, 3, SfLayout.layout_8x4)
        assert scales.shape == (SfLayout.layout_8x4.grouped_rows(rows, 3), 8)
        assert scales.is_contiguous()
        assert scales.data_ptr() % 512 == 0
        assert pool.spec(scales) == ScaleSpec.grouped(40, K, SfLayout.layout_8x4, 3)
        addresses.add(scales.data_ptr())
        del scales
    assert len(addresses) == 1
    assert pool.misses == 0
    held = [pool.acquire_grouped(2, K, 3, SfLayout.layout_8x4) for _ in range(2)]
    assert len({scales.data_ptr() for scales in held}) == 2
    assert pool.misses == 1
    pool.reserve(40, K, SfLayout.layout_8x4, copies=2, experts=3)
    assert pool.stats().buffers == 4


def test_the_smallest_buffer_that_fits_is_handed_out(pool: ScalePool) -> None:
    for rows in (40, 8, 24):
        pool.reserve(rows, K, SfLayout.layout_8x4, copies=1, experts=2)
    assert pool.stats().buffers == 1  # the first one serves the others
    with ScalePool("cpu") as ascending:
        for rows in (8, 24, 40):
            ascending.reserve(rows, K, SfLayout.layout_8x4, experts=2)
        assert ascending.stats().buffers == 3
        found = [ascending.spec(ascending.acquire_grouped(rows, K, 2, SfLayout.layout_8x4)) for rows in (7, 9, 25, 24)]
        assert [spec.rows for spec in found if spec] == [8, 24, 40, 24]


def test_buffers_differ_by_experts_k_and_layout(pool: ScalePool) -> None:
    for experts, k, layout in (
        (2, K, SfLayout.layout_8x4),
        (3, K, SfLayout.layout_8x4),
        (2, 96, SfLayout.layout_8x4),
        (2, K, SfLayout.layout_128x4),
    ):
        pool.reserve(12, k, layout, experts=experts)
    assert pool.stats().buffers == 4


def test_limits_of_the_pool_hold(pool: ScalePool) -> None:
    spec = ScaleSpec.grouped(12, K, SfLayout.layout_8x4, 2)
    with ScalePool("cpu", max_bytes=spec.nbytes) as small:
        held = small.acquire_grouped(12, K, 2, SfLayout.layout_8x4)
        with pytest.raises(PoolExhaustedError):
            small.acquire_grouped(12, K, 2, SfLayout.layout_8x4)
        del held
    with ScalePool("cpu", cache_bytes=0) as none:  # each is made for one call
        for seed in range(2):
            x = activation(12, seed=seed)
            _, scales = nvfp4_quantize_grouped(
                x, torch.ones(2), *offsets([3, 9], SfLayout.layout_8x4), layout=SfLayout.layout_8x4, pool=none
            )
            assert torch.equal(
                SfLayout.layout_8x4.logical(scales, scales.shape[0], K),
                expected(x, torch.ones(2), [3, 9], SfLayout.layout_8x4)[1],
            )
            assert none.verify() == 1
        assert none.stats().buffers == 0
    with pytest.raises(PoolClosedError):
        small.acquire_grouped(12, K, 2, SfLayout.layout_8x4)
    with pytest.raises(ValueError, match="no padded_k"):
        pool.reserve(12, K, SfLayout.layout_8x4, padded_k=96, experts=2)


def test_debug_verifies_at_each_acquire() -> None:
    with ScalePool("cpu", debug=True) as pool:
        scales = check_quantize(pool, [3, 9], SfLayout.layout_8x4)
        scales[-1] = 0x7F
        with pytest.raises(PaddingCorruptionError):
            pool.acquire_grouped(12, K, 2, SfLayout.layout_8x4)


def test_a_dense_gemm_refuses_grouped_scales(pool: ScalePool) -> None:
    x = activation(8)
    data, scales = nvfp4_quantize_grouped(x, torch.ones(1), *offsets([8], SfLayout.layout_128x4), pool=pool)
    b, b_scales = torch.zeros(16, K // 2, dtype=torch.uint8), torch.zeros(128, 8, dtype=torch.uint8)
    with pytest.raises(LayoutMismatchError, match="only a grouped GEMM reads"):
        mm_fp4(data, b.T, scales, b_scales.T, backend="reference")


def test_freshly_made_buffers_are_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the memory held: which bytes will be valid is not known."""
    aligned = buffer._aligned
    monkeypatch.setattr(buffer, "_aligned", lambda *given: aligned(*given).fill_(0x7F))
    with ScalePool("cpu", cache_bytes=0) as pool:
        assert not pool.acquire_grouped(12, K, 2, SfLayout.layout_8x4).any()
        pool.reserve(12, K, SfLayout.layout_8x4, experts=2)
        scales = pool.acquire_grouped(12, K, 2, SfLayout.layout_8x4)
        assert not scales.any()
        spec = pool.spec(scales)
        assert spec is not None
        record = spec.record_in(scales)
        assert record is not None
        assert record.tolist() == [0] * 12


# --- arguments ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"x": torch.zeros(12, K)}, "x must be torch.bfloat16 or torch.float16"),
        ({"x": torch.zeros(12, dtype=torch.bfloat16)}, "x must be \\[rows, k\\]"),
        ({"x": torch.zeros(0, K, dtype=torch.bfloat16)}, "at least 1 row"),
        ({"x": torch.zeros(12, 40, dtype=torch.bfloat16)}, "k a multiple of 16"),
        ({"x": torch.zeros(K, 12, dtype=torch.bfloat16).T}, "x must be contiguous"),
        ({"global_scales": torch.ones(1)}, "expert_offsets must have 2 elements, got 3"),
        ({"global_scales": torch.ones(0)}, "one element for each expert"),
        ({"global_scales": torch.ones(2, dtype=torch.float64)}, "global_scales must be torch.float32"),
        ({"global_scales": torch.ones(4)[::2]}, "global_scales must be contiguous"),
        ({"expert_offsets": torch.zeros(3, dtype=torch.int64)}, "expert_offsets must be torch.int32"),
        ({"blockscale_offsets": torch.zeros(4, dtype=torch.int32)}, "blockscale_offsets must have 3 elements"),
        ({"expert_offsets": [0, 3, 12]}, "expert_offsets must be a tensor"),
        ({"valid_rows": torch.ones(1)}, "valid_rows must be torch.int32"),
        ({"row_tokens": torch.zeros(12, dtype=torch.int32)}, "give valid_rows too"),
        (
            {"valid_rows": torch.ones(1, dtype=torch.int32), "row_tokens": torch.zeros(3, dtype=torch.int32)},
            "row_tokens must have 12 elements",
        ),
        ({"layout": 7}, "layout must be one of"),
        ({"backend": "flashinfer"}, "backend must be one of auto, triton, reference"),
        ({"pool": 3}, "expected a ScalePool"),
    ],
)
def test_wrong_arguments_are_refused(pool: ScalePool, change: dict[str, Any], error: str) -> None:
    expert_offsets, blockscale_offsets = offsets([3, 9], SfLayout.layout_8x4)
    given = {
        "x": activation(12),
        "global_scales": torch.ones(2),
        "expert_offsets": expert_offsets,
        "blockscale_offsets": blockscale_offsets,
        "layout": SfLayout.layout_8x4,
        "pool": pool,
    }
    with pytest.raises((ValueError, TypeError), match=error):
        nvfp4_quantize_grouped(**(given | change))
    assert pool.stats().buffers == 0


def test_silu_and_mul_needs_two_halves(pool: ScalePool) -> None:
    with pytest.raises(ValueError, match=r"2 \* k\] with at least 1 row and k a multiple of 16"):
        silu_and_mul_nvfp4_quantize_grouped(
            activation(12), torch.ones(2), *offsets([3, 9], SfLayout.layout_8x4), layout=SfLayout.layout_8x4, pool=pool
        )
    assert pool.stats().buffers == 0


def test_the_public_names() -> None:
    for name in ("nvfp4_quantize_grouped", "silu_and_mul_nvfp4_quantize_grouped", "clean_grouped_scales"):
        assert name in safealloc.__all__

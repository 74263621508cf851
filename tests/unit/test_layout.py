"""The layout arithmetic against the closed formulas, written out here a second time and never through the package."""

from __future__ import annotations

import enum
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from safealloc import ScaleSpec, SfLayout
from safealloc.formats.format import NAN_SCALE
from safealloc.formats.layout import checked_layout

ROWS = range(1, 141)
K = range(16, 161, 16)

layouts = pytest.mark.parametrize("layout", list(SfLayout), ids=lambda layout: layout.name)
sizes = {"rows": st.integers(1, 5000), "blocks": st.integers(1, 30000 // 16), "layout": st.sampled_from(list(SfLayout))}


def formula(layout: SfLayout, r: Any, c: Any, cols: int) -> Any:
    """Byte of scale (r, c) in a buffer of ``cols`` scale columns; integers or integer tensors."""
    column_tiles = (cols + 3) // 4
    if layout == 0:
        return ((r // 128) * column_tiles + c // 4) * 512 + (r % 32) * 16 + ((r % 128) // 32) * 4 + c % 4
    if layout == 1:
        return ((r // 8) * column_tiles + c // 4) * 32 + (r % 8) * 4 + c % 4
    return r * cols + c


def shape(layout: SfLayout, rows: int, cols: int) -> tuple[int, int]:
    if layout == 2:
        return rows, cols
    tile = 128 if layout == 0 else 8
    return (rows + tile - 1) // tile * tile, (cols + 3) // 4 * 4


def expected_offsets(layout: SfLayout, rows: int, cols: int, all_cols: int | None = None) -> Tensor:
    return formula(layout, torch.arange(rows)[:, None], torch.arange(cols)[None, :], all_cols or cols)


def expected_mask(layout: SfLayout, rows: int, cols: int, all_cols: int | None = None) -> Tensor:
    padded_rows, padded_cols = shape(layout, rows, all_cols or cols)
    mask = torch.ones(padded_rows * padded_cols, dtype=torch.bool)
    mask[expected_offsets(layout, rows, cols, all_cols).flatten()] = False
    return mask


def check_layout(layout: SfLayout, rows: int, k: int, padded_k: int | None = None) -> None:
    cols, all_cols = k // 16, (padded_k or k) // 16
    padded = shape(layout, rows, all_cols)
    assert layout.padded_shape(rows, k, padded_k=padded_k) == padded
    assert layout.nbytes(rows, k, padded_k=padded_k) == padded[0] * padded[1]
    offsets = layout.offsets(rows, k, padded_k=padded_k)
    assert offsets.dtype == torch.int64
    assert torch.equal(offsets, expected_offsets(layout, rows, cols, all_cols))
    mask = layout.padding_mask(rows, k, padded_k=padded_k)
    assert mask.dtype == torch.bool
    assert torch.equal(mask, expected_mask(layout, rows, cols, all_cols))


@layouts
@pytest.mark.parametrize("k", K)
def test_every_small_shape_follows_the_formula(layout: SfLayout, k: int) -> None:
    """Offsets, mask, shape, swizzle and unswizzle of 140 row counts each."""
    everything = torch.randint(1, 256, (max(ROWS), k // 16), dtype=torch.uint8)  # no zero: padding shows
    for rows in ROWS:
        check_layout(layout, rows, k)
        linear = everything[:rows]
        buffer = layout.swizzle(linear)
        assert buffer.shape == shape(layout, rows, k // 16)
        assert buffer.is_contiguous()
        flat = torch.zeros(buffer.numel(), dtype=torch.uint8)
        flat[expected_offsets(layout, rows, k // 16)] = linear
        assert torch.equal(buffer.view(-1), flat)
        assert torch.equal(layout.unswizzle(buffer, rows, k), linear)


@layouts
@pytest.mark.parametrize("rows", [1, 7, 8, 9, 128, 129])
def test_every_padded_k_follows_the_formula(layout: SfLayout, rows: int) -> None:
    """Columns between k and padded_k are padding, whole tiles of them included."""
    for k in K:
        for padded_k in range(k, 177, 16):
            check_layout(layout, rows, k, padded_k)
            real = torch.randint(1, 256, (rows, k // 16), dtype=torch.uint8)
            buffer = torch.full(shape(layout, rows, padded_k // 16), 0x7F, dtype=torch.uint8)
            buffer.view(-1)[expected_offsets(layout, rows, k // 16, padded_k // 16)] = real
            assert torch.equal(layout.unswizzle(buffer, rows, k, padded_k=padded_k), real)


@layouts
@pytest.mark.parametrize("rows", [1, 5, 8, 31, 32, 33, 63, 65, 96, 97, 127, 128, 129, 140])
def test_padding_views_are_exactly_the_padding(layout: SfLayout, rows: int) -> None:
    for k in K:
        for padded_k in (None, k + 16, k + 64, k + 80):
            cols, all_cols = k // 16, (padded_k or k) // 16
            buffer = torch.zeros(shape(layout, rows, all_cols), dtype=torch.uint8)
            views = layout.padding_views(buffer, rows, k, padded_k=padded_k)
            assert len(views) <= 4
            for view in views:
                assert view.numel() > 0
                assert view.untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr()
                view.fill_(1)
            assert torch.equal(buffer.view(-1).bool(), expected_mask(layout, rows, cols, all_cols))


def test_padding_views_of_a_full_tile_are_none() -> None:
    assert SfLayout.layout_128x4.padding_views(torch.zeros(256, 8), 256, 128) == []
    assert SfLayout.layout_8x4.padding_views(torch.zeros(16, 8), 16, 128) == []
    assert SfLayout.layout_linear.padding_views(torch.zeros(3, 5), 3, 80) == []


@pytest.mark.slow
@given(**sizes, extra=st.integers(0, 9), data=st.data())
@example(rows=5000, blocks=1875, layout=SfLayout.layout_128x4, extra=0, data=None)
@settings(max_examples=150, deadline=None)
def test_large_shapes_at_spots(rows: int, blocks: int, layout: SfLayout, extra: int, data: Any) -> None:
    """A buffer in which only some chosen scales are set, where the formula says they lie."""
    k, all_cols = 16 * blocks, blocks + extra
    padded_k = k + 16 * extra if extra else None
    padded = shape(layout, rows, all_cols)
    assert layout.padded_shape(rows, k, padded_k=padded_k) == padded
    spots = {(0, 0), (rows - 1, blocks - 1), (rows - 1, 0), (0, blocks - 1), (rows // 2, blocks // 2)}
    if data is not None:
        spots |= data.draw(st.sets(st.tuples(st.integers(0, rows - 1), st.integers(0, blocks - 1)), max_size=10))
    buffer = torch.zeros(padded[0] * padded[1], dtype=torch.uint8)
    for row, column in spots:
        buffer[formula(layout, row, column, all_cols)] = 1
    rows_set, columns_set = layout.unswizzle(buffer, rows, k, padded_k=padded_k).nonzero(as_tuple=True)
    assert set(zip(rows_set.tolist(), columns_set.tolist(), strict=True)) == spots


@pytest.mark.slow
@given(**sizes)
@settings(max_examples=60, deadline=None)
def test_large_shapes_pad_and_round_trip(rows: int, blocks: int, layout: SfLayout) -> None:
    linear = torch.full((rows, blocks), 7, dtype=torch.uint8)
    linear[-1, -1] = 9
    buffer = layout.swizzle(linear)
    assert buffer.shape == shape(layout, rows, blocks)
    assert int(buffer.count_nonzero()) == rows * blocks
    assert int(buffer.view(-1)[formula(layout, rows - 1, blocks - 1, blocks)]) == 9
    assert torch.equal(layout.unswizzle(buffer, rows, 16 * blocks), linear)
    for padding in layout.padding_views(buffer, rows, 16 * blocks):
        padding.fill_(1)
    assert int(buffer.count_nonzero()) == buffer.numel()


@layouts
def test_dtype_views_and_flat_buffers_are_accepted(layout: SfLayout) -> None:
    linear = torch.randint(0, 0x7F, (9, 5), dtype=torch.uint8)
    buffer = layout.swizzle(linear.view(torch.float8_e4m3fn))
    assert buffer.dtype == torch.uint8
    assert torch.equal(buffer, layout.swizzle(linear))
    for same in (buffer.view(-1), buffer.view(torch.float8_e4m3fn), buffer.view(1, -1)):
        assert torch.equal(layout.unswizzle(same, 9, 80), linear)


def test_a_transposed_matrix_can_be_swizzled() -> None:
    """Only a buffer has to be contiguous: its bytes are the layout."""
    linear = torch.arange(40, dtype=torch.uint8).view(5, 8).T
    assert torch.equal(SfLayout.layout_8x4.swizzle(linear), SfLayout.layout_8x4.swizzle(linear.contiguous()))


def test_names_and_values_are_flashinfers() -> None:
    assert {layout.name: layout.value for layout in SfLayout} == {
        "layout_128x4": 0,
        "layout_8x4": 1,
        "layout_linear": 2,
    }


def test_vllm_issue_37563_is_reproduced() -> None:
    """Rows that read a poisoned padding byte when a 128x4 buffer of 128 rows is read as 8x4: the published counts."""
    for m, published in ((1, 1), (2, 2), (4, 4), (8, 8), (16, 14), (32, 24)):
        padding = torch.ones(128 * 32, dtype=torch.bool)
        padding[SfLayout.layout_128x4.offsets(128, 512)[:m].flatten()] = False
        assert int(padding[SfLayout.layout_8x4.offsets(128, 512)[:m]].any(1).sum()) == published


# --- bad input --------------------------------------------------------------------------------------------------------


class FlashInferLayout(enum.Enum):
    """Stands for the vendor's enum, which is not an SfLayout."""

    layout_128x4 = 0
    layout_8x4 = 1
    other = 7
    text = "layout_8x4"


def test_another_enum_is_taken_by_value() -> None:
    assert checked_layout(FlashInferLayout.layout_8x4) is SfLayout.layout_8x4  # type: ignore[arg-type]
    assert checked_layout(0) is SfLayout.layout_128x4
    assert ScaleSpec.checked(1, 16, FlashInferLayout.layout_128x4).layout is SfLayout.layout_128x4  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("layout", "error"),
    [
        (3, ValueError),
        (-1, ValueError),
        (FlashInferLayout.other, ValueError),
        (FlashInferLayout.text, TypeError),
        ("layout_8x4", TypeError),
        (None, TypeError),
        (True, TypeError),
        (1.0, TypeError),
    ],
)
def test_an_unknown_layout_is_refused(layout: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="layout must be"):
        checked_layout(layout)
    with pytest.raises(error, match="layout must be"):
        ScaleSpec.checked(1, 16, layout)


BAD_SHAPES = [
    ((0, 64), ValueError, "rows must be at least 1, got 0"),
    ((-1, 64), ValueError, "rows must be at least 1, got -1"),
    ((4, 0), ValueError, "multiple of 16, got 0"),
    ((4, -16), ValueError, "multiple of 16, got -16"),
    ((4, 8), ValueError, "multiple of 16, got 8"),
    ((4, 72), ValueError, "multiple of 16, got 72"),
    ((True, 64), TypeError, "rows must be an integer"),
    ((4, True), TypeError, "k must be an integer"),
    ((4.0, 64), TypeError, "rows must be an integer"),
    ((4, 64.0), TypeError, "k must be an integer"),
    (("4", 64), TypeError, "rows must be an integer"),
    ((4, None), TypeError, "k must be an integer"),
    ((2**40, 16), ValueError, "rows=1099511627776 with k=16 need 1099511627776 scale bytes"),
    ((2**60, 64), ValueError, "rows=1152921504606846976 with k=64 need"),
    ((1, 2**44), ValueError, "rows=1 with k=17592186044416 need"),
]
BAD_PADDED_K = [(48, ValueError), (65, ValueError), (72, ValueError), (64.0, TypeError), (True, TypeError)]


@layouts
@pytest.mark.parametrize(("arguments", "error", "message"), BAD_SHAPES)
def test_wrong_shapes_are_refused(
    layout: SfLayout, arguments: tuple[Any, Any], error: type[Exception], message: str
) -> None:
    buffer = torch.zeros(512, dtype=torch.uint8)
    for function in (layout.padded_shape, layout.nbytes, layout.offsets, layout.padding_mask):
        with pytest.raises(error, match=message):
            function(*arguments)
    for with_buffer in (layout.unswizzle, layout.logical, layout.padding_views):
        with pytest.raises(error, match=message):
            with_buffer(buffer, *arguments)
    with pytest.raises(error, match=message):
        ScaleSpec.checked(*arguments, layout)


@layouts
@pytest.mark.parametrize(("padded_k", "error"), BAD_PADDED_K)
def test_a_wrong_padded_k_is_refused(layout: SfLayout, padded_k: Any, error: type[Exception]) -> None:
    for function in (layout.padded_shape, layout.nbytes, layout.offsets, layout.padding_mask):
        with pytest.raises(error, match="padded_k must be"):
            function(4, 64, padded_k=padded_k)
    with pytest.raises(error, match="padded_k must be"):
        ScaleSpec.checked(4, 64, layout, padded_k)


def test_a_matrix_that_no_device_holds_is_refused() -> None:
    assert SfLayout.layout_linear.padded_shape(2**40 - 1, 16) == (2**40 - 1, 1)
    assert SfLayout.layout_128x4.padded_shape(2**20, 2**23) == (2**20, 2**19)
    with pytest.raises(ValueError, match="rows=1048576 with padded_k=16777216 need"):
        ScaleSpec.checked(2**20, 2**23, SfLayout.layout_128x4, 2**24)
    with pytest.raises(ValueError, match="no device holds 1 TiB of them"):
        ScaleSpec.grouped(2**40, 64, SfLayout.layout_128x4, 2)


@pytest.mark.parametrize("nbytes", [1, 511, 513, 1024])
def test_a_buffer_of_another_size_is_refused(nbytes: int) -> None:
    buffer = torch.zeros(nbytes, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"layout_128x4 buffer for rows=4, k=64 is 512 contiguous bytes"):
        SfLayout.layout_128x4.unswizzle(buffer, 4, 64)
    with pytest.raises((ValueError, RuntimeError)):
        SfLayout.layout_128x4.padding_views(buffer, 4, 64)


def test_wrong_tensors_are_refused() -> None:
    layout = SfLayout.layout_8x4
    with pytest.raises(ValueError, match="contiguous"):
        layout.unswizzle(torch.zeros(4, 8, dtype=torch.uint8).T, 8, 64)
    with pytest.raises(ValueError, match="contiguous"):
        layout.unswizzle(torch.zeros(8, 8, dtype=torch.uint8)[:, ::2], 8, 64)
    with pytest.raises(ValueError, match="must hold bytes"):
        layout.unswizzle(torch.zeros(8, 4), 8, 64)
    with pytest.raises(ValueError, match="must hold bytes"):
        layout.swizzle(torch.zeros(8, 4, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"linear must be \[rows, cols\]"):
        layout.swizzle(torch.zeros(8, dtype=torch.uint8))
    with pytest.raises(TypeError, match="linear must be a tensor"):
        layout.swizzle([[1, 2]])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="buffer must be a tensor"):
        layout.unswizzle(None, 8, 64)  # type: ignore[arg-type]
    for empty in ((0, 4), (4, 0)):
        with pytest.raises(ValueError, match=r"at least 1|positive multiple"):
            layout.swizzle(torch.zeros(empty, dtype=torch.uint8))


# --- ScaleSpec --------------------------------------------------------------------------------------------------------


def test_spec_is_a_value() -> None:
    spec = ScaleSpec.checked(5, 64, 1, 128)
    assert spec == ScaleSpec(5, 64, SfLayout.layout_8x4, 128)
    assert spec.padded_shape == (8, 8)
    assert spec.nbytes == 64
    assert str(spec) == "rows=5, k=64, layout_8x4, padded_k=128"
    assert ScaleSpec.checked(5, 64, 0, 64) == ScaleSpec.checked(5, 64, 0) == ScaleSpec(5, 64, SfLayout.layout_128x4)
    assert str(ScaleSpec.checked(5, 64, 0)) == "rows=5, k=64, layout_128x4"
    buffer = torch.zeros(8, 8, dtype=torch.uint8)
    for padding in spec.padding_views(buffer):
        padding.fill_(1)
    assert torch.equal(buffer.view(-1).bool(), expected_mask(SfLayout.layout_8x4, 5, 4, 8))


@layouts
@pytest.mark.parametrize(
    ("rows", "k", "padded_k"), [(1, 16, None), (9, 80, None), (9, 80, 192), (128, 64, None), (130, 48, 64)]
)
def test_zero_padding_zeroes_the_padding_only(layout: SfLayout, rows: int, k: int, padded_k: int | None) -> None:
    buffer = torch.full(layout.padded_shape(rows, k, padded_k=padded_k), NAN_SCALE, dtype=torch.uint8)
    ScaleSpec(rows, k, layout, padded_k).zero_padding(buffer)
    expected = torch.where(expected_mask(layout, rows, k // 16, (padded_k or k) // 16), 0, NAN_SCALE)
    assert torch.equal(buffer.view(-1), expected.to(torch.uint8))


@layouts
def test_zero_padding_keeps_the_rows_that_the_record_names(layout: SfLayout) -> None:
    """Numbers that name no row of the buffer are not followed."""
    spec = ScaleSpec.grouped(6, 80, layout, 2)
    memory = torch.full((spec.nbytes,), NAN_SCALE, dtype=torch.uint8)
    scales = spec.scales_in(memory)
    record = spec.record_in(scales)
    assert record is not None
    record.copy_(torch.tensor([1, 3, -1, 0, spec.stored_rows + 1, 3], dtype=torch.int32))
    spec.zero_padding(scales)
    assert spec.valid_rows_in(record).nonzero().flatten().tolist() == [0, 2]
    valid = layout.logical(scales, spec.stored_rows, 80) == NAN_SCALE
    assert valid.nonzero().tolist() == [[row, col] for row in (0, 2) for col in range(5)]
    assert int(scales.count_nonzero()) == 10


def test_integers_of_other_libraries_are_accepted() -> None:
    class Index:
        def __index__(self) -> int:
            return 16

    assert SfLayout.layout_8x4.padded_shape(Index(), Index()) == (16, 4)  # type: ignore[arg-type]

"""Formats: block sizes, padding and NaN of each, in layouts, pools and checks."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from safealloc import LayoutMismatchError, PaddingCorruptionError, ScaleFormat, ScalePool, ScaleSpec, SfLayout, mm_fp4
from safealloc.ops.quantize import nvfp4_quantize

formats = pytest.mark.parametrize("format", list(ScaleFormat), ids=lambda format: format.name)
layouts = pytest.mark.parametrize("layout", list(SfLayout), ids=lambda layout: layout.name)
MX = (ScaleFormat.mxfp8, ScaleFormat.mxfp4)


@pytest.fixture
def pool() -> Iterator[ScalePool]:
    with ScalePool("cpu") as pool:
        yield pool


@formats
def test_the_nan_bytes_are_those_that_torch_reads_as_nan(format: ScaleFormat) -> None:
    values = torch.arange(256, dtype=torch.uint8).view(format.dtype).float()
    assert tuple(values.isnan().nonzero().view(-1).tolist()) == format.nan_bytes


def test_formats_are_three_and_survive_a_pickle() -> None:
    assert [format.name for format in ScaleFormat] == ["nvfp4", "mxfp8", "mxfp4"]
    assert [format.block_size for format in ScaleFormat] == [16, 32, 32]
    for format in ScaleFormat:
        assert pickle.loads(pickle.dumps(format)) is format


@formats
@layouts
@pytest.mark.parametrize("rows", [1, 9, 130])
@pytest.mark.parametrize("cols", [1, 4, 90])
def test_every_method_counts_scale_columns_of_the_format(
    format: ScaleFormat, layout: SfLayout, rows: int, cols: int
) -> None:
    """Against NVFP4 with as many scale columns, whose layout other tests compare with the published formulas."""
    k, nvfp4_k = cols * format.block_size, cols * 16
    padded = {"padded_k": (cols + 5) * format.block_size, "format": format}, {"padded_k": (cols + 5) * 16}
    for named, expected in (({"format": format}, {}), padded):
        assert layout.padded_shape(rows, k, **named) == layout.padded_shape(rows, nvfp4_k, **expected)
        assert layout.nbytes(rows, k, **named) == layout.nbytes(rows, nvfp4_k, **expected)
        assert torch.equal(layout.offsets(rows, k, **named), layout.offsets(rows, nvfp4_k, **expected))
        assert torch.equal(layout.padding_mask(rows, k, **named), layout.padding_mask(rows, nvfp4_k, **expected))
    linear = torch.randint(1, 256, (rows, cols), dtype=torch.uint8)
    buffer = layout.swizzle(linear.view(format.dtype), format=format)
    assert torch.equal(buffer, layout.swizzle(linear))
    assert torch.equal(layout.unswizzle(buffer, rows, k, format=format), linear)


def test_k_of_gpt_oss_has_two_padding_columns() -> None:
    assert SfLayout.layout_128x4.padded_shape(1, 2880, format=ScaleFormat.mxfp4) == (128, 92)
    assert SfLayout.layout_128x4.padded_shape(1, 2880) == (128, 180)


@pytest.mark.parametrize("format", MX, ids=lambda format: format.name)
def test_k_must_be_a_multiple_of_the_block_size(pool: ScalePool, format: ScaleFormat) -> None:
    with pytest.raises(ValueError, match="k must be a positive multiple of 32, got 48"):
        pool.acquire(1, 48, SfLayout.layout_128x4, format=format)
    with pytest.raises(ValueError, match="padded_k must be a multiple of 32 and at least k=64, got 80"):
        pool.acquire(1, 64, SfLayout.layout_128x4, padded_k=80, format=format)


@pytest.mark.parametrize("format", ["mxfp8", torch.float8_e8m0fnu, None, 1], ids=str)
def test_a_format_that_is_none_is_a_type_error(pool: ScalePool, format: Any) -> None:
    calls = (
        lambda: pool.acquire(1, 64, SfLayout.layout_128x4, format=format),
        lambda: pool.acquire_grouped(1, 64, 2, format=format),
        lambda: pool.reserve(1, 64, format=format),
        lambda: SfLayout.layout_8x4.offsets(1, 64, format=format),
    )
    for call in calls:
        with pytest.raises(TypeError, match="format must be a ScaleFormat, got"):
            call()


@layouts
def test_shapes_of_equal_bytes_in_two_formats_never_share_a_buffer(pool: ScalePool, layout: SfLayout) -> None:
    specs = [ScaleSpec(9, 128, layout)]
    specs += [ScaleSpec(9, 256, layout, format=format) for format in MX]
    assert len({spec.nbytes for spec in specs}) == 1
    addresses = set()
    for spec in specs * 3:  # the first round makes them, the others are hits
        buffer = pool.acquire(spec.rows, spec.k, spec.layout, format=spec.format)
        assert pool.spec(buffer) == spec
        addresses.add(buffer.data_ptr())
        del buffer
    assert len(addresses) == len(specs)
    assert pool.stats().misses == len(specs)
    assert [pool.held(9, 256, layout, format=format) for format in MX] == [0, 0]


@formats
def test_reserved_buffers_serve_their_format_alone(pool: ScalePool, format: ScaleFormat) -> None:
    pool.reserve(5, [64, 128], SfLayout.layout_8x4, format=format)
    held = [pool.acquire(5, k, SfLayout.layout_8x4, format=format) for k in (64, 128)]
    assert pool.stats().misses == 0
    others = [other for other in ScaleFormat if other is not format]
    held += [pool.acquire(5, 64, SfLayout.layout_8x4, format=other) for other in others]
    assert pool.stats().misses == len(others)
    assert pool.held(5, 64, SfLayout.layout_8x4, format=format) == 1


def test_the_reserve_call_in_a_message_names_the_format() -> None:
    layout = SfLayout.layout_8x4
    spec = ScaleSpec(5, 64, layout, 128, ScaleFormat.mxfp4)
    assert spec.reserve_call == "reserve(5, 64, SfLayout.layout_8x4, padded_k=128, format=ScaleFormat.mxfp4)"
    assert str(spec) == "rows=5, k=64, layout_8x4, padded_k=128, mxfp4"
    assert ScaleSpec(5, 64, layout).reserve_call == "reserve(5, 64, SfLayout.layout_8x4)"


@formats
@layouts
def test_poison_is_nan_of_the_format_and_padding_is_zero(format: ScaleFormat, layout: SfLayout) -> None:
    with ScalePool("cpu", poison=True) as pool:
        scales = pool.acquire(5, 96, layout, padded_k=256, format=format)
        assert bool(
            layout.unswizzle(scales, 5, 96, padded_k=256, format=format).view(format.dtype).float().isnan().all()
        )
        padding = layout.padding_mask(5, 96, padded_k=256, format=format).view(scales.shape)
        assert bool((scales[padding] == 0).all())
        assert pool.verify() == 1


@formats
@layouts
def test_verify_finds_names_and_repairs_a_byte_beside_the_valid_columns(
    pool: ScalePool, format: ScaleFormat, layout: SfLayout
) -> None:
    cols = 90  # of 92 in tiles, 95 with the padded k
    scales = pool.acquire(1, cols * format.block_size, layout, padded_k=(cols + 5) * format.block_size, format=format)
    valid = layout.offsets(1, (cols + 5) * format.block_size, format=format)[0]
    scales.view(-1)[valid[:cols]] = format.nan_bytes[0]
    assert pool.verify() == 1
    scales.view(-1)[valid[cols]] = 0xFF
    with pytest.raises(PaddingCorruptionError, match=f"first 0xFF at scale row 0, column {cols}"):
        pool.verify()
    pool.verify(repair=True)
    assert bool((scales.view(-1)[valid[:cols]] == format.nan_bytes[0]).all()), "valid scales must stay"
    assert pool.verify() == 1


@formats
def test_the_guard_finds_a_dirty_byte_in_each_format(format: ScaleFormat) -> None:
    with ScalePool("cpu", verify_every=1) as pool:
        scales = pool.acquire(1, 2880, SfLayout.layout_128x4, format=format)
        first_padding = SfLayout.layout_128x4.padding_mask(1, 2880, format=format).nonzero()[0]
        scales.view(-1)[first_padding] = 1
        del scales
        with pytest.raises(PaddingCorruptionError, match="1 padding bytes are not zero"):
            pool.acquire(1, 2880, SfLayout.layout_128x4, format=format)
            pool.safe_point()


@formats
def test_grouped_buffers_are_of_one_format(pool: ScalePool, format: ScaleFormat) -> None:
    scales = pool.acquire_grouped(9, 96, 4, format=format)
    assert scales.shape[1] == SfLayout.layout_128x4.padded_shape(1, 96, format=format)[1]
    spec = pool.spec(scales)
    assert spec == ScaleSpec.grouped(9, 96, SfLayout.layout_128x4, 4, format)
    del scales
    other = ScaleFormat.mxfp4 if format is not ScaleFormat.mxfp4 else ScaleFormat.mxfp8
    pool.acquire_grouped(9, 96, 4, format=other)
    assert pool.stats().misses == 2
    pool.acquire_grouped(5, 96, 4, format=format)
    assert pool.stats().misses == 2


@formats
def test_traced_code_acquires_each_format(pool: ScalePool, format: ScaleFormat) -> None:
    from safealloc import use_pool

    with use_pool(pool):
        scales = torch.ops.safealloc.acquire(9, 96, 1, torch.device("cpu"), None, format.name)
    assert pool.spec(scales) == ScaleSpec(9, 96, SfLayout.layout_8x4, format=format)
    arguments = (9, 96, 1, torch.device("cpu"), 160, format.name)
    with use_pool(pool):
        torch.library.opcheck(
            torch.ops.safealloc.acquire.default, arguments, test_utils=("test_schema", "test_faketensor")
        )


@pytest.mark.parametrize("which", ["a_descale", "b_descale"])
@pytest.mark.parametrize("format", MX, ids=lambda format: format.name)
def test_an_nvfp4_gemm_refuses_mx_scales_of_equal_bytes(pool: ScalePool, format: ScaleFormat, which: str) -> None:
    m, k, layout = 9, 160, SfLayout.layout_128x4
    x = torch.randn(m, k).bfloat16()
    a, scales = nvfp4_quantize(x, torch.ones(1), pool=pool, backend="reference")
    operands: dict[str, Tensor] = {"a": a, "b": a.T, "a_descale": scales, "b_descale": scales.clone().T}
    mm_fp4(**operands, backend="reference")
    mx = pool.acquire(m, 2 * k, layout, format=format)
    assert mx.shape == scales.shape
    operands[which] = mx if which == "a_descale" else mx.T
    message = f"{which}.* holds {format.name.upper()} scales .* reads it as NVFP4 scales"
    with pytest.raises(LayoutMismatchError, match=message):
        mm_fp4(**operands, backend="reference")

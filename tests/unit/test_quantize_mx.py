"""``mxfp8_quantize`` and ``mxfp4_quantize``: arithmetic against PyTorch's own, pools, layouts, bad input, compilers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support.pytorch_mx import to_mxfp
from torch import Tensor

from safealloc import (
    ScaleFormat,
    ScalePool,
    ScaleSpec,
    SfLayout,
    default_pool,
    mm_fp4,
    mxfp4_quantize,
    mxfp8_quantize,
    use_pool,
)
from safealloc.kernels import reference, reference_mx

QUANTIZE: dict[ScaleFormat, Callable[..., tuple[Tensor, Tensor]]] = {
    ScaleFormat.mxfp8: mxfp8_quantize,
    ScaleFormat.mxfp4: mxfp4_quantize,
}
formats = pytest.mark.parametrize("format", list(QUANTIZE), ids=lambda format: format.name)
layouts = pytest.mark.parametrize("layout", list(SfLayout), ids=lambda layout: layout.name)
INF, NAN = float("inf"), float("nan")


@pytest.fixture
def pool() -> Iterator[ScalePool]:
    with ScalePool("cpu") as pool:
        yield pool


def block(*values: float, rest: float = 0.0) -> Tensor:
    """One row of one block, bfloat16."""
    x = torch.full((1, 32), rest, dtype=torch.float32)
    x[0, : len(values)] = torch.tensor(values)
    return x.to(torch.bfloat16)


def decoded(codes: Tensor, format: ScaleFormat) -> Tensor:
    """Data, without the scales, as float32."""
    return codes.view(torch.float8_e4m3fn).float() if format is ScaleFormat.mxfp8 else reference.decode_e2m1(codes)


# --- arithmetic --------------------------------------------------------------------------------------------------------


@formats
@pytest.mark.parametrize("seed", range(8))
def test_normal_values_are_quantized_as_pytorch_does(format: ScaleFormat, seed: int) -> None:
    """Every normal bfloat16, in random company of its magnitude, where the scale byte is a normal one.

    PyTorch counts subnormal values, which FlashInfer's arithmetic flushes to zero.
    """
    values = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    values = values[values.isfinite() & (values.abs() >= torch.finfo(torch.bfloat16).tiny)]
    values = values[values.abs().float().sort().indices]
    neighbors = torch.randint(-600, 601, values.shape, generator=torch.Generator().manual_seed(seed))
    order = (torch.arange(len(values)) + neighbors).sort().indices
    x = values[order][: len(values) // 1024 * 1024].view(-1, 1024)
    scales, data = to_mxfp(x, format.name)
    codes, linear = reference_mx.encode(x, format)
    normal = (linear > 0) & (linear < 254)
    assert int(normal.sum()) > 0.9 * normal.numel()
    assert torch.equal(linear[normal], scales[normal])
    blocks = (*linear.shape, -1)
    assert torch.equal(codes.view(blocks)[normal], data.view(blocks)[normal])


@formats
@pytest.mark.parametrize("power", [-117, -60, -1, 0, 1, 60, 117])
def test_a_scale_is_the_next_power_of_two_and_exact_powers_stay(format: ScaleFormat, power: int) -> None:
    largest = reference_mx.LARGEST[format]
    x = torch.cat((block(largest), block(-largest), block(largest * (1 + 2**-6)), block(largest * (1 - 2**-6))))
    _, linear = reference_mx.encode(x * 2.0**power, format)
    assert (linear.view(-1).int() - 127 - power).tolist() == [0, 0, 1, 0]


@formats
@pytest.mark.parametrize(
    ("x", "scale"),
    [
        pytest.param(block(rest=NAN), 0xFF, id="all NaN"),
        pytest.param(block(INF, -INF, 1.0, NAN, -1.0), 0xFE, id="Inf"),
        pytest.param(block(0.0, -0.0), 0, id="zeros"),
        pytest.param(block(2.0**-130, -(2.0**-130)), 0, id="subnormal"),
        pytest.param(block(2.0**-126, 2.0**-130, -(2.0**-130)), 0, id="a scale below the normal ones"),
        pytest.param(block(NAN, 2.0**-118, 2.0**-130, -(2.0**-130)), None, id="NaN beside the smallest scale"),
        pytest.param(block(2.0**-117, 1.5 * 2.0**-127, -(2.0**-127)), None, id="subnormal beside normal"),
        pytest.param(block(NAN, 1.0, -1.0, -NAN), None, id="NaN"),
    ],
)
def test_what_is_not_finite_or_too_small(format: ScaleFormat, x: Tensor, scale: int | None) -> None:
    """By the rules that FlashInfer's source gives, applied one value at a time."""
    codes, linear = reference_mx.encode(x, format)
    values = decoded(codes, format)[0]
    byte = int(linear)
    assert scale is None or byte == scale
    largest = reference_mx.LARGEST[format]
    vanishes = byte in (0, 0xFE, 0xFF)
    for value, got in zip(x[0].tolist(), values.tolist(), strict=True):
        if value != value or value in (INF, -INF):
            assert got == largest
        elif vanishes or abs(value) < 2.0**-126:
            assert got == 0
        else:
            assert got == pytest.approx(value / 2.0 ** (byte - 127), rel=0.26)
    signs = (
        codes.view(-1) >> 7 if format is ScaleFormat.mxfp8 else torch.stack((codes >> 3 & 1, codes >> 7), -1).view(-1)
    )
    negative = x.signbit()[0] & x.isfinite()[0]
    assert torch.equal(signs.bool(), negative), "zeros keep their sign, and what was NaN or Inf has none"


@formats
def test_dequantized_values_are_near_the_input(format: ScaleFormat) -> None:
    x = torch.randn(40, 256).bfloat16() * torch.exp2(torch.randint(-90, 90, (40, 1)).float())
    codes, linear = reference_mx.encode(x.bfloat16(), format)
    data = decoded(codes, format)
    scale = linear.view(torch.float8_e8m0fnu).float().repeat_interleave(32, 1)
    largest = x.float().view(40, -1, 32).abs().amax(-1).repeat_interleave(32, 1)
    step = {ScaleFormat.mxfp8: 2**-4, ScaleFormat.mxfp4: 2**-2}[format]
    assert bool(((data * scale - x.bfloat16().float()).abs() <= step * largest).all())


# --- in a pool ---------------------------------------------------------------------------------------------------------


@formats
@layouts
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("shape", [(1, 32), (7, 160), (8, 128), (33, 352), (130, 2880)], ids=str)
def test_valid_scales_lie_where_the_layout_says_and_padding_is_zero(
    pool: ScalePool, format: ScaleFormat, layout: SfLayout, dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    x = torch.randn(shape).to(dtype)
    data, scales = QUANTIZE[format](x, layout=layout, pool=pool)
    codes, linear = reference_mx.encode(x, format)
    assert data.dtype is (torch.float8_e4m3fn if format is ScaleFormat.mxfp8 else torch.uint8)
    assert torch.equal(data.view(torch.uint8), codes)
    assert torch.equal(scales, layout.swizzle(linear))
    assert pool.spec(scales) == ScaleSpec(*shape, layout, format=format)
    assert pool.verify() == 1


@formats
def test_only_valid_scales_are_written(format: ScaleFormat) -> None:
    """A buffer whose padding somebody has written: the quantizer leaves it as it is, for the pool to find."""
    layout = SfLayout.layout_128x4
    scales = torch.full(layout.padded_shape(9, 2880, padded_k=3072, format=format), 0xAA, dtype=torch.uint8)
    data = torch.empty(format.data_shape(9, 2880), dtype=torch.uint8)
    reference_mx.quantize(torch.ones(9, 2880).bfloat16(), data, scales, layout, format)
    padding = layout.padding_mask(9, 2880, padded_k=3072, format=format).view(scales.shape)
    assert bool((scales[padding] == 0xAA).all())
    assert not bool((scales[~padding] == 0xAA).any())


@formats
def test_the_buffer_is_reused_once_it_is_dropped(pool: ScalePool, format: ScaleFormat) -> None:
    x = torch.randn(5, 96).bfloat16()
    address = QUANTIZE[format](x, pool=pool)[1].data_ptr()
    assert QUANTIZE[format](-x, pool=pool)[1].data_ptr() == address
    assert pool.stats().misses == 1


@formats
@layouts
@pytest.mark.parametrize("valid", [-1, 0, 1, 4, 5, 6])
def test_rows_beyond_valid_rows_are_zero(pool: ScalePool, format: ScaleFormat, layout: SfLayout, valid: int) -> None:
    x = torch.randn(5, 96).bfloat16()
    x[max(valid, 0) :] = NAN
    count = torch.tensor([valid], dtype=torch.int32)
    data, scales = QUANTIZE[format](x, layout=layout, pool=pool, valid_rows=count)
    codes, linear = reference_mx.encode(torch.where(x.isnan(), 0, x), format)
    assert torch.equal(data.view(torch.uint8), codes)
    assert torch.equal(scales, layout.swizzle(linear))


@formats
def test_without_a_pool_the_default_one_is_used(pool: ScalePool, format: ScaleFormat) -> None:
    with use_pool(pool):
        _, scales = QUANTIZE[format](torch.ones(3, 64).bfloat16())
        assert default_pool("cpu").spec(scales) == ScaleSpec(3, 64, SfLayout.layout_128x4, format=format)


BAD: list[tuple[str, Any, type[Exception], str]] = [
    ("not a tensor", 1.0, TypeError, "x must be a tensor"),
    ("float32", torch.ones(1, 32), TypeError, "x must be torch.bfloat16 or torch.float16, got torch.float32"),
    ("one dimension", torch.ones(32).bfloat16(), ValueError, r"x must be \[rows, k\]"),
    ("k of 48", torch.ones(1, 48).bfloat16(), ValueError, r"k a multiple of 32, got shape \(1, 48\)"),
    ("k of 0", torch.ones(1, 0).bfloat16(), ValueError, r"k a multiple of 32, got shape \(1, 0\)"),
    ("no rows", torch.ones(0, 32).bfloat16(), ValueError, "at least 1 row"),
    ("strided", torch.ones(32, 64).bfloat16().T, ValueError, "x must be contiguous"),
]


@formats
@pytest.mark.parametrize(("x", "error", "message"), [pytest.param(*case[1:], id=case[0]) for case in BAD])
def test_wrong_input_is_refused(
    pool: ScalePool, format: ScaleFormat, x: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        QUANTIZE[format](x, pool=pool)
    assert pool.stats().misses == 0


@formats
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"valid_rows": torch.ones(1)}, TypeError, "valid_rows must be torch.int32"),
        ({"valid_rows": torch.ones(2, dtype=torch.int32)}, ValueError, "valid_rows must have one element"),
        ({"layout": 3}, ValueError, "layout must be one of"),
        ({"backend": "flashinfer"}, ValueError, "backend must be one of auto, triton, reference"),
        ({"pool": 1}, TypeError, "expected a ScalePool"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_options_are_refused(
    pool: ScalePool, format: ScaleFormat, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        QUANTIZE[format](torch.ones(1, 32).bfloat16(), **{"pool": pool, **options})
    assert pool.stats().misses == 0


@pytest.mark.parametrize("format", list(QUANTIZE), ids=lambda format: format.name)
def test_mm_fp4_reads_no_mx_scales_as_nvfp4(pool: ScalePool, format: ScaleFormat) -> None:
    _, scales = QUANTIZE[format](torch.randn(9, 320).bfloat16(), pool=pool)
    fp4 = torch.zeros(9, 80, dtype=torch.uint8)  # NVFP4 of 160 columns has as many scales
    with pytest.raises(ValueError, match=f"holds {format.name.upper()} scales"):
        mm_fp4(fp4, fp4.T, scales, torch.zeros_like(scales).T, backend="reference")


# --- in compiled code --------------------------------------------------------------------------------------------------


@formats
@layouts
@pytest.mark.parametrize("valid", [None, 4])
def test_opcheck(pool: ScalePool, format: ScaleFormat, layout: SfLayout, valid: int | None) -> None:
    count = None if valid is None else torch.tensor([valid], dtype=torch.int32)
    arguments = (torch.randn(9, 96).bfloat16(), format.name, int(layout), "auto", count)
    op = torch.ops.safealloc.mx_quantize.default
    with use_pool(pool):
        torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))


@formats
def test_compiled_code_with_dynamic_rows_gives_the_eager_result(pool: ScalePool, format: ScaleFormat) -> None:
    def both(x: Tensor) -> tuple[Tensor, Tensor]:
        data, scales = QUANTIZE[format](x * 2, layout=SfLayout.layout_8x4)
        return data.view(torch.uint8), scales.clone()

    torch._dynamo.reset()  # it does not tell enums in a closure apart
    compiled = torch.compile(both, backend="aot_eager", fullgraph=True, dynamic=True)
    with use_pool(pool):
        for rows in (3, 9, 40):
            x = torch.randn(rows, 96).bfloat16()
            for got, expected in zip(compiled(x), both(x), strict=True):
                assert torch.equal(got, expected)
        assert pool.verify() == 3

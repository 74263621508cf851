"""The plain-torch NVFP4 against derivations that share no code with it, vLLM's values, and float64."""

from __future__ import annotations

import importlib
import json
from fractions import Fraction
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from safealloc import ScalePool, SfLayout, mm_fp4, nvfp4_quantize
from safealloc.kernels import reference

NAN = 0x7F
VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
FROZEN = json.loads((Path(__file__).parents[1] / "data" / "ref_nvfp4_quant.json").read_text())

layouts = pytest.mark.parametrize("layout", list(SfLayout), ids=lambda layout: layout.name)
dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=lambda dtype: str(dtype)[6:])


def quantized(
    x: Tensor, global_scale: float | Tensor, layout: SfLayout = SfLayout.layout_linear
) -> tuple[Tensor, Tensor]:
    """Codes [rows, k] and scale bytes [rows, k // 16], out of buffers full of 0xAA."""
    rows, k = x.shape
    x_fp4 = torch.full((rows, k // 2), 0xAA, dtype=torch.uint8)
    scales = torch.full(layout.padded_shape(rows, k), 0xAA, dtype=torch.uint8)
    scale = global_scale if isinstance(global_scale, Tensor) else torch.tensor([global_scale])
    reference.quantize(x, scale, x_fp4, scales, layout)
    assert bool((scales.view(-1)[layout.padding_mask(rows, k)] == 0xAA).all()), "padding was written"
    return torch.stack((x_fp4 & 15, x_fp4 >> 4), -1).flatten(1), layout.unswizzle(scales, rows, k)


def nearest_codes(values: Tensor) -> Tensor:
    """Nearest of the e2m1 values to each float32, by distance in float64; equally near ones go to the even code."""
    distance = (values.double().abs().clamp(max=6)[..., None] - torch.tensor(VALUES, dtype=torch.float64)).abs()
    odd_loses = distance + torch.tensor([0, 1] * 4) * 2.0**-40  # below the distance of two float32 around a tie
    codes = odd_loses.argmin(-1)
    return torch.where(values.isnan(), 7, codes + 8 * (values < 0)).to(torch.uint8)


def derived(x: Tensor, global_scale: float) -> tuple[Tensor, Tensor]:
    """The recipe once more, block by block."""

    def reciprocal(value: Tensor) -> Tensor:
        return torch.where(value == 0, torch.tensor(1e-8), torch.tensor(1.0) / value)

    g = torch.tensor(global_scale)
    codes, scales = (
        torch.empty(x.shape, dtype=torch.uint8),
        torch.empty(x.shape[0], x.shape[1] // 16, dtype=torch.uint8),
    )
    for row in range(x.shape[0]):
        for block in range(x.shape[1] // 16):
            columns = slice(16 * block, 16 * block + 16)
            values = x[row, columns].float()
            sixth = values.abs().max() * torch.tensor(1 / 6)
            scale = (g * sixth).clamp(-448, 448).to(torch.float8_e4m3fn)
            scales[row, block] = NAN if scale.float().isnan() else scale.view(torch.uint8)
            codes[row, columns] = nearest_codes(values * reciprocal(scale.float() * reciprocal(g)))
    return codes, scales


def check(x: Tensor, global_scale: float) -> None:
    codes, scales = quantized(x, global_scale)
    expected_codes, expected_scales = derived(x, global_scale)
    assert torch.equal(scales, expected_scales)
    assert torch.equal(codes, expected_codes)


# --- quantization -----------------------------------------------------------------------------------------------------


@dtypes
@pytest.mark.parametrize("magnitude", [1e-6, 1e-4, 1e-2, 1.0, 1e2, 1e4])
@pytest.mark.parametrize("global_scale", [None, 1e-30, 1e-6, 0.5, 1.0, 1e3, 1e10, 1e30, 0.0], ids=str)
def test_quantize_matches_the_derivation(dtype: torch.dtype, magnitude: float, global_scale: float | None) -> None:
    generator = torch.Generator().manual_seed(int(magnitude * 1e6))
    x = (torch.randn(6, 48, generator=generator) * magnitude).clamp(-6e4, 6e4).to(dtype)
    check(x, 448 * 6 / float(x.abs().max()) if global_scale is None else global_scale)


@pytest.mark.slow
@dtypes
def test_every_16_bit_pattern(dtype: torch.dtype) -> None:
    """All bit patterns of the dtype, NaN and Inf too, each in a block with +6 so that it is rounded as it is."""
    patterns = torch.arange(1 << 16).to(torch.int32).to(torch.int16).view(dtype)
    patterns = patterns[(patterns.float().abs() <= 6) | patterns.isnan()]
    x = torch.full((len(patterns), 16), 6.0, dtype=dtype)
    x[:, 7] = patterns
    codes, scales = quantized(x, 1.0)
    nan = patterns.isnan()
    assert torch.equal(codes[:, 7], nearest_codes(patterns.float()))
    assert bool((scales[nan] == NAN).all())
    assert bool((codes[nan] == 7).all())
    assert bool((scales[~nan] == 0x38).all())  # 1.0
    assert bool((codes[~nan][:, 0] == 7).all())


def test_ties_and_their_neighbors_round_to_the_nearest() -> None:
    halfway = [Fraction(VALUES[code]) + (Fraction(VALUES[code + 1]) - Fraction(VALUES[code])) / 2 for code in range(7)]
    points = torch.tensor([float(point) for point in halfway])
    around = torch.cat([points, points.nextafter(torch.tensor(0.0)), points.nextafter(torch.tensor(9.0))])
    around = torch.cat([around, -around, torch.tensor([5e-324, 6.0, 7.0, 1e38, -1e38])])
    for value, code in zip(around.tolist(), reference.encode_e2m1(around).tolist(), strict=True):
        distances = [abs(min(abs(Fraction(value)), 6) - Fraction(magnitude)) for magnitude in VALUES]
        best = [index for index, distance in enumerate(distances) if distance == min(distances)]
        expected = next(index for index in best if len(best) == 1 or index % 2 == 0)
        assert code == expected + (8 if value < 0 else 0), value
    assert torch.equal(reference.encode_e2m1(around), nearest_codes(around))


@pytest.mark.slow
def test_scale_bytes_are_the_nearest_e4m3() -> None:
    """The cast of torch, which the derivation relies on, against all 127 finite e4m3 magnitudes in fractions."""
    finite = [
        Fraction(mantissa, 8) * Fraction(2) ** -6
        if exponent == 0
        else (1 + Fraction(mantissa, 8)) * Fraction(2) ** (exponent - 7)
        for exponent in range(16)
        for mantissa in range(8)
    ][:-1]
    magnitudes = torch.logspace(-4, 2.65, 300)
    x = torch.zeros(300, 16, dtype=torch.bfloat16)
    x[:, 0] = (6 * magnitudes).bfloat16()
    _, scales = quantized(x, 1.0)
    for row in range(300):
        exact = min(Fraction(float(x[row, 0].float() * torch.tensor(1 / 6))), Fraction(448))
        distances = [abs(exact - value) for value in finite]
        best = [byte for byte, distance in enumerate(distances) if distance == min(distances)]
        assert int(scales[row, 0]) == next(byte for byte in best if len(best) == 1 or byte % 2 == 0)


@dtypes
def test_zeros_negative_zeros_and_subnormals(dtype: torch.dtype) -> None:
    x = torch.zeros(3, 32, dtype=dtype)
    x[0] = -0.0
    x[1, 3], x[1, 4], x[1, 5] = -0.0, 1.0, -1e-3
    x[2] = torch.finfo(dtype).smallest_normal / 4
    for global_scale in (1.0, 1e-3, 1e5):
        check(x, global_scale)
    codes, scales = quantized(x, 1.0)
    assert not codes[0].any()
    assert not scales[0].any()
    assert codes[1, :6].tolist() == [0, 0, 0, 0, 7, 8]  # -0.0 loses its sign, a negative that rounds to zero keeps it
    assert not codes[1, 16:].any()
    large = 1e7 if dtype == torch.float16 else 1e37
    check(x[2:], large)
    assert bool((quantized(x[2:], large)[0] > 0).all()), "subnormal inputs were taken for zero"


@layouts
def test_low_nibble_is_the_even_column(layout: SfLayout) -> None:
    x = torch.zeros(9, 80, dtype=torch.bfloat16)
    x[:, 0::2], x[:, 1::2] = 6.0, -1.0
    x_fp4 = torch.empty(9, 40, dtype=torch.uint8)
    scales = torch.zeros(layout.padded_shape(9, 80), dtype=torch.uint8)
    reference.quantize(x, torch.ones(1), x_fp4, scales, layout)
    assert bool((x_fp4 == 0xA7).all())
    assert bool((layout.unswizzle(scales, 9, 80) == 0x38).all())


@layouts
def test_scales_go_where_the_layout_says(layout: SfLayout) -> None:
    x = torch.randn(140, 176).bfloat16()
    codes, scales = quantized(x, 3.0, layout)
    linear_codes, linear_scales = quantized(x, 3.0)
    assert torch.equal(codes, linear_codes)
    assert torch.equal(scales, linear_scales)


@layouts
@pytest.mark.parametrize("padded_k", [96, 128, 192])
def test_scales_go_into_a_buffer_of_a_padded_k(layout: SfLayout, padded_k: int) -> None:
    x = torch.randn(9, 80).bfloat16()
    x_fp4 = torch.empty(9, 40, dtype=torch.uint8)
    scales = torch.zeros(layout.padded_shape(9, 80, padded_k=padded_k), dtype=torch.uint8)
    reference.quantize(x, torch.ones(1), x_fp4, scales, layout)
    assert torch.equal(layout.unswizzle(scales, 9, 80, padded_k=padded_k), quantized(x, 1.0)[1])
    assert not scales.view(-1)[layout.padding_mask(9, 80, padded_k=padded_k)].any()


def test_global_scale_may_have_any_shape() -> None:
    x = torch.randn(3, 16).bfloat16()
    expected = quantized(x, 5.0)
    for shape in ((), (1,), (1, 1)):
        codes, scales = quantized(x, torch.full(shape, 5.0))
        assert torch.equal(codes, expected[0])
        assert torch.equal(scales, expected[1])


@layouts
@pytest.mark.parametrize("valid", [-1, 0, 1, 5, 9, 10, 1000])
def test_rows_beyond_valid_rows_are_zero(layout: SfLayout, valid: int) -> None:
    x = torch.randn(9, 48).bfloat16()
    x[max(valid, 0) :] = float("nan")
    x_fp4 = torch.full((9, 24), 0xAA, dtype=torch.uint8)
    scales = torch.full(layout.padded_shape(9, 48), 0xAA, dtype=torch.uint8)
    reference.quantize(x, torch.ones(1), x_fp4, scales, layout, torch.tensor([valid], dtype=torch.int32))
    real, kept = layout.unswizzle(scales, 9, 48), min(max(valid, 0), 9)
    assert not x_fp4[kept:].any()
    assert not real[kept:].any()
    if kept:
        codes, expected = quantized(x[:kept], 1.0)
        assert torch.equal(real[:kept], expected)
        assert torch.equal(torch.stack((x_fp4 & 15, x_fp4 >> 4), -1).flatten(1)[:kept], codes)
    assert bool((scales.view(-1)[layout.padding_mask(9, 48)] == 0xAA).all())


# --- not finite -------------------------------------------------------------------------------------------------------


@dtypes
@pytest.mark.parametrize("global_scale", [1e-30, 1.0, 20.0, 1e30])
def test_nan_makes_its_block_nan(dtype: torch.dtype, global_scale: float) -> None:
    x = torch.randn(5, 64).to(dtype)
    clean_codes, clean_scales = quantized(x, global_scale)
    x[2, 21] = float("nan")
    x[4, 63] = -float("nan")
    codes, scales = quantized(x, global_scale)
    for row, block in ((2, 1), (4, 3)):
        columns = slice(16 * block, 16 * block + 16)
        assert scales[row, block] == NAN
        assert bool((codes[row, columns] == 7).all())
        scales[row, block] = clean_scales[row, block]
        codes[row, columns] = clean_codes[row, columns]
    assert torch.equal(codes, clean_codes)
    assert torch.equal(scales, clean_scales)


@dtypes
@pytest.mark.parametrize("global_scale", [1e-30, 1.0, 20.0, 1e30])
def test_inf_saturates_the_scale(dtype: torch.dtype, global_scale: float) -> None:
    """The scale is 448, Inf is 6 with its sign, and finite values are rounded with that scale."""
    x = torch.randn(5, 64).to(dtype)
    clean_codes, clean_scales = quantized(x, global_scale)
    x[2, 21], x[2, 22], x[3, 0] = float("inf"), -float("inf"), -float("inf")
    check(x, global_scale)
    codes, scales = quantized(x, global_scale)
    assert scales[2, 1] == scales[3, 0] == 0x7E
    assert codes[2, 21].item() == 7
    assert codes[2, 22].item() == codes[3, 0].item() == 15
    for row, block in ((2, 1), (3, 0)):
        scales[row, block] = clean_scales[row, block]
        codes[row, 16 * block : 16 * block + 16] = clean_codes[row, 16 * block : 16 * block + 16]
    assert torch.equal(codes, clean_codes)
    assert torch.equal(scales, clean_scales)


def test_finite_values_beside_inf() -> None:
    """They are x * global_scale / 448 rounded: zero where that is small, and not where it is not."""
    x = torch.zeros(1, 16, dtype=torch.bfloat16)
    x[0, 0], x[0, 1], x[0, 2] = float("inf"), 100.0, 448.0
    assert quantized(x, 1.0)[0][0, :3].tolist() == [7, 0, 2]


@layouts
def test_not_finite_rows_stay_alone_through_mm(layout: SfLayout) -> None:
    with ScalePool("cpu") as pool:
        x, w, one = torch.randn(9, 80).bfloat16(), torch.randn(12, 80).bfloat16(), torch.ones(1)
        w_fp4, w_scales = nvfp4_quantize(w, one, pool=pool)
        sf = None if layout is SfLayout.layout_linear else layout is SfLayout.layout_8x4

        def product(x: Tensor) -> Tensor:
            x_fp4, scales = nvfp4_quantize(x, one, layout=layout, pool=pool)
            return mm_fp4(x_fp4, w_fp4.T, scales, w_scales.T, use_8x4_sf_layout=sf, backend="reference")

        clean = product(x)
        x[1, 79], x[4, 0], x[6, 40] = float("nan"), float("inf"), -float("inf")
        dirty = product(x)
        assert bool(clean.isfinite().all())
        assert bool(dirty[1].isnan().all())
        assert bool(dirty[[4, 6]].isfinite().all())
        others = [0, 2, 3, 5, 7, 8]
        assert torch.equal(dirty[others], clean[others])
        assert pool.verify() == pool.stats().buffers


# --- vLLM -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", FROZEN["cases"], ids=lambda case: case["name"])
def test_quantize_matches_frozen_bytes_of_vllm(case: dict[str, str]) -> None:
    """Bytes that vLLM 0.32.0's ref_nvfp4_quant gave."""
    rows, k = int(case["rows"]), int(case["k"])
    patterns = torch.frombuffer(bytearray.fromhex(case["x"]), dtype=torch.uint8).view(-1, 2).flip(1).contiguous()
    x = patterns.view(getattr(torch, case["dtype"])).view(rows, k)
    scale = torch.frombuffer(bytearray.fromhex(case["global_scale"])[::-1], dtype=torch.float32)
    x_fp4 = torch.empty(rows, k // 2, dtype=torch.uint8)
    scales = torch.empty(rows, k // 16, dtype=torch.uint8)
    reference.quantize(x, scale, x_fp4, scales, SfLayout.layout_linear)
    assert bytes(x_fp4.flatten().tolist()).hex() == case["x_fp4"]
    assert bytes(scales.flatten().tolist()).hex() == case["scales"]
    check(x, float(scale))


@pytest.fixture(scope="module")
def vllm_utils() -> ModuleType:
    name = "vllm.model_executor.layers.quantization.utils.nvfp4_emulation_utils"
    try:
        return importlib.import_module(name)
    except Exception as error:  # vLLM's import runs much that can fail on a machine without a GPU
        pytest.skip(f"{name} is the oracle here: {type(error).__name__}: {error}")


@dtypes
@pytest.mark.parametrize("global_scale", [None, 1e-6, 1.0, 1e6], ids=str)
@pytest.mark.parametrize("shape", [(1, 64), (33, 128), (130, 320)], ids=str)
def test_quantize_matches_the_installed_vllm(
    vllm_utils: ModuleType, dtype: torch.dtype, global_scale: float | None, shape: tuple[int, int]
) -> None:
    x = torch.randn(shape).to(dtype)
    g = torch.tensor([448 * 6 / float(x.abs().max()) if global_scale is None else global_scale])
    their_values, their_scales = vllm_utils.ref_nvfp4_quant(x.clone(), g, 16)
    codes, scales = quantized(x, g)
    assert torch.equal(scales.view(torch.float8_e4m3fn).float(), their_scales)
    values = torch.tensor([*VALUES, *(-value for value in VALUES)])[codes.int()]
    assert torch.equal(values.view(torch.int32), their_values.view(torch.int32))  # the sign of zero too
    layout = SfLayout.layout_128x4
    x_fp4, swizzled = codes[:, 0::2] | codes[:, 1::2] << 4, layout.swizzle(scales)
    theirs = vllm_utils.dequantize_to_dtype(x_fp4, swizzled, torch.ones(1), torch.float32, 16)
    assert torch.equal(reference.dequantize(x_fp4, swizzled, layout), theirs)


# --- the GEMM ---------------------------------------------------------------------------------------------------------


def random_operand(rows: int, k: int, layout: SfLayout, *, padding: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Any codes, positive scales of moderate size, padding bytes of one value; and what they stand for, in float64."""
    packed = torch.randint(0, 256, (rows, k // 2), dtype=torch.uint8)
    linear = torch.randint(0x28, 0x48, (rows, k // 16), dtype=torch.uint8)
    buffer = layout.swizzle(linear)
    buffer.view(-1)[layout.padding_mask(rows, k)] = padding
    table = torch.tensor([*VALUES, *(-value for value in VALUES)], dtype=torch.float64)
    codes = torch.stack((packed & 15, packed >> 4), -1).flatten(1).int()
    values = table[codes].view(rows, -1, 16) * linear.view(torch.float8_e4m3fn).double()[..., None]
    return packed, buffer, values.view(rows, k)


def product(
    a: Tensor,
    b: Tensor,
    a_scales: Tensor,
    b_scales: Tensor,
    layout: SfLayout,
    alpha: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    out = torch.full((len(a), len(b)), float("nan"), dtype=dtype)
    reference.mm(a, b, a_scales, b_scales, alpha, out, layout)
    return out


@layouts
@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float16, torch.float32], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("alphas", ["none", "one", "one per row"])
@pytest.mark.parametrize("shape", [(1, 8, 16), (5, 24, 80), (9, 130, 176), (130, 7, 64)], ids=str)
def test_mm_is_close_to_float64(
    layout: SfLayout, out_dtype: torch.dtype, alphas: str, shape: tuple[int, int, int]
) -> None:
    m, n, k = shape
    a, a_scales, a_values = random_operand(m, k, layout)
    b, b_scales, b_values = random_operand(n, k, SfLayout.layout_128x4)
    alpha = {"none": None, "one": torch.tensor([0.37]), "one per row": torch.rand(m) + 0.1}[alphas]
    factor = torch.ones(1) if alpha is None else alpha
    exact = a_values @ b_values.T * factor.double().view(-1, 1)
    bound = (a_values.abs() @ b_values.abs().T) * factor.double().view(-1, 1) * (k + 2) * 2.0**-24
    rounding = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}[out_dtype]
    out = product(a, b, a_scales, b_scales, layout, alpha, out_dtype)
    assert out.dtype == out_dtype
    assert bool(((out.double() - exact).abs() <= bound + exact.abs() * rounding).all())


@pytest.mark.parametrize("layout", [SfLayout.layout_128x4, SfLayout.layout_8x4], ids=lambda layout: layout.name)
@pytest.mark.parametrize("column", [5, 6, 7])
def test_nan_in_a_padding_column_of_a_reaches_its_row(layout: SfLayout, column: int) -> None:
    m, n, k = 9, 12, 80
    a, a_scales, _ = random_operand(m, k, layout)
    b, b_scales, _ = random_operand(n, k, SfLayout.layout_128x4)
    clean = product(a, b, a_scales, b_scales, layout)
    assert bool(clean.isfinite().all())
    a_scales.view(-1)[layout.offsets(m, 128)[4, column]] = NAN
    dirty = product(a, b, a_scales, b_scales, layout)
    assert bool(dirty[4].isnan().all())
    others = [row for row in range(m) if row != 4]
    assert torch.equal(dirty[others], clean[others])


@layouts
@pytest.mark.parametrize("column", [5, 6, 7])
def test_nan_in_a_padding_column_of_b_reaches_its_output_column(layout: SfLayout, column: int) -> None:
    m, n, k = 9, 12, 80
    a, a_scales, _ = random_operand(m, k, layout)
    b, b_scales, _ = random_operand(n, k, SfLayout.layout_128x4)
    clean = product(a, b, a_scales, b_scales, layout)
    b_scales.view(-1)[SfLayout.layout_128x4.offsets(n, 128)[7, column]] = NAN
    dirty = product(a, b, a_scales, b_scales, layout)
    assert bool(dirty[:, 7].isnan().all())
    others = [row for row in range(n) if row != 7]
    assert torch.equal(dirty[:, others], clean[:, others])


@pytest.mark.parametrize("layout", [SfLayout.layout_128x4, SfLayout.layout_8x4], ids=lambda layout: layout.name)
def test_finite_padding_is_multiplied_by_zero(layout: SfLayout) -> None:
    a, a_scales, a_values = random_operand(9, 80, layout, padding=0x7E)
    b, b_scales, b_values = random_operand(12, 80, SfLayout.layout_128x4, padding=0x7E)
    out = product(a, b, a_scales, b_scales, layout)
    torch.testing.assert_close(out.double(), a_values @ b_values.T, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("layout", [SfLayout.layout_128x4, SfLayout.layout_8x4], ids=lambda layout: layout.name)
def test_padding_rows_are_never_read(layout: SfLayout) -> None:
    m, n, k = 9, 12, 80
    a, a_scales, _ = random_operand(m, k, layout)
    b, b_scales, _ = random_operand(n, k, SfLayout.layout_128x4)
    clean = product(a, b, a_scales, b_scales, layout)
    for scales, which, rows in ((a_scales, layout, m), (b_scales, SfLayout.layout_128x4, n)):
        padded_rows, padded_cols = which.padded_shape(rows, k)
        scales.view(-1)[which.offsets(padded_rows, 16 * padded_cols)[rows:].flatten()] = NAN
    assert torch.equal(product(a, b, a_scales, b_scales, layout), clean)


@layouts
def test_a_longer_buffer_is_read_from_its_start(layout: SfLayout) -> None:
    a, a_scales, _ = random_operand(9, 80, layout)
    b, b_scales, _ = random_operand(12, 80, SfLayout.layout_128x4)
    longer = torch.cat((a_scales.view(-1), torch.full((64,), NAN, dtype=torch.uint8)))
    assert torch.equal(product(a, b, longer, b_scales, layout), product(a, b, a_scales, b_scales, layout))


@layouts
def test_dequantize_inverts_the_encoding(layout: SfLayout) -> None:
    packed, buffer, values = random_operand(9, 80, layout, padding=NAN)
    assert torch.equal(reference.dequantize(packed, buffer, layout).double(), values)
    assert torch.equal(reference.dequantize(packed, buffer, layout, 4.0).double(), values / 4)
    if layout is not SfLayout.layout_linear:
        wider = reference.dequantize(packed, buffer, layout, k=128)
        assert torch.equal(wider[:, :80].double(), values)
        assert bool(wider[:, 80:].isnan().all())


@dtypes
def test_dequantized_values_are_near(dtype: torch.dtype) -> None:
    """Half the widest step of e2m1 (2 of 6) and the scale's own rounding: within a quarter of the block's maximum."""
    x = torch.randn(16, 64).to(dtype)
    g = torch.tensor([448 * 6 / float(x.abs().max())])
    x_fp4, scales = torch.empty(16, 32, dtype=torch.uint8), torch.empty(16, 4, dtype=torch.uint8)
    reference.quantize(x, g, x_fp4, scales, SfLayout.layout_linear)
    error = (reference.dequantize(x_fp4, scales, SfLayout.layout_linear, g) - x.float()).view(16, 4, 16).abs()
    assert bool((error <= x.float().view(16, 4, 16).abs().amax(-1, keepdim=True) / 4).all())

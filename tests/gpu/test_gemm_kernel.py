"""The Triton GEMM against its plain-torch twin, on a GPU or in Triton's interpreter, as test_kernels.py."""

from __future__ import annotations

import pytest
import torch
from support.kernels import (
    DEVICE,
    INTERPRETED,
    MARKS,
    ROWS,
    K,
    Operand,
    generator,
    gpu_only,
    layouts,
    scalar,
)
from torch import Tensor

triton = pytest.importorskip("triton", reason="the Triton kernels need triton")

from safealloc.formats.format import NAN_SCALE  # noqa: E402
from safealloc.formats.layout import SfLayout  # noqa: E402
from safealloc.kernels import reference, triton_gemm  # noqa: E402

pytestmark = MARKS


def check_mm(a: Operand, b: Operand, alpha: Tensor | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
    """Compares with the reference; returns its float32 result."""
    m, n = len(a.data), len(b.data)
    expected, total = (torch.empty(m, n, dtype=torch.float32, device=DEVICE) for _ in range(2))
    actual = torch.full((m + 1, n), -77.0, dtype=dtype, device=DEVICE)
    reference.mm(a.data, b.data, a.scales, b.scales, alpha, expected, a.layout)
    triton_gemm.mm(a.data, b.data, a.scales, b.scales, alpha, actual[:m], a.layout)
    assert (actual[m] == -77.0).all(), "written beyond the last row"
    actual = actual[:m].float()

    assert torch.equal(actual.isnan(), expected.isnan()), "NaN in other places"
    x, y = a.magnitudes(), b.magnitudes()
    reference.mm(x.data, y.data, x.scales, y.scales, None if alpha is None else alpha.abs(), total, a.layout)
    # One ulp of the output's type, and the order of a float32 sum (2**-18 of the sum of magnitudes).
    ulp = torch.finfo(dtype).eps if dtype is not torch.float32 else 0.0
    error, bound = (actual - expected).abs(), expected.abs() * ulp + total * 2.0**-18 + 2.0**-24
    worst = (error - bound).nan_to_num(-1.0)
    assert (worst <= 0).all(), f"off by {error[worst > 0].max()} at {(worst > 0).nonzero()[0].tolist()}"
    return expected


needs_interpreter_loops = pytest.mark.skipif(
    INTERPRETED
    and tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7)
    and tuple(map(int, __import__("numpy").__version__.split(".")[:2])) >= (2, 4),
    reason="Triton's interpreter before 3.7 cannot run a loop with NumPy 2.4: it converts one-element arrays to int",
)


@needs_interpreter_loops
class TestMm:
    @layouts
    @pytest.mark.parametrize("m", ROWS)
    def test_shapes(self, layout: SfLayout, m: int) -> None:
        for k in K:
            for n in (1 + k % 137,) if INTERPRETED else (16, 144, 1024):
                check_mm(Operand(m, k, layout), Operand(n, k, SfLayout.layout_128x4))

    @pytest.mark.parametrize("m", [1, 20, 50, 130])  # one of each tiling
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    def test_alpha_and_output_types(self, m: int, dtype: torch.dtype) -> None:
        a, b = Operand(m, 496, SfLayout.layout_8x4), Operand(40, 496, SfLayout.layout_128x4)
        per_row = torch.rand(m, generator=generator(m), device=DEVICE) - 0.5
        for alpha in (None, scalar(0.37), scalar(-0.01).reshape(()), per_row, per_row.view(m, 1)):
            check_mm(a, b, alpha, dtype)

    @layouts
    @pytest.mark.parametrize("k", [16, 32, 48, 80, 496])
    @pytest.mark.parametrize("m", [3, 130])
    def test_nan_in_padding_columns_reaches_row_or_output_column(self, layout: SfLayout, m: int, k: int) -> None:
        a, b = Operand(m, k, layout), Operand(40, k, SfLayout.layout_128x4)
        padding = b.logical.shape[1] - b.cols
        for column in range(padding):
            b.logical[:40, b.cols :] = 0
            b.logical[17, b.cols + column] = NAN_SCALE
            expected = check_mm(a, b)
            assert expected[:, 17].isnan().all()
            assert expected.isnan().sum() == m
        if layout is not SfLayout.layout_linear:
            b.logical[:40, b.cols :] = 0
            a.logical[1, a.cols + padding - 1] = 0xFF  # NaN too
            expected = check_mm(a, b)
            assert expected[1].isnan().all()
            assert expected.isnan().sum() == 40

    @layouts
    def test_nan_in_valid_scales_of_zero_data(self, layout: SfLayout) -> None:
        a, b = Operand(9, 80, layout), Operand(40, 80, SfLayout.layout_128x4)
        a.data[4], a.logical[4, 2] = 0, NAN_SCALE
        expected = check_mm(a, b)
        assert expected[4].isnan().all()
        assert expected.isnan().sum() == 40

    @layouts
    def test_every_code_and_scale(self, layout: SfLayout) -> None:
        """All e2m1 codes under all e4m3 scales, in a product with ones."""
        a, b = Operand(256, 16, layout), Operand(8, 16, SfLayout.layout_128x4)
        a.data[:] = (
            torch.arange(256, device=DEVICE)[:, None].to(torch.uint8)
            + torch.arange(8, device=DEVICE).to(torch.uint8) * 32
        )
        a.logical[:256, 0] = torch.arange(256, device=DEVICE).to(torch.uint8)
        b.data.zero_()
        for row in range(8):
            b.data[row, row] = 0x42  # 1 in the even column, 2 in the odd
        b.logical[:8, 0] = 0x38  # 1
        expected = check_mm(a, b)
        assert expected.isnan().sum() == 2 * 8

    @pytest.mark.parametrize("m", [1, 20, 50, 130])
    @pytest.mark.parametrize("k", [4112, 8192])
    def test_programs_share_a_tile(self, m: int, k: int) -> None:
        shares = triton_gemm.shares_for(1, -(-k // 128), 132)
        assert shares == (2 if k == 4112 else 4)
        a, b = Operand(m, k, SfLayout.layout_8x4), Operand(40, k, SfLayout.layout_128x4)
        check_mm(a, b, torch.rand(m, generator=generator(m), device=DEVICE) - 0.5, torch.bfloat16)
        a.data[0], a.logical[0, k // 16 - 1] = 0, NAN_SCALE  # in the last share
        assert check_mm(a, b)[0].isnan().all()

    @layouts
    def test_unaligned_scales(self, layout: SfLayout) -> None:
        a, b = Operand(9, 528, layout), Operand(40, 528, SfLayout.layout_128x4)
        expected, actual = torch.empty(9, 40, device=DEVICE), torch.empty(9, 40, device=DEVICE)
        triton_gemm.mm(a.data, b.data, a.scales, b.scales, None, expected, layout)
        shifted = [torch.cat((torch.zeros_like(one.scales[:1]), one.scales))[1:] for one in (a, b)]
        triton_gemm.mm(a.data, b.data, *shifted, None, actual, layout)
        assert torch.equal(actual, expected)

    def test_strided_output(self) -> None:
        a, b = Operand(9, 80, SfLayout.layout_8x4), Operand(40, 80, SfLayout.layout_128x4)
        expected = torch.empty(9, 40, device=DEVICE)
        triton_gemm.mm(a.data, b.data, a.scales, b.scales, None, expected, a.layout)
        for out in (torch.zeros(40, 9, device=DEVICE).T, torch.zeros(18, 48, device=DEVICE)[::2, :40]):
            triton_gemm.mm(a.data, b.data, a.scales, b.scales, None, out, a.layout)
            assert torch.equal(out, expected)

    @gpu_only
    @layouts
    @pytest.mark.parametrize("m", [1, 8, 17, 33, 64, 100])
    def test_8192(self, layout: SfLayout, m: int) -> None:
        a, b = Operand(m, 8192, layout), Operand(8192, 8192, SfLayout.layout_128x4)
        check_mm(a, b, scalar(0.01), torch.bfloat16)

    @gpu_only
    def test_more_than_2_to_31_bytes(self) -> None:
        k, first = 16384, 262144  # first * k / 2 = 2**31 bytes of b
        if torch.cuda.mem_get_info()[0] < 12 << 30:
            pytest.skip("needs 12 GiB of free device memory")
        a, tail = Operand(3, k, SfLayout.layout_8x4), Operand(100, k, SfLayout.layout_128x4)
        data = torch.zeros(first + 100, k // 2, dtype=torch.uint8, device=DEVICE)
        data[first:] = tail.data
        scales = torch.zeros(first + 128, k // 16, dtype=torch.uint8, device=DEVICE)
        scales[first:] = tail.layout.swizzle(tail.logical)
        expected = torch.empty(3, 100, device=DEVICE)
        out = torch.empty(3, first + 100, device=DEVICE)
        reference.mm(a.data, tail.data, a.scales, tail.scales, None, expected, a.layout)
        triton_gemm.mm(a.data, data, a.scales, scales, None, out, a.layout)
        torch.testing.assert_close(out[:, first:], expected, rtol=1e-5, atol=1e-2)
        assert not out[:, :first].any()

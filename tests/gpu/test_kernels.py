"""The Triton kernels for layout, quantization and padding against their plain-torch twins, bit for bit.

Runs on a GPU and, with TRITON_INTERPRET=1, in Triton's interpreter on the CPU (tests/unit/test_triton_interpreter.py starts
that in a process of its own), over fewer and smaller shapes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from support.kernels import (
    DEVICE,
    GUARD,
    INTERPRETED,
    MARKS,
    ROWS,
    K,
    activations,
    assert_same_bytes,
    generator,
    gpu_only,
    layouts,
    scalar,
)
from torch import Tensor

triton = pytest.importorskip("triton", reason="the Triton kernels need triton")
import triton.language as tl  # noqa: E402

from benchmarks import in_kernel  # noqa: E402
from safealloc.formats.format import NAN_SCALE  # noqa: E402
from safealloc.formats.layout import SfLayout  # noqa: E402
from safealloc.formats.spec import ScaleSpec  # noqa: E402
from safealloc.kernels import reference, triton_padding, triton_quantize  # noqa: E402
from safealloc.kernels.triton_layout import scale_offset  # noqa: E402

pytestmark = MARKS

TILINGS = sorted(
    {
        triton_quantize.tiling_for(rows, 64, words)
        for rows in (1, 1 << 20)
        for words in ((False,) if INTERPRETED else (False, True))  # which are inline assembly
    }
)

WIDE_TILINGS = [TILINGS[0]._replace(blocks=512)] if INTERPRETED else TILINGS  # its time follows the number of programs
tilings = pytest.mark.parametrize("tiling", TILINGS, ids=lambda tiling: "-".join(str(int(part)) for part in tiling))
dtypes = pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16], ids=lambda dtype: str(dtype).removeprefix("torch.")
)

GLOBAL_SCALES = [1.0, 50.0, 2.0**-130, 3e-30, 3e30, 0.0, -0.0, -7.0, float("inf"), float("nan")]
SPECIAL = list(itertools.product(GLOBAL_SCALES, SfLayout))
if INTERPRETED:
    SPECIAL = [(g, SfLayout(number % 3)) for number, g in enumerate(GLOBAL_SCALES)]


@pytest.fixture
def wide_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer, wider programs in the interpreter, whose time follows their number (test_tilings has the real tilings)."""
    if INTERPRETED:
        monkeypatch.setattr(triton_quantize, "tiling_for", lambda *given: WIDE_TILINGS[0])


def check_quantize(
    x: Tensor, global_scale: Tensor, layout: SfLayout, valid_rows: int | None = None, padded_k: int | None = None
) -> None:
    rows, k = x.shape
    valid = None if valid_rows is None else torch.tensor([valid_rows], dtype=torch.int32, device=DEVICE)
    padded_rows, padded_cols = layout.padded_shape(rows, k, padded_k=padded_k)
    results = []
    for kernel in (reference.quantize, triton_quantize.quantize):
        data = torch.full((rows * k // 2 + GUARD,), 0xEE, dtype=torch.uint8, device=DEVICE)
        scales = torch.full((padded_rows * padded_cols + GUARD,), NAN_SCALE, dtype=torch.uint8, device=DEVICE)
        kernel(
            x,
            global_scale,
            data[:-GUARD].view(rows, k // 2),
            scales[:-GUARD].view(padded_rows, padded_cols),
            layout,
            valid,
        )
        results.append((data, scales))
    (expected_data, expected_scales), (data, scales) = results
    assert_same_bytes(scales, expected_scales, f"scales of [{rows}, {k}]")
    assert_same_bytes(data, expected_data, f"data of [{rows}, {k}]")


@triton.jit
def _store_offsets(out, first_row, cols, col_tiles, LAYOUT: tl.constexpr, COLS: tl.constexpr):
    row = first_row + tl.program_id(0)
    col = tl.arange(0, COLS)
    offset = scale_offset(row, col, col_tiles, LAYOUT)
    tl.store(out + tl.program_id(0) * cols + col, offset, mask=col < cols)


class TestLayout:
    def offsets(self, layout: SfLayout, first_row: int, rows: int, cols: int, padded_cols: int) -> Tensor:
        out = torch.full((rows, cols), -1, dtype=torch.int64, device=DEVICE)
        width = triton.next_power_of_2(cols)
        _store_offsets[(rows,)](out, first_row, cols, padded_cols // layout.tile.cols, LAYOUT=int(layout), COLS=width)
        return out

    @layouts
    @pytest.mark.parametrize("padded", [0, 16, 96])
    @pytest.mark.parametrize("k", [16, 48, 64, 80, 496])
    def test_scale_offset_is_offsets(self, layout: SfLayout, k: int, padded: int) -> None:
        rows = 130 if INTERPRETED else 300
        _, padded_cols = layout.padded_shape(rows, k, padded_k=k + padded)
        expected = layout.offsets(rows, k, DEVICE, padded_k=k + padded)
        assert torch.equal(self.offsets(layout, 0, rows, k // 16, padded_cols), expected)

    @layouts
    def test_offsets_beyond_32_bits(self, layout: SfLayout) -> None:
        k, first_row = 28672, 1 << 24  # whole tiles in each layout
        cols = k // 16
        expected = layout.offsets(9, k, DEVICE) + first_row * cols
        assert expected.max() > 1 << 32
        assert torch.equal(self.offsets(layout, first_row, 9, cols, cols), expected)


class TestQuantize:
    @layouts
    @dtypes
    @pytest.mark.parametrize("rows", ROWS)
    @pytest.mark.usefixtures("wide_tiles")
    def test_shapes(self, rows: int, layout: SfLayout, dtype: torch.dtype) -> None:
        for number, k in enumerate((80,) if INTERPRETED and rows > 33 else K):  # a program is a row
            x = activations(rows, k, dtype)
            global_scales = [448 * 6 / x.float().abs().max().clamp(min=1).reshape(1), scalar(37.25)]
            if INTERPRETED:  # one of them, in turn
                del global_scales[(number + (dtype is torch.float16)) % 2]
            for global_scale in global_scales:
                check_quantize(x, global_scale, layout)

    @layouts
    @tilings
    def test_tilings(self, layout: SfLayout, tiling: triton_quantize.Tiling, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(triton_quantize, "tiling_for", lambda *given: tiling)
        for rows, k in ((1, 16), (9, 1040)) if INTERPRETED else ((1, 16), (9, 496), (133, 1040), (513, 4096)):
            check_quantize(activations(rows, k, torch.bfloat16), scalar(20.0), layout)

    @layouts
    @dtypes
    @pytest.mark.parametrize("padded", [16, 32, 48, 64, 208])
    @pytest.mark.usefixtures("wide_tiles")
    def test_padded_k(self, layout: SfLayout, dtype: torch.dtype, padded: int) -> None:
        for rows, k in ((1, 16), (9, 48), (33 if INTERPRETED else 130, 496)):
            check_quantize(activations(rows, k, dtype), scalar(20.0), layout, padded_k=k + padded)

    @layouts
    @dtypes
    @pytest.mark.parametrize("rows", [1, 8, 17] if INTERPRETED else [1, 8, 33, 130])
    @pytest.mark.usefixtures("wide_tiles")
    def test_valid_rows(self, layout: SfLayout, dtype: torch.dtype, rows: int) -> None:
        least_and_most = {-1, 2**31 - 1} if not INTERPRETED or rows < 17 else set()
        for valid in {0, 1, rows // 2, rows - 1, rows, rows + 5} | least_and_most:
            x = activations(rows, 80, dtype)
            x[max(valid, 0) :] = float("nan")
            check_quantize(x, scalar(20.0), layout, valid_rows=valid)
        for g in (float("nan"), float("inf"), -2.0):  # none of which makes zeros of zeros
            check_quantize(activations(rows, 80, dtype), scalar(g), layout, valid_rows=rows // 2)

    @dtypes
    @tilings
    @pytest.mark.parametrize(("g", "layout"), SPECIAL, ids=lambda value: getattr(value, "name", None))
    def test_special_values(
        self,
        dtype: torch.dtype,
        g: float,
        layout: SfLayout,
        tiling: triton_quantize.Tiling,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(triton_quantize, "tiling_for", lambda *given: tiling)
        nan, inf, most = float("nan"), float("inf"), torch.finfo(dtype).max
        least = torch.finfo(dtype).tiny
        starts = [
            [nan],
            [-nan, 1.0, -1.0],
            [inf, 1.0, -1.0],
            [-inf, 0.0, -0.0],
            [inf, -inf, nan],
            [0.0],
            [-0.0] * 16,
            [-0.0, 1.0, -1e-3, 1e-3],  # -1e-3 rounds to zero and keeps its sign
            [6.0, -0.25, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -0.75, -1.25, -1.75, -2.5, -3.5, -5.0, 0.5],
            [most, -most, 1.0],
            [least, -least],
            [1.0, least, -least],
        ]
        x = torch.zeros(len(starts), 48, dtype=dtype, device=DEVICE)
        for row, start in zip(x, starts, strict=True):
            row[16 : 16 + len(start)] = torch.tensor(start, dtype=torch.float32, device=DEVICE).to(dtype)
            row[32:] = 1.5  # what lies beside it
        check_quantize(x, scalar(g), layout)

    @pytest.mark.slow
    @dtypes
    @pytest.mark.parametrize("tiling", WIDE_TILINGS)
    @pytest.mark.parametrize("g", [1.0, 0.37, 1000.0, 2.0**-115, 1e-45, 3e30])
    def test_every_value(
        self, dtype: torch.dtype, g: float, tiling: triton_quantize.Tiling, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """All bit patterns, in blocks of neighbors and in shuffled blocks."""
        monkeypatch.setattr(triton_quantize, "tiling_for", lambda *given: tiling)
        bits = torch.arange(1 << 16, dtype=torch.int32, device=DEVICE)
        if INTERPRETED and dtype is torch.bfloat16:  # the interpreter does not convert its subnormals right
            bits = torch.where(bits & 0x7F80 == 0, bits & 0x8000, bits)
        shuffled = bits[torch.randperm(1 << 16, generator=generator(g), device=DEVICE)]
        for order in (bits, shuffled):
            x = (order - (order >> 15 << 16)).to(torch.int16).view(dtype).view(64, 1024)
            check_quantize(x, scalar(g), SfLayout.layout_linear)

    @pytest.mark.parametrize("offset", [1, 2, 3])
    @pytest.mark.usefixtures("wide_tiles")
    def test_unaligned_input(self, offset: int) -> None:
        rows, k = (9, 80) if INTERPRETED else (133, 1040)  # enough blocks for words where they are aligned
        x = torch.empty(rows * k + offset, dtype=torch.bfloat16, device=DEVICE)[offset:].view(rows, k)
        x.copy_(activations(rows, k, torch.bfloat16))
        check_quantize(x, scalar(20.0), SfLayout.layout_128x4)

    @gpu_only
    @layouts
    def test_more_than_2_to_31_elements(self, layout: SfLayout) -> None:
        k, first = 16384, 131072  # first * k = 2**31, and whole tiles
        rows = first + 130
        if torch.cuda.mem_get_info()[0] < 12 << 30:
            pytest.skip("needs 12 GiB of free device memory")
        x = torch.zeros(rows, k, dtype=torch.bfloat16, device=DEVICE)
        x[first:] = activations(130, k, torch.bfloat16)
        data = torch.full((rows, k // 2), 0xEE, dtype=torch.uint8, device=DEVICE)
        scales = torch.full(layout.padded_shape(rows, k), NAN_SCALE, dtype=torch.uint8, device=DEVICE)
        triton_quantize.quantize(x, scalar(20.0), data, scales, layout)
        expected_data = torch.empty(130, k // 2, dtype=torch.uint8, device=DEVICE)
        expected_scales = torch.full(layout.padded_shape(130, k), NAN_SCALE, dtype=torch.uint8, device=DEVICE)
        reference.quantize(x[first:], scalar(20.0), expected_data, expected_scales, layout)
        assert_same_bytes(data[first:], expected_data, "data")
        assert_same_bytes(scales[first:], expected_scales, "scales")
        assert not data[:first].any()
        assert not scales[:first].any()


class TestZeroPadding:
    @layouts
    @pytest.mark.parametrize("padded", [0, 16, 48, 64, 208])
    @pytest.mark.parametrize("rows", ROWS)
    def test_shapes(self, layout: SfLayout, rows: int, padded: int) -> None:
        for k in K:
            used = layout.nbytes(rows, k, padded_k=k + padded)
            expected = torch.full((used + GUARD,), NAN_SCALE, dtype=torch.uint8, device=DEVICE)
            actual = expected.clone()
            ScaleSpec(rows, k, layout, k + padded).zero_padding(expected[:used])
            triton_padding.zero_padding(actual, layout, rows, k, k + padded)
            assert_same_bytes(actual, expected, f"[{rows}, {k}]")

    @layouts
    @pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int32], ids=["float8_e4m3fn", "int32"])
    def test_other_dtypes(self, layout: SfLayout, dtype: torch.dtype) -> None:
        shape = layout.padded_shape(9, 48, padded_k=64)
        expected = torch.full(shape, NAN_SCALE, dtype=torch.uint8, device=DEVICE)
        actual = expected.clone()
        ScaleSpec(9, 48, layout, 64).zero_padding(expected)
        triton_padding.zero_padding(actual.view(dtype), layout, 9, 48, 64)
        assert_same_bytes(actual, expected, str(dtype))

    def test_unaligned_buffer(self) -> None:
        layout = SfLayout.layout_128x4
        buffer = torch.full((layout.nbytes(9, 48) + 3,), NAN_SCALE, dtype=torch.uint8, device=DEVICE)
        expected = buffer.clone()
        ScaleSpec(9, 48, layout).zero_padding(expected[3:])
        triton_padding.zero_padding(buffer[3:], layout, 9, 48)
        assert_same_bytes(buffer, expected, "an unaligned buffer")

    def test_without_padding_nothing_is_launched(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(triton_padding, "_zero_padding", None)
        for layout, rows, k in (
            (SfLayout.layout_128x4, 256, 128),
            (SfLayout.layout_8x4, 16, 64),
            (SfLayout.layout_linear, 7, 48),
        ):
            buffer = torch.full((layout.nbytes(rows, k),), NAN_SCALE, dtype=torch.uint8, device=DEVICE)
            triton_padding.zero_padding(buffer, layout, rows, k)
            assert (buffer == NAN_SCALE).all()


class TestInKernel:
    """What the benchmarks compare with: padding zeroed by the quantizer."""

    @pytest.mark.parametrize("layout", [SfLayout.layout_128x4, SfLayout.layout_8x4], ids=lambda layout: layout.name)
    @pytest.mark.parametrize("kernel", [in_kernel.row_by_row, in_kernel.wide_stores])
    def test_all_padding_is_zero(self, layout: SfLayout, kernel: Callable[..., None]) -> None:
        row_by_row = kernel is in_kernel.row_by_row
        for rows, k in ((1, 1088), (3, 2112), (9, 80 if row_by_row else 64), (130, 64), (128, 64)):
            if INTERPRETED and row_by_row and (rows > 9 or k == 1088):
                continue
            x, g = activations(rows, k, torch.bfloat16), scalar(20.0)
            expected = torch.empty(rows, k // 2, dtype=torch.uint8, device=DEVICE)
            expected_scales = torch.zeros(layout.padded_shape(rows, k), dtype=torch.uint8, device=DEVICE)
            reference.quantize(x, g, expected, expected_scales, layout)
            data, scales = torch.full_like(expected, 0xEE), torch.full_like(expected_scales, NAN_SCALE)
            kernel(x, g, data, scales, layout)
            assert_same_bytes(data, expected, f"data of [{rows}, {k}]")
            assert_same_bytes(scales, expected_scales, f"scales of [{rows}, {k}]")

    def test_wide_stores_refuse_padding_columns(self) -> None:
        with pytest.raises(ValueError, match="k must be a multiple of 64, got 80"):
            in_kernel.wide_stores(
                activations(1, 80, torch.bfloat16), scalar(1.0), *[torch.empty(0)] * 2, SfLayout.layout_8x4
            )

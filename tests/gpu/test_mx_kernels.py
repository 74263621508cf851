"""The Triton kernel for MXFP8 and MXFP4 against its plain-torch twin, bit for bit.

Runs on a GPU and, with TRITON_INTERPRET=1, in Triton's interpreter on the CPU, as test_kernels.py does.
"""

from __future__ import annotations

import pytest
import torch
from support.adversary import Adversary
from support.kernels import DEVICE, GUARD, INTERPRETED, MARKS, ROWS, activations, assert_same_bytes, gpu_only, layouts
from support.kernels import generator as seeded
from support.pytorch_mx import to_mxfp
from torch import Tensor

pytest.importorskip("triton", reason="the Triton kernels need triton")

from safealloc import ScaleFormat, ScalePool, SfLayout, capture, mxfp4_quantize, mxfp8_quantize
from safealloc.formats.spec import ScaleSpec
from safealloc.kernels import reference_mx, triton_mx, triton_padding

pytestmark = MARKS

K = (32, 96, 160, 2880) if INTERPRETED else (32, 64, 96, 160, 1024, 2880, 4096, 28672)
QUANTIZE = {ScaleFormat.mxfp8: mxfp8_quantize, ScaleFormat.mxfp4: mxfp4_quantize}
formats = pytest.mark.parametrize("format", list(QUANTIZE), ids=lambda format: format.name)
dtypes = pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16], ids=lambda dtype: str(dtype).removeprefix("torch.")
)


def check_quantize(
    x: Tensor, layout: SfLayout, format: ScaleFormat, valid_rows: int | None = None, padded_k: int | None = None
) -> tuple[Tensor, Tensor]:
    """Both results have the same bytes, padding and what lies behind them included; returns the data and scales."""
    rows, k = x.shape
    valid = None if valid_rows is None else torch.tensor([valid_rows], dtype=torch.int32, device=DEVICE)
    shape = layout.padded_shape(rows, k, padded_k=padded_k, format=format)
    data_shape = format.data_shape(rows, k)
    results = []
    for kernel in (reference_mx.quantize, triton_mx.quantize):
        data = torch.full((data_shape[0] * data_shape[1] + GUARD,), 0xEE, dtype=torch.uint8, device=DEVICE)
        scales = torch.full((shape[0] * shape[1] + GUARD,), 0xFF, dtype=torch.uint8, device=DEVICE)
        kernel(x, data[:-GUARD].view(data_shape), scales[:-GUARD].view(shape), layout, format, valid)
        results.append((data, scales))
    (expected_data, expected_scales), (data, scales) = results
    assert_same_bytes(scales, expected_scales, f"scales of [{rows}, {k}]")
    assert_same_bytes(data, expected_data, f"data of [{rows}, {k}]")
    return data[:-GUARD].view(data_shape), scales[:-GUARD].view(shape)


def every_value(dtype: torch.dtype, shuffled: bool) -> Tensor:
    """All bit patterns, ``[64, 1024]``, in blocks of neighbors or in shuffled blocks."""
    bits = torch.arange(1 << 16, dtype=torch.int32, device=DEVICE)
    if shuffled:
        bits = bits[torch.randperm(1 << 16, generator=seeded(dtype), device=DEVICE)]
    return (bits - (bits >> 15 << 16)).to(torch.int16).view(dtype).view(64, 1024)


class TestMx:
    @formats
    @layouts
    @dtypes
    @pytest.mark.parametrize("rows", ROWS)
    def test_shapes(self, rows: int, dtype: torch.dtype, layout: SfLayout, format: ScaleFormat) -> None:
        for k in (96,) if INTERPRETED and rows > 9 else K:  # in the interpreter, a program takes milliseconds
            check_quantize(activations(rows, k, dtype), layout, format)

    @formats
    @layouts
    @pytest.mark.parametrize("padded", [32, 96, 128, 416])
    def test_padded_k(self, layout: SfLayout, format: ScaleFormat, padded: int) -> None:
        for rows, k in ((1, 32), (9, 96), (33, 160)):
            check_quantize(activations(rows, k, torch.bfloat16), layout, format, padded_k=k + padded)

    @formats
    @layouts
    @pytest.mark.parametrize("rows", [1, 8, 17])
    def test_valid_rows(self, layout: SfLayout, format: ScaleFormat, rows: int) -> None:
        for valid in {-1, 0, 1, rows // 2, rows, rows + 5, 2**31 - 1}:
            x = activations(rows, 96, torch.bfloat16)
            x[max(valid, 0) :] = float("nan")
            check_quantize(x, layout, format, valid_rows=valid)

    @formats
    @dtypes
    @pytest.mark.parametrize("shuffled", [False, True], ids=["neighbors", "shuffled"])
    def test_every_value(self, dtype: torch.dtype, format: ScaleFormat, shuffled: bool) -> None:
        check_quantize(every_value(dtype, shuffled), SfLayout.layout_linear, format)

    @formats
    def test_a_few_values_in_random_company(self, format: ScaleFormat) -> None:
        """NaN, Inf, zeros, subnormal and largest values, of both signs, each in many blocks."""
        tiny = torch.finfo(torch.bfloat16).tiny
        small = [2.0**-133, 1.5 * 2.0**-127, tiny, 2 * tiny, 2.0**-123, 2.0**-117]
        values = [float("nan"), float("inf"), 0.0, *small, 1.0, 448.0, 6.0, 5.0, 3.3e38]
        pool = torch.tensor([sign * value for value in values for sign in (1, -1)], device=DEVICE).bfloat16()
        rng = seeded(format)
        picks = torch.randint(len(pool), (128, 1024), generator=rng, device=DEVICE)
        first = torch.randint(len(pool), (128, 32, 1), generator=rng, device=DEVICE).expand(-1, -1, 32).reshape(128, -1)
        rare = torch.rand(picks.shape, generator=rng, device=DEVICE) < 0.03
        check_quantize(pool[torch.where(rare, picks, first)], SfLayout.layout_linear, format)

    @formats
    def test_pytorch_gives_the_same_bits_for_normal_values(self, format: ScaleFormat) -> None:
        x = every_value(torch.bfloat16, shuffled=False).cpu()
        x = torch.where(x.isfinite() & (x.abs() >= torch.finfo(torch.bfloat16).tiny), x, 1.0)
        expected_scales, expected = to_mxfp(x, format.name)
        data, scales = check_quantize(x.to(DEVICE), SfLayout.layout_linear, format)
        # 1 may stand for a subnormal number, which our arithmetic flushes to zero
        normal = ((expected_scales > 1) & (expected_scales < 254)).to(DEVICE)
        blocks = (64, 32, -1)
        assert_same_bytes(scales[normal], expected_scales.to(DEVICE)[normal], "scales")
        assert_same_bytes(data.view(blocks)[normal], expected.to(DEVICE).view(blocks)[normal], "data")

    @pytest.mark.parametrize("offset", [1, 2, 3])
    def test_unaligned_input(self, offset: int) -> None:
        x = torch.empty(9 * 96 + offset, dtype=torch.bfloat16, device=DEVICE)[offset:].view(9, 96)
        x.copy_(activations(9, 96, torch.bfloat16))
        check_quantize(x, SfLayout.layout_128x4, ScaleFormat.mxfp8)

    @formats
    @layouts
    def test_zero_padding_zeroes_what_the_format_calls_padding(self, layout: SfLayout, format: ScaleFormat) -> None:
        for rows, k, padded in ((1, 32, 0), (9, 2880, 0), (33, 96, 160)):
            spec = ScaleSpec.checked(rows, k, layout, k + padded, format)
            expected = torch.full((spec.scale_bytes + GUARD,), 0xFF, dtype=torch.uint8, device=DEVICE)
            actual = expected.clone()
            spec.zero_padding(expected[: spec.scale_bytes])
            triton_padding.zero_padding(actual, layout, rows, k, k + padded, format=format)
            assert_same_bytes(actual, expected, str(spec))


@gpu_only
class TestMxOnTheDevice:
    @formats
    @layouts
    def test_more_rows_and_wide_programs(self, layout: SfLayout, format: ScaleFormat) -> None:
        for rows, k in ((513, 4096), (4097, 2880)):
            assert rows * k // 32 > triton_mx.FEW_BLOCKS
            check_quantize(activations(rows, k, torch.bfloat16), layout, format)

    @formats
    def test_more_than_2_to_31_elements(self, format: ScaleFormat) -> None:
        k, first = 16384, 131072  # first * k = 2**31, and whole tiles
        if torch.cuda.mem_get_info()[0] < 16 << 30:
            pytest.skip("needs 16 GiB of free device memory")
        layout = SfLayout.layout_128x4
        x = torch.zeros(first + 130, k, dtype=torch.bfloat16, device=DEVICE)
        x[first:] = activations(130, k, torch.bfloat16)
        data = torch.full(format.data_shape(*x.shape), 0xEE, dtype=torch.uint8, device=DEVICE)
        scales = torch.full(layout.padded_shape(*x.shape, format=format), 0xFF, dtype=torch.uint8, device=DEVICE)
        triton_mx.quantize(x, data, scales, layout, format)
        expected, expected_scales = check_quantize(x[first:], layout, format)
        assert_same_bytes(data[first:], expected, "data")
        assert_same_bytes(scales[first:], expected_scales, "scales")
        assert not data[:first].any()
        assert not scales[:first].any()

    @formats
    @pytest.mark.parametrize("layout", [SfLayout.layout_128x4, SfLayout.layout_8x4], ids=lambda layout: layout.name)
    def test_replays_write_valid_scales_and_padding_stays_zero(self, layout: SfLayout, format: ScaleFormat) -> None:
        """Under the adversary, with 90 scale columns in 92."""
        rows, k = 8, 2880
        x = torch.zeros(rows, k, dtype=torch.bfloat16, device=DEVICE)
        valid = torch.tensor([rows], dtype=torch.int32, device=DEVICE)
        with ScalePool("cuda", growth_in_capture="error") as pool:
            pool.reserve(rows, k, layout, copies=2, format=format)
            QUANTIZE[format](x, layout=layout, pool=pool, valid_rows=valid)  # compiles
            with capture(pool=pool) as graph:
                data, scales = QUANTIZE[format](x, layout=layout, pool=pool, valid_rows=valid)
            adversary = Adversary(pool, [ScaleSpec(rows, k, layout, format=format)])
            adversary.fill_device()
            for step, valid_rows in enumerate((8, 5, 0, 8)):
                x.copy_(activations(rows, k, torch.bfloat16) * 2.0**step)
                x[valid_rows:] = float("nan")
                valid.fill_(valid_rows)
                adversary.fill_cached_memory()
                adversary.write_eager_buffers()
                adversary.run_compiled_code()
                graph.replay()
                expected = torch.empty(format.data_shape(rows, k), dtype=torch.uint8, device=DEVICE)
                expected_scales = torch.zeros_like(scales)
                reference_mx.quantize(x, expected, expected_scales, layout, format, valid)
                assert_same_bytes(data.view(torch.uint8), expected, f"data of step {step}")
                assert_same_bytes(scales, expected_scales, f"scales of step {step}, padding included")
            assert pool.verify() == 2, "the graph's buffer and one of eager work"
            nodes = pool.graph_report(graph).nodes
            assert nodes is None or nodes == {"kernel": 1}

    @formats
    def test_a_launch_allocates_nothing(self, format: ScaleFormat) -> None:
        layout, x = SfLayout.layout_128x4, activations(9, 2880, torch.bfloat16)
        data = torch.empty(format.data_shape(9, 2880), dtype=torch.uint8, device=DEVICE)
        scales = torch.zeros(layout.padded_shape(9, 2880, format=format), dtype=torch.uint8, device=DEVICE)
        triton_mx.quantize(x, data, scales, layout, format)
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        triton_mx.quantize(x, data, scales, layout, format)
        assert torch.cuda.memory_stats()["allocation.all.allocated"] == before

    def test_reciprocals_of_the_device_are_the_rounded_ones(self) -> None:
        """What FlashInfer's kernels multiply by is ``rcp.approx.ftz``; the reference has the correctly rounded number."""
        import triton
        import triton.language as tl

        @triton.jit
        def reciprocals(out, x):
            at = tl.arange(0, 2)
            value = tl.inline_asm_elementwise(
                "rcp.approx.ftz.f32 $0, $1;", "=f,f", [tl.load(x + at)], tl.float32, True, 1
            )
            tl.store(out + at, value)

        x = torch.tensor([448.0, 6.0], device=DEVICE)
        out = torch.empty_like(x)
        reciprocals[(1,)](out, x)
        assert [hex(bits) for bits in out.view(torch.int32).tolist()] == ["0x3b124925", "0x3e2aaaab"]

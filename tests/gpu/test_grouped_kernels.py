"""The kernels for rows grouped by expert against their plain-torch twins: every byte of data, scales and record.

Runs on a GPU and, with TRITON_INTERPRET=1, in Triton's interpreter on the CPU, as test_kernels.py does.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import pytest
import torch
from support.kernels import DEVICE, GUARD, INTERPRETED, MARKS, layouts
from torch import Tensor

triton = pytest.importorskip("triton", reason="the Triton kernels need triton")
import triton.language as tl  # noqa: E402

from safealloc.formats.format import ScaleFormat  # noqa: E402
from safealloc.formats.layout import SfLayout  # noqa: E402
from safealloc.kernels import reference, reference_grouped, triton_grouped  # noqa: E402

pytestmark = MARKS

SHAPES = (
    ((6, 24, 80), (1, 16, 528)) if INTERPRETED else ((6, 40, 80), (1, 300, 528), (100, 700, 1040), (256, 512, 2048))
)
MX_SHAPES = ((6, 40), (1, 30)) if INTERPRETED else ((6, 40), (1, 300), (128, 2048))
STEPS = 6 if INTERPRETED else 40

shapes = pytest.mark.parametrize(("experts", "most", "k"), SHAPES)


@dataclass
class Groups:
    """Rows of each expert, and their offsets."""

    counts: list[int]
    layout: SfLayout

    def __post_init__(self) -> None:
        tile = self.layout.tile.rows
        counts = torch.tensor(self.counts)
        self.expert_offsets = self.sums(counts)
        self.blockscale_offsets = self.sums((counts + tile - 1) // tile * tile)

    def sums(self, counts: Tensor) -> Tensor:
        return torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]).to(torch.int32).to(DEVICE)


class Buffer:
    """Scales and record, with bytes behind each that nobody may touch."""

    def __init__(
        self, experts: int, most: int, k: int, layout: SfLayout, format: ScaleFormat = ScaleFormat.nvfp4
    ) -> None:
        padded_rows, padded_cols = layout.padded_shape(layout.grouped_rows(most, experts), k, format=format)
        self.memory = torch.zeros(padded_rows * padded_cols + GUARD, dtype=torch.uint8, device=DEVICE)
        self.scales = self.memory[:-GUARD].view(padded_rows, padded_cols)
        self.noted = torch.zeros(most + GUARD, dtype=torch.int32, device=DEVICE)
        self.record = self.noted[:-GUARD]

    def check(self, other: Buffer, what: str) -> None:
        assert torch.equal(self.memory, other.memory), f"{what}: scales"
        assert torch.equal(self.noted, other.noted), f"{what}: record"


class TestGrouped:
    def draw(self, layout: SfLayout, experts: int, most: int, step: int) -> tuple[int, Groups, torch.Generator]:
        """Even, skewed and one-sided groups, some with rows outside of every group."""
        rng = torch.Generator().manual_seed(zlib.crc32(repr((layout, experts, most, step)).encode()))
        rows = int(torch.randint(1, most + 1, (1,), generator=rng))
        grouped = int(torch.randint(0, rows + 1, (1,), generator=rng)) if step % 4 == 0 else rows
        chosen = torch.randint(0, experts, (grouped,), generator=rng)
        if step % 3 == 1:
            chosen = chosen**3 // experts**2
        elif step % 3 == 2:
            chosen = chosen * 0 + step % experts
        return rows, Groups(torch.bincount(chosen, minlength=experts).tolist(), layout), rng

    @layouts
    @shapes
    @pytest.mark.parametrize("silu_and_mul", [False, True], ids=["quantize", "silu_and_mul"])
    def test_a_sequence_of_steps(self, layout: SfLayout, experts: int, most: int, k: int, silu_and_mul: bool) -> None:
        """One buffer through steps that differ in rows, groups, dtype and valid rows."""
        ours, theirs = (Buffer(experts, most, k, layout) for _ in range(2))
        for step in range(STEPS):
            rows, groups, rng = self.draw(layout, experts, most, step)
            x = torch.randn(rows, 2 * k if silu_and_mul else k, generator=rng) * 3
            x[int(torch.randint(0, rows, (1,), generator=rng))] = (float("nan"), float("inf"), 0.0)[step % 3]
            x = x.to(torch.bfloat16 if step % 2 else torch.float16).to(DEVICE)
            global_scales = (torch.rand(experts, generator=rng) * 100).to(DEVICE)
            valid_rows = torch.tensor([rows // 2], dtype=torch.int32, device=DEVICE) if step % 3 == 0 else None
            row_tokens = torch.randperm(rows, generator=rng).int().to(DEVICE) if step % 6 == 0 else None
            results = []
            for kernel, buffer in ((triton_grouped.quantize, ours), (reference_grouped.quantize, theirs)):
                data = torch.full((rows * k // 2 + GUARD,), 0xEE, dtype=torch.uint8, device=DEVICE)
                kernel(
                    x,
                    global_scales,
                    data[:-GUARD].view(rows, k // 2),
                    buffer.scales,
                    layout,
                    buffer.record,
                    groups.expert_offsets,
                    groups.blockscale_offsets,
                    valid_rows,
                    row_tokens,
                    silu_and_mul,
                )
                results.append(data)
            assert torch.equal(*results), f"step {step}: data"
            ours.check(theirs, f"step {step}")

    @layouts
    @shapes
    def test_cleaning_beside_another_producer(self, layout: SfLayout, experts: int, most: int, k: int) -> None:
        """The other producer writes valid scales only; cleaned before or after it, the buffer is the quantizer's."""
        produce = (reference_grouped if INTERPRETED else triton_grouped).quantize  # what is interpreted takes seconds
        ours, theirs = (Buffer(experts, most, k, layout) for _ in range(2))
        for step in range(STEPS):
            rows, groups, rng = self.draw(layout, experts, most, step)
            x = torch.randn(rows, k, generator=rng).bfloat16().to(DEVICE)
            global_scales = torch.ones(experts, device=DEVICE)
            offsets = groups.expert_offsets, groups.blockscale_offsets
            data = torch.empty(rows, k // 2, dtype=torch.uint8, device=DEVICE)

            def clean(rows: int = rows, offsets: tuple[Tensor, Tensor] = offsets) -> None:
                triton_grouped.clean(ours.scales, layout, k // 16, ours.record, *offsets, rows)

            if step % 2:
                clean()
            produce(x, global_scales, data, ours.scales, layout, None, *offsets)
            if step % 2 == 0:
                clean()
            reference_grouped.quantize(x, global_scales, data, theirs.scales, layout, theirs.record, *offsets)
            ours.check(theirs, f"step {step}")
            assert ours.scales.any() or not sum(groups.counts)

    @layouts
    @pytest.mark.parametrize(("experts", "most"), MX_SHAPES)
    def test_cleaning_mx_scales(self, layout: SfLayout, experts: int, most: int) -> None:
        """MX scales of k = 2880, gpt-oss's: 90 columns in 92. The producer writes valid scales only."""
        k, format = 2880, ScaleFormat.mxfp4
        ours, theirs = (Buffer(experts, most, k, layout, format) for _ in range(2))
        at = layout.offsets(len(ours.scales), k, DEVICE, format=format)
        for step in range(STEPS // 2):
            rows, groups, rng = self.draw(layout, experts, most, step)
            offsets = groups.expert_offsets, groups.blockscale_offsets
            place = reference_grouped.places(rows, *offsets, len(ours.scales))[1]
            place = place[place >= 0]
            written = torch.randint(1, 256, (len(place), k // 32), dtype=torch.uint8, generator=rng).to(DEVICE)
            for clean, buffer in ((triton_grouped.clean, ours), (reference_grouped.clean, theirs)):
                if step % 2:
                    clean(buffer.scales, layout, k // 32, buffer.record, *offsets, rows)
                buffer.scales.view(-1)[at[place]] = written
                if step % 2 == 0:
                    clean(buffer.scales, layout, k // 32, buffer.record, *offsets, rows)
            ours.check(theirs, f"step {step}")
            assert int(ours.scales.count_nonzero()) == written.numel(), f"step {step}: stale scales"
            assert torch.equal(ours.scales.view(-1)[at[place]], written)

    def test_without_a_record_nothing_is_cleaned(self) -> None:
        layout, k = SfLayout.layout_8x4, 80
        buffer = Buffer(2, 8, k, layout)
        x, one = torch.ones(8, k, dtype=torch.bfloat16, device=DEVICE), torch.ones(2, device=DEVICE)
        data = torch.empty(8, k // 2, dtype=torch.uint8, device=DEVICE)
        for counts, scales in (([5, 3], 8), ([1, 0], 8)):
            groups = Groups(counts, layout)
            offsets = groups.expert_offsets, groups.blockscale_offsets
            triton_grouped.quantize(x, one, data, buffer.scales, layout, None, *offsets)
            assert int((buffer.scales != 0).sum()) == scales * 5
        assert not buffer.noted.any()
        triton_grouped.clean(buffer.scales, layout, k // 16, buffer.record, *offsets, 8)
        assert buffer.record[:8].tolist() == [1] + 7 * [-1]

    @layouts
    def test_offsets_that_contradict_the_buffer_write_nothing_beyond_it(self, layout: SfLayout) -> None:
        experts, rows, k = 4, 12, 80
        ours, theirs = (Buffer(experts, rows, k, layout) for _ in range(2))
        x = torch.ones(rows, k, dtype=torch.bfloat16, device=DEVICE)
        global_scales = torch.ones(experts, device=DEVICE)
        expert_offsets = torch.tensor([0, 3, 6, 9, 12], dtype=torch.int32, device=DEVICE)
        beyond = torch.tensor(
            [0, 1 << 20, (1 << 20) + 512, (1 << 30), (1 << 30) + 512], dtype=torch.int32, device=DEVICE
        )
        for kernel, buffer in ((triton_grouped.quantize, ours), (reference_grouped.quantize, theirs)):
            data = torch.empty(rows, k // 2, dtype=torch.uint8, device=DEVICE)
            kernel(x, global_scales, data, buffer.scales, layout, buffer.record, expert_offsets, beyond)
            assert data[:3].any()
            assert not data[3:].any()
        ours.check(theirs, "offsets beyond the buffer")
        assert ours.record[:rows].tolist() == [1, 2, 3] + 9 * [-1]

    def test_a_record_with_numbers_beyond_the_buffer_writes_nothing_beyond_it(self) -> None:
        layout, experts, rows, k = SfLayout.layout_128x4, 2, 4, 80
        buffer = Buffer(experts, rows, k, layout)
        buffer.record.copy_(torch.tensor([1 << 30, -(1 << 30), 257, 256], dtype=torch.int32))
        groups = Groups([2, 2], layout)
        triton_grouped.clean(
            buffer.scales, layout, k // 16, buffer.record, groups.expert_offsets, groups.blockscale_offsets, rows
        )
        assert not buffer.memory.any()
        assert buffer.noted[:rows].tolist() == [1, 2, 129, 130]
        assert not buffer.noted[rows:].any()

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
    def test_silu_of_every_value(self, dtype: torch.dtype) -> None:
        """Each bit pattern as a gate, against the reference; and the reference against PyTorch."""
        step = 37 if INTERPRETED else 1
        gate = torch.arange(0, 1 << 16, step, dtype=torch.int32).to(torch.int16).view(dtype)
        gate = gate[: len(gate) // 16 * 16].view(1, -1)
        if not INTERPRETED:
            gate = gate.view(256, -1)
        rows, k = gate.shape
        x = torch.cat([gate, torch.full_like(gate, 1.5)], 1).contiguous().to(DEVICE)
        groups = Groups([rows], SfLayout.layout_linear)
        one, results = torch.ones(1, device=DEVICE), []
        for kernel in (triton_grouped.quantize, reference_grouped.quantize):
            data = torch.empty(rows, k // 2, dtype=torch.uint8, device=DEVICE)
            scales = torch.zeros(rows, k // 16, dtype=torch.uint8, device=DEVICE)
            offsets = groups.expert_offsets, groups.blockscale_offsets
            kernel(x, one, data, scales, SfLayout.layout_linear, None, *offsets, None, None, True)
            results.append((data, scales))
        assert torch.equal(results[0][0], results[1][0])
        assert torch.equal(results[0][1], results[1][1])
        ours = reference.multiply(x).float()
        exact = torch.nn.functional.silu(gate.double()) * 1.5
        finite = exact.to(dtype).isfinite() & (exact.abs() > 1e-30)
        error = (ours.cpu().double() - exact).abs()[finite] / exact.abs()[finite]
        steps = 2.0**-8 if dtype is torch.bfloat16 else 2.0**-10
        normal = exact.abs()[finite] > torch.finfo(dtype).tiny
        assert float(error[normal].max()) < steps


@triton.jit(do_not_specialize=["divisor", "reciprocal"])
def _divided(numbers, quotients, rests, divisor, reciprocal, COUNT: tl.constexpr):
    at = tl.arange(0, COUNT)
    quotient, rest = triton_grouped._divide(tl.load(numbers + at), divisor, reciprocal)
    tl.store(quotients + at, quotient)
    tl.store(rests + at, rest)


@pytest.mark.parametrize("divisor", [1, 2, 3, 7, 14, 28, 64, 1023, 65537, 2**30 + 1, 2**31 - 1])
def test_the_division_without_a_division_is_exact(divisor: int) -> None:
    most = 2**31 - 1
    near = [multiple + by for multiple in (0, divisor, most // divisor * divisor, most) for by in (-1, 0, 1)]
    numbers = [number for number in near if 0 <= number <= most]
    numbers += torch.randint(most, (64 - len(numbers),), generator=torch.Generator().manual_seed(divisor)).tolist()
    given = torch.tensor(numbers, dtype=torch.int32, device=DEVICE)
    quotients, rests = torch.empty_like(given), torch.empty_like(given)
    _divided[(1,)](given, quotients, rests, divisor, most // divisor, COUNT=64)
    assert quotients.tolist() == [number // divisor for number in numbers]
    assert rests.tolist() == [number % divisor for number in numbers]

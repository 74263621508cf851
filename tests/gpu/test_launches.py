"""What a launch of our kernels must not do: need the current device, synchronize, allocate."""

from __future__ import annotations

import pytest
import torch
from support.kernels import (
    DEVICE,
    MARKS,
    Operand,
    activations,
    assert_same_bytes,
    generator,
    gpu_only,
    scalar,
)
from torch import Tensor

triton = pytest.importorskip("triton", reason="the Triton kernels need triton")

from safealloc.formats.format import NAN_SCALE  # noqa: E402
from safealloc.formats.layout import SfLayout  # noqa: E402
from safealloc.formats.spec import ScaleSpec  # noqa: E402
from safealloc.kernels import reference, triton_gemm, triton_padding, triton_quantize  # noqa: E402

pytestmark = MARKS


@gpu_only
class TestLaunch:
    """A launch must not need the current device, synchronize or allocate."""

    def buffers(self, rows: int, k: int, n: int, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        return (
            torch.tensor([20.0], device=device),
            torch.tensor([rows], dtype=torch.int32, device=device),
            torch.zeros(rows, k // 2, dtype=torch.uint8, device=device),
            torch.full(SfLayout.layout_128x4.padded_shape(rows, k), NAN_SCALE, dtype=torch.uint8, device=device),
            torch.zeros(rows, n, device=device),
        )

    def test_in_a_cuda_graph(self) -> None:
        rows, k, n = 9, 496, 64
        weight = Operand(n, k, SfLayout.layout_128x4)
        weight_scales = weight.scales
        x, buffers = activations(rows, k, torch.bfloat16), self.buffers(rows, k, n, DEVICE)
        g, valid, data, scales, out = buffers
        layout = SfLayout.layout_128x4

        def chain() -> None:
            triton_quantize.quantize(x, g, data, scales, layout, valid)
            triton_padding.zero_padding(scales, layout, rows, k)
            triton_gemm.mm(data, weight.data, scales, weight_scales, None, out, layout)

        chain()  # compiles
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        chain()
        assert torch.cuda.memory_allocated() == before
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            chain()
        for valid_rows in (9, 4, 0):
            x.copy_(activations(rows, k, torch.bfloat16) * (1 + valid_rows))
            x[valid_rows:] = float("nan")
            valid.fill_(valid_rows)
            scales.fill_(NAN_SCALE)
            graph.replay()
            eager = self.buffers(rows, k, n, DEVICE)
            reference.quantize(x, g, eager[2], eager[3], layout, valid)
            ScaleSpec(rows, k, layout).zero_padding(eager[3])
            assert_same_bytes(data, eager[2], "data")
            assert_same_bytes(scales, eager[3], "scales")
            assert out.isfinite().all()
            assert not out[valid_rows:].any()

    def test_a_dependent_launch_waits_for_what_came_before(self) -> None:
        """The kernels before it are slow: one writes x, one reads the previous results, and it has to wait for both."""
        rows, k, layout = 8, 8192, SfLayout.layout_128x4
        parts = torch.zeros(512, rows * k, dtype=torch.bfloat16, device=DEVICE)
        x, g = torch.zeros(rows, k, dtype=torch.bfloat16, device=DEVICE), scalar(20.0)
        data = torch.zeros(rows, k // 2, dtype=torch.uint8, device=DEVICE)
        scales = torch.zeros(layout.padded_shape(rows, k), dtype=torch.uint8, device=DEVICE)
        seen, seen_scales = torch.empty(4096, *data.shape, dtype=torch.uint8, device=DEVICE), scales.clone()
        other = activations(rows, k, torch.bfloat16)

        def chain() -> None:
            torch.sum(parts, 0, out=x.view(-1))  # x is written at its end
            triton_quantize.quantize(x, g, data, scales, layout)
            x.fill_(float("nan"))  # too late for the quantizer
            seen_scales.copy_(scales)
            seen.copy_(data)  # 128 MiB, of which the last rows are read last
            triton_quantize.quantize(other, g, data, scales, layout)

        chain()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            chain()
        expected, expected_scales = torch.empty_like(data), torch.zeros_like(scales)
        for run in range(50):
            parts.normal_(generator=generator(run))
            (graph.replay if run % 2 else chain)()
            reference.quantize(torch.sum(parts, 0).view(rows, k), g, expected, expected_scales, layout)
            assert_same_bytes(seen_scales, expected_scales, f"scales of run {run}")
            assert torch.equal(seen, expected.expand_as(seen)), f"data of run {run}"

    @pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
    def test_on_another_device(self) -> None:
        rows, k, n = 9, 496, 64
        weight = Operand(n, k, SfLayout.layout_128x4)
        x = activations(rows, k, torch.bfloat16)
        here, there = self.buffers(rows, k, n, "cuda:0"), self.buffers(rows, k, n, "cuda:1")
        layout = SfLayout.layout_128x4
        with torch.cuda.device(0):
            for device, (g, valid, data, scales, out) in (("cuda:0", here), ("cuda:1", there)):
                triton_quantize.quantize(x.to(device), g, data, scales, layout, valid)
                triton_padding.zero_padding(scales, layout, rows, k)
                triton_gemm.mm(data, weight.data.to(device), scales, weight.scales.to(device), None, out, layout)
            assert torch.cuda.current_device() == 0
        for mine, other in zip(here, there, strict=True):
            assert torch.equal(mine, other.to("cuda:0"))

"""FlashInfer's own host dequantizer reads back what we wrote: an oracle that nobody here wrote."""

from __future__ import annotations

import pytest
import torch

from safealloc import SfLayout, nvfp4_quantize
from safealloc._optional import missing, require
from safealloc.kernels import reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(missing("flashinfer") is not None, reason=f"the oracle is FlashInfer: {missing('flashinfer')}"),
]


@pytest.mark.parametrize("layout", [SfLayout.layout_128x4, SfLayout.layout_8x4])
@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize(("rows", "k"), [(1, 64), (5, 512), (8, 1024), (33, 4096), (130, 256), (257, 1024), (7, 7168)])
def test_data_and_scales_read_back_exactly(rows, k, layout, backend):
    flashinfer = require("flashinfer")
    x = torch.randn(rows, k, device="cuda", dtype=torch.bfloat16)
    x_fp4, scales = nvfp4_quantize(x, torch.tensor([500.0], device="cuda"), layout=layout, backend=backend)
    one = torch.ones(1)
    read = flashinfer.e2m1_and_ufp8sf_scale_to_float(
        x_fp4.cpu(), scales.cpu().reshape(-1), one, 16, 1, True, layout is SfLayout.layout_8x4
    )
    assert torch.equal(read, reference.dequantize(x_fp4.cpu(), scales.cpu(), layout))


@pytest.mark.parametrize(("rows", "cols"), [(128, 32), (256, 64), (384, 8)])
def test_the_swizzle_is_theirs(rows, cols):
    flashinfer = require("flashinfer")
    linear = torch.randint(0, 256, (rows, cols), dtype=torch.uint8, device="cuda")
    theirs = flashinfer.block_scale_interleave(linear)
    assert torch.equal(SfLayout.layout_128x4.swizzle(linear).view(-1), theirs.view(torch.uint8).view(-1))

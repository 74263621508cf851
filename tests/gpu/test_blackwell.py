"""FlashInfer's GEMMs on pool buffers, and the audit with a pool: what only a Blackwell GPU can run."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from safealloc import (
    LayoutMismatchError,
    ScalePool,
    SfLayout,
    _optional,
    mm_fp4,
    nvfp4_linear,
    nvfp4_quantize,
    use_pool,
)
from safealloc.audit.consumers import TOLERANCE
from safealloc.cli import main
from safealloc.commands.repro.operands import Weight, random_activation
from safealloc.kernels import reference
from safealloc.ops.backends import GEMMS, Call

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.sm100,
    pytest.mark.skipif(_optional.missing("flashinfer") is not None, reason=f"{_optional.missing('flashinfer')}"),
]

N = 256
DEVICE, NAN = torch.device("cuda"), 0x7F
ANY_K = ("flashinfer", "cudnn", "cutlass", "b12x")  # a multiple of 32; FlashInfer's others want more


@pytest.fixture
def pool():
    with ScalePool(DEVICE) as pool:
        yield pool


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def skip_unless(name: str, layout: SfLayout) -> None:
    device = torch.zeros(0, device=DEVICE).device  # with its index
    reason = GEMMS[name].refusal(Call(device, layout, torch.bfloat16, row_alpha=name == "cake"))
    if reason is not None:
        pytest.skip(reason)


def operands(m: int, k: int, name: str, generator: torch.Generator) -> tuple[Tensor, Weight, Weight]:
    """An activation, a weight for the reference, and the same as a backend takes it."""
    x = random_activation(m, k, DEVICE, generator)
    weight = Weight.random(N, k, DEVICE, generator)
    given = weight.shuffled() if name == "trtllm" else weight
    return x, weight, replace(given, alpha=given.alpha.expand(m).contiguous()) if name == "cake" else given


def quantize(x: Tensor, layout: SfLayout, pool: ScalePool) -> tuple[Tensor, Tensor]:
    """Into a buffer of the pool that served a matrix of NaN before."""
    one = torch.ones(1, device=DEVICE)
    address = nvfp4_quantize(torch.full_like(x, float("nan")), one, layout=layout, pool=pool)[1].data_ptr()
    x_fp4, scales = nvfp4_quantize(x, one, layout=layout, pool=pool)
    assert scales.data_ptr() == address
    return x_fp4, scales


def close(y: Tensor, right: Tensor) -> bool:
    difference = (y.float() - right.float()).abs().max()
    return bool(difference <= TOLERANCE * right.float().abs().max())  # NaN is not


@pytest.mark.parametrize(("m", "k"), [(5, 512), (40, 512), (5, 480)])
@pytest.mark.parametrize("name", [name for name, row in GEMMS.items() if row.package])
def test_a_gemm_on_pool_buffers_and_on_poisoned_ones(name, m, k, pool, generator):
    """As the reference: on the pool's buffer, and on NaN padding, copied to the pool or zeroed as a foreign buffer."""
    skip_unless(name, SfLayout.layout_128x4)
    if (k % 64 and name not in ANY_K) or (m > 8 and name == "cutedsl_low_latency"):
        pytest.skip("FlashInfer's does not take this shape")
    x, weight, given = operands(m, k, name, generator)
    x_fp4, scales = quantize(x, SfLayout.layout_128x4, pool)
    right = weight.multiply(x_fp4, scales, "reference", use_8x4=None)
    assert close(given.multiply(x_fp4, scales, name, use_8x4=None), right)

    offsets = SfLayout.layout_128x4.offsets(m, k, DEVICE)
    poisoned = torch.full_like(scales, NAN)
    poisoned.view(-1)[offsets] = scales.view(-1)[offsets]
    replaced = pool.acquire(m, k, SfLayout.layout_128x4)
    replaced.view(-1)[offsets] = poisoned.view(-1)[offsets]
    assert close(given.multiply(x_fp4, replaced, name, use_8x4=None), right)
    assert close(given.multiply(x_fp4, poisoned, name, use_8x4=False), right)  # set_foreign_scales("zero"), the default
    assert pool.verify() == 2


@pytest.mark.parametrize("m", [1, 5, 8, 9, 32])
def test_trtllm_reads_8x4_scales_of_the_pool(m, pool, generator):
    skip_unless("trtllm", SfLayout.layout_8x4)
    x, weight, given = operands(m, 512, "trtllm", generator)
    x_fp4, scales = quantize(x, SfLayout.layout_8x4, pool)
    right = weight.multiply(x_fp4, scales, "reference", use_8x4=None)
    assert close(given.multiply(x_fp4, scales, "trtllm", use_8x4=None), right)
    with pytest.raises(LayoutMismatchError):
        given.multiply(x_fp4, scales, "trtllm", use_8x4=False)
    assert pool.verify() == 1
    with ScalePool(DEVICE) as other, use_pool(other):
        other.reserve(m, 512, SfLayout.layout_8x4)
        y = nvfp4_linear(
            x, given.fp4, given.scales, given.alpha, given.alpha, backend="trtllm"
        )  # both global scales are 1
        assert close(y, right)
        assert other.verify() == 1, "it took a buffer of another layout"


def test_trtllm_on_a_weight_that_is_not_shuffled_is_wrong(pool, generator):
    """So the other tests would see a wrong product."""
    skip_unless("trtllm", SfLayout.layout_128x4)
    x, weight, given = operands(5, 512, "trtllm", generator)
    x_fp4, scales = quantize(x, SfLayout.layout_128x4, pool)
    exact = (
        reference.dequantize(x_fp4, scales, SfLayout.layout_128x4)
        @ reference.dequantize(weight.fp4, weight.scales, SfLayout.layout_128x4).T
    )
    assert close(given.multiply(x_fp4, scales, "trtllm", use_8x4=None), exact)
    assert not close(mm_fp4(x_fp4, weight.fp4.T, scales, given.scales.T, given.alpha, backend="trtllm"), exact)


def test_every_combination_is_safe_in_a_pool(tmp_path, capsys):
    file = tmp_path / "audit.json"
    code = main(["audit", "--device", str(DEVICE), "--quick", "--with-pool", "--json", str(file)])
    printed = capsys.readouterr().out
    found = json.loads(file.read_text())
    assert any(row["consumer"].startswith("flashinfer") for row in found["combinations"]), printed
    assert [row for row in found["combinations"] if not row["safe"]] == []
    assert (code, found["safe"]) == (0, True)

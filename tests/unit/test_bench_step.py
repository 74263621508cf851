"""The step that ``python -m benchmarks decode`` measures: what runs in which order, on what; no GPU is needed."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from support.interpreted import printed_lines
from torch import Tensor

pytest.importorskip("triton", reason="the kernels need triton")
from benchmarks import decode, moe
from benchmarks.models import MODELS, Model
from safealloc import ScalePool
from safealloc.commands.plan.architectures import ExpertSite, Site
from safealloc.formats.layout import SfLayout
from safealloc.kernels import reference, reference_grouped

CPU = torch.device("cpu")
K, WIDTH = 128, 64
DENSE = (
    Site("self_attn.qkv_proj", K, 192, (0, 1)),
    Site("self_attn.o_proj", 64, K, (0, 1)),
    Site("mlp.gate_up_proj", K, 2 * WIDTH, (0,)),
    Site("mlp.down_proj", WIDTH, K, (0,)),
)
EXPERTS = ExpertSite("mlp.experts", K, WIDTH, 6, 2, ("gate_proj", "up_proj", "down_proj"), (1,))
MIXED = Model("small", 1, (*DENSE, EXPERTS))


class Did(NamedTuple):
    """One kernel of a step."""

    what: str
    about: Any


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[Did]:
    """What a step launches, with plain torch in place of the Triton kernels."""
    done: list[Did] = []

    def mm(a: Tensor, b: Tensor, a_scales: Tensor, b_scales: Tensor, alpha: Tensor, out: Tensor, layout: SfLayout):
        reference.mm(a, b, a_scales.view(-1)[: layout.nbytes(len(a), 2 * a.shape[1])], b_scales, alpha, out, layout)
        done.append(Did("mm", (tuple(a.shape), tuple(b.shape), b.data_ptr(), out.clone())))

    def rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, out: Tensor, total: Tensor | None) -> None:
        summed = x if residual is None else x + residual
        out.copy_(torch.nn.functional.rms_norm(summed.float(), x.shape[1:], weight.float(), 1e-6))
        done.append(Did("norm", (x.shape[1], residual is not None)))

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 30, 1 << 30))
    monkeypatch.setattr(decode.triton_gemm, "mm", mm)
    monkeypatch.setattr(decode.producers, "rms_norm", rms_norm)
    return done


def baseline(pool: ScalePool, done: list[Did], layout: SfLayout | None = None) -> decode.Baseline:
    """The pool's, with plain torch."""

    def quantize(x: Tensor, global_scale: Tensor, layout: SfLayout, silu_and_mul: bool = False):
        k = x.shape[1] // (2 if silu_and_mul else 1)
        x_fp4, scales = torch.empty(len(x), k // 2, dtype=torch.uint8), pool.acquire(len(x), k, layout)
        reference.quantize(x, global_scale, x_fp4, scales, layout, None, silu_and_mul)
        done.append(Did("silu and quantize" if silu_and_mul else "quantize", k))
        return x_fp4, scales

    def experts(step: moe.Step):
        rows, count = len(step.x), len(step.global_scales)
        scales = torch.zeros(moe.right_sized_rows(rows, count), max(4, step.k // 16), dtype=torch.uint8)
        data = torch.empty(rows, step.k // 2, dtype=torch.uint8)
        reference_grouped.quantize(
            step.x, step.global_scales, data, scales, moe.LAYOUT, None, *step.offsets, silu_and_mul=step.silu
        )
        done.append(Did("experts: silu and quantize" if step.silu else "experts: quantize", (rows, step.k)))
        return data, scales

    return decode.Baseline("pool", "", quantize, experts, layout)


def test_every_site_has_its_producer_its_quantization_and_its_product(log: list[Did]) -> None:
    weights = decode.weights_of(MIXED, CPU)
    with ScalePool(CPU) as pool:
        step = decode.Step(MIXED, weights, 3, CPU)
        step.run(baseline(pool, log))
        pool.verify()
    attention = [("norm", (K, True)), ("quantize", K), "mm", ("quantize", 64), "mm"]
    dense = [("norm", (K, True)), ("quantize", K), "mm", ("silu and quantize", WIDTH), "mm"]
    experts = [
        ("norm", (K, True)),
        ("experts: quantize", (6, K)),
        "mm",
        ("experts: silu and quantize", (6, WIDTH)),
        "mm",
    ]
    assert [did.what if did.what == "mm" else tuple(did) for did in log] == attention + dense + attention + experts
    quantizations = [did for did in log if "quantize" in did.what]
    assert len(quantizations) == MIXED.quantizations == 8


def test_a_low_rank_query_has_a_norm_without_residual_and_shared_experts_share_the_norm_of_the_routed_ones() -> None:
    deepseek = next(model for model in MODELS if model.name == "DeepSeek-R1")
    small = Model("2 layers", 1, deepseek.sites)
    sites = [(site, site.layers[number], None) for site, number in small.step]
    found = [(sites[place][0].name, residual) for place, residual in decode.norms(sites).items()]
    assert found[:3] == [
        ("self_attn.fused_qkv_a_proj", True),
        ("self_attn.q_b_proj", False),
        ("mlp.gate_up_proj", True),
    ]
    assert found[-3:] == [
        ("self_attn.fused_qkv_a_proj", True),
        ("self_attn.q_b_proj", False),
        ("mlp.shared_experts.gate_up_proj", True),
    ]
    assert len(found) == 3 * 61


def test_each_layer_reads_its_own_weight_and_experts_as_many_as_the_batch_is_routed_to(log: list[Did]) -> None:
    weights = decode.weights_of(MIXED, CPU)
    with ScalePool(CPU) as pool:
        step = decode.Step(MIXED, weights, 3, CPU)
        step.run(baseline(pool, log))
    active = step.active_experts
    assert active is not None
    assert 2 <= active <= 6
    products = [did.about for did in log if did.what == "mm"]
    dense = [address for _, _, address, _ in products[:-2]]
    order = [(0, 0), (1, 0), (2, 0), (3, 0), (0, 1), (1, 1)]
    assert dense == [weights[DENSE[place]][number].fp4.data_ptr() for place, number in order]
    per_expert = -(-6 // active)  # 3 tokens, 2 experts each
    assert [(a, b) for a, b, _, _ in products[-2:]] == [
        ((per_expert, K // 2), (active * 128, K // 2)),  # w13: gate and up
        ((per_expert, WIDTH // 2), (active * 128, WIDTH // 2)),  # w2
    ]
    for (_, shape, address, _), weight in zip(products[-2:], weights[EXPERTS], strict=True):
        first, last = weight.fp4.data_ptr(), weight.fp4.data_ptr() + weight.fp4.nbytes
        assert first <= address <= address + shape[0] * shape[1] <= last


def test_layers_of_experts_read_different_parts_of_the_weights(log: list[Did]) -> None:
    site = ExpertSite("mlp.experts", K, WIDTH, 16, 1, ("gate_proj", "up_proj", "down_proj"), (0, 1, 2))
    model = Model("experts", 1, (Site("self_attn.qkv_proj", K, 64, (0, 1, 2)), site))
    with ScalePool(CPU) as pool:
        decode.Step(model, decode.weights_of(model, CPU), 1, CPU).run(baseline(pool, log))
    addresses = [did.about[2] for did in log if did.what == "mm" and did.about[0][1] == WIDTH // 2]
    assert len(set(addresses)) == 3


@pytest.mark.parametrize("layout", [None, SfLayout.layout_linear])
def test_products_alone_quantize_once_and_read_the_same_weights(log: list[Did], layout: SfLayout | None) -> None:
    model = Model("dense", 1, DENSE) if layout is not None else MIXED
    with ScalePool(CPU) as pool:
        step, way = decode.Step(model, decode.weights_of(model, CPU), 3, CPU), baseline(pool, log, layout)
        step.run(way)
        ran = [did.about for did in log if did.what == "mm"]
        log.clear()
        step.multiply(way)
        first = [did.what for did in log]
        log.clear()
        step.multiply(way)
        again = [did.about for did in log]
    assert "norm" not in first
    assert {did.what for did in log} == {"mm"}
    assert [about[:3] for about in again] == [about[:3] for about in ran]
    for *_, out in ran:
        assert out.isfinite().all()
        assert out.count_nonzero() > out.numel() / 4


def test_an_expert_weight_is_one_layers_and_each_expert_begins_at_a_tile_of_scales(log: list[Did]) -> None:
    site = ExpertSite("mlp.experts", 48, 80, 3, 2, ("gate_proj", "up_proj", "down_proj"), (0, 1, 2, 3))
    model = Model("experts", 1, (DENSE[0], site))
    w13, w2 = decode.weights_of(model, CPU)[site]
    assert w13.fp4.shape == (3 * 256, 24)  # 160 rows of gate and up
    assert w13.scales.shape == (3 * 256, 4)
    assert w2.fp4.shape == (3 * 128, 40)
    assert w2.scales.shape == (3 * 128, 8)


PROGRAM = """
import torch
from safealloc import ScalePool
from benchmarks import baselines, moe, producers
from safealloc.formats.layout import SfLayout
from safealloc.kernels import reference

generator = torch.Generator().manual_seed(0)
x, residual = (torch.randn(3, 80, generator=generator).bfloat16() for _ in range(2))
weight = torch.randn(80, generator=generator).bfloat16()
for added in (None, residual):
    out = torch.empty_like(x)
    total = None if added is None else torch.empty_like(x)
    producers.rms_norm(x, added, weight, out, total)
    summed = x.float() if added is None else x.float() + added.float()
    wanted = torch.nn.functional.rms_norm(summed, (80,), weight.float(), producers.EPSILON)
    torch.testing.assert_close(out.float(), wanted, rtol=1e-2, atol=1e-3)
    if total is not None:
        torch.testing.assert_close(total.float(), summed, rtol=1e-2, atol=1e-3)
    print("norm")

gate_up, one = torch.randn(3, 128, generator=generator).bfloat16(), torch.ones(1)
counts = torch.tensor([2, 0, 4])
rows = torch.randn(6, 64, generator=generator).bfloat16()
step = moe.Step(rows, torch.ones(3), moe.offsets(counts, torch.device("cpu")), 64, False)
with ScalePool("cpu") as pool:
    for name, baseline in baselines.baselines(pool).items():
        layout = baseline.layout or SfLayout.layout_128x4
        for silu, given in ((False, gate_up[:, :64].contiguous()), (True, gate_up)):
            data, scales = baseline.quantize(given, one, layout, silu_and_mul=silu)
            expected, expected_scales = torch.empty_like(data), torch.zeros_like(scales)
            reference.quantize(given, one, expected, expected_scales, layout, None, silu)
            assert torch.equal(data, expected), (name, silu)
            ours, theirs = (layout.unswizzle(each, 3, 64) for each in (scales, expected_scales))
            assert torch.equal(ours, theirs), (name, silu)
            if name not in (baselines.EMPTY, baselines.LINEAR):
                assert torch.equal(scales, expected_scales), (name, silu)  # padding is zero
        data, scales = baseline.experts(step)
        assert data.shape == (6, 32) and scales.shape[1] == 4
        print(name)
"""


def test_the_producer_and_every_baseline_are_right() -> None:
    """In Triton's interpreter: RMSNorm, and quantizations of x, of SiLU and mul, and of experts' rows."""
    assert printed_lines(PROGRAM) == [
        "norm",
        "norm",
        "pool",
        "empty",
        "zeros (stand-in)",
        "padding in the kernel (stand-in)",
        "padding in the kernel, wide stores (stand-in)",
        "zeroing the returned buffer (stand-in)",
        "linear",
    ]

"""vLLM's fusion passes on graphs whose scales come from the pool."""

from __future__ import annotations

import ast
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch._dynamo as dynamo
import vllm.distributed.parallel_state as parallel_state
from support.vllm_cpu_ops import CPU, fusions, mm_calls
from support.vllm_fusion import (
    ARGUMENTS,
    ATTENTION,
    CASES,
    LAYER,
    ROWS,
    AttentionLayer,
    K,
    TwoRanks,
    add_norm,
    attention_pass,
    calls,
    expected_of,
    flashinfer_add_rmsnorm_fp4quant,
    flashinfer_allreduce_fusion,
    op_named,
    pattern_pass,
    quantize_and_multiply,
    silu_mul,
    source,
    trace,
)
from torch import Tensor, fx
from vllm.compilation.passes import pass_manager
from vllm.forward_context import override_forward_context

from safealloc import ScalePool, ScaleSpec, SfLayout
from safealloc.integrations import vllm as integration
from safealloc.integrations.vllm.hooks import zero_for_attention
from safealloc.kernels import reference

NOT_EXERCISED = {
    "ActivationQuantFusionPass": "its constructor traces FP8 patterns too, over ops that have no stand-in here",
    "AllReduceFusionPass": "its constructor makes FlashInfer's workspace on several GPUs, and asks for capability 10.0",
    "RMSNormQuantFusionPass": "its constructor traces FP8 patterns too, and asks for capability 10.0 before the NVFP4 one",
}
"""Passes with NVFP4 patterns that cannot run here as a whole, and why; their patterns run one by one."""

SCALES, ZEROS = torch.ops.safealloc.vllm_scales.default, torch.ops.safealloc.vllm_zero_scales.default
FUSED = torch.ops.safealloc.vllm_fused_scales.default
QUANTIZE = torch.ops._C.scaled_fp4_quant.out

pytestmark = pytest.mark.filterwarnings("ignore:dynamo_pgo force disabled")


@pytest.fixture(autouse=True)
def producers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Stand-ins for what needs GPUs."""
    group = TwoRanks()
    monkeypatch.setattr(parallel_state, "_TP", group)
    monkeypatch.setitem(parallel_state._groups, group.unique_name, weakref.ref(group))
    all_reduce = fusions["allreduce_rms_fusion"]
    workspace = SimpleNamespace(backend="trtllm")
    monkeypatch.setattr(all_reduce, "get_fi_ar_quant_workspace", lambda **options: workspace)
    monkeypatch.setattr(all_reduce.flashinfer_comm, "allreduce_fusion", flashinfer_allreduce_fusion)
    monkeypatch.setattr(
        fusions["rms_quant_fusion"], "_FLASHINFER_ADD_RMSNORM_FP4QUANT", flashinfer_add_rmsnorm_fp4quant
    )
    dynamo.reset()
    yield
    dynamo.reset()


@pytest.fixture
def layer() -> Iterator[AttentionLayer]:
    """A layer in vLLM's forward context."""
    layer = AttentionLayer()
    context = SimpleNamespace(attn_metadata=None, no_compile_layers={LAYER: layer}, slot_mapping={})
    with override_forward_context(context):
        yield layer


# --- norms and activations --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", list(CASES))
def test_the_pattern_matches_and_the_fused_op_writes_a_pool_buffer(pool: ScalePool, plugin: None, pattern: str) -> None:
    """It matches once, and the GEMM reads the same buffer."""
    case, fusion = CASES[pattern], pattern_pass(pattern)
    traced = trace(case.model, fusion, *ARGUMENTS)
    assert fusion.matches == 1
    assert calls(traced.fused, QUANTIZE) == []
    (fused,) = calls(traced.fused, op_named(case.op))
    assert source(fused.kwargs[case.scales]) is SCALES
    (final,) = calls(traced.final, op_named(case.op))
    position = [argument.name for argument in op_named(case.op)._schema.arguments].index(case.scales)
    written = final.kwargs[case.scales] if case.scales in final.kwargs else final.args[position]
    assert source(written) is FUSED
    (multiplication,) = calls(traced.final, torch.ops.vllm.flashinfer_mm_fp4.default)
    assert source(multiplication.args[2]) is FUSED
    assert (len(calls(traced.final, FUSED)), len(calls(traced.final, SCALES))) == (1, 0)
    assert [call.spec for call in mm_calls] == [ScaleSpec(ROWS, K, SfLayout.layout_128x4)]
    assert pool.verify() == 1


@pytest.mark.parametrize("pattern", list(CASES))
def test_fused_producers_are_right_on_stale_memory(pool: ScalePool, pattern: str, stale: None) -> None:
    """They write valid rows only: without the plugin the result is NaN, with it the bits of the unfused model."""
    case = CASES[pattern]
    expected = expected_of(case.model)
    assert torch.isfinite(expected[0]).all()
    fusion = pattern_pass(pattern)
    without = trace(case.model, fusion, *ARGUMENTS)
    assert fusion.matches == 1
    assert without.run(*ARGUMENTS)[0].isnan().all()
    dynamo.reset()
    integration.register()
    traced = trace(case.model, fusion, *ARGUMENTS)
    for _ in range(3):
        for got, wanted in zip(traced.run(*ARGUMENTS), expected, strict=True):
            assert torch.equal(got, wanted)
    assert fusion.matches == 2
    assert pool.verify() == 1
    assert pool.stats().misses == 1


def test_several_sites_in_one_graph_are_served(pool: ScalePool, plugin: None) -> None:
    """Norm, activation and a quantization that is not fused, as in a transformer block."""

    def block(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        first, residual = add_norm(x, residual, weight)
        return first, *silu_mul(x, residual, weight), quantize_and_multiply(residual + x)

    expected = expected_of(block)
    fusions_here = [pattern_pass(name) for name in ("FusedAddRMSNormNvfp4QuantPattern", "SiluMulNvfp4QuantPattern")]

    def both(graph: fx.Graph) -> None:
        for fusion in fusions_here:
            fusion(graph)

    traced = trace(block, both, *ARGUMENTS)
    assert [fusion.matches for fusion in fusions_here] == [1, 1]
    assert len(calls(traced.final, QUANTIZE)) == 1
    assert (len(calls(traced.final, FUSED)), len(calls(traced.final, SCALES))) == (2, 1)  # the quantizer zeroes padding
    for got, wanted in zip(traced.run(*ARGUMENTS), expected, strict=True):
        assert torch.equal(got, wanted)
    assert pool.verify() == pool.stats().buffers


# --- attention --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", list(ATTENTION))
def test_fused_attention_gets_scales_that_are_zeroed_per_step(
    pool: ScalePool, plugin: None, layer: AttentionLayer, monkeypatch: pytest.MonkeyPatch, pattern: str
) -> None:
    """The pass matches, and the graph has the op that zeroes; other sites keep pool buffers."""
    one_site, module, name, op = ATTENTION[pattern]

    def model(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        return *one_site(x, residual, weight), quantize_and_multiply(residual)

    fusion = attention_pass(module, name, monkeypatch)
    traced = trace(model, fusion, *ARGUMENTS)
    assert fusion.matched_count == 1
    (fused,) = calls(traced.fused, op)
    assert source(fused.kwargs["output_block_scale"]) is ZEROS
    (quantization,) = calls(traced.fused, QUANTIZE)
    assert source(quantization.kwargs["output_scale"]) is SCALES
    expected = expected_of(model)
    mm_calls.clear()
    for got, wanted in zip(traced.run(*ARGUMENTS), expected, strict=True):
        assert torch.equal(got, wanted)
    specs = {call.spec for call in mm_calls}
    assert specs == {None, ScaleSpec(ROWS, K, SfLayout.layout_128x4)}


@pytest.mark.parametrize("pattern", list(ATTENTION))
def test_rows_without_a_token_have_zero_scales(
    pool: ScalePool, layer: AttentionLayer, monkeypatch: pytest.MonkeyPatch, pattern: str, stale: None
) -> None:
    """A captured batch with two tokens in five rows: rows that attention does not write are zero, not an earlier step's."""
    model, module, name, _ = ATTENTION[pattern]
    seen: list[Tensor] = []
    original = reference.mm

    def spy(a: Tensor, b: Tensor, a_scales: Tensor, *rest: Any) -> None:
        seen.append(a_scales.clone())
        original(a, b, a_scales, *rest)

    monkeypatch.setattr(reference, "mm", spy)
    integration.register()
    traced = trace(model, attention_pass(module, name, monkeypatch), *ARGUMENTS)
    layer.tokens = 2
    traced.run(*ARGUMENTS)
    linear = SfLayout.layout_128x4.unswizzle(seen[-1], ROWS, K)
    assert (linear[:2] != 0).all()
    assert (linear[2:] == 0).all()
    assert not seen[-1].view(-1)[SfLayout.layout_128x4.padding_mask(ROWS, K)].any()


@pytest.mark.parametrize("pattern", list(ATTENTION))
def test_unregistering_restores_the_attention_pass(
    layer: AttentionLayer, monkeypatch: pytest.MonkeyPatch, pattern: str
) -> None:
    """The class has its own ``__call__`` again."""
    model, module, name, op = ATTENTION[pattern]
    before = getattr(fusions[module], name).__call__
    integration.register()
    assert getattr(fusions[module], name).__call__ is not before
    integration.unregister()
    assert getattr(fusions[module], name).__call__ is before
    fusion = attention_pass(module, name, monkeypatch)
    traced = trace(model, fusion, *ARGUMENTS)
    assert fusion.matched_count == 1
    (fused,) = calls(traced.fused, op)
    assert source(fused.kwargs["output_block_scale"]) is torch.ops.aten.empty.memory_format


def test_zero_for_attention_changes_the_scales_of_attention_only() -> None:
    """Through any number of views; not where no scales are given, or scales that are not the pool's."""
    graph = fx.Graph()

    def scales() -> fx.Node:
        return graph.call_function(SCALES, (ROWS, K, CPU))

    def view(node: fx.Node) -> fx.Node:
        return graph.call_function(torch.ops.aten.view.dtype, (node, torch.uint8))

    x = graph.placeholder("x")
    quantized, direct, viewed, twice = scales(), scales(), view(scales()), view(view(scales()))
    foreign = graph.call_function(torch.ops.aten.empty.memory_format, ([128, 2],))
    attend = ATTENTION["AttnNvfp4QuantPattern"][3]
    nodes = [graph.call_function(QUANTIZE, (x, x, True), {"output": x, "output_scale": quantized})]
    for given in (direct, viewed, twice, foreign, None):
        nodes.append(graph.call_function(attend, (x, x, x, x), {"output_block_scale": given}))
    graph.output(tuple(nodes))
    assert zero_for_attention(graph) == 3
    assert source(nodes[0].kwargs["output_scale"]) is SCALES
    sources = [source(node.kwargs["output_block_scale"]) for node in nodes[1:]]
    assert sources == [ZEROS, ZEROS, ZEROS, torch.ops.aten.empty.memory_format, None]
    assert zero_for_attention(graph) == 0
    graph.lint()


# --- coverage ---------------------------------------------------------------------------------------------------------


def nvfp4_classes() -> tuple[set[str], set[str]]:
    """The patterns of vLLM's compilation passes with NVFP4 in their names, and the passes that register them."""
    trees = [ast.parse(path.read_text()) for path in Path(pass_manager.__file__).parent.rglob("*.py")]
    classes = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    patterns = {node.name for node in classes if "nvfp4" in node.name.lower()}
    passes = {
        node.name
        for node in classes
        if node.name.endswith("Pass") and patterns & {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
    }
    return patterns, passes


def test_every_nvfp4_pattern_is_tested_or_listed() -> None:
    patterns, passes = nvfp4_classes()
    exercised = {*CASES, *ATTENTION, *(name for _, _, name, _ in ATTENTION.values())}
    assert not exercised & NOT_EXERCISED.keys()
    assert exercised | NOT_EXERCISED.keys() == patterns | passes
    assert all(NOT_EXERCISED.values())

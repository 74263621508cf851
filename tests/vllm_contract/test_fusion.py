"""vLLM's fusion passes on graphs whose scales come from the pool.

A model is traced by Dynamo and AOTAutograd, and its graph goes through Inductor's post-grad passes with vLLM's pass manager
among them, as in vLLM. What comes out is run op by op, where ``torch.empty`` can be made to return stale memory. The fused
ops have FlashInfer's signatures and write real rows only, as FlashInfer's kernels do.
"""

from __future__ import annotations

import ast
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import stand_ins
import torch
import torch._dynamo as dynamo
import torch._inductor.pattern_matcher as pattern_matcher
import vllm
import vllm.compilation.passes.pass_manager as pass_manager
import vllm.distributed.communication_op as communication
import vllm.distributed.parallel_state as parallel_state
import vllm.ir.ops
from stand_ins import ALPHA, CPU, L128, activation, as_on_cuda, fusions, kernel_and_layer, quantize_rows
from torch import Tensor, fx
from torch._inductor import config as inductor_config
from torch._inductor.compile_fx import compile_fx
from torch._inductor.fx_passes.post_grad import post_grad_passes, view_to_reshape
from torch._inductor.pattern_matcher import PatternMatcherPass
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from vllm.compilation.passes.inductor_pass import pass_context
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.config.utils import Range
from vllm.forward_context import override_forward_context
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.quantization.utils.quant_utils import kNvfp4Dynamic
from vllm.utils.torch_utils import _encode_layer_name

from safealloc import ScalePool, ScaleSpec
from safealloc.integrations import vllm as integration
from safealloc.integrations.vllm.hooks import zero_for_attention
from safealloc.kernels import reference

NOT_EXERCISED = {
    "ActivationQuantFusionPass": "its constructor traces FP8 patterns too, over ops that have no stand-in here",
    "AllReduceFusionPass": "its constructor makes FlashInfer's workspace on several GPUs, and asks for capability 10.0",
    "RMSNormQuantFusionPass": "its constructor traces FP8 patterns too, and asks for capability 10.0 before the NVFP4 one",
}
"""Passes of NVFP4 patterns that are not run here as they are, and why: their patterns are, one by one."""

N, K, ROWS, EPSILON = 24, 80, 5, 1e-6
HEADS, HEAD_SIZE = 5, 16
LAYER = "model.layers.0.self_attn.attn"
SCALES, ZEROS = torch.ops.safealloc.vllm_scales.default, torch.ops.safealloc.vllm_zero_scales.default
QUANTIZE = torch.ops._C.scaled_fp4_quant.out
_, _projection = kernel_and_layer("trtllm", N, K)
WEIGHT, WEIGHT_SCALE = _projection.weight.data, _projection.weight_scale.data

pytestmark = pytest.mark.filterwarnings("ignore:dynamo_pgo force disabled")


# --- what is traced ---------------------------------------------------------------------------------------------------


def multiply(x_fp4: Tensor, scales: Tensor) -> Tensor:
    """The GEMM of vLLM's CUTLASS kernel for FlashInfer."""
    return stand_ins.vllm_flashinfer.flashinfer_scaled_fp4_mm(
        x_fp4, WEIGHT, scales, WEIGHT_SCALE, ALPHA, torch.bfloat16, "cutlass"
    )


def quantize_and_multiply(x: Tensor) -> Tensor:
    return multiply(*stand_ins.vllm_quantize(x))


def add_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    y, residual = vllm.ir.ops.fused_add_rms_norm(x + x, residual + residual, weight, EPSILON)
    return quantize_and_multiply(y), residual


def silu_mul(x: Tensor, _residual: Tensor, _weight: Tensor) -> tuple[Tensor]:
    return (quantize_and_multiply(SiluAndMul.forward_native(torch.cat((x, x + x), -1))),)


def all_reduce_norm(x: Tensor, _residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    reduced = communication.tensor_model_parallel_all_reduce(x + x)
    return quantize_and_multiply(vllm.ir.ops.rms_norm(reduced, weight, EPSILON)), reduced


def all_reduce_add_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    reduced = communication.tensor_model_parallel_all_reduce(x + x)
    y, residual = vllm.ir.ops.fused_add_rms_norm(reduced, residual + residual, weight, EPSILON)
    return quantize_and_multiply(y), residual


def attention(x: Tensor, residual: Tensor, _weight: Tensor) -> tuple[Tensor]:
    """As ``Attention.forward`` and the projection behind it."""
    query, key = (t.view(-1, HEADS, HEAD_SIZE) for t in (x + x, residual + residual))
    output = torch.empty((x.shape[0], HEADS * HEAD_SIZE), dtype=x.dtype, device=x.device)
    torch.ops.vllm.unified_attention_with_output(
        query, key, key, output.view(-1, HEADS, HEAD_SIZE), _encode_layer_name(LAYER), kv_cache_dummy_dep=x.new_empty(0)
    )
    return (quantize_and_multiply(output.view(-1, HEADS * HEAD_SIZE)),)


def mla_attention(x: Tensor, residual: Tensor, _weight: Tensor) -> tuple[Tensor]:
    query = (x + x).view(-1, HEADS, HEAD_SIZE)
    output = torch.empty((x.shape[0], HEADS * HEAD_SIZE), dtype=x.dtype, device=x.device)
    torch.ops.vllm.unified_mla_attention_with_output(
        query,
        residual + residual,
        residual[:, None, :8] * 2,
        output,
        _encode_layer_name(LAYER),
        kv_cache_dummy_dep=x.new_empty(0),
    )
    return (quantize_and_multiply(output),)


# --- stand-ins of fused producers: real rows only ---------------------------------------------------------------------


def _native(name: str) -> Callable[..., Any]:
    return getattr(vllm.ir.ops, name).impls["native"].impl_fn


def flashinfer_add_rmsnorm_fp4quant(
    input: Tensor,
    residual: Tensor,
    weight: Tensor,
    *,
    y_fp4: Tensor,
    block_scale: Tensor,
    global_scale: Tensor,
    eps: float,
    **options: Any,
) -> None:
    """FlashInfer's CuTe-DSL kernel, which writes no padding columns and no padding rows."""
    y, updated = _native("fused_add_rms_norm")(input, residual, weight, eps)
    residual.copy_(updated)
    quantize_rows(y, global_scale, y_fp4.view(torch.uint8), block_scale)


def flashinfer_allreduce_fusion(
    *,
    input: Tensor,
    residual_in: Tensor,
    residual_out: Tensor,
    norm_out: Tensor | None,
    quant_out: Tensor,
    scale_out: Tensor,
    rms_gamma: Tensor,
    rms_eps: float,
    scale_factor: Tensor,
    **options: Any,
) -> None:
    """FlashInfer's all-reduce of two ranks that have the same input, with norm and quantization."""
    y, updated = _native("fused_add_rms_norm")(input + input, residual_in, rms_gamma, rms_eps)
    residual_out.copy_(updated)
    quantize_rows(y, scale_factor, quant_out, scale_out)


class TwoRanks(parallel_state.GroupCoordinator):
    """A tensor-parallel group of two ranks, of which only this one is there."""

    def __init__(self) -> None:
        self.unique_name = "stand_in:0"
        self.world_size, self.rank_in_group, self.cpu_group = 2, 0, None
        self.use_custom_op_call = True
        self.device_communicator = SimpleNamespace(all_reduce=lambda x: x + x)


@pytest.fixture(autouse=True)
def producers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """In the place of what needs GPUs."""
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


class AttentionLayer:
    """What vLLM's attention ops and fusion passes take of a layer; the last rows of a batch are of no token."""

    layer_name, num_heads, head_size, kv_cache = LAYER, HEADS, HEAD_SIZE, torch.empty(0)
    v_head_dim, kv_lora_rank, qk_rope_head_dim, qk_nope_head_dim = HEAD_SIZE, K, 8, 8
    hisparse_cache = None
    tokens = ROWS

    def __init__(self) -> None:
        self.impl = self

    def fused_output_quant_supported(self, key: object) -> bool:
        return key == kNvfp4Dynamic

    def forward(self, layer: Any, query: Tensor, *given: Any, **named: Any) -> None:
        self.forward_impl(query, **named)

    def forward_impl(
        self,
        query: Tensor,
        *given: Any,
        output: Tensor,
        output_scale: Tensor | None,
        output_block_scale: Tensor | None,
        **options: Any,
    ) -> None:
        y = query.reshape(query.shape[0], -1)[: self.tokens]
        if output_scale is None:
            output.view(-1, K)[: self.tokens] = y
            return
        data, scales = torch.empty(len(y), K // 2, dtype=torch.uint8), torch.empty(len(y), K // 16, dtype=torch.uint8)
        reference.quantize(y, output_scale.reshape(1), data, scales, stand_ins.SfLayout.layout_linear)
        output.view(torch.uint8).view(-1, K // 2)[: self.tokens] = data
        offsets = L128.offsets(query.shape[0], K, padded_k=128)[: self.tokens]
        output_block_scale.view(torch.uint8).view(-1)[offsets] = scales


@pytest.fixture
def layer() -> Iterator[AttentionLayer]:
    """A layer in vLLM's forward context."""
    layer = AttentionLayer()
    context = SimpleNamespace(attn_metadata=None, no_compile_layers={LAYER: layer}, slot_mapping={})
    with override_forward_context(context):
        yield layer


# --- vLLM's passes over it --------------------------------------------------------------------------------------------


@dataclass
class Patterns:
    """A pass of some patterns, for vLLM's pass manager; remembers the graphs."""

    patterns: PatternMatcherPass = field(default_factory=lambda: PatternMatcherPass(pass_name="stand_in"))
    matches: int = 0

    def is_applicable_for_range(self, compile_range: Range) -> bool:
        return True

    def __call__(self, graph: fx.Graph) -> None:
        self.matches += self.patterns.apply(graph)


def engine() -> VllmConfig:
    with as_on_cuda():
        return VllmConfig()


def pattern_pass(name: str) -> Patterns:
    """The pattern of that name alone, registered as vLLM's pass registers it."""
    module = next(module for module in fusions.values() if hasattr(module, name))
    result = Patterns()
    with as_on_cuda(), set_current_vllm_config(engine()), torch._guards.tracing(None), FakeTensorMode():
        if name == "FusedAddRMSNormNvfp4QuantPattern":
            getattr(module, name)(EPSILON, True).register(result.patterns)
        elif name.startswith("AllReduce"):
            params = module.FlashInferFusedAllReduceParams(world_size=2)
            getattr(module, name)(EPSILON, torch.bfloat16, "cpu", params).register(result.patterns)
        else:
            pattern = getattr(module, name)()
            trace = module.VllmFusionPatternMatcherPass._trace_fn
            inputs = pattern.get_inputs()
            pattern_matcher.register_replacement(pattern.pattern, pattern.replacement, inputs, trace, result.patterns)
    return result


def attention_pass(module: str, name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The real pass, for a model of one layer whose backend writes NVFP4."""
    monkeypatch.setattr(fusions[module], "get_layers_from_vllm_config", lambda config, kind: {LAYER: AttentionLayer()})
    config = SimpleNamespace(
        compilation_config=engine().compilation_config,
        model_config=SimpleNamespace(dtype=torch.bfloat16),
        device_config=SimpleNamespace(device="cpu"),
        compile_debug_dump_path=lambda: None,
    )
    with as_on_cuda():
        return getattr(fusions[module], name)(config)


@dataclass
class Traced:
    """A model after Inductor's and vLLM's post-grad passes.

    Attributes:
        fused: the graph right after the fusion pass.
        final: the graph that runs, whose mutations are in place again.
    """

    run: Callable[..., Any]
    fused: fx.Graph | None = None
    final: fx.Graph | None = None


def trace(model: Callable[..., Any], fusion: Any, *arguments: Tensor) -> Traced:
    """Trace and transform; ``run`` then calls one op after the other."""
    manager = pass_manager.PostGradPassManager()
    with as_on_cuda():
        manager.configure(engine())
    traced = Traced(lambda *given: None)

    class Fusion:
        def is_applicable_for_range(self, compile_range: Range) -> bool:
            return True

        def __call__(self, graph: fx.Graph) -> None:
            fusion(graph)
            traced.fused = fx.Graph()
            traced.fused.graph_copy(_sorted(graph), {})

    manager.passes.append(Fusion())

    def inner_compile(module: fx.GraphModule, inputs: list[Tensor], **options: Any) -> Callable[..., Any]:
        fake_mode = next(v.fake_mode for node in module.graph.nodes if hasattr(v := node.meta.get("val"), "fake_mode"))
        with V.set_fake_mode(fake_mode), pass_context(Range(1, 8192)):
            view_to_reshape(module)  # as Inductor does
            post_grad_passes(module, True)
        module.recompile()
        traced.final = module.graph
        return module.forward

    def backend(module: fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        return compile_fx(module, inputs, inner_compile=inner_compile)

    settings = {
        "post_grad_custom_post_pass": manager,
        "enable_auto_functionalized_v2": False,  # as vLLM sets it
        "force_disable_caches": True,
    }
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=False)

    def run(*given: Tensor) -> Any:
        with inductor_config.patch(settings), torch.inference_mode(), vllm.ir.enable_torch_wrap(True):
            return compiled(*given)

    traced.run = run
    run(*arguments)
    return traced


def _sorted(graph: fx.Graph) -> fx.Graph:
    """A copy in topological order, which a pattern's replacement need not be in."""
    copy = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    pending = list(graph.nodes)
    while pending:
        later = []
        for node in pending:
            if all(argument in mapping for argument in node.all_input_nodes):
                mapping[node] = copy.node_copy(node, lambda argument: mapping[argument])
            else:
                later.append(node)
        assert len(later) < len(pending)
        pending = later
    return copy


def source(node: Any) -> Any:
    """What a scale buffer was made by: views are looked through."""
    while isinstance(node, fx.Node) and node.target is torch.ops.aten.view.dtype:
        node = node.args[0]
    return node.target if isinstance(node, fx.Node) else node


def calls(graph: fx.Graph | None, op: Any) -> list[fx.Node]:
    """Nodes that call ``op``, also through ``auto_functionalized``."""
    assert graph is not None
    return [node for node in graph.nodes if op in (node.target, *node.args[:1])]


ARGUMENTS = activation(ROWS, K), activation(ROWS, K, seed=1), activation(1, K)[0]


@dataclass
class Case:
    """One pattern.

    Attributes:
        model: what it is found in.
        op: the fused op, by name.
        scales: the argument of that op that is the scale buffer.
    """

    model: Callable[..., Any]
    op: str
    scales: str


CASES = {
    "FusedAddRMSNormNvfp4QuantPattern": Case(
        add_norm, "vllm.flashinfer_fused_add_rms_norm_nvfp4_quant", "result_block_scale"
    ),
    "SiluMulNvfp4QuantPattern": Case(silu_mul, "_C.silu_and_mul_nvfp4_quant", "result_block_scale"),
    "AllReduceFusedRMSNormStaticQuantNVFP4Pattern": Case(
        all_reduce_norm, "vllm.flashinfer_trtllm_fused_allreduce_norm", "scale_out"
    ),
    "AllReduceFusedAddRMSNormStaticQuantNVFP4Pattern": Case(
        all_reduce_add_norm, "vllm.flashinfer_trtllm_fused_allreduce_norm", "scale_out"
    ),
}
ATTENTION = {
    "AttnNvfp4QuantPattern": (
        attention,
        "attn_quant_fusion",
        "AttnQuantFusionPass",
        torch.ops.vllm.unified_attention_with_output.default,
    ),
    "MLAAttnNvfp4QuantPattern": (
        mla_attention,
        "mla_attn_quant_fusion",
        "MLAAttnQuantFusionPass",
        torch.ops.vllm.unified_mla_attention_with_output.default,
    ),
}


def op_named(name: str) -> Any:
    namespace, _, op = name.partition(".")
    return getattr(getattr(torch.ops, namespace), op).default


def expected_of(model: Callable[..., Any]) -> tuple[Tensor, ...]:
    """Eager, not fused, and with vLLM's own quantizer, which writes padding."""
    with stand_ins.padding_is_written(), torch.inference_mode():
        return model(*ARGUMENTS)


# --- norms and activations --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", list(CASES))
def test_the_pattern_matches_with_our_op_as_source(pool: ScalePool, plugin: None, pattern: str) -> None:
    """Once, the fused op writes the pool's buffer, and the GEMM reads what it wrote."""
    case, fusion = CASES[pattern], pattern_pass(pattern)
    traced = trace(case.model, fusion, *ARGUMENTS)
    assert fusion.matches == 1
    assert calls(traced.fused, QUANTIZE) == []
    (fused,) = calls(traced.fused, op_named(case.op))
    assert source(fused.kwargs[case.scales]) is SCALES
    (final,) = calls(traced.final, op_named(case.op))
    position = [argument.name for argument in op_named(case.op)._schema.arguments].index(case.scales)
    written = final.kwargs[case.scales] if case.scales in final.kwargs else final.args[position]
    assert source(written) is SCALES
    (multiplication,) = calls(traced.final, torch.ops.vllm.flashinfer_mm_fp4.default)
    assert source(multiplication.args[2]) is SCALES
    assert len(calls(traced.final, SCALES)) == 1
    assert [call.spec for call in stand_ins.mm_calls] == [ScaleSpec(ROWS, K, L128)]
    assert pool.verify() == 1


@pytest.mark.parametrize("pattern", list(CASES))
def test_fused_producers_on_stale_memory(pool: ScalePool, pattern: str, stale: None) -> None:
    """They write real rows only: NaN without the plugin, and with it what vLLM computes unfused."""
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


def test_several_sites_in_one_graph(pool: ScalePool, plugin: None) -> None:
    """As in a transformer block: norm, activation and a quantization that nothing is fused with."""

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
    assert len(calls(traced.final, SCALES)) == 3
    for got, wanted in zip(traced.run(*ARGUMENTS), expected, strict=True):
        assert torch.equal(got, wanted)
    assert pool.verify() == pool.stats().buffers


# --- attention --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", list(ATTENTION))
def test_attention_gets_scales_that_are_zeroed_at_each_step(
    pool: ScalePool, plugin: None, layer: AttentionLayer, monkeypatch: pytest.MonkeyPatch, pattern: str
) -> None:
    """VLLM's pass matches, and leaves the graph with the op that zeroes; other sites keep the pool's."""
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
    stand_ins.mm_calls.clear()
    for got, wanted in zip(traced.run(*ARGUMENTS), expected, strict=True):
        assert torch.equal(got, wanted)
    specs = {call.spec for call in stand_ins.mm_calls}
    assert specs == {None, ScaleSpec(ROWS, K, L128)}


@pytest.mark.parametrize("pattern", list(ATTENTION))
def test_dead_rows_have_zero_scales(
    pool: ScalePool, layer: AttentionLayer, monkeypatch: pytest.MonkeyPatch, pattern: str, stale: None
) -> None:
    """A captured batch with two tokens in five rows: what attention leaves unwritten is zero, not an earlier step's."""
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
    linear = L128.unswizzle(seen[-1], ROWS, K)
    assert (linear[:2] != 0).all()
    assert (linear[2:] == 0).all()
    assert not seen[-1].view(-1)[L128.padding_mask(ROWS, K)].any()


@pytest.mark.parametrize("pattern", list(ATTENTION))
def test_without_the_plugin_the_attention_pass_is_vllms(
    layer: AttentionLayer, monkeypatch: pytest.MonkeyPatch, pattern: str
) -> None:
    """Also after it was registered: the class has its own ``__call__`` again."""
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


def test_zero_for_attention_looks_at_attention_alone() -> None:
    """Through any number of views, and not where nothing is given, or something that is not the pool's."""
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


# --- what is covered --------------------------------------------------------------------------------------------------


def nvfp4_classes() -> tuple[set[str], set[str]]:
    """Of vLLM's compilation passes: the patterns with NVFP4 in their names, and the passes that register them."""
    trees = [ast.parse(path.read_text()) for path in Path(pass_manager.__file__).parent.rglob("*.py")]
    classes = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    patterns = {node.name for node in classes if "nvfp4" in node.name.lower()}
    passes = {
        node.name
        for node in classes
        if node.name.endswith("Pass") and patterns & {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
    }
    return patterns, passes


def test_every_nvfp4_pattern_is_exercised_or_named() -> None:
    patterns, passes = nvfp4_classes()
    exercised = {*CASES, *ATTENTION, *(name for _, _, name, _ in ATTENTION.values())}
    assert not exercised & NOT_EXERCISED.keys()
    assert exercised | NOT_EXERCISED.keys() == patterns | passes
    assert all(NOT_EXERCISED.values())

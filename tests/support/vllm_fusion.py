"""Models that vLLM's fusion passes match, stand-ins for the fused producers, and tracing as vLLM traces.

A model is traced by Dynamo and AOTAutograd, and its graph goes through Inductor's post-grad passes with vLLM's pass manager
among them, as in vLLM. The result is run op by op, where ``torch.empty`` can be made to return stale memory. The fused ops
have FlashInfer's signatures and write valid rows only, as FlashInfer's kernels do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch._inductor.pattern_matcher as pattern_matcher
import vllm.distributed.communication_op as communication
import vllm.distributed.parallel_state as parallel_state
import vllm.ir.ops
from support import vllm_cpu_ops
from support.vllm_cpu_ops import ALPHA, activation, as_on_cuda, fusions, kernel_and_layer, quantize_rows
from torch import Tensor, fx
from torch._inductor import config as inductor_config
from torch._inductor.compile_fx import compile_fx
from torch._inductor.fx_passes.post_grad import post_grad_passes, view_to_reshape
from torch._inductor.pattern_matcher import PatternMatcherPass
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from vllm.compilation.passes import pass_manager
from vllm.compilation.passes.inductor_pass import pass_context
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.config.utils import Range
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.quantization.utils.quant_utils import kNvfp4Dynamic
from vllm.utils.torch_utils import _encode_layer_name

from safealloc import SfLayout
from safealloc.kernels import reference

N, K, ROWS, EPSILON = 24, 80, 5, 1e-6
HEADS, HEAD_SIZE = 5, 16
LAYER = "model.layers.0.self_attn.attn"
_, _projection = kernel_and_layer("trtllm", N, K)
WEIGHT, WEIGHT_SCALE = _projection.weight.data, _projection.weight_scale.data


# --- models -----------------------------------------------------------------------------------------------------------


def multiply(x_fp4: Tensor, scales: Tensor) -> Tensor:
    """The GEMM of vLLM's CUTLASS kernel for FlashInfer."""
    return vllm_cpu_ops.vllm_flashinfer.flashinfer_scaled_fp4_mm(
        x_fp4, WEIGHT, scales, WEIGHT_SCALE, ALPHA, torch.bfloat16, "cutlass"
    )


def quantize_and_multiply(x: Tensor) -> Tensor:
    return multiply(*vllm_cpu_ops.vllm_quantize(x))


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
    """As ``Attention.forward`` and the projection after it."""
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


# --- stand-ins for fused producers ------------------------------------------------------------------------------------


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
    """A tensor-parallel group of two ranks, of which only this one exists."""

    def __init__(self) -> None:
        self.unique_name = "stand_in:0"
        self.world_size, self.rank_in_group, self.cpu_group = 2, 0, None
        self.use_custom_op_call = True
        self.device_communicator = SimpleNamespace(all_reduce=lambda x: x + x)


class AttentionLayer:
    """The parts of a layer that vLLM's attention ops and fusion passes use; rows from ``tokens`` on hold no token."""

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
        reference.quantize(y, output_scale.reshape(1), data, scales, SfLayout.layout_linear)
        output.view(torch.uint8).view(-1, K // 2)[: self.tokens] = data
        offsets = SfLayout.layout_128x4.offsets(query.shape[0], K, padded_k=128)[: self.tokens]
        output_block_scale.view(torch.uint8).view(-1)[offsets] = scales


# --- vLLM's passes ----------------------------------------------------------------------------------------------------


@dataclass
class Patterns:
    """A pass of some patterns, for vLLM's pass manager; counts the matches."""

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
    """A pass of one pattern by name, registered as vLLM's pass registers it."""
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
        final: the graph that runs, with mutations in place.
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
    """A copy in topological order; the replacement of a pattern may be in another order."""
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
    """The op that made a scale buffer, through any views."""
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
        model: contains it once.
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
    """The model's results in eager code, with a quantizer that writes padding."""
    with vllm_cpu_ops.padding_is_written(), torch.inference_mode():
        return model(*ARGUMENTS)

"""``safealloc plan`` against vLLM's own classes: layers and their shapes, quantization, kernels of experts, batch sizes.

vLLM's layers are made on the meta device. Attention operators and routed experts are stand-ins there; the linear layers are
vLLM's, and ask a quantization of ours for their method, which notes them.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import json
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import vllm.distributed.parallel_state as groups
from support import published_configs as published
from support.published_configs import PUBLISHED, Fields
from torch import nn
from transformers import AutoConfig
from vllm.config import DeviceConfig, VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.fused_moe.oracle import nvfp4 as oracle
from vllm.model_executor.layers.linear import LinearBase, QKVParallelLinear, UnquantizedLinearMethod
from vllm.model_executor.layers.mamba.gdn import qwen_gdn_linear_attn
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig
from vllm.model_executor.layers.quantization.modelopt import ModelOptMixedPrecisionConfig, ModelOptNvFp4Config
from vllm.model_executor.layers.quantization.utils import flashinfer_fp4_moe
from vllm.model_executor.layers.quantization.utils.quant_utils import kNvfp4Dynamic, kNvfp4Static
from vllm.platforms import current_platform

from safealloc.commands.plan import architectures, checkpoint, deployment
from safealloc.commands.plan.architectures import ExpertSite, Site
from safealloc.commands.plan.deployment import Deployment

MODELS = "vllm.model_executor.models"
STAND_INS = (
    "Attention",
    "MLAAttention",
    "ChunkedLocalAttention",
    "MultiHeadLatentAttentionWrapper",
    "Indexer",
    "get_rope",
)


class Noting(QuantizationConfig):
    """Notes linear layers: what vLLM calls them, columns of input and output."""

    def __init__(self) -> None:
        super().__init__()
        self.layers: list[tuple[str, LinearBase]] = []

    def get_name(self) -> str:  # type: ignore[override]
        return "noting"

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16]

    @classmethod
    def get_min_capability(cls) -> int:
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Noting:
        return cls()

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        if not isinstance(layer, LinearBase):
            return None
        self.layers.append((prefix, layer))
        return UnquantizedLinearMethod()

    def shapes(self) -> dict[str, tuple[int, int]]:
        found = {}
        for prefix, layer in self.layers:
            columns = getattr(layer, "input_size_per_partition", layer.input_size)
            found[prefix] = (columns, getattr(layer, "output_size_per_partition", layer.output_size))
        return found


class Anything(nn.Module):
    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__()

    def __getattr__(self, name: str) -> Any:
        return self.__dict__.get(name)


def group(ranks: int) -> SimpleNamespace:
    """A group of ranks, of which this is the first."""
    device_group = SimpleNamespace(size=lambda: ranks)
    return SimpleNamespace(
        world_size=ranks, rank_in_group=0, device_group=device_group, is_first_rank=True, is_last_rank=True
    )


def language_model(fields: Fields) -> Fields:
    return {**fields, **fields.get("text_config", {})}


TYPES = {
    "LlamaForCausalLM": "llama",
    "Phi3ForCausalLM": "phi3",
    "Qwen3ForCausalLM": "qwen3",
    "Gemma3ForConditionalGeneration": "gemma3_text",
    "MixtralForCausalLM": "mixtral",
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "Qwen3NextForCausalLM": "qwen3_next",
    "DeepseekV3ForCausalLM": "deepseek_v3",
    "Llama4ForConditionalGeneration": "llama4_text",
    "Glm4MoeForCausalLM": "glm4_moe",
    "GptOssForCausalLM": "gpt_oss",
    "MiniMaxM2ForCausalLM": "minimax_m2",
    "NemotronHForCausalLM": "nemotron_h",
}
RENAMED = {"gpt_oss": ("self_attn.", "attn."), "minimax_m2": ("block_sparse_moe.", "mlp.")}
"""What vLLM calls parts of layers in these modules, instead of a checkpoint's name."""


@pytest.fixture
def vllm_layer(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Noting, list[dict[str, Any]]]]:
    """Makes one layer of vLLM's, and returns what was noted: linear layers, and what experts were made with."""

    def make(
        fields: Fields, module: str, layer_class: str, layer: int, ranks: int, **parallel: Any
    ) -> tuple[Noting, list[dict[str, Any]]]:
        own = {
            name: value
            for name, value in language_model(fields).items()
            if name not in ("text_config", "quantization_config")
        }
        config = AutoConfig.for_model(
            TYPES[fields["architectures"][0]], **{k: v for k, v in own.items() if k != "model_type"}
        )
        for name, size in (("_TP", ranks), ("_EP", ranks), ("_PP", 1), ("_DP", 1), ("_PCP", 1), ("_DCP", 1)):
            monkeypatch.setattr(groups, name, group(size))
        found = importlib.import_module(f"{MODELS}.{module}")
        for name in STAND_INS:
            if hasattr(found, name):
                monkeypatch.setattr(found, name, Anything)
        monkeypatch.setattr(current_platform, "current_device", lambda: "meta", raising=False)
        monkeypatch.setattr(qwen_gdn_linear_attn, "ChunkGatedDeltaRule", Anything)
        experts: list[dict[str, Any]] = []
        monkeypatch.setattr(
            found, "FusedMoEFactory", lambda **given: experts.append(given) or Anything(), raising=False
        )
        vllm_config, noting = VllmConfig(device_config=DeviceConfig("cpu")), Noting()
        for name, value in parallel.items():
            object.__setattr__(vllm_config.parallel_config, name, value)
        model = SimpleNamespace(
            hf_config=config,
            hf_text_config=config,
            dtype=torch.bfloat16,
            multimodal_config=None,
            use_mla=True,
            enforce_eager=True,
        )
        object.__setattr__(vllm_config, "model_config", model)
        object.__setattr__(vllm_config, "quant_config", noting)
        named = {
            "vllm_config": vllm_config,
            "config": config,
            "prefix": f"model.layers.{layer}",
            "quant_config": noting,
            "layer_idx": layer,
            "cache_config": vllm_config.cache_config,
            "parallel_config": vllm_config.parallel_config,
            "model_config": model,
            "layer_type": (getattr(config, "layer_types", None) or [None] * (layer + 1))[layer],
        }
        factory = getattr(found, layer_class)
        with torch.device("meta"), set_current_vllm_config(vllm_config, check_compile=False):
            factory(**{name: named[name] for name in inspect.signature(factory.__init__).parameters if name in named})
        return noting, experts

    return make


def planned(
    fields: Fields, layer: int, ranks: int, **parallel: Any
) -> tuple[dict[str, tuple[int, int]], list[ExpertSite]]:
    """The linear layers and experts of one layer, by our table."""
    every = architectures.sites(language_model(fields), Deployment((1,), ranks, **parallel))
    found = [site for number, site in every if number == layer]
    linear = {f"model.layers.{layer}.{site.name}": (site.k, site.n) for site in found if isinstance(site, Site)}
    return linear, [site for site in found if isinstance(site, ExpertSite)]


@pytest.mark.parametrize(
    ("fields", "module", "layer_class", "layer", "most"),
    [
        (published.LLAMA_3_70B, "llama", "LlamaDecoderLayer", 0, 16),
        (published.PHI_4, "llama", "LlamaDecoderLayer", 0, 2),
        (published.QWEN3_32B, "qwen3", "Qwen3DecoderLayer", 0, 8),
        (published.GEMMA_3_27B, "gemma3", "Gemma3DecoderLayer", 5, 8),
        (published.MIXTRAL_8X7B, "mixtral", "MixtralDecoderLayer", 1, 8),
        (published.QWEN3_235B_A22B, "qwen3_moe", "Qwen3MoeDecoderLayer", 1, 8),
        (published.QWEN3_NEXT_80B, "qwen3_next", "Qwen3NextDecoderLayer", 0, 8),
        (published.QWEN3_NEXT_80B, "qwen3_next", "Qwen3NextDecoderLayer", 3, 8),
        (published.DEEPSEEK_V3, "deepseek_v2", "DeepseekV2DecoderLayer", 2, 8),
        (published.DEEPSEEK_V3, "deepseek_v2", "DeepseekV2DecoderLayer", 3, 8),
        (published.KIMI_K2, "deepseek_v2", "DeepseekV2DecoderLayer", 1, 8),
        (published.LLAMA_4_MAVERICK, "llama4", "Llama4DecoderLayer", 0, 8),
        (published.LLAMA_4_MAVERICK, "llama4", "Llama4DecoderLayer", 1, 8),
        (published.LLAMA_4_SCOUT, "llama4", "Llama4DecoderLayer", 0, 8),
        (published.GLM_4_6, "glm4_moe", "Glm4MoeDecoderLayer", 2, 8),
        (published.GLM_4_6, "glm4_moe", "Glm4MoeDecoderLayer", 3, 8),
        (published.GPT_OSS_120B, "gpt_oss", "TransformerBlock", 1, 4),
        (published.MINIMAX_M2_5, "minimax_m2", "MiniMaxM2DecoderLayer", 1, 8),
        (published.NEMOTRON_H_8B, "nemotron_h", "NemotronHMambaDecoderLayer", 0, 8),
        (published.NEMOTRON_H_8B, "nemotron_h", "NemotronHMLPDecoderLayer", 1, 8),
        (published.NEMOTRON_H_8B, "nemotron_h", "NemotronHAttentionDecoderLayer", 7, 8),
        (published.NEMOTRON_3_NANO, "nemotron_h", "NemotronHMoEDecoderLayer", 1, 4),
        (published.NEMOTRON_3_NANO | {"moe_latent_size": 1024}, "nemotron_h", "NemotronHMoEDecoderLayer", 1, 4),
    ],
)
def test_the_linear_layers_of_a_layer_are_vllms(fields, module, layer_class, layer, most, vllm_layer):
    """On one rank and on the most that can share them; routers and ``kv_b_proj`` are not in a captured step's count."""
    for ranks in (1, most):
        noting, made = vllm_layer(fields, module, layer_class, layer, ranks)
        linear, experts = planned(fields, layer, ranks)
        old, new = RENAMED.get(module, ("", ""))
        found = {name: shape for name, shape in noting.shapes().items() if not name.endswith((".gate", ".kv_b_proj"))}
        assert found == {name.replace(old, new): shape for name, shape in linear.items()}
        assert [
            (given["prefix"], given["hidden_size"], given["intermediate_size"], given["num_experts"], given["top_k"])
            for given in made
        ] == [
            (f"model.layers.{layer}.{site.name}".replace(old, new), site.k, site.width * ranks, site.experts, site.topk)
            for site in experts
        ]


@pytest.mark.parametrize(
    ("fields", "module", "layer_class", "layer"),
    [
        (published.DEEPSEEK_V3, "deepseek_v2", "DeepseekV2DecoderLayer", 3),
        (published.LLAMA_4_SCOUT, "llama4", "Llama4DecoderLayer", 0),
        (published.QWEN3_NEXT_80B, "qwen3_next", "Qwen3NextDecoderLayer", 3),
        (published.GLM_4_6, "glm4_moe", "Glm4MoeDecoderLayer", 3),
        (published.NEMOTRON_3_NANO, "nemotron_h", "NemotronHMoEDecoderLayer", 1),
    ],
)
def test_shared_experts_with_data_and_expert_parallelism_are_vllms(fields, module, layer_class, layer, vllm_layer):
    parallel = {"tensor_parallel_size": 4, "data_parallel_size": 2, "enable_expert_parallel": True}
    noting, _ = vllm_layer(fields, module, layer_class, layer, 4, **parallel)
    linear, _ = planned(fields, layer, 4, data=2, expert_parallel=True)
    assert {
        name: shape for name, shape in noting.shapes().items() if not name.endswith((".gate", ".kv_b_proj"))
    } == linear


PACKED = {
    "qkv_proj": ["q_proj", "k_proj", "v_proj"],
    "gate_up_proj": ["gate_proj", "up_proj"],
    "fused_qkv_a_proj": ["q_a_proj", "kv_a_proj_with_mqa"],
    "in_proj_qkvz": ["in_proj_qkv", "in_proj_z"],
    "in_proj_ba": ["in_proj_b", "in_proj_a"],
}


def mapper_of(architecture: str) -> Any:
    """What vLLM maps a checkpoint's names with, if it does."""
    from vllm.model_executor.models.registry import ModelRegistry

    return getattr(ModelRegistry._try_load_model_cls(architecture), "hf_to_vllm_mapper", None)


def stored_sites(fields: Fields) -> list[tuple[int, Site | ExpertSite]]:
    return list(architectures.sites(language_model(fields), Deployment((1,))))


def vllm_names(architecture: str, layer: int, name: str) -> str:
    before = "language_model.model" if architecture.endswith("ConditionalGeneration") else "model"
    return f"{before}.layers.{layer}.{name}"


NVFP4_MODELS = [name for name, (fields, beside) in PUBLISHED.items() if "NVFP4" in name and "3.6" not in name]


@pytest.mark.parametrize("name", NVFP4_MODELS)
def test_modelopts_excluded_layers_are_those_that_vllm_excludes(name):
    """Every layer of every published checkpoint."""
    fields, beside = PUBLISHED[name]
    (architecture,) = fields["architectures"]
    quantization = ModelOptNvFp4Config.from_config(json.loads(json.dumps(beside or fields["quantization_config"])))
    quantization.packed_modules_mapping = PACKED
    if (mapper := mapper_of(architecture)) is not None:
        quantization.apply_vllm_mapper(mapper)
    ours = checkpoint.read(fields, beside)
    for layer, site in stored_sites(fields):
        own = site.name.replace("block_sparse_moe.", "mlp.") if "MiniMax" in name else site.name
        excluded = quantization.is_layer_excluded(vllm_names(architecture, layer, own))
        assert ours.scheme(layer, site) == ("unquantized" if excluded else quantization.quant_method), (layer, site)


def test_mixed_precision_is_resolved_as_vllm_does():
    fields, beside = PUBLISHED["nvidia/Qwen3.6-27B-NVFP4"]
    quantization = ModelOptMixedPrecisionConfig.from_config(json.loads(json.dumps(beside)))
    quantization.packed_modules_mapping = PACKED
    ours = checkpoint.read(fields, beside)
    for layer, site in stored_sites(fields):
        algorithm = quantization._resolve_quant_algo(vllm_names(fields["architectures"][0], layer, site.name))
        assert ours.scheme(layer, site) == (algorithm or "unquantized")


FP4 = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "symmetric": True}
FP8 = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}


@pytest.mark.parametrize(
    ("groups_", "ignore"),
    [
        ([(FP4, True, ["Linear"])], ["lm_head"]),
        ([(FP4, False, ["Linear"])], ["lm_head", "re:.*self_attn.*"]),
        (
            [(FP4, True, ["Linear"])],
            [f"model.layers.0.self_attn.{name}_proj" for name in "qkv"],
        ),
        ([(FP8, True, ["re:.*self_attn.*"]), (FP4, True, [r"re:.*mlp.*(gate|up|down)_proj$"])], []),
        ([(FP4, True, ["model.layers.1.mlp.down_proj"]), (FP8, True, ["Linear"])], ["re:.*o_proj"]),
    ],
)
def test_compressed_tensors_are_resolved_as_vllm_does(groups_, ignore):
    """What vLLM looks up is compared, not what its kernels make of it."""
    named = {
        f"group_{number}": {"weights": weights, "input_activations": weights if inputs else None, "targets": targets}
        for number, (weights, inputs, targets) in enumerate(groups_)
    }
    fields = {
        "quant_method": "compressed-tensors",
        "format": "nvfp4-pack-quantized",
        "config_groups": named,
        "ignore": ignore,
    }
    quantization = CompressedTensorsConfig.from_config(json.loads(json.dumps(fields)))
    quantization.packed_modules_mapping = PACKED
    ours = checkpoint.read({"quantization_config": fields}, None)
    layer_of_vllm = QKVParallelLinear.__new__(QKVParallelLinear)  # its class has a name that targets may be
    for layer, site in stored_sites(published.LLAMA_3_8B | {"num_hidden_layers": 3}):
        scheme = quantization.get_scheme_dict(layer_of_vllm, f"model.layers.{layer}.{site.name}")
        expected = "unquantized"
        if scheme is not None:
            bits = scheme["weights"].num_bits
            expected = "FP8" if bits == 8 else "NVFP4" if scheme["input_activations"] else "W4A16_NVFP4"
        assert ours.scheme(layer, site) == expected


@pytest.mark.parametrize("width", [64, 128, 160, 192, 352, 704, 1408])
def test_widths_of_gated_experts_that_vllm_does_not_pad(width, monkeypatch):
    """Twice the width has to be a multiple of 128."""
    monkeypatch.setattr(torch.Tensor, "cuda", lambda tensor: tensor)
    experts, hidden = 2, 64
    half = functools.partial(torch.zeros, dtype=torch.uint8)
    scales = functools.partial(torch.zeros, dtype=torch.float8_e4m3fn)
    given = {
        "backend": oracle.NvFp4MoeBackend.VLLM_CUTLASS,
        "layer": SimpleNamespace(activation=SimpleNamespace(is_gated=True), moe_config=None),
        "w13": half(experts, 2 * width, hidden // 2),
        "w13_scale": scales(experts, 2 * width, hidden // 16),
        "w13_scale_2": torch.ones(experts),
        "a13_scale": torch.ones(experts, 2),
        "w2": half(experts, hidden, width // 2),
        "w2_scale": scales(experts, hidden, width // 16),
        "w2_scale_2": torch.ones(experts),
        "a2_scale": torch.ones(experts),
        "is_act_and_mul": True,
    }
    if 2 * width % 128:
        with pytest.raises(NotImplementedError, match="Intermediate size padding for w1 and w3"):
            flashinfer_fp4_moe.prepare_nvfp4_moe_layer_for_fi_or_cutlass(**given)
    else:
        flashinfer_fp4_moe.prepare_nvfp4_moe_layer_for_fi_or_cutlass(**given)


@pytest.mark.parametrize("flashinfer", [True, False])
@pytest.mark.parametrize(("major", "minor"), [(10, 0), (10, 3), (11, 0), (12, 0), (12, 1)])
def test_the_default_kernels_of_experts_are_vllms(major, minor, flashinfer, monkeypatch):
    """Without FlashInfer vLLM's CUTLASS on all of them, as the documentation says."""
    capability = 10 * major + minor
    pretended: Mapping[str, Callable[..., bool]] = {
        "is_cuda": lambda: True,
        "is_device_capability_family": lambda family: family // 10 == major,
        "is_device_capability": lambda exact: exact == capability,
        "has_device_capability": lambda least: capability >= least,
    }
    for name, answer in pretended.items():
        monkeypatch.setattr(current_platform, name, answer, raising=False)
    for backend in (
        "trtllm_nvfp4_moe",
        "flashinfer_cutlass_moe",
        "flashinfer_cutedsl_moe",
        "flashinfer_cutedsl_batched_moe",
    ):
        module = importlib.import_module(f"vllm.model_executor.layers.fused_moe.experts.{backend}")
        for name in [name for name in vars(module) if name.startswith("has_flashinfer")]:
            monkeypatch.setattr(module, name, lambda: flashinfer)
    parallel = SimpleNamespace(use_batched_activation_format=False, use_all2all_kernels=False, enable_eplb=False)
    for flag in ("use_fi_nvl_two_sided_kernels", "use_deepep_ht_kernels", "use_fi_nvl_one_sided_kernels"):
        setattr(parallel, flag, False)
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation
    from vllm.model_executor.layers.fused_moe.config import RoutingMethodType

    config = SimpleNamespace(
        moe_parallel_config=parallel,
        moe_backend="auto",
        swiglu_limit=None,
        is_act_and_mul=True,
        activation=MoEActivation.SILU,
        has_hash_routing=False,
        routing_method=RoutingMethodType.DeepSeekV3,
        router_logits_dtype=torch.float32,
        hidden_dim=7168,
        is_lora_enabled=False,
    )
    backend, _ = oracle.select_nvfp4_moe_backend(config, kNvfp4Static, kNvfp4Dynamic)
    ours = Deployment((1,), capability=major).expert_kernel if flashinfer else deployment.CUTLASS
    assert backend.value == ours


@pytest.fixture
def vllm_sizes(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, ...]]:
    """The sizes that vLLM captures by default, with those that model runner V2 adds for decoding."""
    from vllm.config.compilation import CUDAGraphMode
    from vllm.v1.worker.gpu.cudagraph_utils import CudaGraphManager

    def sizes(major: int, spec_tokens: int, max_num_seqs: int) -> tuple[int, ...]:
        monkeypatch.setattr(
            current_platform, "is_device_capability_family", lambda family: family // 10 == major, raising=False
        )
        compilation = SimpleNamespace(
            cudagraph_mode=CUDAGraphMode.FULL_AND_PIECEWISE,
            max_cudagraph_capture_size=None,
            cudagraph_capture_sizes=None,
            post_init_cudagraph_sizes=lambda: None,
        )
        config = SimpleNamespace(
            model_config=SimpleNamespace(enforce_eager=False),
            compilation_config=compilation,
            uniform_decode_query_len=spec_tokens + 1,
            scheduler_config=SimpleNamespace(max_num_seqs=max_num_seqs, max_num_batched_tokens=8192),
            speculative_config=None,
            performance_mode="balanced",
        )
        VllmConfig._set_cudagraph_sizes(config)
        manager = CudaGraphManager.__new__(CudaGraphManager)
        config.cache_config = SimpleNamespace(use_kda_recoverssm=False)
        vars(manager).update(
            vllm_config=config,
            compilation_config=compilation,
            cudagraph_mode=compilation.cudagraph_mode,
            max_num_reqs=max_num_seqs,
            decode_query_len=spec_tokens + 1,
            lora_capture_cases=[0],
            varlen_decode=False,
            ubatch_runner=None,
            _capture_descs={},
            _candidates={},
        )
        manager._init_candidates()
        return tuple(sorted({batch.num_tokens for batches in manager._capture_descs.values() for batch in batches}))

    return sizes


@pytest.mark.parametrize("spec_tokens", range(8))
@pytest.mark.parametrize(("major", "max_num_seqs"), [(9, 1024), (10, 1024), (12, 256), (10, 20), (10, 100)])
def test_the_captured_batch_sizes_are_vllms(major, max_num_seqs, spec_tokens, vllm_sizes):
    default = deployment.default_sizes(major, spec_tokens, max_num_seqs)
    assert deployment.with_decode_sizes(default, spec_tokens, max_num_seqs) == vllm_sizes(
        major, spec_tokens, max_num_seqs
    )

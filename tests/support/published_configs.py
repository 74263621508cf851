"""Real models' configurations: the fields that ``safealloc plan`` reads, with the values that were published.

The values were compared with copies of the published files. Where no copy was at hand: Gemma 3 and Phi-4 are as public
programs quote them; GLM-4.6 is GLM-4.7's file, whose shapes the GLM-4.5 report gives too; Nemotron-H 8B and Mistral 7B have
the defaults of transformers' configuration classes, which were made from them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

Fields = dict[str, Any]


def _each(layers: Iterable[int], *names: str) -> list[str]:
    return [name.format(layer) for layer in layers for name in names]


def _modelopt(*excluded: str, kv_cache: str | None = "FP8") -> Fields:
    """``hf_quant_config.json``."""
    fields = {"quant_algo": "NVFP4", "kv_cache_quant_algo": kv_cache, "group_size": 16, "exclude_modules": [*excluded]}
    return {"quantization": fields}


def _inside(*ignored: str) -> Fields:
    """The same in ``config.json``."""
    weights = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}
    groups = {"group_0": {"input_activations": weights, "weights": weights, "targets": ["Linear"]}}
    fields = {"config_groups": groups, "ignore": list(ignored), "quant_algo": "NVFP4", "quant_method": "modelopt"}
    return {"quantization_config": fields}


def _multimodal(architecture: str, text: Fields, **others: Any) -> Fields:
    return {"architectures": [architecture], "text_config": text, "vision_config": {"hidden_size": 1152}, **others}


def _shape(
    architecture: str | None, hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, **others: Any
) -> Fields:
    fields = {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        **others,
    }
    return fields if architecture is None else {"architectures": [architecture], **fields}


FP8 = {"quantization_config": {"activation_scheme": "dynamic", "quant_method": "fp8", "weight_block_size": [128, 128]}}
MXFP4 = {
    "quantization_config": {
        "modules_to_not_convert": [
            "model.layers.*.self_attn",
            "model.layers.*.mlp.router",
            "model.embed_tokens",
            "lm_head",
        ],
        "quant_method": "mxfp4",
    }
}

LLAMA_FP8 = {"quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head"]}}

LLAMA_3_8B = _shape("LlamaForCausalLM", 4096, 14336, 32, 32, 8)
LLAMA_3_70B = _shape("LlamaForCausalLM", 8192, 28672, 80, 64, 8)
LLAMA_3_405B = _shape("LlamaForCausalLM", 16384, 53248, 126, 128, 8)
MISTRAL_7B = _shape("MistralForCausalLM", 4096, 14336, 32, 32, 8, head_dim=None)
PHI_4 = _shape("Phi3ForCausalLM", 5120, 17920, 40, 40, 10)
QWEN3_32B = _shape("Qwen3ForCausalLM", 5120, 25600, 64, 64, 8, head_dim=128)
GEMMA_3_27B = _multimodal(
    "Gemma3ForConditionalGeneration", _shape(None, 5376, 21504, 62, 32, 16, head_dim=128, model_type="gemma3_text")
)
MIXTRAL_8X7B = _shape("MixtralForCausalLM", 4096, 14336, 32, 32, 8, num_local_experts=8, num_experts_per_tok=2)

_QWEN3_MOE = {
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
QWEN3_235B_A22B = _shape("Qwen3MoeForCausalLM", 4096, 12288, 94, 64, 4, moe_intermediate_size=1536, **_QWEN3_MOE)
QWEN3_30B_A3B = _shape("Qwen3MoeForCausalLM", 2048, 6144, 48, 32, 4, moe_intermediate_size=768, **_QWEN3_MOE)

_LLAMA_4 = {"head_dim": 128, "intermediate_size_mlp": 16384, "num_experts_per_tok": 1, "model_type": "llama4_text"}
LLAMA_4_SCOUT = _multimodal(
    "Llama4ForConditionalGeneration",
    _shape(None, 5120, 8192, 48, 40, 8, num_local_experts=16, interleave_moe_layer_step=1, **_LLAMA_4),
)
LLAMA_4_MAVERICK = _multimodal(
    "Llama4ForConditionalGeneration",
    _shape(None, 5120, 8192, 48, 40, 8, num_local_experts=128, interleave_moe_layer_step=2, **_LLAMA_4),
)

QWEN3_NEXT_80B = _shape(
    "Qwen3NextForCausalLM",
    2048,
    5120,
    48,
    16,
    2,
    head_dim=256,
    full_attention_interval=4,
    linear_key_head_dim=128,
    linear_num_key_heads=16,
    linear_num_value_heads=32,
    linear_value_head_dim=128,
    num_experts=512,
    num_experts_per_tok=10,
    moe_intermediate_size=512,
    shared_expert_intermediate_size=512,
    decoder_sparse_step=1,
    mlp_only_layers=[],
)
_QWEN3_6 = {
    "attn_output_gate": True,
    "head_dim": 256,
    "layer_types": [*["linear_attention"] * 3, "full_attention"] * 16,
    "linear_key_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 48,
    "linear_value_head_dim": 128,
}
QWEN3_6_27B = _multimodal("Qwen3_5ForConditionalGeneration", _shape(None, 5120, 17408, 64, 24, 4, **_QWEN3_6))
_QWEN3_6_FULL = range(3, 64, 4)
_QWEN3_6_LINEAR = [layer for layer in range(64) if layer % 4 != 3]
_QWEN = "model.language_model.layers.{}."
_QWEN3_6_FP8 = [
    *_each(_QWEN3_6_LINEAR, *(f"{_QWEN}linear_attn.{name}" for name in ("out_proj", "in_proj_qkv", "in_proj_z"))),
    *_each(_QWEN3_6_FULL, *(f"{_QWEN}self_attn.{name}_proj" for name in "qkvo")),
]
_QWEN3_6_W4A16 = _each(range(64), *(f"{_QWEN}mlp.{name}_proj" for name in ("gate", "up", "down")))
QWEN3_6_27B_MIXED: Fields = {
    "quantization": {
        "quant_algo": "MIXED_PRECISION",
        "kv_cache_quant_algo": "FP8",
        "quantized_layers": {
            **{name: {"quant_algo": "FP8"} for name in _QWEN3_6_FP8},
            **{name: {"quant_algo": "W4A16_NVFP4", "group_size": 16} for name in [*_QWEN3_6_W4A16, "lm_head"]},
        },
        "exclude_modules": ["mtp*", "mtp.layers.0*"],
    }
}

_LATENT = {
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
}
DEEPSEEK_V3 = _shape(
    "DeepseekV3ForCausalLM", 7168, 18432, 61, 128, 128, n_routed_experts=256, first_k_dense_replace=3, **_LATENT
)
DEEPSEEK_V3_2 = DEEPSEEK_V3 | {"architectures": ["DeepseekV32ForCausalLM"], "index_head_dim": 128, "index_n_heads": 64}
KIMI_K2 = _shape(
    "DeepseekV3ForCausalLM", 7168, 18432, 61, 64, 64, n_routed_experts=384, first_k_dense_replace=1, **_LATENT
)
KIMI_K2_5 = _multimodal("KimiK25ForConditionalGeneration", KIMI_K2)
GLM_5 = _shape(
    "GlmMoeDsaForCausalLM",
    6144,
    12288,
    78,
    64,
    64,
    head_dim=64,
    index_head_dim=128,
    index_n_heads=32,
    n_routed_experts=256,
    first_k_dense_replace=3,
    **_LATENT | {"q_lora_rank": 2048, "qk_nope_head_dim": 192, "v_head_dim": 256},
)
GLM_4_6 = _shape(
    "Glm4MoeForCausalLM",
    5120,
    12288,
    92,
    96,
    8,
    head_dim=128,
    n_routed_experts=160,
    n_shared_experts=1,
    num_experts_per_tok=8,
    moe_intermediate_size=1536,
    first_k_dense_replace=3,
)
GPT_OSS_120B = _shape(
    "GptOssForCausalLM", 2880, 2880, 36, 64, 8, head_dim=64, num_local_experts=128, num_experts_per_tok=4
)
_MINIMAX = {"rotary_dim": 64, "scoring_func": "sigmoid", "use_qk_norm": True, "use_routing_bias": True}
MINIMAX_M2_5 = _shape(
    "MiniMaxM2ForCausalLM",
    3072,
    1536,
    62,
    48,
    8,
    head_dim=128,
    **_MINIMAX,
    num_local_experts=256,
    num_experts_per_tok=8,
)

NEMOTRON_H_8B = _shape(
    "NemotronHForCausalLM",
    4096,
    21504,
    52,
    32,
    8,
    head_dim=128,
    hybrid_override_pattern="M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-",
    mamba_head_dim=64,
    mamba_num_heads=128,
    n_groups=8,
    ssm_state_size=128,
)
NEMOTRON_H_56B = NEMOTRON_H_8B | {
    "hidden_size": 8192,
    "intermediate_size": 32768,
    "num_hidden_layers": 118,
    "num_attention_heads": 64,
    "head_dim": None,
    "attention_head_dim": 128,
    "hybrid_override_pattern": "M-M-M-M*-" + "M-M-M-M-M*-" * 9 + "M-M-M-M-M-",
    "mamba_num_heads": 256,
    "ssm_state_size": 256,
}
NEMOTRON_3_NANO = NEMOTRON_H_8B | {
    "hidden_size": 2688,
    "intermediate_size": 1856,
    "num_key_value_heads": 2,
    "hybrid_override_pattern": "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
    "mamba_num_heads": 64,
    "moe_intermediate_size": 1856,
    "moe_shared_expert_intermediate_size": 3712,
    "n_routed_experts": 128,
    "n_shared_experts": 1,
    "num_experts_per_tok": 6,
}
_NANO_MAMBA, _NANO_ATTENTION = (4, 11, 18, 25, 32, 41), (5, 12, 19, 26, 33, 42)

PUBLISHED: dict[str, tuple[Fields, Fields | None]] = {
    "meta-llama/Llama-3.1-8B": (LLAMA_3_8B, None),
    "meta-llama/Llama-3.3-70B-Instruct": (LLAMA_3_70B, None),
    "meta-llama/Llama-3.1-405B": (LLAMA_3_405B, None),
    "nvidia/Llama-3.1-70B-Instruct-FP8": (LLAMA_3_70B, LLAMA_FP8),
    "meta-llama/Llama-4-Scout-17B-16E-Instruct": (LLAMA_4_SCOUT, None),
    "meta-llama/Llama-4-Maverick-17B-128E-Instruct": (LLAMA_4_MAVERICK, None),
    "mistralai/Mistral-7B": (MISTRAL_7B, None),
    "mistralai/Mixtral-8x7B-v0.1": (MIXTRAL_8X7B, None),
    "microsoft/phi-4": (PHI_4, None),
    "google/gemma-3-27b-it": (GEMMA_3_27B, None),
    "Qwen/Qwen3-32B": (QWEN3_32B, None),
    "nvidia/Qwen3-32B-NVFP4": (QWEN3_32B, _modelopt("lm_head")),
    "Qwen/Qwen3-235B-A22B-FP8": (QWEN3_235B_A22B | FP8, None),
    "nvidia/Qwen3-235B-A22B-NVFP4": (
        QWEN3_235B_A22B,
        _modelopt(*_each(range(94), "model.layers.{}.mlp.gate"), "lm_head"),
    ),
    "nvidia/Qwen3-30B-A3B-NVFP4": (QWEN3_30B_A3B, _modelopt(*_each(range(48), "model.layers.{}.mlp.gate"), "lm_head")),
    "Qwen/Qwen3-Next-80B-A3B-Thinking": (QWEN3_NEXT_80B, None),
    "nvidia/Qwen3.6-27B-NVFP4": (QWEN3_6_27B, QWEN3_6_27B_MIXED),
    "deepseek-ai/DeepSeek-R1": (DEEPSEEK_V3 | FP8, None),
    "nvidia/DeepSeek-V3-0324-NVFP4": (
        DEEPSEEK_V3,
        _modelopt(
            *_each(range(3, 61), "model.layers.{}.mlp.gate"),
            *_each(range(61), "model.layers.{}.input_layernorm", "model.layers.{}.post_attention_layernorm"),
            *_each(range(61), "model.layers.{}.self_attn*"),
            *("lm_head", "model.layers.61*", "model.embed_tokens", "model.norm"),
            kv_cache=None,
        ),
    ),
    "nvidia/DeepSeek-V3.1-NVFP4": (
        DEEPSEEK_V3,
        _modelopt(
            *_each(range(61), *(f"model.layers.{{}}.self_attn.{name}" for name in ("kv_a_proj_with_mqa", "kv_b_proj"))),
            *_each(range(61), *(f"model.layers.{{}}.self_attn.{name}" for name in ("q_a_proj", "q_b_proj"))),
            *("lm_head", "model.layers.61*"),
        ),
    ),
    "deepseek-ai/DeepSeek-V3.2": (DEEPSEEK_V3_2 | FP8, None),
    "nvidia/DeepSeek-V3.2-NVFP4": (
        DEEPSEEK_V3_2,
        _modelopt(
            *_each(range(61), "model.layers.{}.self_attn.indexer*"),
            *_each(range(61), *(f"model.layers.{{}}.self_attn.{name}" for name in ("kv_a_proj_with_mqa", "kv_b_proj"))),
            *_each(range(61), *(f"model.layers.{{}}.self_attn.{name}" for name in ("q_a_proj", "q_b_proj"))),
            *("lm_head", "model.layers.61*"),
        ),
    ),
    "moonshotai/Kimi-K2-Instruct": (KIMI_K2 | FP8, None),
    "nvidia/Kimi-K2.5-NVFP4": (
        KIMI_K2_5
        | _inside(
            *_each(range(61), "language_model.model.layers.{}.self_attn*"),
            *("language_model.lm_head", "mm_projector*", "vision_tower*"),
        ),
        None,
    ),
    "nvidia/Kimi-K2.6-NVFP4": (
        KIMI_K2_5,
        _modelopt(
            *_each(range(1, 61), "language_model.model.layers.{}.self_attn*"),
            *_each(range(1, 61), "language_model.model.layers.{}.mlp.shared_experts*"),
            *("language_model.model.layers.0*", "language_model.lm_head", "mm_projector*", "vision_tower*"),
        ),
    ),
    "zai-org/GLM-4.6": (GLM_4_6, None),
    "nvidia/GLM-5-NVFP4": (
        GLM_5,
        _modelopt(
            *_each(range(78), *(f"model.layers.{{}}.self_attn.{name}" for name in ("kv_a_proj_with_mqa", "kv_b_proj"))),
            *_each(
                range(78), *(f"model.layers.{{}}.self_attn.{name}" for name in ("q_a_proj", "q_b_proj", "indexer*"))
            ),
            *_each(range(79), "model.layers.{}.self_attn.o_proj"),
            *("lm_head", "model.layers.78*"),
        ),
    ),
    "openai/gpt-oss-120b": (GPT_OSS_120B | MXFP4, None),
    "nvidia/MiniMax-M2.5-NVFP4": (
        MINIMAX_M2_5
        | _inside(
            *_each(range(62), "model.layers.{}.block_sparse_moe.gate", "model.layers.{}.self_attn*"),
            "lm_head",
        ),
        None,
    ),
    "nvidia/Nemotron-H-8B-Base-8K": (NEMOTRON_H_8B, None),
    "nvidia/Nemotron-H-56B-Base-8K": (NEMOTRON_H_56B, None),
    "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-NVFP4": (
        NEMOTRON_3_NANO,
        _modelopt(
            *_each(_NANO_MAMBA, "backbone.layers.{}.mixer.in_proj", "backbone.layers.{}.mixer.out_proj"),
            *_each(_NANO_ATTENTION, *(f"backbone.layers.{{}}.mixer.{name}_proj" for name in "qkvo")),
            *_each(
                [layer for layer, kind in enumerate(NEMOTRON_3_NANO["hybrid_override_pattern"]) if kind == "M"],
                "backbone.layers.{}.mixer.conv1d",
            ),
            "lm_head",
        ),
    ),
}
"""``config.json`` and ``hf_quant_config.json``, by the name on Hugging Face."""

"""Linear layers of real models: which there are, their shapes on one rank, and the bytes of their buffers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.model_configs import DEEPSEEK_R1, LLAMA_70B, MIXTRAL_8X7B, QWEN3_235B
from support.published_configs import (
    DEEPSEEK_V3_2,
    GLM_4_6,
    KIMI_K2,
    LLAMA_4_MAVERICK,
    LLAMA_4_SCOUT,
    NEMOTRON_3_NANO,
    NEMOTRON_H_8B,
    PUBLISHED,
    QWEN3_NEXT_80B,
    Fields,
)

from safealloc.commands.plan import command as plan
from safealloc.commands.plan.architectures import ARCHITECTURES, Site
from safealloc.commands.plan.deployment import Deployment
from safealloc.commands.report import UsageError
from safealloc.integrations.vllm.sizes import capture_sizes

SIZES = capture_sizes(512)


def planned(folder: Path, fields: Any, beside: Fields | None = None, ranks: int = 1, **options: Any) -> plan.Result:
    (folder / "config.json").write_text(json.dumps(fields))
    if beside is not None:
        (folder / "hf_quant_config.json").write_text(json.dumps(beside))
    as_nvfp4 = options.pop("as_nvfp4", False)
    return plan.run(folder, Deployment(SIZES, ranks, **options), as_nvfp4=as_nvfp4)


def shapes(result: plan.Result) -> dict[str, tuple[int, int, int]]:
    """Columns of the input and the output, and layers, by name."""
    linear = [site for _, site in result.layers if isinstance(site, Site)]
    return {site.name: (site.k, site.n, len(site.layers)) for site in linear}


# name: MiB as published; k of its NVFP4 layers; MiB if all were NVFP4; experts on one GPU and the k of their inputs
EXPECTED: dict[str, tuple[float, set[int], float, tuple[int, set[int]] | None]] = {
    "meta-llama/Llama-3.1-8B": (0, set(), 15.0, None),
    "meta-llama/Llama-3.3-70B-Instruct": (0, set(), 30.1, None),
    "meta-llama/Llama-3.1-405B": (0, set(), 56.8, None),
    "nvidia/Llama-3.1-70B-Instruct-FP8": (0, set(), 30.1, None),
    "meta-llama/Llama-4-Scout-17B-16E-Instruct": (0, set(), 10.9, None),
    "meta-llama/Llama-4-Maverick-17B-128E-Instruct": (0, set(), 24.2, None),
    "mistralai/Mistral-7B": (0, set(), 15.0, None),
    "mistralai/Mixtral-8x7B-v0.1": (0, set(), 3.3, None),
    "microsoft/phi-4": (0, set(), 18.8, None),
    "google/gemma-3-27b-it": (0, set(), 25.3, None),
    "Qwen/Qwen3-32B": (0, set(), 31.8, None),
    "nvidia/Qwen3-32B-NVFP4": (31.8, {5120, 8192, 25600}, 31.8, None),
    "Qwen/Qwen3-235B-A22B-FP8": (0, set(), 10.0, None),
    "nvidia/Qwen3-235B-A22B-NVFP4": (10.0, {4096, 8192}, 10.0, (128, {4096, 1536})),
    "nvidia/Qwen3-30B-A3B-NVFP4": (5.0, {2048, 4096}, 5.0, (128, {2048, 768})),
    "Qwen/Qwen3-Next-80B-A3B-Thinking": (0, set(), 5.4, None),
    "nvidia/Qwen3.6-27B-NVFP4": (0, set(), 23.4, None),
    "deepseek-ai/DeepSeek-R1": (0, set(), 37.2, None),
    "nvidia/DeepSeek-V3-0324-NVFP4": (22.6, {2048, 7168, 18432}, 37.2, (256, {7168, 2048})),
    "nvidia/DeepSeek-V3.1-NVFP4": (35.9, {2048, 7168, 16384, 18432}, 37.2, (256, {7168, 2048})),
    "deepseek-ai/DeepSeek-V3.2": (0, set(), 37.2, None),
    "nvidia/DeepSeek-V3.2-NVFP4": (35.9, {2048, 7168, 16384, 18432}, 37.2, (256, {7168, 2048})),
    "moonshotai/Kimi-K2-Instruct": (0, set(), 30.5, None),
    "nvidia/Kimi-K2.5-NVFP4": (22.6, {2048, 7168, 18432}, 30.5, (384, {7168, 2048})),
    "nvidia/Kimi-K2.6-NVFP4": (0, set(), 30.5, (384, {7168, 2048})),
    "zai-org/GLM-4.6": (0, set(), 15.5, None),
    "nvidia/GLM-5-NVFP4": (16.7, {2048, 6144, 12288}, 30.1, (256, {6144, 2048})),
    "openai/gpt-oss-120b": (0, set(), 5.7, None),
    "nvidia/MiniMax-M2.5-NVFP4": (0, set(), 7.5, (256, {3072, 1536})),
    "nvidia/Nemotron-H-8B-Base-8K": (0, set(), 27.6, None),
    "nvidia/Nemotron-H-56B-Base-8K": (0, set(), 46.8, None),
    "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-NVFP4": (8.6, {2688, 3712, 4096}, 8.6, (128, {2688, 1920})),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_checkpoints_at_vllms_51_batch_sizes(tmp_path, name):
    """On one GPU: the layers that the checkpoint quantizes to NVFP4 have buffers, and no others."""
    fields, beside = PUBLISHED[name]
    mebibytes, ks, all_mebibytes, experts = EXPECTED[name]
    result = planned(tmp_path, fields, beside)
    assert round(result.nbytes / 2**20, 1) == mebibytes
    assert {site.k for site in result.sites} == ks
    held = result.experts
    assert (None if held is None else (held.sites[0].experts, {spec.k for spec in held.held})) == experts
    assert round(planned(tmp_path, fields, beside, as_nvfp4=True).nbytes / 2**20, 1) == all_mebibytes


def test_of_every_kind_of_architecture_one_is_among_the_published_configurations():
    """Those that share a row of the table have the same layers."""
    seen = {ARCHITECTURES[fields["architectures"][0]] for fields, _ in PUBLISHED.values()}
    assert seen >= {*ARCHITECTURES.values()}


def layers(first: int, end: int) -> tuple[int, ...]:
    return tuple(range(first, end))


def test_tensor_parallel_ranks_split_heads_and_columns(tmp_path):
    result = planned(tmp_path, LLAMA_70B, ranks=8)
    assert shapes(result) == {
        "self_attn.qkv_proj": (8192, 1280, 80),  # 8 of 64 heads, 1 of 8 key and 1 of 8 value heads, of 128
        "self_attn.o_proj": (1024, 8192, 80),
        "mlp.gate_up_proj": (8192, 7168, 80),
        "mlp.down_proj": (3584, 8192, 80),
    }
    assert {spec.k for spec in result.buffers} == {8192, 1024, 3584}


@pytest.mark.parametrize(("ranks", "n"), [(1, 80 * 128), (4, 20 * 128), (8, 10 * 128), (16, 6 * 128), (32, 4 * 128)])
def test_more_ranks_than_key_value_heads_have_copies_of_them(tmp_path, ranks, n):
    assert shapes(planned(tmp_path, LLAMA_70B, ranks=ranks))["self_attn.qkv_proj"] == (8192, n, 80)


def test_the_default_of_key_value_heads_is_all_heads(tmp_path):
    """Multi-head attention, as ``transformers`` reads such a configuration."""
    fields = LLAMA_70B | {"num_key_value_heads": None}
    assert shapes(planned(tmp_path, fields))["self_attn.qkv_proj"] == (8192, 3 * 8192, 80)


@pytest.mark.parametrize(("architecture", "head"), [("Qwen3ForCausalLM", 128), ("Gemma3ForCausalLM", 256)])
def test_architectures_with_a_head_size_of_their_own(tmp_path, architecture, head):
    """Where the configuration has none, ``transformers`` does not divide the hidden size."""
    fields = LLAMA_70B | {"architectures": [architecture], "num_attention_heads": 16, "head_dim": None}
    assert shapes(planned(tmp_path, fields))["self_attn.o_proj"][0] == 16 * head


def test_latent_attention_and_shared_experts(tmp_path):
    """DeepSeek-R1: three dense layers, then experts with a shared one; ``kv_b_proj`` runs at prefill only."""
    assert shapes(planned(tmp_path, DEEPSEEK_R1, ranks=8)) == {
        "self_attn.fused_qkv_a_proj": (7168, 1536 + 512 + 64, 61),
        "self_attn.q_b_proj": (1536, 16 * (128 + 64), 61),
        "self_attn.o_proj": (2048, 7168, 61),
        "mlp.gate_up_proj": (7168, 4608, 3),
        "mlp.down_proj": (2304, 7168, 3),
        "mlp.shared_experts.gate_up_proj": (7168, 512, 58),
        "mlp.shared_experts.down_proj": (256, 7168, 58),
    }


def test_latent_attention_without_compressed_queries(tmp_path):
    """DeepSeek-V2-Lite has no q_lora_rank."""
    found = shapes(planned(tmp_path, DEEPSEEK_R1 | {"q_lora_rank": None}, ranks=8))
    assert list(found.items())[:2] == [
        ("self_attn.q_proj", (7168, 16 * (128 + 64), 61)),
        ("self_attn.kv_a_proj_with_mqa", (7168, 512 + 64, 61)),
    ]


def test_sparse_attention_has_an_indexer_that_no_rank_shares(tmp_path):
    found = shapes(planned(tmp_path, DEEPSEEK_V3_2, ranks=8, as_nvfp4=True))
    assert found["self_attn.indexer.wq_b"] == (1536, 64 * 128, 61)


def test_kimi_k2_is_a_deepseek_with_one_dense_layer(tmp_path):
    found = shapes(planned(tmp_path, KIMI_K2, as_nvfp4=True))
    assert (found["mlp.down_proj"], found["mlp.shared_experts.down_proj"]) == ((18432, 7168, 1), (2048, 7168, 60))


def test_glm_4_6_has_attention_of_its_own_kind(tmp_path):
    assert shapes(planned(tmp_path, GLM_4_6, ranks=8, as_nvfp4=True)) == {
        "self_attn.qkv_proj": (5120, (12 + 2) * 128, 92),
        "self_attn.o_proj": (1536, 5120, 92),
        "mlp.gate_up_proj": (5120, 3072, 3),
        "mlp.down_proj": (1536, 5120, 3),
        "mlp.shared_experts.gate_up_proj": (5120, 384, 89),
        "mlp.shared_experts.down_proj": (192, 5120, 89),
    }


@pytest.mark.parametrize(("fields", "dense", "moe"), [(LLAMA_4_SCOUT, 0, 48), (LLAMA_4_MAVERICK, 24, 24)])
def test_llama_4_has_a_shared_expert_and_perhaps_dense_layers_between(tmp_path, fields, dense, moe):
    result = planned(tmp_path, fields, as_nvfp4=True)
    found = shapes(result)
    assert found["feed_forward.shared_expert.down_proj"] == (8192, 5120, moe)
    assert found.get("feed_forward.down_proj", (16384, 5120, 0)) == (16384, 5120, dense)
    assert result.experts is not None
    assert len(result.experts.sites[0].layers) == moe


def test_qwen3_next_has_12_attention_layers_with_gates_and_36_of_delta_net(tmp_path):
    assert shapes(planned(tmp_path, QWEN3_NEXT_80B, ranks=2, as_nvfp4=True)) == {
        "linear_attn.in_proj_qkvz": (2048, (2 * 16 * 128 + 2 * 32 * 128) // 2, 36),
        "linear_attn.in_proj_ba": (2048, 32, 36),
        "linear_attn.out_proj": (2048, 2048, 36),
        "mlp.shared_expert.gate_up_proj": (2048, 512, 48),
        "mlp.shared_expert.down_proj": (256, 2048, 48),
        "self_attn.qkv_proj": (2048, (2 * 8 + 2) * 256, 12),
        "self_attn.o_proj": (2048, 2048, 12),
    }


def test_nemotron_h_has_4_attention_layers_mamba_and_mlps_without_gates(tmp_path):
    assert shapes(planned(tmp_path, NEMOTRON_H_8B, as_nvfp4=True)) == {
        "mixer.in_proj": (4096, 18560, 24),
        "mixer.out_proj": (8192, 4096, 24),
        "mixer.up_proj": (4096, 21504, 24),
        "mixer.down_proj": (21504, 4096, 24),
        "mixer.qkv_proj": (4096, (32 + 2 * 8) * 128, 4),
        "mixer.o_proj": (4096, 4096, 4),
    }


def test_nemotron_3_has_experts_without_gates_perhaps_in_a_latent_space(tmp_path):
    """Layers by letter or by name; vLLM pads the width of such experts to 128 where it runs CUTLASS."""
    names = {"M": "mamba", "E": "moe", "*": "attention"}
    blocks = [names[letter] for letter in NEMOTRON_3_NANO["hybrid_override_pattern"]]
    others = {"hybrid_override_pattern": None, "num_hidden_layers": None, "layers_block_type": blocks}
    result = planned(tmp_path, NEMOTRON_3_NANO, as_nvfp4=True)
    assert shapes(planned(tmp_path, NEMOTRON_3_NANO | others, as_nvfp4=True)) == shapes(result)
    assert shapes(result)["mixer.shared_experts.up_proj"] == (2688, 3712, 23)
    latent = planned(tmp_path, NEMOTRON_3_NANO | {"moe_latent_size": 1024}, as_nvfp4=True)
    assert shapes(latent)["mixer.fc2_latent_proj"] == (1024, 2688, 23)
    assert [spec.k for spec in latent.experts.held] == [1024, 1920]


@pytest.mark.parametrize(("ranks", "n"), [(2, 9280), (16, 2 * (8 * 64 + 128) + 8)])
def test_mamba_groups_that_ranks_cannot_split_are_copied(tmp_path, ranks, n):
    fields = NEMOTRON_H_8B | {"num_key_value_heads": 16}
    assert shapes(planned(tmp_path, fields, ranks=ranks, as_nvfp4=True))["mixer.in_proj"] == (4096, n, 24)


def test_a_model_whose_mlps_are_all_moe(tmp_path):
    """Qwen3-235B-A22B: only attention is left."""
    result = planned(tmp_path, QWEN3_235B, ranks=4)
    assert shapes(result) == {"self_attn.qkv_proj": (4096, (16 + 2) * 128, 94), "self_attn.o_proj": (2048, 4096, 94)}
    assert sum(spec.nbytes for spec in result.buffers) == result.nbytes == result.as_dict()["bytes"]
    assert {spec.experts for spec in result.buffers} == {None}


def test_some_layers_are_dense(tmp_path):
    fields = QWEN3_235B | {"num_hidden_layers": 8, "decoder_sparse_step": 2, "mlp_only_layers": [7]}
    result = planned(tmp_path, fields)
    assert {site.name: site.layers for site in result.sites}["mlp.down_proj"] == (0, 2, 4, 6, 7)
    assert result.experts is not None
    assert [site.layers for site in result.experts.sites] == [(1, 3, 5)]


def test_a_moe_model_whose_layers_are_all_dense(tmp_path):
    fields = QWEN3_235B | {"num_hidden_layers": 2, "mlp_only_layers": [0, 1]}
    assert planned(tmp_path, fields).experts is None


@pytest.mark.parametrize(
    ("ranks", "expert_parallel", "experts", "width"), [(1, False, 256, 2048), (8, False, 256, 256), (8, True, 32, 2048)]
)
def test_expert_sites_of_deepseek_r1(tmp_path, ranks, expert_parallel, experts, width):
    """Either each rank has a part of each expert, or a part of the experts."""
    result = planned(tmp_path, DEEPSEEK_R1, ranks=ranks, expert_parallel=expert_parallel)
    (site,) = result.experts.sites
    assert (site.name, site.k, site.width, site.experts, site.topk) == ("mlp.experts", 7168, width, experts, 8)
    assert site.layers == layers(3, 61)
    assert shapes(result)["mlp.shared_experts.down_proj"][0] == 2048 // ranks  # never whole


def test_an_expert_of_mixtral_is_what_an_mlp_would_be(tmp_path):
    (site,) = planned(tmp_path, MIXTRAL_8X7B, ranks=2).experts.sites
    assert (site.k, site.width, site.experts, site.topk) == (4096, 7168, 8, 2)


def test_experts_that_ranks_cannot_share_evenly(tmp_path):
    """With expert parallelism some ranks have one more, and are planned; else their columns are split."""
    fields = QWEN3_235B | {"num_experts": 100}
    assert planned(tmp_path, fields, ranks=8, expert_parallel=True).experts.sites[0].experts == 13
    assert planned(tmp_path, fields, ranks=8).experts is not None
    with pytest.raises(UsageError, match="1540 columns on each rank"):  # whole, and no multiple of 16
        planned(tmp_path, QWEN3_235B | {"moe_intermediate_size": 1540}, ranks=4, expert_parallel=True)
    with pytest.raises(UsageError, match="no routed experts"):
        planned(tmp_path, LLAMA_70B, ranks=8, expert_parallel=True)


def test_the_language_model_of_a_multimodal_one(tmp_path):
    """Which may have other fields of the same names."""
    text = LLAMA_70B | {"architectures": None}
    fields = {"architectures": ["Mistral3ForConditionalGeneration"], "text_config": text}
    assert planned(tmp_path, fields | {"hidden_size": 64}).nbytes == planned(tmp_path, LLAMA_70B).nbytes


@pytest.mark.parametrize("architectures", [["LlamaModelOfMine"], [], None, "LlamaForCausalLM", {"a": 1}, 7, [None]])
def test_an_architecture_that_is_not_known_is_refused_by_name(tmp_path, architectures):
    with pytest.raises(UsageError, match="is not known; known are LlamaForCausalLM, ") as error:
        planned(tmp_path, LLAMA_70B | {"architectures": architectures})
    assert architectures != ["LlamaModelOfMine"] or "'LlamaModelOfMine'" in str(error.value)


def test_params_json_of_mistral_gets_a_clear_word(tmp_path):
    params = tmp_path / "params.json"
    params.write_text(json.dumps({"dim": 5120, "n_layers": 40}))
    for given in (tmp_path, params):  # a folder that has no other
        with pytest.raises(UsageError, match=r"params\.json is Mistral's own format; give the config\.json"):
            plan.run(given, Deployment((1,)))
    with pytest.raises(UsageError, match=r"fields of Mistral's params\.json"):
        planned(tmp_path, {"dim": 5120, "n_layers": 40})


@pytest.mark.parametrize(
    ("fields", "ranks", "says"),
    [
        ([], 1, "JSON object"),
        ({}, 1, "architecture None is not known"),
        ({**LLAMA_70B, "hidden_size": None}, 1, "no hidden_size"),
        ({**LLAMA_70B, "hidden_size": "large"}, 1, "hidden_size must be a whole number"),
        ({**LLAMA_70B, "hidden_size": 8200}, 1, "not a multiple of 16"),
        ({**LLAMA_70B, "num_attention_heads": 0}, 1, "at least 1"),
        ({**LLAMA_70B, "num_hidden_layers": True}, 1, "num_hidden_layers"),
        ({**LLAMA_70B, "num_hidden_layers": 10**9}, 1, "num_hidden_layers must be at most 10000"),
        ({**LLAMA_70B, "hidden_size": float("nan")}, 1, "hidden_size must be a whole number"),
        (LLAMA_70B, 3, "64 heads, which 3 ranks cannot share evenly"),
        (
            {**LLAMA_70B, "num_key_value_heads": 6},
            4,
            "6 key and value heads, which 4 ranks cannot share or copy evenly",
        ),
        ({**LLAMA_70B, "num_key_value_heads": 6}, 8, "which 8 ranks cannot share or copy evenly"),
        ({**LLAMA_70B, "num_key_value_heads": 0}, 1, "num_key_value_heads must be a whole number of at least 1"),
        ({**LLAMA_70B, "intermediate_size": 28676}, 8, "mlp.down_proj has 28676 columns, which 8 ranks"),
        ({**LLAMA_70B, "intermediate_size": 28736}, 8, "3592 columns on each rank, which is not a multiple of 16"),
        ({**DEEPSEEK_R1, "qk_rope_head_dim": None}, 1, "no qk_rope_head_dim"),
        ({**QWEN3_235B, "decoder_sparse_step": [1]}, 1, "decoder_sparse_step"),
        ({**QWEN3_235B, "mlp_only_layers": 7}, 1, "mlp_only_layers must be a list"),
        ({**QWEN3_235B, "mlp_only_layers": [[0]]}, 1, "mlp_only_layers must be a list of whole numbers"),
        ({**QWEN3_235B, "num_experts_per_tok": None}, 1, "no num_experts_per_tok"),
        ({**QWEN3_235B, "num_experts_per_tok": [8]}, 1, "num_experts_per_tok must be a whole number"),
        ({**QWEN3_235B, "num_experts_per_tok": 129}, 1, "routes a token to 129 of 128 experts"),
        ({**QWEN3_235B, "num_experts": "many"}, 1, "num_experts must be a whole number"),
        ({**QWEN3_235B, "moe_intermediate_size": 1536.0}, 1, "moe_intermediate_size must be a whole number"),
        ({**QWEN3_235B, "moe_intermediate_size": 1540}, 8, "experts has 1540 columns, which 8 ranks"),
        ({**QWEN3_235B, "moe_intermediate_size": 1600}, 8, r"experts\.w2 has 200 columns on each rank"),
        ({**NEMOTRON_H_8B, "hybrid_override_pattern": "M?"}, 1, r"layer 1 is of an unknown kind, '\?'"),
        (
            {**NEMOTRON_H_8B, "hybrid_override_pattern": None},
            1,
            "layers_block_type must be a list of names, 1 at least",
        ),
        ({**QWEN3_NEXT_80B, "layer_types": ["full_attention"]}, 1, "layer_types must be a list of names, 2 at least"),
    ],
)
def test_a_bad_configuration_has_a_reason(tmp_path, fields, ranks, says):
    with pytest.raises(UsageError, match=says):
        planned(tmp_path, fields, ranks=ranks)

"""How a checkpoint quantizes each layer, from what ModelOpt and compressed-tensors write."""

from __future__ import annotations

from typing import Any

import pytest
from support.published_configs import FP8, MXFP4, QWEN3_6_27B_MIXED

from safealloc.commands.plan import checkpoint
from safealloc.commands.plan.architectures import ExpertSite, Site

QKV, O_PROJ, DOWN = Site("self_attn.qkv_proj", 64, 64), Site("self_attn.o_proj", 64, 64), Site("mlp.down_proj", 64, 64)
EXPERTS = ExpertSite("mlp.experts", 64, 64, 8, 2, ("gate_proj", "up_proj", "down_proj"))
NVFP4_WEIGHTS = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "symmetric": True}
MXFP8_WEIGHTS = {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"}
MXFP4_WEIGHTS = {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32}
FP8_BLOCKS = {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 128]}


def schemes(quantization: Any, layer: int = 0, beside: Any = None) -> list[str]:
    """Of the attention's two layers, the MLP's second and the experts."""
    found = checkpoint.read({"quantization_config": quantization}, beside)
    return [found.scheme(layer, site) for site in (QKV, O_PROJ, DOWN, EXPERTS)]


def modelopt(*ignored: str, **others: Any) -> dict[str, Any]:
    return {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": list(ignored), **others}


def groups(*found: dict[str, Any], ignore: tuple[str, ...] = ()) -> dict[str, Any]:
    named = {f"group_{number}": group for number, group in enumerate(found)}
    return {"quant_method": "compressed-tensors", "config_groups": named, "ignore": list(ignore)}


def group(weights: dict[str, Any], *targets: str, inputs: bool = True) -> dict[str, Any]:
    return {"targets": list(targets), "weights": weights, "input_activations": weights if inputs else None}


@pytest.mark.parametrize("layer", [1, 10])
@pytest.mark.parametrize(
    ("ignored", "expected"),
    [
        ([], ["NVFP4"] * 4),
        (["lm_head"], ["NVFP4"] * 4),
        (["model.layers.1.self_attn*"], ["unquantized", "unquantized", "NVFP4", "NVFP4"]),
        (["language_model.model.layers.1.self_attn*"], ["unquantized", "unquantized", "NVFP4", "NVFP4"]),
        (["model.layers.1.self_attn.o_proj"], ["NVFP4", "unquantized", "NVFP4", "NVFP4"]),
        ([f"backbone.layers.1.self_attn.{name}_proj" for name in "qkv"], ["unquantized", "NVFP4", "NVFP4", "NVFP4"]),
        (["model.layers.1.mlp.experts*"], ["NVFP4", "NVFP4", "NVFP4", "unquantized"]),
        (["*.mlp.down_proj"], ["NVFP4", "NVFP4", "unquantized", "NVFP4"]),
    ],
)
def test_modelopts_lists_are_names_parts_of_names_or_wildcards(ignored, expected, layer):
    """Of layer 1, and not of layer 10."""
    found = schemes(modelopt(*ignored), layer)
    assert found == (expected if layer == 1 or ignored == ["*.mlp.down_proj"] else ["NVFP4"] * 4)


def test_a_file_beside_config_json_is_read_where_that_says_nothing():
    beside = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "nvfp4", "exclude_modules": ["*mlp*"]}}
    assert schemes(None, beside=beside) == ["NVFP4", "NVFP4", "unquantized", "unquantized"]
    assert schemes(FP8["quantization_config"], beside=beside) == ["FP8"] * 4


@pytest.mark.parametrize(
    ("quantization", "expected"),
    [
        (None, "unquantized"),
        ({}, "unquantized"),
        (FP8["quantization_config"], "FP8"),
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, "FP8"),
        ({"quant_method": "modelopt", "quant_algo": "W4A16_NVFP4"}, "W4A16_NVFP4"),
        (modelopt(config_groups={"group_0": group(NVFP4_WEIGHTS, "Linear", inputs=False)}), "W4A16_NVFP4"),
        (modelopt(config_groups={"group_0": group(NVFP4_WEIGHTS, "Linear")}), "NVFP4"),
        ({"quant_method": "awq"}, "AWQ"),
        (groups(group(NVFP4_WEIGHTS, "Linear")), "NVFP4"),
        (groups(group(NVFP4_WEIGHTS, "Linear", inputs=False)), "W4A16_NVFP4"),
        (groups(group(FP8_BLOCKS, "Linear")), "FP8"),
        (groups(group(MXFP4_WEIGHTS, "Linear")), "MXFP4"),
        (groups(group(MXFP8_WEIGHTS, "Linear")), "MXFP8"),
        (groups(group(MXFP8_WEIGHTS | {"scale_dtype": None}, "Linear")), "FP8"),
        ({"quant_method": "modelopt", "quant_algo": "MXFP8"}, "MXFP8"),
        ({"quant_method": "mxfp8"}, "MXFP8"),
        (groups({"targets": ["Linear"], "weights": MXFP4_WEIGHTS, "input_activations": MXFP8_WEIGHTS}), "W4A8_MXFP4"),
        (groups(group({"num_bits": 4, "type": "int", "group_size": 128}, "Linear", inputs=False)), "INT4"),
    ],
)
def test_a_scheme_of_all_layers(quantization, expected):
    assert schemes(quantization) == [expected] * 4


def test_mxfp4_of_gpt_oss_is_of_experts_alone():
    assert schemes(MXFP4["quantization_config"]) == ["unquantized", "unquantized", "unquantized", "MXFP4"]
    assert schemes({"quant_method": "gpt_oss_mxfp4"}) == schemes(MXFP4["quantization_config"])  # vLLM's own name


@pytest.mark.parametrize("method", ["mxfp8", "modelopt_mxfp8"])
def test_mxfp8_of_minimax_names_the_layers_that_it_ignores(method):
    found = schemes({"quant_method": method, "ignored_layers": ["model.layers.0.self_attn.o_proj"]})
    assert found == ["MXFP8", "unquantized", "MXFP8", "MXFP8"]


def test_compressed_tensors_groups_have_targets_by_name_pattern_or_class():
    """As in a published DeepSeek-V4 Flash, whose attention is FP8 and whose experts are NVFP4."""
    mixed = groups(group(FP8_BLOCKS, "re:.*attn.*"), group(NVFP4_WEIGHTS, r"re:.*mlp.*(gate|up|down)_proj$"))
    assert schemes(mixed) == ["FP8", "FP8", "NVFP4", "NVFP4"]
    named = groups(group(NVFP4_WEIGHTS, "model.layers.0.mlp.down_proj"), group(FP8_BLOCKS, "Linear"))
    assert schemes(named) == ["FP8", "FP8", "NVFP4", "FP8"]
    assert schemes(named, layer=1) == ["FP8"] * 4


@pytest.mark.parametrize("pattern", ["re:.*self_attn.*", r"re:.*\.self_attn\.(q|k|v|o)_proj$"])
def test_compressed_tensors_ignores_names_and_regular_expressions(pattern):
    quantization = groups(group(NVFP4_WEIGHTS, "Linear"), ignore=(pattern, "lm_head", "model.layers.3.mlp.down_proj"))
    assert schemes(quantization) == ["unquantized", "unquantized", "NVFP4", "NVFP4"]
    assert schemes(quantization, layer=3)[2] == "unquantized"
    assert schemes(groups(group(NVFP4_WEIGHTS, "Linear"), ignore=("self_attn",))) == ["NVFP4"] * 4  # no part of a name


def test_mixed_precision_names_every_layer_that_is_quantized():
    found = checkpoint.read({}, QWEN3_6_27B_MIXED)
    assert found.method == "MIXED_PRECISION"
    assert [found.scheme(3, site) for site in (QKV, O_PROJ, DOWN)] == ["FP8", "FP8", "W4A16_NVFP4"]
    delta_net = [Site(f"linear_attn.{name}", 64, 64) for name in ("in_proj_qkvz", "in_proj_ba", "out_proj")]
    assert [found.scheme(0, site) for site in delta_net] == ["FP8", "unquantized", "FP8"]
    layers = {
        f"model.layers.0.mlp.experts.{number}.{name}": {"quant_algo": "NVFP4"} for number in (0, 1) for name in "abc"
    }
    experts = ExpertSite("mlp.experts", 64, 64, 2, 1, ("a", "b", "c"))
    mixed = checkpoint.read(
        {"quantization_config": modelopt(quant_algo="MIXED_PRECISION", quantized_layers=layers)}, None
    )
    assert mixed.scheme(0, experts) == "NVFP4"
    assert mixed.scheme(1, experts) == "unquantized"


@pytest.mark.parametrize(
    "quantization",
    [modelopt("model.layers.0.self_attn.q_proj"), groups(group(NVFP4_WEIGHTS, "Linear"), ignore=("re:.*q_proj",))],
)
def test_parts_that_vllm_fuses_must_have_one_scheme(quantization):
    with pytest.raises(
        ValueError, match=r"quantizes parts of layers\.0\.self_attn\.qkv_proj differently, which vLLM refuses"
    ):
        schemes(quantization)


@pytest.mark.parametrize(
    ("quantization", "says"),
    [
        ([1], "quantization_config must be an object"),
        ({"quantization": 3}, "quantization must be an object"),
        (modelopt() | {"ignore": "lm_head"}, "ignore must be a list of names"),
        (modelopt(quant_algo="MIXED_PRECISION"), "quantized_layers must be an object"),
        (modelopt(quant_algo="MIXED_PRECISION", quantized_layers={"a": 1}), "need a quant_algo each"),
        ({"config_groups": [1]}, "config_groups must be an object of objects"),
        (groups(group(NVFP4_WEIGHTS, "Linear") | {"targets": None}, ignore=("re:(",)), "bad pattern"),
    ],
)
def test_a_bad_quantization_has_a_reason(quantization, says):
    with pytest.raises(ValueError, match=says):
        schemes(quantization)

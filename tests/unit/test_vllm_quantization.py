"""Which models may have FP4 layers, by the fields of their configuration that vLLM fills in."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from safealloc.integrations.vllm.quantization import may_have_fp4


def model(method: str | None, written: object = None) -> SimpleNamespace:
    return SimpleNamespace(quantization=method, hf_config=SimpleNamespace(quantization_config=written))


def config(model_config: object, draft: object = None) -> SimpleNamespace:
    speculative = None if draft is None else SimpleNamespace(draft_model_config=draft)
    return SimpleNamespace(model_config=model_config, speculative_config=speculative)


def groups(weights: dict[str, object], activations: dict[str, object] | None) -> dict[str, object]:
    return {"config_groups": {"group_0": {"weights": weights, "input_activations": activations}}, "ignore": ["lm_head"]}


FP4, FP8 = {"num_bits": 4, "type": "float"}, {"num_bits": 8, "type": "float"}
INT4 = {"num_bits": 4, "type": "int"}


@pytest.mark.parametrize("method", ["fp8", "awq_marlin", "gptq", "bitsandbytes", "modelopt", "mxfp8", None])
def test_methods_without_fp4_are_known(method):
    assert not may_have_fp4(config(model(method)))


@pytest.mark.parametrize("method", ["modelopt_fp4", "modelopt_mixed", "mxfp4", "gpt_oss_mxfp4", "quark", "somebody's"])
def test_fp4_methods_mixed_ones_and_unknown_ones_may_have_it(method):
    assert may_have_fp4(config(model(method)))


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (groups(FP4, FP4), True),
        (groups(FP4, None), True),
        (groups(FP8, FP8), False),
        (groups(INT4, FP8), False),
        ({"format": "nvfp4-pack-quantized"}, True),
        (None, True),  # not to be seen
    ],
)
def test_the_groups_of_compressed_tensors_decide(written, expected):
    assert may_have_fp4(config(model("compressed-tensors", written))) is expected


def test_a_checkpoint_that_says_nvfp4_counts_whatever_its_method_is_called():
    assert may_have_fp4(config(model("modelopt", {"quant_algo": "NVFP4"})))
    assert not may_have_fp4(config(model("modelopt", {"quant_algo": "FP8"})))


def test_a_draft_model_counts_too():
    assert may_have_fp4(config(model(None), model("modelopt_fp4")))
    assert not may_have_fp4(config(model("fp8"), model(None)))
    assert not may_have_fp4(config(None))

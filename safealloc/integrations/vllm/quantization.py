"""Whether a model may have layers whose activations are quantized to FP4 in blocks or MXFP8, by its vLLM configuration."""

from __future__ import annotations

from typing import Any

_WITHOUT = {
    *("awq", "auto_awq", "awq_marlin", "cpu_awq", "gptq", "auto_gptq", "gptq_marlin", "gguf", "bitsandbytes"),
    *("experts_int8", "moe_wna16", "int8_per_channel_weight_only", "mxfp8", "modelopt_mxfp8"),
    *("fp8", "fbgemm_fp8", "fp8_per_tensor", "fp8_per_block", "fp8_per_channel", "modelopt"),
}
"""vLLM's quantization methods without FP4 (0.19.1 to 0.33.0); a method that is not known may have it."""


def may_have_fp4(vllm_config: Any) -> bool:
    """Whether the model of a ``VllmConfig``, or its draft model, may have FP4 layers; unknown quantization may."""
    return any(map(_may_have_fp4, _models(vllm_config)))


def may_have_mx(vllm_config: Any) -> bool:
    """Whether the model of a ``VllmConfig``, or its draft model, has MXFP8 layers by its configuration."""
    return any(
        "mxfp8" in str(getattr(model, "quantization", None)) or _mentions_mxfp8(_written(model))
        for model in _models(vllm_config)
    )


def _models(vllm_config: Any) -> list[Any]:
    speculative = getattr(vllm_config, "speculative_config", None)
    models = (vllm_config.model_config, getattr(speculative, "draft_model_config", None))
    return [model for model in models if model is not None]


def _written(model_config: Any) -> object:
    return getattr(getattr(model_config, "hf_config", None), "quantization_config", None)


def _may_have_fp4(model_config: Any) -> bool:
    method = getattr(model_config, "quantization", None)
    written = _written(model_config)
    if method is None or method in _WITHOUT or (method == "compressed-tensors" and isinstance(written, dict)):
        return _mentions_fp4(written)
    return True


def _mentions_fp4(written: object) -> bool:
    if isinstance(written, dict):
        is_fp4 = (written.get("num_bits"), written.get("type")) == (4, "float")
        return is_fp4 or any(map(_mentions_fp4, written.values()))
    if isinstance(written, list):
        return any(map(_mentions_fp4, written))
    return isinstance(written, str) and "fp4" in written.lower()


def _mentions_mxfp8(written: object) -> bool:
    if isinstance(written, dict):
        is_mx = (written.get("num_bits"), written.get("type"), written.get("group_size")) == (8, "float", 32)
        return is_mx or any(map(_mentions_mxfp8, written.values()))
    if isinstance(written, list):
        return any(map(_mentions_mxfp8, written))
    return isinstance(written, str) and "mxfp8" in written.lower()

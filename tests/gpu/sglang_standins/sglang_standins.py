"""A plugin of SGLang's that lets its NVFP4 layers run below Blackwell, on the stand-in for FlashInfer."""

from __future__ import annotations


def load() -> None:
    import sglang.srt.layers.quantization.modelopt_quant as modelopt

    modelopt.is_blackwell_supported = lambda *given: True

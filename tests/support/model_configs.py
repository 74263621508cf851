"""Four models whose linear layers and experts are all NVFP4: fields of their ``config.json``, and such a quantization."""

from __future__ import annotations

from typing import Any

from support.published_configs import DEEPSEEK_V3, LLAMA_3_70B, QWEN3_235B_A22B
from support.published_configs import MIXTRAL_8X7B as MIXTRAL

NVFP4 = {
    "quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16, "ignore": ["lm_head"]}
}

LLAMA_70B: dict[str, Any] = LLAMA_3_70B | NVFP4
DEEPSEEK_R1: dict[str, Any] = DEEPSEEK_V3 | NVFP4
QWEN3_235B: dict[str, Any] = QWEN3_235B_A22B | NVFP4
MIXTRAL_8X7B: dict[str, Any] = MIXTRAL | NVFP4

"""Starts SGLang's engine on a tiny NVFP4 Llama with random weights, generates, and prints the tokens as JSON.

The stand-in for FlashInfer (sglang_standins) has to be first on PYTHONPATH.
"""

from __future__ import annotations

import json
import os
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"
BATCHES = [1, 2, 4, 8]  # of the decode graphs
PROMPTS = [[5, 6, 7], [11, 12], [9, 10, 30, 40]]


def tiny_model(hidden: int = 1024, intermediate: int = 2848, layers: int = 4) -> str:
    """A folder with its configuration; 2848 columns are 178 scales in 180 columns."""
    folder = tempfile.mkdtemp()
    quantization = {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16, "ignore": ["lm_head"]}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 128,
        "num_key_value_heads": hidden // 128,
        "head_dim": 128,
        "vocab_size": 2048,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "quantization_config": quantization,
    }
    with open(f"{folder}/config.json", "w", encoding="utf-8") as file:
        json.dump(config, file)
    return folder


if __name__ == "__main__":
    from sglang.srt.entrypoints.engine import Engine

    engine = Engine(
        model_path=tiny_model(),
        load_format="dummy",
        quantization="modelopt_fp4",
        fp4_gemm_runner_backend="flashinfer_cutlass",
        cuda_graph_config={"decode": {"backend": "full", "bs": BATCHES}, "prefill": {"backend": "disabled"}},
        attention_backend="triton",
        sampling_backend="pytorch",
        grammar_backend="none",
        skip_tokenizer_init=True,
        disable_flashinfer_autotune=True,
        disable_radix_cache=True,
        mem_fraction_static=float(os.environ.get("MEMORY", "0.1")),
        max_total_tokens=8192,
        max_running_requests=8,
        context_length=512,
        random_seed=7,
        log_level="info",
    )
    greedy = {"max_new_tokens": 24, "ignore_eos": True, "temperature": 0}
    tokens = []
    for count in (1, 3, 2, 3):  # 3 requests run in the graph of 4: one row is padding
        done = engine.generate(input_ids=PROMPTS[:count], sampling_params=greedy)
        tokens.append([one["output_ids"] for one in done])
    print("TOKENS", json.dumps(tokens), flush=True)
    engine.shutdown()

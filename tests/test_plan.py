"""What a pool will hold, from models' configurations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from safealloc import ScalePool
from safealloc.cli import main
from safealloc.commands import plan
from safealloc.commands.plan import vllm_sizes
from safealloc.commands.report import UsageError
from safealloc.layout import SfLayout
from safealloc.models import Site, sites

LLAMA_70B = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "num_hidden_layers": 80,
}
DEEPSEEK_R1 = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_attention_heads": 128,
    "num_hidden_layers": 61,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "first_k_dense_replace": 3,
    "moe_layer_freq": 1,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}
QWEN3_235B = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "num_attention_heads": 64,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_hidden_layers": 94,
    "num_experts": 128,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}


def planned(tmp_path: Path, fields: Any, ranks: int = 1, sizes=(1, 8), rule: str = "128x4") -> plan.Result:
    (tmp_path / "config.json").write_text(json.dumps(fields))
    return plan.run(tmp_path, ranks, sizes, rule)


def test_vllms_default_sizes():
    assert len(vllm_sizes(512)) == 51
    assert len(vllm_sizes(1024)) == 83
    assert vllm_sizes(512)[:6] == (1, 2, 4, 8, 16, 24)
    assert vllm_sizes(512)[-2:] == (496, 512)
    assert vllm_sizes(3) == (1, 2)


@pytest.mark.parametrize(("largest", "mebibytes", "compact"), [(512, 30.1, 2.8), (1024, 88.6, 10.1)])
def test_llama_70b_at_vllms_default_sizes(tmp_path, largest, mebibytes, compact):
    """One buffer a batch size and k, on one rank; a compact pool has one for 128 batch sizes."""
    result = planned(tmp_path, LLAMA_70B, sizes=vllm_sizes(largest))
    assert round(result.nbytes / 2**20, 1) == mebibytes
    assert len(result.buffers) == 2 * len(vllm_sizes(largest))
    assert result.per_call_nbytes == largest * 28672 // 16
    assert round(result.compact_nbytes / 2**20, 1) == compact
    assert len(result.compact) == 2 * largest // 128
    scales = sum(range(128, largest + 1, 128)) * (8192 + 28672) // 16
    assert (
        result.compact_nbytes - scales == largest // 128 * 4 * (8192 + 28672) // 512
    )  # counts, 4 bytes for 32 columns
    assert result.as_dict()["compact"] == {"buffers": len(result.compact), "bytes": result.compact_nbytes}


def test_a_compact_pool_holds_what_was_planned(tmp_path):
    result = planned(tmp_path, LLAMA_70B, sizes=(1, 8, 9, 32, 40, 300), rule="trtllm")
    with ScalePool("cpu", compact=True) as pool:
        for spec in result.buffers:
            pool.reserve(spec.rows, spec.k, spec.layout)
        stats = pool.stats()
    assert (stats.buffers, stats.bytes) == (len(result.compact), result.compact_nbytes)
    assert len(result.compact) == 2 * (3 + 2)


def layers(first: int, end: int) -> tuple[int, ...]:
    return tuple(range(first, end))


def test_tensor_parallel_ranks_split_what_is_split(tmp_path):
    result = planned(tmp_path, LLAMA_70B, ranks=8)
    assert result.sites == [
        Site("qkv_proj", 8192, 1280, layers(0, 80)),  # 8 of 64 heads, 1 of 8 key and 1 of 8 value heads, of 128
        Site("o_proj", 1024, 8192, layers(0, 80)),
        Site("mlp.gate_up_proj", 8192, 7168, layers(0, 80)),
        Site("mlp.down_proj", 3584, 8192, layers(0, 80)),
    ]
    assert {spec.k for spec in result.buffers} == {8192, 1024, 3584}


@pytest.mark.parametrize(("ranks", "n"), [(1, 80 * 128), (4, 20 * 128), (8, 10 * 128), (16, 6 * 128), (32, 4 * 128)])
def test_more_ranks_than_key_value_heads_have_copies_of_them(ranks, n):
    qkv = sites(LLAMA_70B, ranks)[0]
    assert (qkv.k, qkv.n) == (8192, n)


def test_without_a_number_of_key_value_heads_each_head_has_its_own():
    """Multi-head attention, as ``transformers`` reads such a configuration."""
    fields = {name: value for name, value in LLAMA_70B.items() if name != "num_key_value_heads"}
    assert sites(fields, 1)[0].n == sites(fields | {"num_key_value_heads": None}, 1)[0].n == 3 * 8192


def test_latent_attention_and_shared_experts(tmp_path):
    """DeepSeek-R1: three dense layers, then experts with a shared one."""
    assert planned(tmp_path, DEEPSEEK_R1, ranks=8).sites == [
        Site("fused_qkv_a_proj", 7168, 1536 + 512 + 64, layers(0, 61)),
        Site("q_b_proj", 1536, 16 * (128 + 64), layers(0, 61)),
        Site("kv_b_proj", 512, 16 * (128 + 128), layers(0, 61)),
        Site("o_proj", 2048, 7168, layers(0, 61)),
        Site("mlp.gate_up_proj", 7168, 4608, layers(0, 3)),
        Site("mlp.down_proj", 2304, 7168, layers(0, 3)),
        Site("shared_experts.gate_up_proj", 7168, 512, layers(3, 61)),
        Site("shared_experts.down_proj", 256, 7168, layers(3, 61)),
    ]


def test_latent_attention_whose_queries_are_not_compressed():
    """DeepSeek-V2-Lite has no q_lora_rank."""
    found = sites(DEEPSEEK_R1 | {"q_lora_rank": None}, 8)
    assert [(site.name, site.k, site.n) for site in found[:3]] == [
        ("q_proj", 7168, 16 * (128 + 64)),
        ("kv_a_proj_with_mqa", 7168, 512 + 64),
        ("kv_b_proj", 512, 16 * (128 + 128)),
    ]


def test_a_model_of_experts_only(tmp_path):
    """Qwen3-235B-A22B: what is left is attention."""
    result = planned(tmp_path, QWEN3_235B, ranks=4)
    assert result.sites == [
        Site("qkv_proj", 4096, (16 + 2) * 128, layers(0, 94)),
        Site("o_proj", 2048, 4096, layers(0, 94)),
    ]
    assert result.as_dict()["expert_scales_included"] is False


def test_some_layers_without_experts(tmp_path):
    fields = QWEN3_235B | {"num_hidden_layers": 8, "decoder_sparse_step": 2, "mlp_only_layers": [7]}
    found = {site.name: site.layers for site in planned(tmp_path, fields).sites}
    assert found["mlp.down_proj"] == (0, 2, 4, 6, 7)  # layers 1, 3 and 5 have experts


def test_trtllm_takes_8x4_up_to_32_rows(tmp_path):
    result = planned(tmp_path, LLAMA_70B, sizes=(40, 32, 1, 32), rule="trtllm")
    layouts = {(spec.rows, spec.layout) for spec in result.buffers}
    assert layouts == {(1, SfLayout.layout_8x4), (32, SfLayout.layout_8x4), (40, SfLayout.layout_128x4)}
    assert result.sizes == (1, 32, 40)


def test_the_language_model_of_a_multimodal_one(tmp_path):
    fields = {"architectures": ["SomeForConditionalGeneration"], "text_config": LLAMA_70B | {"architectures": None}}
    assert planned(tmp_path, fields).nbytes == planned(tmp_path, LLAMA_70B).nbytes


@pytest.mark.parametrize(
    ("fields", "ranks", "says"),
    [
        ([], 1, "JSON object"),
        ({}, 1, "hidden_size"),
        ({**LLAMA_70B, "hidden_size": "large"}, 1, "hidden_size must be a whole number"),
        ({**LLAMA_70B, "hidden_size": 8200}, 1, "not a multiple of 16"),
        ({**LLAMA_70B, "num_attention_heads": 0}, 1, "at least 1"),
        ({**LLAMA_70B, "num_hidden_layers": True}, 1, "num_hidden_layers"),
        ({**LLAMA_70B, "num_hidden_layers": 10**30}, 1, "at most 65536"),
        (LLAMA_70B, 3, "64 heads, which 3 ranks cannot share evenly"),
        ({**LLAMA_70B, "num_key_value_heads": 6}, 4, "6 key and value heads, which 4 ranks cannot share evenly"),
        ({**LLAMA_70B, "num_key_value_heads": 6}, 8, "cannot be copied evenly to 8 ranks"),
        ({**LLAMA_70B, "num_key_value_heads": 0}, 1, "num_key_value_heads must be at least 1"),
        ({**LLAMA_70B, "intermediate_size": 28676}, 8, "mlp.down_proj has 28676 columns, which 8 ranks"),
        ({**LLAMA_70B, "intermediate_size": 28736}, 8, "3592 columns on each of 8 ranks, not a multiple of 16"),
        ({**DEEPSEEK_R1, "qk_rope_head_dim": None}, 1, "no qk_rope_head_dim"),
        ({**QWEN3_235B, "decoder_sparse_step": [1]}, 1, "decoder_sparse_step"),
        ({**QWEN3_235B, "mlp_only_layers": 7}, 1, "mlp_only_layers must be a list"),
    ],
)
def test_what_is_no_configuration_says_why(tmp_path, fields, ranks, says):
    with pytest.raises(UsageError, match=says):
        planned(tmp_path, fields, ranks)


def test_the_command(tmp_path, capsys):
    config, result = tmp_path / "config.json", tmp_path / "plan.json"
    config.write_text(json.dumps(LLAMA_70B))
    assert main(["plan", str(config), "--max-size", "1024", "--json", str(result)]) == 0
    printed = capsys.readouterr().out
    assert "166 buffers, 88.6 MiB" in printed
    assert "16 buffers, 10.1 MiB with their counts" in printed
    row = next(line for line in printed.splitlines() if line.startswith("8192") and "128 x 512" in line)
    assert row.split()[-2:] == ["64.1", "KiB"]  # one instead of 19
    written = json.loads(result.read_text())
    assert written["bytes"] == sum(buffer["bytes"] for buffer in written["buffers"])
    assert written["sites"][0] == {"name": "qkv_proj", "k": 8192, "n": 10240, "layers": 80}
    assert ["qkv_proj", "8192", "10240", "80"] in [line.split() for line in printed.splitlines()]
    assert main(["plan", str(tmp_path), "--sizes", "1, 8,300", "--tp", "2", "--layout", "trtllm"]) == 0
    assert "Buffers for 3 captured batch sizes" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [
        ["no/such/config.json"],
        ["config.json", "--sizes", "1,,2"],
        ["config.json", "--sizes", "0"],
        ["config.json", "--sizes", "1", "--max-size", "4"],
        ["config.json", "--tp", "-1"],
        ["config.json", "--sizes", "9" * 30],
        ["config.json", "--max-size", "9" * 30],
        ["config.json", "--layout", "8x4"],
        ["bytes.bin"],
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("config.json").write_text(json.dumps(LLAMA_70B))
    Path("bytes.bin").write_bytes(bytes(range(256)))
    with pytest.raises(SystemExit) as exit_:
        main(["plan", *arguments])
    assert exit_.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1

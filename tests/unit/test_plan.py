"""What a pool will hold, from models' configurations."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.model_configs import DEEPSEEK_R1, LLAMA_70B, MIXTRAL_8X7B, QWEN3_235B

from safealloc import ScalePool
from safealloc.cli import main
from safealloc.commands import plan
from safealloc.commands.models import ExpertSite, Site, expert_sites, sites
from safealloc.commands.report import UsageError
from safealloc.formats.layout import SfLayout
from safealloc.integrations.vllm.sizes import capture_sizes


def planned(
    tmp_path: Path, fields: Any, ranks: int = 1, sizes=(1, 8), rule: str = "128x4", *, expert_parallel: bool = False
) -> plan.Result:
    (tmp_path / "config.json").write_text(json.dumps(fields))
    return plan.run(tmp_path, ranks, sizes, rule, expert_parallel=expert_parallel)


def planned_experts(tmp_path: Path, fields: Any, ranks: int = 1, *, expert_parallel: bool = False) -> plan.Experts:
    """At vLLM's default sizes up to 512."""
    found = planned(tmp_path, fields, ranks, capture_sizes(512), expert_parallel=expert_parallel).experts
    assert found is not None
    return found


def test_vllms_default_sizes():
    assert len(capture_sizes(512)) == 51
    assert len(capture_sizes(1024)) == 83
    assert capture_sizes(512)[:6] == (1, 2, 4, 8, 16, 24)
    assert capture_sizes(512)[-2:] == (496, 512)
    assert capture_sizes(3) == (1, 2)


@pytest.mark.parametrize(("largest", "mebibytes"), [(512, 30.1), (1024, 88.6)])
def test_llama_70b_at_vllms_default_sizes(tmp_path, largest, mebibytes):
    """One buffer per batch size and k, on one rank."""
    result = planned(tmp_path, LLAMA_70B, sizes=capture_sizes(largest))
    assert round(result.nbytes / 2**20, 1) == mebibytes
    assert len(result.buffers) == 2 * len(capture_sizes(largest))
    assert result.per_call_nbytes == largest * 28672 // 16


def test_a_pool_holds_what_was_planned(tmp_path):
    result = planned(tmp_path, LLAMA_70B, sizes=(1, 8, 9, 32, 40, 300), rule="trtllm")
    with ScalePool("cpu") as pool:
        for spec in result.buffers:
            pool.reserve(spec.rows, spec.k, spec.layout)
        stats = pool.stats()
    assert (stats.buffers, stats.bytes) == (len(result.buffers), result.nbytes)
    assert result.experts is None
    assert result.as_dict()["experts"] is None


def layers(first: int, end: int) -> tuple[int, ...]:
    return tuple(range(first, end))


def test_tensor_parallel_ranks_split_heads_and_columns(tmp_path):
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


def test_the_default_of_key_value_heads_is_all_heads():
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


def test_latent_attention_without_compressed_queries():
    """DeepSeek-V2-Lite has no q_lora_rank."""
    found = sites(DEEPSEEK_R1 | {"q_lora_rank": None}, 8)
    assert [(site.name, site.k, site.n) for site in found[:3]] == [
        ("q_proj", 7168, 16 * (128 + 64)),
        ("kv_a_proj_with_mqa", 7168, 512 + 64),
        ("kv_b_proj", 512, 16 * (128 + 128)),
    ]


def test_a_model_whose_mlps_are_all_moe(tmp_path):
    """Qwen3-235B-A22B: only attention is left."""
    result = planned(tmp_path, QWEN3_235B, ranks=4)
    assert result.sites == [
        Site("qkv_proj", 4096, (16 + 2) * 128, layers(0, 94)),
        Site("o_proj", 2048, 4096, layers(0, 94)),
    ]
    assert sum(spec.nbytes for spec in result.buffers) == result.nbytes == result.as_dict()["bytes"]
    assert {spec.experts for spec in result.buffers} == {None}


def test_some_layers_are_dense(tmp_path):
    fields = QWEN3_235B | {"num_hidden_layers": 8, "decoder_sparse_step": 2, "mlp_only_layers": [7]}
    result = planned(tmp_path, fields)
    found = {site.name: site.layers for site in result.sites}
    assert found["mlp.down_proj"] == (0, 2, 4, 6, 7)
    assert result.experts is not None
    assert [site.layers for site in result.experts.sites] == [(1, 3, 5)] * 2


def test_a_moe_model_whose_layers_are_all_dense(tmp_path):
    fields = QWEN3_235B | {"num_hidden_layers": 2, "mlp_only_layers": [0, 1]}
    assert planned(tmp_path, fields).experts is None


@pytest.mark.parametrize(
    ("ranks", "expert_parallel", "experts", "width"), [(1, False, 256, 2048), (8, False, 256, 256), (8, True, 32, 2048)]
)
def test_expert_sites_of_deepseek_r1(ranks, expert_parallel, experts, width):
    """Either each rank has a part of each expert, or a part of the experts."""
    assert expert_sites(DEEPSEEK_R1, ranks, expert_parallel=expert_parallel) == [
        ExpertSite("experts.w13", 7168, experts, 8, layers(3, 61)),
        ExpertSite("experts.w2", width, experts, 8, layers(3, 61)),
    ]
    shared = sites(DEEPSEEK_R1, ranks)[-1]
    assert (shared.name, shared.k) == ("shared_experts.down_proj", 2048 // ranks)  # never whole


def test_the_default_width_of_an_expert_is_that_of_an_mlp():
    assert [(site.k, site.experts, site.topk) for site in expert_sites(MIXTRAL_8X7B, 2)] == [(4096, 8, 2), (7168, 8, 2)]


@pytest.mark.parametrize("name", ["num_experts_per_token", "top_k_experts", "moe_topk", "moe_top_k"])
def test_names_of_experts_per_token(name):
    fields = QWEN3_235B | {"num_experts_per_tok": None, name: 5}
    assert [site.topk for site in expert_sites(fields, 1)] == [5, 5]


ROUTED = 512 * 8
RECORD = 4 * ROUTED  # an int32 per row
VLLM_ROWS = 163840 * 8


@pytest.mark.parametrize(
    ("fields", "ranks", "expert_parallel", "stored", "right", "columns"),
    [
        (DEEPSEEK_R1, 1, False, 36608, ROUTED + 127 * 256, (128, 448)),  # k = 2048 and 7168
        (DEEPSEEK_R1, 8, False, 36608, ROUTED + 127 * 256, (16, 448)),  # 256 of 2048
        (DEEPSEEK_R1, 8, True, 8064, ROUTED + 127 * 32, (128, 448)),
        (QWEN3_235B, 1, False, 20352, ROUTED + 127 * 128, (96, 256)),  # k = 1536 and 4096
        (QWEN3_235B, 8, False, 20352, ROUTED + 127 * 128, (12, 256)),  # 192 of 1536
        (QWEN3_235B, 8, True, 6016, ROUTED + 127 * 16, (96, 256)),
    ],
)
def test_expert_bytes_at_vllms_default_sizes(tmp_path, fields, ranks, expert_parallel, stored, right, columns):
    """One buffer per k, of whole tiles; vLLM holds the wider of its two."""
    experts = planned_experts(tmp_path, fields, ranks, expert_parallel=expert_parallel)
    assert stored == right // 128 * 128
    assert [spec.padded_shape for spec in experts.buffers] == [(stored, count) for count in columns]
    assert [spec.nbytes for spec in experts.buffers] == [stored * count + RECORD for count in columns]
    written = experts.as_dict()
    assert [buffer["vllm_bytes"] for buffer in written["buffers"]] == [VLLM_ROWS * count for count in columns]
    assert [buffer["right_sized_bytes"] for buffer in written["buffers"]] == [right * count for count in columns]
    assert written["bytes"] == stored * sum(columns) + 2 * RECORD
    assert written["vllm_bytes"] == VLLM_ROWS * columns[1]
    assert written["right_sized_bytes"] == right * columns[1]
    assert written["freed_bytes"] == written["vllm_bytes"] - written["bytes"]
    assert written["expert_parallel"] is expert_parallel


def test_a_call_of_vllm_is_587_megabytes_for_deepseek_r1(tmp_path):
    experts = planned_experts(tmp_path, DEEPSEEK_R1)
    assert experts.vllm_nbytes == 587_202_560
    assert experts.nbytes == 21_118_976
    assert experts.freed_nbytes == 566_083_584


def test_columns_round_up_to_a_tile_as_vllms_do(tmp_path):
    """A width of 96 is 6 scale columns, 8 in the buffer; 16 ranks split 1536."""
    experts = planned_experts(tmp_path, QWEN3_235B, 16)
    assert [(spec.k, spec.padded_shape[1]) for spec in experts.buffers] == [(96, 8), (4096, 256)]
    assert experts.as_dict()["buffers"][0]["vllm_bytes"] == VLLM_ROWS * 8


def test_both_calls_share_a_buffer_where_k_is_equal(tmp_path):
    experts = planned_experts(tmp_path, QWEN3_235B | {"moe_intermediate_size": 4096})
    assert [spec.k for spec in experts.buffers] == [4096]
    assert experts.nbytes == 20352 * 256 + RECORD


@pytest.mark.parametrize(
    ("fields", "ranks", "expert_parallel"),
    [(DEEPSEEK_R1, 1, False), (DEEPSEEK_R1, 8, True), (QWEN3_235B, 1, False), (MIXTRAL_8X7B, 2, False)],
)
def test_a_pool_holds_what_was_planned_for_experts(tmp_path, fields, ranks, expert_parallel):
    """Once reserved, every captured batch size gets that memory, and there is never more of it."""
    experts = planned_experts(tmp_path, fields, ranks, expert_parallel=expert_parallel)
    sizes = capture_sizes(512)
    with ScalePool("cpu") as pool:
        for site in experts.sites:
            pool.reserve([size * site.topk for size in sizes], site.k, experts=site.experts)
        assert (pool.stats().buffers, pool.stats().bytes) == (len(experts.buffers), experts.nbytes)
        for site in experts.sites:
            for size in sizes:
                pool.acquire_grouped(size * site.topk, site.k, site.experts)
        stats = pool.stats()
        assert (stats.buffers, stats.bytes, stats.misses) == (len(experts.buffers), experts.nbytes, 0)


def scale_rows(counts: list[int]) -> int:
    """Rows of scales for groups of so many rows, each padded to whole tiles."""
    return sum(-(-count // 128) * 128 for count in counts)


def test_some_routing_takes_every_planned_row(tmp_path):
    """512 tokens, each to 8 of 256 experts: 226 experts with one row, 30 with 129."""
    counts = [1] * 226 + [129] * 30
    assert sum(counts) == 512 * 8
    assert {spec.stored_rows for spec in planned_experts(tmp_path, DEEPSEEK_R1).buffers} == {scale_rows(counts)}


@st.composite
def routings(draw: st.DrawFn) -> tuple[int, int, int, list[int]]:
    """Ranks, experts per token, tokens, and rows of each expert: even, skewed to a few experts, or with experts unused."""
    ranks = draw(st.sampled_from([1, 2, 8]))
    experts = ranks * draw(st.integers(1, 32))
    topk = draw(st.integers(1, min(experts, 10)))
    tokens = draw(st.integers(1, 300))
    used = draw(st.integers(topk, experts))
    skew = draw(st.sampled_from([0, 1, 8]))
    rng = random.Random(draw(st.integers(0, 2**32)))
    weights = [rng.random() ** skew for _ in range(used)]
    counts = [0] * experts
    for _ in range(tokens):
        ranking = [rng.random() * weight for weight in weights]
        for expert in sorted(range(used), key=ranking.__getitem__)[:topk]:
            counts[expert] += 1
    rng.shuffle(counts)
    return ranks, topk, tokens, counts


@given(routings(), st.integers(0, 400), st.sampled_from([256, 768, 4096]))
def test_no_routing_takes_more_rows_than_planned(routing, more, width):
    """Planned scales are also within the right-sized bound, whether a rank has all experts or some."""
    ranks, topk, tokens, counts = routing
    fields = QWEN3_235B | {
        "num_experts": len(counts),
        "num_experts_per_tok": topk,
        "moe_intermediate_size": width,
    }
    for expert_parallel in (False, True):
        found = expert_sites(fields, ranks, expert_parallel=expert_parallel)
        own = found[0].experts
        assert own == (len(counts) // ranks if expert_parallel else len(counts))
        for spec in plan.expert_buffers(found, tokens + more):
            for first in range(0, len(counts), own):
                assert scale_rows(counts[first : first + own]) <= spec.padded_shape[0]
            assert spec.scale_bytes <= plan.right_sized_nbytes(spec)


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
        ({**LLAMA_70B, "hidden_size": float("nan")}, 1, "hidden_size must be a whole number"),
        (LLAMA_70B, 3, "64 heads, which 3 ranks cannot share evenly"),
        ({**LLAMA_70B, "num_key_value_heads": 6}, 4, "6 key and value heads, which 4 ranks cannot share evenly"),
        ({**LLAMA_70B, "num_key_value_heads": 6}, 8, "cannot be copied evenly to 8 ranks"),
        ({**LLAMA_70B, "num_key_value_heads": 0}, 1, "num_key_value_heads must be at least 1"),
        ({**LLAMA_70B, "intermediate_size": 28676}, 8, "mlp.down_proj has 28676 columns, which 8 ranks"),
        ({**LLAMA_70B, "intermediate_size": 28736}, 8, "3592 columns on each of 8 ranks, not a multiple of 16"),
        ({**DEEPSEEK_R1, "qk_rope_head_dim": None}, 1, "no qk_rope_head_dim"),
        ({**QWEN3_235B, "decoder_sparse_step": [1]}, 1, "decoder_sparse_step"),
        ({**QWEN3_235B, "mlp_only_layers": 7}, 1, "mlp_only_layers must be a list"),
        ({**QWEN3_235B, "mlp_only_layers": [[0]]}, 1, "mlp_only_layers must be a list of whole numbers"),
        ({**QWEN3_235B, "num_experts_per_tok": None}, 1, "no num_experts_per_tok or num_experts_per_token or"),
        ({**QWEN3_235B, "num_experts_per_tok": [8]}, 1, "num_experts_per_tok must be a whole number"),
        ({**QWEN3_235B, "num_experts_per_tok": 0}, 1, "routes a token to 0 of 128 experts"),
        ({**QWEN3_235B, "num_experts_per_tok": 129}, 1, "routes a token to 129 of 128 experts"),
        ({**QWEN3_235B, "num_experts": "many"}, 1, "num_experts must be a whole number"),
        ({**QWEN3_235B, "moe_intermediate_size": 1536.0}, 1, "moe_intermediate_size must be a whole number"),
        ({**QWEN3_235B, "moe_intermediate_size": None, "intermediate_size": None}, 1, "no moe_intermediate_size or"),
        ({**QWEN3_235B, "moe_intermediate_size": 0}, 1, "experts.w2 has 0 columns"),
        ({**QWEN3_235B, "moe_intermediate_size": 1540}, 8, "experts.w2 has 1540 columns, which 8 ranks"),
        ({**QWEN3_235B, "moe_intermediate_size": 1600}, 8, "200 columns on each of 8 ranks, not a multiple of 16"),
    ],
)
def test_a_bad_configuration_has_a_reason(tmp_path, fields, ranks, says):
    with pytest.raises(UsageError, match=says):
        planned(tmp_path, fields, ranks)


@pytest.mark.parametrize(
    ("architectures", "model"),
    [
        (["LlamaForCausalLM", "Other"], "LlamaForCausalLM"),
        ([], "llama"),
        (None, "llama"),
        ("LlamaForCausalLM", "llama"),  # no list
        ({"a": 1}, "llama"),
        (7, "llama"),
        ([None], "unknown"),
    ],
)
def test_a_model_without_a_named_architecture(tmp_path, architectures, model):
    assert planned(tmp_path, LLAMA_70B | {"architectures": architectures, "model_type": "llama"}).model == model


def test_experts_that_ranks_cannot_share_evenly(tmp_path):
    with pytest.raises(UsageError, match="the model has 100 experts, which 8 ranks cannot share evenly"):
        planned(tmp_path, QWEN3_235B | {"num_experts": 100}, 8, expert_parallel=True)
    assert planned(tmp_path, QWEN3_235B | {"num_experts": 100}, 8).experts is not None
    with pytest.raises(UsageError, match="1540 columns on each of 4 ranks"):  # whole, and no multiple of 16
        planned(tmp_path, QWEN3_235B | {"moe_intermediate_size": 1540}, 4, expert_parallel=True)
    with pytest.raises(UsageError, match="no routed experts"):
        planned(tmp_path, LLAMA_70B, 8, expert_parallel=True)


def test_batches_at_and_beyond_vllms_limit(tmp_path):
    """At its limit the two buffers of a pool are more than the larger of vLLM's."""
    experts = planned(tmp_path, DEEPSEEK_R1, sizes=(1, 163840)).experts
    assert experts is not None
    assert experts.freed_nbytes < 0
    with pytest.raises(UsageError, match=r"at most 163840 tokens at once.*, the largest batch has 163841"):
        planned(tmp_path, DEEPSEEK_R1, sizes=(1, 163841))
    assert planned(tmp_path, LLAMA_70B, sizes=(163841,)).experts is None


def test_the_command(tmp_path, capsys):
    config, result = tmp_path / "config.json", tmp_path / "plan.json"
    config.write_text(json.dumps(LLAMA_70B))
    assert main(["plan", str(config), "--max-size", "1024", "--json", str(result)]) == 0
    printed = capsys.readouterr().out
    assert "166 buffers, 88.6 MiB" in printed
    row = next(line for line in printed.splitlines() if line.startswith("8192") and "128 x 512" in line)
    assert " ".join(row.split()) == "8192 1 to 128 128x4 128 x 512 19 1.2 MiB"
    written = json.loads(result.read_text())
    assert written["bytes"] == sum(buffer["bytes"] for buffer in written["buffers"])
    assert written["sites"][0] == {"name": "qkv_proj", "k": 8192, "n": 10240, "layers": 80}
    assert ["qkv_proj", "8192", "10240", "80"] in [line.split() for line in printed.splitlines()]
    assert main(["plan", str(tmp_path), "--sizes", "1, 8,300", "--tp", "2", "--layout", "trtllm"]) == 0
    printed = capsys.readouterr().out
    assert "Buffers for 3 captured batch sizes" in printed
    assert "xpert" not in printed


def test_the_command_for_experts(tmp_path, capsys):
    config, result = tmp_path / "config.json", tmp_path / "plan.json"
    config.write_text(json.dumps(DEEPSEEK_R1))
    assert main(["plan", str(config), "--json", str(result)]) == 0
    printed = capsys.readouterr().out
    assert "Expert scales: 256 experts on each rank, 8 per token, in 58 layers" in printed
    rows = [" ".join(line.split()) for line in printed.splitlines() if line.startswith("experts.")]
    assert rows == [
        "experts.w2 2048 4096 36608 x 128 4.5 MiB 4.5 MiB 160.0 MiB",
        "experts.w13 7168 4096 36608 x 448 15.7 MiB 15.6 MiB 560.0 MiB",
    ]
    assert "In all 20.1 MiB with row records" in printed
    assert "hold 560.0 MiB at once: 539.9 MiB are freed." in printed
    written = json.loads(result.read_text())
    assert written["bytes"] == sum(buffer["bytes"] for buffer in written["buffers"])
    assert written["experts"]["sites"] == [
        {"name": "experts.w13", "k": 7168, "experts": 256, "topk": 8, "layers": 58},
        {"name": "experts.w2", "k": 2048, "experts": 256, "topk": 8, "layers": 58},
    ]
    assert written["experts"]["freed_bytes"] == 566_083_584
    assert main(["plan", str(config), "--tp", "8", "--expert-parallel", "--json", str(result)]) == 0
    assert "Expert scales: 32 experts on each rank" in capsys.readouterr().out
    assert json.loads(result.read_text())["experts"]["expert_parallel"] is True
    assert main(["plan", str(config), "--sizes", "163840"]) == 0
    assert "are freed" not in capsys.readouterr().out


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
        ["config.json", "--expert-parallel"],
        ["bytes.bin"],
        ["empty.json"],
        ["deep.json"],
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("config.json").write_text(json.dumps(LLAMA_70B))
    Path("bytes.bin").write_bytes(bytes(range(256)))
    Path("empty.json").touch()
    Path("deep.json").write_text("[" * 100_000)
    with pytest.raises(SystemExit) as exit_:
        main(["plan", *arguments])
    assert exit_.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1

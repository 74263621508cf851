"""What a pool will hold, from models' configurations."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.model_configs import DEEPSEEK_R1, LLAMA_70B, MIXTRAL_8X7B, NVFP4, QWEN3_235B
from support.published_configs import GLM_4_6, GPT_OSS_120B, MXFP4

from safealloc import ScaleFormat, ScalePool, ScaleSpec
from safealloc.cli import main
from safealloc.commands.plan import command as plan
from safealloc.commands.plan.architectures import ExpertSite, sites
from safealloc.commands.plan.deployment import Deployment, capability, default_sizes, with_decode_sizes
from safealloc.commands.report import UsageError
from safealloc.formats.layout import SfLayout
from safealloc.integrations.vllm.sizes import capture_sizes


def planned(tmp_path: Path, fields: Any, ranks: int = 1, sizes=(1, 8), **deployment: Any) -> plan.Result:
    (tmp_path / "config.json").write_text(json.dumps(fields))
    return plan.run(tmp_path, Deployment(tuple(sizes), ranks, **deployment))


def planned_experts(tmp_path: Path, fields: Any, ranks: int = 1, **deployment: Any) -> plan.Experts:
    """At vLLM's default sizes up to 512, with its CUTLASS kernels."""
    found = planned(tmp_path, fields, ranks, capture_sizes(512), **{"moe_backend": "cutlass"} | deployment).experts
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
    result = planned(tmp_path, LLAMA_70B, sizes=(1, 8, 9, 32, 40, 300), layout_rule="trtllm")
    with ScalePool("cpu") as pool:
        for spec in result.buffers:
            pool.reserve(spec.rows, spec.k, spec.layout)
        stats = pool.stats()
    assert (stats.buffers, stats.bytes) == (len(result.buffers), result.nbytes)
    assert result.experts is None
    assert result.as_dict()["experts"] is None


ROUTED = 512 * 8
RECORD = 4 * ROUTED  # an int32 per row
VLLM_ROWS = 163840 * 8


@pytest.mark.parametrize(
    ("fields", "ranks", "expert_parallel", "stored", "right", "columns"),
    [
        (DEEPSEEK_R1, 1, False, 36608, ROUTED + 127 * 256, (448, 128)),  # k = 7168 and 2048
        (DEEPSEEK_R1, 8, False, 36608, ROUTED + 127 * 256, (448, 16)),  # 256 of 2048
        (DEEPSEEK_R1, 8, True, 8064, ROUTED + 127 * 32, (448, 128)),
        (QWEN3_235B, 1, False, 20352, ROUTED + 127 * 128, (256, 96)),  # k = 4096 and 1536
        (QWEN3_235B, 8, False, 20352, ROUTED + 127 * 128, (256, 12)),  # 192 of 1536
        (QWEN3_235B, 8, True, 6016, ROUTED + 127 * 16, (256, 96)),
    ],
)
def test_expert_bytes_at_vllms_default_sizes(tmp_path, fields, ranks, expert_parallel, stored, right, columns):
    """One buffer per k, of whole tiles; vLLM holds the wider of its two."""
    experts = planned_experts(tmp_path, fields, ranks, expert_parallel=expert_parallel)
    assert stored == right // 128 * 128
    assert [spec.padded_shape for spec in experts.held] == [(stored, count) for count in columns]
    assert [spec.nbytes for spec in experts.held] == [stored * count + RECORD for count in columns]
    written = experts.as_dict()
    assert [buffer["vllm_bytes"] for buffer in written["buffers"]] == [VLLM_ROWS * count for count in columns]
    assert [buffer["right_sized_bytes"] for buffer in written["buffers"]] == [right * count for count in columns]
    assert written["bytes"] == stored * sum(columns) + 2 * RECORD
    assert written["vllm_bytes"] == VLLM_ROWS * columns[0]
    assert written["right_sized_bytes"] == right * columns[0]
    assert written["freed_bytes"] == written["vllm_bytes"] - written["bytes"]


def test_a_call_of_vllm_is_587_megabytes_for_deepseek_r1(tmp_path):
    experts = planned_experts(tmp_path, DEEPSEEK_R1)
    assert experts.vllm_nbytes == 587_202_560
    assert experts.nbytes == 21_118_976
    assert experts.freed_nbytes == 566_083_584


def test_both_calls_share_a_buffer_where_k_is_equal(tmp_path):
    experts = planned_experts(tmp_path, QWEN3_235B | {"moe_intermediate_size": 4096})
    assert [spec.k for spec in experts.held] == [4096]
    assert list(experts.buffers) == ["mlp.experts.w13", "mlp.experts.w2"]
    assert experts.nbytes == 20352 * 256 + RECORD


def test_the_tokens_of_all_data_parallel_ranks_are_quantized_for_experts(tmp_path):
    """They are gathered, and vLLM divides experts among all ranks."""
    experts = planned_experts(tmp_path, DEEPSEEK_R1, 2, data=4)
    assert [(spec.rows, spec.k, spec.experts) for spec in experts.held] == [
        (4 * ROUTED, 7168, 256),
        (4 * ROUTED, 256, 256),
    ]
    experts = planned_experts(tmp_path, DEEPSEEK_R1, 2, data=4, expert_parallel=True)
    assert [(spec.rows, spec.k, spec.experts) for spec in experts.held] == [
        (4 * ROUTED, 7168, 32),
        (4 * ROUTED, 2048, 32),
    ]


def test_ranks_share_the_rows_of_whole_shared_experts_with_data_and_expert_parallelism(tmp_path):
    """With sequence-parallel MoE; attention and dense layers see every row."""
    result = planned(tmp_path, DEEPSEEK_R1, 8, [4, 512], data=2, expert_parallel=True)
    rows = {k: sorted(spec.rows for spec in result.buffers if spec.k == k) for k in (2048, 2304)}
    assert rows == {2048: [1, 4, 64, 512], 2304: [4, 512]}  # o_proj has 2048 columns too
    shared = [site for site in result.sites if "shared" in site.name]
    assert [(site.k, site.n) for site in shared] == [(7168, 4096), (2048, 7168)]
    glm = planned(tmp_path, GLM_4_6 | NVFP4, 8, [4, 512], data=2, expert_parallel=True)  # vLLM does not do so there
    assert {spec.rows for spec in glm.buffers} == {4, 512}
    with_tensor_parallelism_only = planned(tmp_path, DEEPSEEK_R1, 8, [4, 512], expert_parallel=True)
    assert {spec.rows for spec in with_tensor_parallelism_only.buffers} == {4, 512}


@pytest.mark.parametrize(
    ("fields", "ranks", "expert_parallel"),
    [(DEEPSEEK_R1, 1, False), (DEEPSEEK_R1, 8, True), (QWEN3_235B, 1, False), (MIXTRAL_8X7B, 2, False)],
)
def test_a_pool_holds_what_was_planned_for_experts(tmp_path, fields, ranks, expert_parallel):
    """Once reserved, every captured batch size gets that memory, and there is never more of it."""
    experts = planned_experts(tmp_path, fields, ranks, expert_parallel=expert_parallel)
    topk, sizes = experts.sites[0].topk, capture_sizes(512)
    with ScalePool("cpu") as pool:
        for spec in experts.held:
            pool.reserve([size * topk for size in sizes], spec.k, experts=spec.experts)
        assert (pool.stats().buffers, pool.stats().bytes) == (len(experts.held), experts.nbytes)
        for spec in experts.held:
            for size in sizes:
                pool.acquire_grouped(size * topk, spec.k, spec.experts)
        stats = pool.stats()
        assert (stats.buffers, stats.bytes, stats.misses) == (len(experts.held), experts.nbytes, 0)


def scale_rows(counts: list[int]) -> int:
    """Rows of scales for groups of so many rows, each padded to whole tiles."""
    return sum(-(-count // 128) * 128 for count in counts)


def test_some_routing_takes_every_planned_row(tmp_path):
    """512 tokens, each to 8 of 256 experts: 226 experts with one row, 30 with 129."""
    counts = [1] * 226 + [129] * 30
    assert sum(counts) == 512 * 8
    assert {spec.stored_rows for spec in planned_experts(tmp_path, DEEPSEEK_R1).held} == {scale_rows(counts)}


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
        deployment = Deployment((1,), ranks, expert_parallel=expert_parallel)
        found = next(site for _, site in sites(fields, deployment) if isinstance(site, ExpertSite))
        own = found.experts
        assert own == (len(counts) // ranks if expert_parallel else len(counts))
        for spec in plan.expert_buffers([found], tokens + more).values():
            for first in range(0, len(counts), own):
                assert scale_rows(counts[first : first + own]) <= spec.padded_shape[0]
            assert spec.scale_bytes <= plan.right_sized_nbytes(spec)


def test_trtllm_takes_8x4_up_to_32_rows(tmp_path):
    result = planned(tmp_path, LLAMA_70B, sizes=(1, 32, 40), layout_rule="trtllm")
    layouts = {(spec.rows, spec.layout) for spec in result.buffers}
    assert layouts == {(1, SfLayout.layout_8x4), (32, SfLayout.layout_8x4), (40, SfLayout.layout_128x4)}


def test_batches_at_and_beyond_vllms_limit(tmp_path):
    """At its limit the two buffers of a pool are more than the larger of vLLM's."""
    freed = planned(tmp_path, DEEPSEEK_R1, sizes=(1, 163840), moe_backend="cutlass").experts.freed_nbytes
    assert freed < 0
    with pytest.raises(UsageError, match=r"at most 163840 tokens at once.*, the largest batch has 163841"):
        planned(tmp_path, DEEPSEEK_R1, sizes=(1, 163841))
    with pytest.raises(UsageError, match="the largest batch has 163842"):
        planned(tmp_path, DEEPSEEK_R1, sizes=(1, 81921), data=2)
    assert planned(tmp_path, LLAMA_70B, sizes=(163841,)).experts is None


@pytest.mark.parametrize(
    ("gpu", "kernel", "held", "freed"),
    [
        ("b200", "FLASHINFER_TRTLLM", False, False),
        ("10.3", "FLASHINFER_TRTLLM", False, False),
        ("thor", "VLLM_CUTLASS", True, True),
        ("rtx-pro-6000", "FLASHINFER_CUTLASS", False, False),
        ("12.1", "FLASHINFER_CUTLASS", False, False),
        ("H100", "MARLIN", False, False),
        (None, None, True, False),
    ],
)
def test_memory_is_freed_only_where_vllms_cutlass_path_runs(tmp_path, gpu, kernel, held, freed):
    deployment = {"capability": capability(gpu) if gpu else None}
    result = planned(tmp_path, DEEPSEEK_R1, **deployment)
    assert result.as_dict()["moe_backend"] == kernel
    assert (result.experts is not None) is held
    assert (result.experts is not None and result.experts.freed_nbytes is not None) is freed
    asked = planned(tmp_path, DEEPSEEK_R1, moe_backend="cutlass", **deployment)
    assert (asked.experts is not None and asked.experts.freed_nbytes is not None) is (gpu != "H100")


def test_a_gpu_without_fp4_has_no_scales_of_activations(tmp_path):
    result = planned(tmp_path, LLAMA_70B, capability=9)
    assert (result.nbytes, result.per_call_nbytes) == (0, 0)
    assert "Marlin" in result.remarks[0]


def test_flashinfers_cutlass_kernels_quantize_their_input_as_linear_layers_do(tmp_path):
    """Without data parallelism, where vLLM quantizes before it gathers, into linear scales."""
    alone = planned(tmp_path, QWEN3_235B, capability=12)
    assert alone.sites[-1].name == "mlp.experts.w13"
    assert (alone.sites[-1].k, alone.sites[-1].n) == (4096, 3072)
    assert planned(tmp_path, QWEN3_235B, capability=12, data=2).sites[-1].name == "self_attn.o_proj"


@pytest.mark.parametrize(("width", "fits"), [(128, True), (192, True), (160, False), (352, False), (1408, True)])
def test_gate_and_up_rows_of_a_rank_that_vllm_refuses(tmp_path, width, fits):
    """Its CUTLASS paths take a multiple of 128; TRTLLM pads."""
    fields = QWEN3_235B | {"moe_intermediate_size": 8 * width}
    for backend in ("cutlass", "flashinfer_cutlass"):
        if fits:
            planned(tmp_path, fields, 8, moe_backend=backend)
        else:
            with pytest.raises(
                UsageError, match=f"gate and up have {2 * width} rows on each rank, not a multiple of 128"
            ):
                planned(tmp_path, fields, 8, moe_backend=backend)
    planned(tmp_path, fields, 8, moe_backend="flashinfer_trtllm")
    assert (planned(tmp_path, fields, 8).experts is not None) is fits  # no GPU is given


def test_an_unknown_gpu_is_refused_by_name():
    with pytest.raises(ValueError, match=r"b200, gb200.*got 'b300x'"):
        capability("b300x")


@pytest.mark.parametrize(("major", "count"), [(None, 51), (9, 51), (10, 83), (12, 51)])
def test_the_gpu_chooses_the_default_batch_sizes(major, count):
    assert default_sizes(major, 0, 1024) == capture_sizes(1024 if major == 10 else 512)
    assert len(default_sizes(major, 0, 1024)) == count


def test_few_requests_bound_the_default_batch_sizes():
    """Twice as many, and just as many, which need be no multiple of 8."""
    assert default_sizes(10, 0, 20) == (1, 2, 4, 8, 16, 20, 24, 32, 40)


@pytest.mark.parametrize("tokens", range(1, 8))
@pytest.mark.parametrize("major", [9, 10])
def test_speculative_tokens_add_sizes_of_whole_requests(tokens, major):
    query, largest = tokens + 1, 1024 if major == 10 else 512
    found = with_decode_sizes(default_sizes(major, tokens, 1024), tokens, 1024)
    assert {*capture_sizes(largest)} <= {*found}
    assert {-(-size // query) * query for size in found if size <= largest - query} <= {*found}
    assert {size for size in found if size not in capture_sizes(largest)} <= {
        size for size in found if size % query == 0
    }
    assert max(found) == largest


def test_the_command(tmp_path, capsys):
    config, result = tmp_path / "config.json", tmp_path / "plan.json"
    config.write_text(json.dumps(LLAMA_70B))
    assert main(["plan", str(config), "--max-size", "1024", "--json", str(result)]) == 0
    printed = capsys.readouterr().out
    assert "166 buffers, 88.6 MiB" in printed
    lines = [" ".join(line.split()) for line in printed.splitlines()]
    assert "8192 1 to 1024 128x4 1024 x 512 83 19.7 MiB" in lines
    assert "self_attn.qkv_proj 8192 10240 80 NVFP4" in lines
    written = json.loads(result.read_text())
    assert written["bytes"] == sum(buffer["bytes"] for buffer in written["buffers"])
    assert written["sites"][0] == {"name": "self_attn.qkv_proj", "k": 8192, "n": 10240, "layers": 80}
    assert main(["plan", str(tmp_path), "--sizes", "1, 8,300", "--tp", "2", "--layout", "trtllm"]) == 0
    printed = capsys.readouterr().out
    assert "Buffers for 3 captured batch sizes" in printed
    assert "Expert scales" not in printed


def test_vllms_spellings_of_options(tmp_path, capsys):
    """As in ``vllm serve``, with the same meaning."""
    (tmp_path / "config.json").write_text(json.dumps(DEEPSEEK_R1))
    flags = ["--cudagraph-capture-sizes", "1", "8", "--tensor-parallel-size=4", "-dp", "2", "--enable-expert-parallel"]
    flags += ["--moe-backend", "cutlass", "--speculative-config", '{"method": "ngram", "num_speculative_tokens": 2}']
    assert main(["plan", str(tmp_path), *flags, "--json", "-"]) == 0
    written = json.loads(capsys.readouterr().out)
    assert [written[name] for name in ("tensor_parallel", "data_parallel", "expert_parallel")] == [4, 2, True]
    assert written["sizes"] == [1, 3, 8]  # 9 is above the largest
    assert main(["plan", str(tmp_path), "--gpu", "b200", "--spec-tokens=2", "-tp=8", "-ep", "--json", "-"]) == 0
    written = json.loads(capsys.readouterr().out)
    assert (written["tensor_parallel"], written["sizes"][-1], 993 in written["sizes"]) == (8, 1024, True)


def test_the_command_for_experts(tmp_path, capsys):
    config, result = tmp_path / "config.json", tmp_path / "plan.json"
    config.write_text(json.dumps(DEEPSEEK_R1))
    assert main(["plan", str(config), "--moe-backend", "cutlass", "--json", str(result)]) == 0
    printed = capsys.readouterr().out
    assert "Expert scales: 256 experts on each rank, 8 per token, in 58 layers" in printed
    rows = [" ".join(line.split()) for line in printed.splitlines() if line.startswith("mlp.experts.")]
    assert rows == [
        "mlp.experts.w13 7168 4096 36608 x 448 15.7 MiB 15.6 MiB 560.0 MiB",
        "mlp.experts.w2 2048 4096 36608 x 128 4.5 MiB 4.5 MiB 160.0 MiB",
    ]
    assert "In all 20.1 MiB with row records" in printed
    assert "hold 560.0 MiB at once: 539.9 MiB are freed." in printed
    written = json.loads(result.read_text())
    assert written["bytes"] == sum(buffer["bytes"] for buffer in written["buffers"])
    assert written["experts"]["sites"] == [
        {"name": "mlp.experts.w13", "k": 7168, "experts": 256, "topk": 8, "layers": 58},
        {"name": "mlp.experts.w2", "k": 2048, "experts": 256, "topk": 8, "layers": 58},
    ]
    assert written["experts"]["freed_bytes"] == 566_083_584
    assert main(["plan", str(config), "--tp", "8", "--expert-parallel", "--json", str(result)]) == 0
    printed = capsys.readouterr().out
    assert "Expert scales: 32 experts on each rank" in printed
    assert "at once: --gpu says if it runs." in printed
    assert json.loads(result.read_text())["expert_parallel"] is True
    assert main(["plan", str(config), "--sizes", "163840"]) == 0
    assert "are freed" not in capsys.readouterr().out


def test_the_command_where_a_pool_holds_nothing(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_70B | {"quantization_config": None}))
    assert main(["plan", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "No activation is quantized to NVFP4: a pool holds nothing" in printed
    assert "Buffers" not in printed
    assert main(["plan", str(tmp_path), "--as-nvfp4"]) == 0
    printed = capsys.readouterr().out
    assert "LlamaForCausalLM, TP 1, as NVFP4: " in printed
    assert "102 buffers, 30.1 MiB" in printed


def test_layers_of_other_schemes_are_named_with_them(tmp_path, capsys):
    quantization = {"quant_algo": "W4A16_NVFP4", "ignore": ["model.layers.*.self_attn*"]}
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_235B | {"quantization_config": quantization}))
    assert main(["plan", str(tmp_path), "--json", str(tmp_path / "plan.json")]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "self_attn.o_proj 8192 4096 94 unquantized" in lines
    assert "mlp.experts 4096 3072 94 W4A16_NVFP4" in lines
    written = json.loads((tmp_path / "plan.json").read_text())
    assert [site["scheme"] for site in written["others"]] == ["unquantized", "unquantized", "W4A16_NVFP4"]


@pytest.mark.parametrize("scheme", ["MXFP8", "MXFP4"])
def test_linear_layers_of_mx_are_listed_with_the_sizes_of_their_scales(tmp_path, capsys, scheme):
    weights = {"num_bits": int(scheme[-1]), "type": "float", "strategy": "group", "group_size": 32}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights | {"scale_dtype": "torch.uint8"}}}
    quantization = {"quant_method": "compressed-tensors", "config_groups": groups, "ignore": []}
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_70B | {"quantization_config": quantization}))
    file = tmp_path / "plan.json"
    assert main(["plan", str(tmp_path), "--sizes", "1,130", "-tp", "2", "--json", str(file)]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert f"LlamaForCausalLM, TP 2, {scheme}: linear layers and experts" in lines
    assert f"mlp.down_proj 80 {scheme.lower()} 14336 130 256 x 448 112.0 KiB" in lines
    assert any("a pool holds none of them" in line for line in lines)
    written = json.loads(file.read_text())
    assert (written["quantization"], written["bytes"], written["buffers"]) == (scheme, 0, [])
    assert {(site["k"], site["format"], site["bytes"]) for site in written["mx"]} == {
        (8192, scheme.lower(), 256 * 8192 // 32),
        (4096, scheme.lower(), 256 * 4096 // 32),
        (14336, scheme.lower(), 256 * 14336 // 32),
    }


def test_experts_of_gpt_oss_are_listed_with_the_buffers_of_cutlass(tmp_path):
    result = planned(tmp_path, GPT_OSS_120B | MXFP4, sizes=(1, 8))
    assert result.quantization == "MXFP4"
    (first, second) = result.mx
    assert [name.rpartition(".")[2] for name, _, _ in result.mx] == ["w13", "w2"]
    assert first[2] == ScaleSpec.grouped(8 * 4, 2880, SfLayout.layout_128x4, 128, ScaleFormat.mxfp4)
    assert first[2].padded_shape[1] == 92
    assert (second[1], second[2].format) == (36, ScaleFormat.mxfp4)
    with ScalePool("cpu") as pool:
        pool.reserve(first[2].rows, first[2].k, experts=first[2].experts, format=ScaleFormat.mxfp4)
        assert pool.stats().bytes == first[2].nbytes
    assert any("CUTLASS_MXFP4_MXFP4" in remark for remark in result.remarks)
    assert result.experts is None


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

"""What a pool will hold for a model in SGLang. The graphs' sizes are held against SGLang in ``sglang_contract``."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.published_configs import LLAMA_3_70B, QWEN3_6_27B, QWEN3_30B_A3B

from safealloc import ScalePool
from safealloc.cli import main
from safealloc.commands.plan import sglang
from safealloc.commands.plan.deployment import GPUS
from safealloc.formats.format import ScaleFormat
from safealloc.formats.layout import SfLayout
from safealloc.integrations.sglang import runner

MODELOPT = {"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4"}}
DOWN_ONLY = {"quantization_config": MODELOPT["quantization_config"] | {"ignore": ["*gate_proj*", "*up_proj*"]}}
MXFP8 = {"quantization_config": {"quant_method": "mxfp8", "modules_to_not_convert": ["o_proj"]}}
COMPRESSED = {
    "quantization_config": {
        "quant_method": "compressed-tensors",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16},
                "input_activations": {"num_bits": 4, "type": "float"},
            }
        },
    }
}


def plan(tmp_path: Path, fields: Any, *options: str, engine: str = "sglang") -> dict[str, Any]:
    """The JSON that the command writes."""
    (tmp_path / "config.json").write_text(json.dumps(fields))
    written = tmp_path / "plan.json"
    assert main(["plan", str(tmp_path), "--engine", engine, *options, "--json", str(written)]) == 0
    return json.loads(written.read_text())


def refused(tmp_path: Path, capsys: Any, *options: str) -> str:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_3_70B | MODELOPT))
    with pytest.raises(SystemExit, match="2"):
        main(["plan", str(tmp_path), *options])
    return capsys.readouterr().err


def test_buffers_are_those_of_a_pool(tmp_path: Path) -> None:
    options = ("--tp-size", "2", "--cuda-graph-bs", "1,3", "200", "--speculative-num-draft-tokens", "4")
    found = plan(tmp_path, LLAMA_3_70B | MODELOPT, *options, "--max-running-requests", "200")
    pool = ScalePool("cpu")
    for k in (8192, 4096, 14336):
        pool.reserve([4, 12, 800], k, SfLayout.layout_128x4)
    assert (len(found["buffers"]), found["bytes"]) == (pool.stats().buffers, pool.stats().bytes)
    assert (found["sizes"], found["engine"], found["others"]) == ([4, 12, 800], "sglang", [])
    assert not any("safety there" in remark for remark in found["remarks"])


def test_mxfp8_layers_have_scales_of_32_columns(tmp_path: Path) -> None:
    found = plan(tmp_path, LLAMA_3_70B | MXFP8, "--cuda-graph-max-bs", "1")
    pool = ScalePool("cpu")
    for k in (8192, 28672):
        pool.reserve([1], k, SfLayout.layout_128x4, format=ScaleFormat.mxfp8)
    assert (len(found["buffers"]), found["bytes"]) == (2, pool.stats().bytes)
    assert [site["name"] for site in found["sites"]] == ["self_attn.qkv_proj", "mlp.gate_up_proj", "mlp.down_proj"]
    assert [site["name"] for site in found["others"]] == ["self_attn.o_proj"]
    assert found["mx"] == []  # none that FlashInfer allocates
    assert {buffer["format"] for buffer in found["buffers"]} == {"mxfp8"}


@pytest.mark.parametrize(
    ("fields", "fused"),
    [
        (QWEN3_6_27B | MODELOPT, True),
        (QWEN3_6_27B | COMPRESSED, False),
        (QWEN3_6_27B | DOWN_ONLY, False),
        (LLAMA_3_70B | MODELOPT, False),
    ],
)
def test_fused_producer_of_dense_qwen(tmp_path: Path, fields: Any, fused: bool) -> None:
    remarks = plan(tmp_path, fields, "--gpu", "b200")["remarks"]
    assert any("before mlp.down_proj of 48 layers" in remark for remark in remarks) is fused
    assert any("no safety. No time was measured" in remark for remark in remarks)


def test_experts_are_not_counted_and_it_says_so(tmp_path: Path) -> None:
    found = plan(tmp_path, QWEN3_30B_A3B | MODELOPT, "--gpu", "b200")
    assert found["experts"] is None
    assert "routed experts" in found["remarks"][-1]


def test_gpu_without_fp4_holds_nothing(tmp_path: Path) -> None:
    found = plan(tmp_path, LLAMA_3_70B | MODELOPT, "--gpu", "h100")
    assert (found["bytes"], found["buffers"], found["sizes"][-1]) == (0, [], 256)


def test_printed(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_6_27B | MODELOPT))
    assert main(["plan", str(tmp_path), "--engine", "sglang", "--gpu", "B200", "--tp", "2"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "In all 156 buffers, 13.9 MiB, on each rank" in printed
    assert "a pool gives safety there. Elsewhere FlashInfer's quantizer zeroes padding" in printed
    assert "fill per call" not in printed


def test_sizes_follow_gpu_ranks_and_speculation(tmp_path: Path) -> None:
    def rows(*options: str) -> list[int]:
        return plan(tmp_path, LLAMA_3_70B | MODELOPT, *options)["sizes"]

    assert rows("--gpu", "rtx-5090")[-1] == 48
    assert rows("--gpu", "rtx-5090", "--tp", "4")[-1] == 160
    assert rows("--gpu", "b200", "--max-running-requests", "100")[-2:] == [96, 100]
    assert rows("--gpu", "b200", "--speculative-num-draft-tokens", "4")[-2:] == [176, 192]  # of 48 requests
    drafts = rows("--gpu", "b200", "--speculative-num-draft-tokens", "4", "--max-running-requests", "512")
    assert drafts[-2:] == [1984, 2048]


def test_rows_are_those_that_the_plugin_reserves(tmp_path: Path) -> None:
    options = ("--speculative-num-draft-tokens", "4", "--max-running-requests", "100")
    planned = plan(tmp_path, LLAMA_3_70B | MODELOPT, "--gpu", "b200", *options)["sizes"]
    graphs = {"decode": {"bs": list(sglang.batch_sizes(100, speculative=True))}}
    given = SimpleNamespace(cuda_graph_config=graphs, speculative_algorithm="EAGLE", speculative_num_draft_tokens=4)
    assert planned == list(runner.steps(SimpleNamespace(server_args=given)).copies)


def test_memory_is_known_of_every_gpu_but_one() -> None:
    assert set(GPUS) - set(sglang.GIBIBYTES) == {"a100"}


@pytest.mark.parametrize(
    ("options", "instead"),
    [
        (("-dp", "2"), "leave it out"),
        (("-ep",), "leave it out"),
        (("--moe-backend", "cutlass"), "leave it out"),
        (("--layout", "trtllm"), "leave it out"),
        (("--spec-tokens", "3"), "--speculative-num-draft-tokens"),
        (("--max-num-seqs", "8"), "--max-running-requests"),
        (("--max-size", "8"), "--cuda-graph-max-bs"),
        (("--sizes", "8"), "--cuda-graph-bs"),
    ],
)
def test_options_of_the_other_engine_are_refused(
    tmp_path: Path, capsys: Any, options: tuple[str, ...], instead: str
) -> None:
    error = refused(tmp_path, capsys, "--engine", "sglang", "--gpu", "b200", *options)
    assert "is an option of vLLM" in error
    assert instead in error
    if instead.startswith("--"):
        error = refused(tmp_path, capsys, instead, "4")
        assert f"{instead} is an option of SGLang: give --engine sglang" in error


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ((), "--cuda-graph-max-bs N"),
        (("--gpu", "10.0"), "--cuda-graph-max-bs N"),
        (("--gpu", "a100"), "--cuda-graph-max-bs N"),
        (("--cuda-graph-bs", "8", "--max-running-requests", "4"), "--max-running-requests 8"),
    ],
)
def test_graphs_that_nothing_determines_are_refused(
    tmp_path: Path, capsys: Any, options: tuple[str, ...], said: str
) -> None:
    assert said in refused(tmp_path, capsys, "--engine", "sglang", *options)

"""The decode graphs that ``safealloc plan --engine sglang`` computes, held against SGLang's own rules."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import types
from pathlib import Path
from typing import Any, TypeGuard

import pytest

from safealloc.commands.plan import sglang

GRAPHS, MEMORY = "sglang.srt.arg_groups.cuda_graph_hook", "sglang.srt.arg_groups.memory_hook"


@pytest.fixture
def rules(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """SGLang's modules, which read the arguments themselves instead of what other rules have resolved."""
    graphs, memory = map(importlib.import_module, (GRAPHS, MEMORY))
    for module in (graphs, memory):
        monkeypatch.setattr(module, "resolving_view", lambda args: args)
    return graphs, memory


def arguments(tensor: int, requests: int | None, algorithm: str | None) -> Any:
    phase = {"max_bs": None, "bs": None}
    config = types.SimpleNamespace(
        decode=types.SimpleNamespace(**phase), prefill=types.SimpleNamespace(max_bs=8, bs=[8])
    )
    return types.SimpleNamespace(
        device="cuda",
        cuda_graph_config=config,
        chunked_prefill_size=8,
        tp_size=tensor,
        max_running_requests=requests,
        disable_cuda_graph_padding=False,
        speculative_algorithm=algorithm,
        mem_fraction_static=0.5,
    )


@pytest.mark.parametrize("algorithm", [None, "EAGLE"])
def test_batch_sizes(rules: tuple[Any, Any], algorithm: str | None) -> None:
    for largest in range(1, 1200):
        expected = rules[0].generate_decode_cuda_graph_batch_sizes(arguments(1, None, algorithm), largest)
        assert sglang.batch_sizes(largest, speculative=algorithm is not None) == tuple(expected)


@pytest.mark.parametrize("tensor", [1, 3, 4, 8])
def test_most_requests(rules: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch, tensor: int) -> None:
    class SeenError(Exception):
        pass

    def sizes(args: Any, largest: int) -> None:
        raise SeenError(largest)

    monkeypatch.setattr(rules[0], "generate_decode_cuda_graph_batch_sizes", sizes)
    for gibibytes in (*sglang.GIBIBYTES.values(), 16, 19.9, 20, 34.9, 35, 59.9, 60, 89.9, 90, 159.9, 160):
        monkeypatch.setattr(rules[1], "get_device_memory_capacity", lambda device, known=gibibytes: known * 1024)
        for requests in (None, 5, 10_000):
            with pytest.raises(SeenError) as seen:
                rules[1].handle_gpu_memory_settings(arguments(tensor, requests, None))
            assert seen.value.args == (min(sglang.most_requests(gibibytes, tensor), requests or 512),)


def test_requests_of_speculative_decoding() -> None:
    """Each rule that sets a number of requests where none is given sets this one."""
    numbers = {
        keyword.value.value
        for node in ast.walk(_parsed("arg_groups/speculative_hook.py"))
        if isinstance(node, ast.Call)
        for keyword in node.keywords
        if keyword.arg == "max_running_requests" and isinstance(keyword.value, ast.Constant)
    }
    assert numbers == {sglang.SPECULATIVE_REQUESTS}


def test_layers_with_the_fused_producer() -> None:
    """Dense layers of Gated DeltaNet only, and ModelOpt's method only."""
    tree = _parsed("models/qwen3_5.py")
    name = "_maybe_enable_silu_fp4_quant_fusion"
    layers = [node for node in tree.body if isinstance(node, ast.ClassDef) and name in ast.unparse(node)]
    assert [layer.name for layer in layers] == ["Qwen3_5LinearDecoderLayer"]
    (branch,) = (
        node
        for node in ast.walk(layers[0])
        if isinstance(node, ast.If) and any(ast.unparse(line) == f"{name}(self.mlp)" for line in node.body)
    )
    assert ast.unparse(branch.test) == "config.model_type == 'qwen3_5_text'"
    (condition,) = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name)
    methods = [ast.unparse(node.args[1]) for node in ast.walk(condition) if _is_instance_check(node)]
    assert methods == ["ModelOptFp4LinearMethod"] * 2


def _is_instance_check(node: ast.AST) -> TypeGuard[ast.Call]:
    return isinstance(node, ast.Call) and ast.unparse(node.func) == "isinstance"


def _parsed(path: str) -> ast.Module:
    found = importlib.util.find_spec("sglang")
    assert found is not None
    (folder,) = found.submodule_search_locations or ()
    return ast.parse(Path(folder, "srt", path).read_text(encoding="utf-8"))

"""What a registration of the plugin changes, a vLLM whose sources differ, and processes that load the plugin."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import vllm.utils.flashinfer as vllm_flashinfer
from vllm.model_executor.kernels import linear

from safealloc.integrations.vllm import targets


def state() -> dict[tuple[str, ...], object]:
    """All that a registration may change: attributes of vLLM's modules and classes, and its tables."""
    found: dict[tuple[str, ...], object] = {}
    for name, module in list(sys.modules.items()):
        if name != "vllm" and not name.startswith("vllm."):
            continue
        for attribute, value in list(vars(module).items()):
            found[name, attribute] = value
            if isinstance(value, type) and value.__module__ == name:
                found |= {(name, attribute, member): inner for member, inner in vars(value).items()}
            elif isinstance(value, dict):
                found |= {(name, attribute, repr(key)): inner for key, inner in value.items()}
    for name, value in vllm_flashinfer.flashinfer_mm_fp4._backend_fns.items():
        found["kernel of vllm::flashinfer_mm_fp4", str(name)] = value
    for platform, kernels in linear._POSSIBLE_NVFP4_KERNELS.items():
        found |= {("kernels", str(platform), str(index)): kernel for index, kernel in enumerate(kernels)}
    found |= {("sys.meta_path", str(index)): finder for index, finder in enumerate(sys.meta_path)}
    return found


def differences(before: dict[tuple[str, ...], object], after: dict[tuple[str, ...], object]) -> set[tuple[str, ...]]:
    """Keys whose values differ, or are in one state only."""
    missing = object()
    return {key for key in before.keys() | after.keys() if before.get(key, missing) is not after.get(key, missing)}


def with_source(monkeypatch: pytest.MonkeyPatch, module: str, old: str, new: str) -> None:
    """Let the plugin read a vLLM in one of whose modules ``old`` is replaced by ``new``."""
    found = targets.installed()
    assert found is not None
    version, source = found

    def changed(name: str) -> str | None:
        text = source(name)
        if name == module and text is not None:
            assert text.count(old) >= 1
            return text.replace(old, new)
        return text

    monkeypatch.setattr(targets, "installed", lambda: (version, changed))


def run(program: str, **environment: str) -> str:
    """Run a program in a Python process of its own, which may import ``support`` too; its output."""
    paths = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SAFEALLOC", "VLLM"))}
    result = subprocess.run(
        [sys.executable, "-c", program],
        env=kept | {"PYTHONPATH": paths, "VLLM_PLUGINS": "safealloc"} | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


LOADED = """
import multiprocessing, sys
import torch
import vllm.plugins
vllm.plugins.load_general_plugins()
from safealloc import default_pool
from safealloc.integrations.vllm import plugin
import importlib
default = importlib.import_module("safealloc.pool.default")

def allocate():
    import vllm._custom_ops as ops
    from safealloc.integrations.vllm.serve import allocator
    from safealloc.integrations.startup import Steps
    from safealloc.integrations.vllm.engine import Engine
    engine = Engine(Steps({8: 1}), torch.device("cpu"))
    engine.pool = default_pool("cpu")
    with allocator.working(engine):
        _, scales = ops.create_fp4_output_tensors(5, 80, torch.device("cpu"), True, padded_n=96)
    return str(default_pool("cpu").spec(scales))

def loaded_and_allocated():
    import vllm.plugins
    vllm.plugins.load_general_plugins()
    plugin.register()  # as a worker does
    return allocate()
"""
"""The beginning of such a program: vLLM has loaded its plugins. ``allocate`` does so as in a capture."""

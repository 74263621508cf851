"""Registering with vLLM and unregistering: what is replaced, when, and what is logged."""

from __future__ import annotations

import importlib.metadata
import logging
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import vllm._custom_ops as ops
import vllm.envs
import vllm.model_executor.kernels.linear.nvfp4.flashinfer as flashinfer_kernels
import vllm.model_executor.model_loader.base_loader as base_loader
import vllm.plugins
import vllm.utils.flashinfer as vllm_flashinfer
import vllm.v1.worker.gpu_worker
from support.vllm_cpu_ops import ALPHA, CPU, fused_act_quant
from support.vllm_installed import TESTED
from support.vllm_registration import differences, state, with_source
from torch import Tensor

from safealloc import ScalePool
from safealloc.integrations import vllm as integration
from safealloc.integrations.vllm import hooks, plugin, targets

K = 80


@pytest.fixture
def modules_to_look_through() -> None:
    """All of them: these tests compare every module."""


# --- what is replaced -------------------------------------------------------------------------------------------------


def test_unregistering_restores_every_original(pool: ScalePool) -> None:
    before = state()
    integration.register()
    replaced = differences(before, state())
    assert {key[:2] for key in replaced} >= {
        ("vllm._custom_ops", "create_fp4_scale_tensor"),
        ("vllm._custom_ops", "create_fp4_output_tensors"),
        ("vllm._custom_ops", "flashinfer_quant_nvfp4_8x4_sf_layout"),
        ("vllm.utils.flashinfer", "flashinfer_quant_nvfp4_8x4_sf_layout"),
        ("vllm.utils.flashinfer", "flashinfer_scaled_fp4_mm"),
        ("kernel of vllm::flashinfer_mm_fp4", "cpu"),
        ("vllm.model_executor.layers.fusion.fused_act_quant", "_silu_and_mul_nvfp4_dynamic"),
        ("vllm.model_executor.layers.fusion.fused_act_quant", "_FUSED_ACT_QUANT"),
        ("vllm.compilation.passes.fusion.attn_quant_fusion", "AttnQuantFusionPass"),
        ("vllm.compilation.passes.fusion.mla_attn_quant_fusion", "MLAAttnQuantFusionPass"),
        ("vllm.v1.worker.gpu_worker", "Worker"),
        ("vllm.model_executor.model_loader.utils", "process_weights_after_loading"),
        ("vllm.envs", "environment_variables"),
    }
    assert not any(key[0] == "sys.meta_path" for key in replaced)  # no import is waited for
    integration.unregister()
    assert differences(before, state()) == set()


def test_a_second_registration_changes_nothing(pool: ScalePool) -> None:
    before = state()
    integration.register()
    during = state()
    for load in (integration.register, plugin.load, integration.register):
        load()
        assert differences(during, state()) == set()
    integration.unregister()
    integration.unregister()
    assert differences(before, state()) == set()
    assert plugin.registered() is None


def test_registering_again_and_again_does_not_stack_wrappers(pool: ScalePool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call passes through as many frames afterwards as before."""
    depths: list[int] = []

    def kernel(*given: Any) -> Tensor:
        frame, depth = sys._getframe(), 0
        while frame.f_back is not None:
            frame, depth = frame.f_back, depth + 1
        depths.append(depth)
        return torch.empty(given[0].shape[0], given[1].shape[1], dtype=given[5])

    op = vllm_flashinfer.flashinfer_mm_fp4
    monkeypatch.setitem(op._backend_fns, "cpu", kernel)
    x_fp4, weight = torch.zeros(5, 32, dtype=torch.uint8), torch.zeros(16, 32, dtype=torch.uint8)
    arguments = (x_fp4, weight.T, x_fp4, weight.T, ALPHA, torch.bfloat16, False, "cutlass")
    op(*arguments)
    for _ in range(4):
        integration.register()
        integration.unregister()
    op(*arguments)
    assert depths[0] == depths[1]


def test_names_that_other_modules_have_imported_are_replaced_there(pool: ScalePool) -> None:
    def bound() -> list[object]:
        return [
            flashinfer_kernels.flashinfer_scaled_fp4_mm,
            ops.flashinfer_quant_nvfp4_8x4_sf_layout,
            base_loader.process_weights_after_loading,
        ]

    before = bound()
    integration.register()
    import vllm.model_executor.model_loader.utils as loader_utils

    assert bound() == [
        vllm_flashinfer.flashinfer_scaled_fp4_mm,
        vllm_flashinfer.flashinfer_quant_nvfp4_8x4_sf_layout,
        loader_utils.process_weights_after_loading,
    ]
    assert all(new is not old for new, old in zip(bound(), before, strict=True))
    integration.unregister()
    assert all(new is old for new, old in zip(bound(), before, strict=True))


def test_replacements_have_the_parameters_of_the_originals(pool: ScalePool) -> None:
    """In the same order, with the same defaults."""
    import inspect

    def parameters() -> list[list[tuple[str, object]]]:
        functions: list[Callable[..., Any]] = [
            ops.create_fp4_scale_tensor,
            ops.create_fp4_output_tensors,
            ops.flashinfer_quant_nvfp4_8x4_sf_layout,
            vllm_flashinfer.flashinfer_scaled_fp4_mm,
            fused_act_quant._silu_and_mul_nvfp4_dynamic,
            base_loader.process_weights_after_loading,
        ]
        return [[(p.name, p.default) for p in inspect.signature(f).parameters.values()] for f in functions]

    before = parameters()
    integration.register()
    assert parameters() == before


# --- what is logged ---------------------------------------------------------------------------------------------------


def test_registering_logs_one_line(pool: ScalePool, log: list[logging.LogRecord]) -> None:
    integration.register()
    (record,) = log
    assert record.levelno == logging.INFO
    assert f"registered for vLLM {TESTED}: " in record.getMessage()
    hooked = record.getMessage().rpartition(": ")[2].split(", ")
    assert hooked == [target.name for target in targets.TARGETS if target is not targets.STEP]
    assert plugin.registered() == tuple(hooked)
    integration.unregister()
    assert log[-1].getMessage() == "safealloc: unregistered"
    assert [record.levelno for record in log] == [logging.INFO] * 2


CHANGES = {
    "another parameter": (targets.SCALES, "    m: int,\n    n: int,", "    rows: int,\n    n: int,"),
    "another body": (targets.OUTPUTS, "return output, output_scale\n", "return output, output_scale.zero_()\n"),
    "gone": (targets.QUANTIZE_8X4, "def flashinfer_quant_nvfp4_8x4_sf_layout(", "def quant_8x4("),
    "a method gone": (targets.WARM_UP, "def compile_or_warm_up_model(", "def warm_up_model("),
}


@pytest.mark.parametrize("change", list(CHANGES))
def test_a_target_that_vllm_has_changed_is_not_hooked(
    pool: ScalePool, monkeypatch: pytest.MonkeyPatch, log: list[logging.LogRecord], change: str
) -> None:
    target, old, new = CHANGES[change]
    with_source(monkeypatch, target.module, old, new)
    before = state()
    integration.register()
    replaced = {key[:2] for key in differences(before, state())}
    name = target.attributes[0].partition(".")[0]
    if target is targets.WARM_UP:
        import vllm.v1.worker.gpu_worker as module

        assert (
            module.Worker.compile_or_warm_up_model
            is before["vllm.v1.worker.gpu_worker", "Worker", "compile_or_warm_up_model"]
        )
    else:
        assert (target.module, name) not in replaced
    assert ("vllm.utils.flashinfer", "flashinfer_scaled_fp4_mm") in replaced  # the others are hooked
    (warning,) = [record for record in log if record.levelno >= logging.WARNING]
    assert warning.levelno == logging.WARNING
    assert f"safealloc: not hooked in vLLM {TESTED}: {target.name} (" in warning.getMessage()
    assert target.name not in plugin.registered()
    integration.unregister()
    assert differences(before, state()) == set()


@pytest.mark.parametrize("failure", ["not installed", "check", "cache key"])
def test_registering_never_raises(
    pool: ScalePool, monkeypatch: pytest.MonkeyPatch, log: list[logging.LogRecord], failure: str
) -> None:
    def fail(*given: Any) -> Any:
        raise RuntimeError("no such luck")

    before = state()
    with monkeypatch.context() as patch:
        if failure == "not installed":
            patch.setattr(targets, "installed", lambda: None)
        elif failure == "check":
            patch.setattr(targets, "check", fail)
        else:
            patch.setattr(plugin, "_add_cache_key", fail)
        plugin.load()
    (record,) = log
    assert record.levelno == logging.WARNING
    reason = "vLLM is not installed" if failure == "not installed" else "no such luck"
    assert record.getMessage().startswith("safealloc: not registered: ")
    assert record.getMessage().endswith(reason)
    assert plugin.registered() is None
    assert differences(before, state()) == set()
    integration.register()  # the next one may work
    assert plugin.registered()


def test_a_hook_that_fails_does_not_stop_the_others(
    pool: ScalePool, monkeypatch: pytest.MonkeyPatch, log: list[logging.LogRecord]
) -> None:
    def fail(*given: Any) -> None:
        raise RuntimeError("no such luck")

    monkeypatch.setitem(hooks.HOOKS, targets.MM, fail)
    before = vllm_flashinfer.flashinfer_scaled_fp4_mm
    integration.register()
    assert vllm_flashinfer.flashinfer_scaled_fp4_mm is before
    assert pool.spec(ops.create_fp4_scale_tensor(5, K, CPU, True)) is not None
    (warning,) = [record for record in log if record.levelno >= logging.WARNING]
    assert "flashinfer_scaled_fp4_mm is not hooked: RuntimeError: no such luck" in warning.getMessage()


# --- the entry point --------------------------------------------------------------------------------------------------


def test_the_installed_entry_point_is_ours() -> None:
    (entry,) = [
        found for found in importlib.metadata.entry_points(group="vllm.general_plugins") if found.name == "safealloc"
    ]
    assert entry.load() is plugin.load
    assert entry.group == vllm.plugins.DEFAULT_PLUGINS_GROUP


@pytest.mark.parametrize(("setting", "expected"), [(None, True), ("1", True), ("0", False)])
def test_vllm_loads_the_plugin_unless_safealloc_is_0(
    pool: ScalePool, monkeypatch: pytest.MonkeyPatch, setting: str | None, expected: bool
) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "safealloc")  # and none of its own
    if setting is not None:
        monkeypatch.setenv("SAFEALLOC", setting)
    for _ in range(2):
        monkeypatch.setattr(vllm.plugins, "plugins_loaded", False)
        vllm.plugins.load_general_plugins()
        assert (plugin.registered() is not None) is expected
    scales = ops.create_fp4_scale_tensor(5, K, CPU, True)
    assert (pool.spec(scales) is not None) is expected


def test_ray_workers_get_the_variables_by_a_prefix(monkeypatch: pytest.MonkeyPatch) -> None:
    """The README says which; without it vLLM copies none of them."""
    ray_env = pytest.importorskip("vllm.ray.ray_env", reason="this vLLM keeps it elsewhere")
    ours = {"SAFEALLOC", "SAFEALLOC_VERIFY"}
    for name in ours:
        monkeypatch.setenv(name, "1")
    assert not ours & ray_env.get_env_vars_to_copy()
    monkeypatch.setenv("VLLM_RAY_EXTRA_ENV_VAR_PREFIXES_TO_COPY", "SAFEALLOC")
    assert ours <= ray_env.get_env_vars_to_copy()


def test_the_compile_cache_key_tells_hooked_vllms_apart(pool: ScalePool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hooked one, a plain one, one with our kernel first, and one with fewer hooks."""

    def factors() -> dict[str, object]:
        return {name: str(value) for name, value in vllm.envs.compile_factors().items()}

    plain = factors()
    integration.register()
    hooked = factors()
    assert {name for name in hooked if hooked[name] != plain.get(name)} == {plugin.CACHE_KEY}
    assert hooked == factors()
    integration.unregister()
    assert factors() == plain
    monkeypatch.setenv("SAFEALLOC_LINEAR", "1")
    assert factors() == plain
    integration.register()
    first = factors()
    assert {name for name in first if first[name] != hooked[name]} == {plugin.CACHE_KEY}
    integration.unregister()
    monkeypatch.delenv("SAFEALLOC_LINEAR")
    with_source(
        monkeypatch, "vllm._custom_ops", "return output, output_scale\n", "return output, output_scale.zero_()\n"
    )
    integration.register()
    assert len({factors()[plugin.CACHE_KEY], first[plugin.CACHE_KEY], hooked[plugin.CACHE_KEY]}) == 3

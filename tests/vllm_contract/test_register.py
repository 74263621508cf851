"""Registering with vLLM and unregistering: what is replaced, when, and what is logged."""

from __future__ import annotations

import importlib.metadata
import logging
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import vllm._custom_ops as ops
import vllm.compilation.passes.pass_manager
import vllm.envs
import vllm.model_executor.kernels.linear.nvfp4.flashinfer as flashinfer_kernels
import vllm.plugins
import vllm.utils.flashinfer as vllm_flashinfer
from support.vllm_cpu_ops import ALPHA, CPU, fused_act_quant
from support.vllm_installed import TESTED
from support.vllm_registration import differences, state, with_source
from torch import Tensor
from vllm.compilation.caching import aot_compile_hash_factors
from vllm.config import DeviceConfig, VllmConfig
from vllm.v1.worker.gpu_worker import Worker

from safealloc import ScalePool
from safealloc.integrations import patches
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
        ("vllm.utils.flashinfer", "flashinfer_scaled_fp4_mm"),
        ("kernel of vllm::flashinfer_mm_fp4", "cpu"),
        ("vllm.model_executor.layers.fusion.fused_act_quant", "_silu_and_mul_nvfp4_dynamic"),
        ("vllm.model_executor.layers.fusion.fused_act_quant", "_FUSED_ACT_QUANT"),
        ("vllm.compilation.passes.fusion.attn_quant_fusion", "AttnQuantFusionPass"),
        ("vllm.compilation.passes.fusion.mla_attn_quant_fusion", "MLAAttnQuantFusionPass"),
        ("vllm.v1.worker.gpu_worker", "Worker"),
        ("vllm.compilation.passes.pass_manager", "PostGradPassManager"),
        ("vllm.config.vllm", "VllmConfig"),
    }
    assert not {key for key in replaced if key[0] == "vllm.envs"}
    assert not any(key[0] == "sys.meta_path" for key in replaced)  # no import is waited for
    integration.unregister()
    assert differences(before, state()) == set()


def test_a_second_registration_changes_nothing(pool: ScalePool) -> None:
    before = state()
    integration.register()
    during = state()
    for load in (integration.register, integration.register):
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
    before = flashinfer_kernels.flashinfer_scaled_fp4_mm
    integration.register()
    assert flashinfer_kernels.flashinfer_scaled_fp4_mm is vllm_flashinfer.flashinfer_scaled_fp4_mm is not before
    integration.unregister()
    assert flashinfer_kernels.flashinfer_scaled_fp4_mm is before


def test_all_modules_are_looked_through_once(pool: ScalePool, monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[int] = []

    class Modules(dict[str, Any]):
        def get(self, name: str, default: object = None) -> Any:
            return sys.modules.get(name, default)

        def values(self) -> Any:
            passes.append(1)
            return sys.modules.values()

    monkeypatch.setattr(patches, "sys", SimpleNamespace(modules=Modules(), meta_path=sys.meta_path))
    integration.register()
    assert passes == [1]
    integration.unregister()
    assert passes == [1, 1]


def test_replacements_have_the_parameters_of_the_originals(pool: ScalePool) -> None:
    """In the same order, with the same defaults."""
    import inspect

    def parameters() -> list[list[tuple[str, object]]]:
        functions: list[Callable[..., Any]] = [
            ops.create_fp4_scale_tensor,
            ops.create_fp4_output_tensors,
            vllm_flashinfer.flashinfer_scaled_fp4_mm,
            fused_act_quant._silu_and_mul_nvfp4_dynamic,
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
    not_listed = (targets.QUANTIZE, targets.STEP, targets.START)
    assert set(hooked) == {target.name for target in targets.TARGETS if target not in not_listed}
    assert plugin.registered() == tuple(hooked)
    integration.unregister()
    assert log[-1].getMessage() == "safealloc: unregistered"
    assert [record.levelno for record in log] == [logging.INFO] * 2


CHANGES = {
    "another parameter": (targets.EXPERTS, "    blockscale_offsets: torch.Tensor,\n", "    offsets: torch.Tensor,\n"),
    "another body": (targets.OUTPUTS, "padded_n if padded_n is not None else n", "padded_n or n"),
    "gone": (targets.SILU_EXPERTS, "def silu_and_mul_scaled_fp4_experts_quant(", "def silu_experts_quant("),
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
    assert warning.getMessage().startswith(f"safealloc: not hooked in vLLM {TESTED}: ")
    assert f" {target.name} (" in warning.getMessage()
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
            patch.setattr(plugin, "_cache_key", fail)
        integration.register()
    record = log[-1]
    assert {one.levelno for one in log} == {logging.WARNING}
    reason = {"not installed": "vLLM is not installed", "check": "no such luck"}.get(failure, "without the hooks")
    assert record.getMessage().startswith("safealloc: not registered: ")
    assert record.getMessage().endswith(reason)
    assert plugin.registered() is None
    assert differences(before, state()) == set()
    integration.register()  # the next one may work
    assert plugin.registered()


def test_without_a_place_for_the_cache_key_nothing_is_hooked(
    pool: ScalePool, monkeypatch: pytest.MonkeyPatch, log: list[logging.LogRecord]
) -> None:
    with_source(monkeypatch, targets.CACHE_KEY.module, "def compute_hash(", "def compute_the_hash(")
    before = state()
    integration.register()
    assert plugin.registered() is None
    assert differences(before, state()) == set()
    (record,) = log
    assert record.getMessage().startswith("safealloc: not registered: ImportError: its compile-cache key")


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


def worker(quantization: str | None, device: str = "cuda", **fields: Any) -> Any:
    """A worker before it loads its model, and a ``load_model`` of its own that does nothing."""
    config = SimpleNamespace(
        model_config=SimpleNamespace(quantization=quantization, hf_config=None), speculative_config=None
    )
    return SimpleNamespace(device=torch.device(device), vllm_config=config, **fields)


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Loads the plugin as vLLM does, and then a model into a worker."""
    monkeypatch.setenv("VLLM_PLUGINS", "safealloc")  # and none of its own
    monkeypatch.setattr(Worker, "load_model", lambda self, *, load_dummy_weights=False: f"loaded {load_dummy_weights}")

    def load(given: Any) -> str:
        monkeypatch.setattr(vllm.plugins, "plugins_loaded", False)
        vllm.plugins.load_general_plugins()
        result: str = Worker.load_model(given, load_dummy_weights=True)
        return result

    return load


@pytest.mark.parametrize(("setting", "expected"), [(None, True), ("1", True), ("0", False)])
def test_a_worker_that_loads_an_nvfp4_model_registers_the_hooks_unless_safealloc_is_0(
    pool: ScalePool,
    loaded: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
    setting: str | None,
    expected: bool,
) -> None:
    if setting is not None:
        monkeypatch.setenv("SAFEALLOC", setting)
    for _ in range(2):
        assert loaded(worker("modelopt_fp4")) == "loaded True"
        assert (plugin.registered() is not None) is expected
    scales = ops.create_fp4_scale_tensor(5, K, CPU, True)
    assert (pool.spec(scales) is not None) is expected


ABSENT = {
    "no quantization": worker(None),
    "FP8": worker("fp8"),
    "on a CPU": worker("modelopt_fp4", "cpu"),
    "on XPU": worker("modelopt_fp4", "xpu"),
    "a worker without a device": SimpleNamespace(),
}


@pytest.mark.parametrize("case", list(ABSENT))
def test_without_fp4_on_cuda_nothing_but_the_start_of_a_worker_is_touched_or_logged(
    loaded: Callable[..., str], log: list[logging.LogRecord], case: str
) -> None:
    key = vllm.envs.compile_factors()
    before = state()
    assert loaded(ABSENT[case]) == "loaded True"
    replaced = differences(before, state())
    assert {key[:3] for key in replaced if key[0] != "vllm.plugins"} == {
        ("vllm.v1.worker.gpu_worker", "Worker", "load_model")
    }
    assert vllm.envs.compile_factors() == key
    assert [record for record in log if record.levelno > logging.DEBUG] == []
    assert not torch.cuda.is_initialized()
    assert plugin.registered() is None


def test_on_rocm_nothing_is_hooked(
    loaded: Callable[..., str], monkeypatch: pytest.MonkeyPatch, log: list[logging.LogRecord]
) -> None:
    monkeypatch.setattr(torch.version, "hip", "7.0")
    loaded(worker("modelopt_fp4"))
    assert plugin.registered() is None
    assert log == []


def test_a_model_whose_configuration_cannot_be_read_counts_as_one_with_fp4(
    pool: ScalePool, loaded: Callable[..., str]
) -> None:
    loaded(SimpleNamespace(device=torch.device("cuda"), vllm_config=SimpleNamespace()))
    assert plugin.registered()


def test_after_unregistering_a_worker_registers_nothing(
    pool: ScalePool, loaded: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where somebody else's wrapper keeps ours alive."""
    plugin.load()
    ours = Worker.load_model
    theirs: Any = lambda self, **named: ours(self, **named)  # noqa: E731
    monkeypatch.setattr(Worker, "load_model", theirs)
    integration.unregister()
    assert Worker.load_model is theirs
    assert Worker.load_model(worker("modelopt_fp4"), load_dummy_weights=True) == "loaded True"
    assert plugin.registered() is None


def test_a_vllm_whose_workers_are_unknown_works_without_the_plugin(
    monkeypatch: pytest.MonkeyPatch, log: list[logging.LogRecord]
) -> None:
    monkeypatch.delattr(Worker, "load_model")
    monkeypatch.delattr(Worker.__mro__[1], "load_model")
    before = state()
    plugin.load()
    assert differences(before, state()) == set()
    (record,) = log
    assert record.getMessage().startswith("safealloc: not registered: this vLLM is not known: ")


def test_ray_workers_get_the_variables_by_a_prefix(monkeypatch: pytest.MonkeyPatch) -> None:
    """The README says which; without it vLLM copies none of them."""
    ray_env = pytest.importorskip("vllm.ray.ray_env", reason="this vLLM keeps it elsewhere")
    ours = {"SAFEALLOC", "SAFEALLOC_VERIFY"}
    for name in ours:
        monkeypatch.setenv(name, "1")
    assert not ours & ray_env.get_env_vars_to_copy()
    monkeypatch.setenv("VLLM_RAY_EXTRA_ENV_VAR_PREFIXES_TO_COPY", "SAFEALLOC")
    assert ours <= ray_env.get_env_vars_to_copy()


# --- the compile-cache key --------------------------------------------------------------------------------------------


def keys(quantization: str | None) -> tuple[str, list[str]]:
    """Of both caches of compiled code."""
    config = VllmConfig(device_config=DeviceConfig("cpu"))
    config.model_config = SimpleNamespace(
        quantization=quantization,
        hf_config=None,
        compute_hash=lambda: "model",
        multimodal_config=None,
        is_moe=False,
    )
    return config.compute_hash(), aot_compile_hash_factors(config)


def test_the_compile_cache_key_tells_hooked_vllms_apart(pool: ScalePool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hooked one, a plain one, one with our kernel first, and one with fewer hooks."""
    plain = keys("modelopt_fp4")
    integration.register()
    hooked = keys("modelopt_fp4")
    assert hooked[0].startswith(f"{plain[0]}-")
    assert hooked[1] != plain[1]
    assert hooked == keys("modelopt_fp4")
    integration.unregister()
    assert keys("modelopt_fp4") == plain
    monkeypatch.setenv("SAFEALLOC_LINEAR", "1")
    assert keys("modelopt_fp4") == plain
    integration.register()
    first = keys("modelopt_fp4")
    integration.unregister()
    monkeypatch.delenv("SAFEALLOC_LINEAR")
    with_source(monkeypatch, "vllm._custom_ops", "padded_n if padded_n is not None else n", "padded_n or n")
    integration.register()
    assert len({plain[0], hooked[0], first[0], keys("modelopt_fp4")[0]}) == 4


@pytest.mark.parametrize("quantization", [None, "fp8", "awq_marlin"])
def test_the_compile_cache_key_of_a_model_without_fp4_stays(pool: ScalePool, quantization: str | None) -> None:
    """Also beside a hooked engine in the same process."""
    plain = keys(quantization)
    integration.register()
    assert keys(quantization) == plain


def test_the_key_below_somebody_elses_wrapper_is_vllms_own_after_unregistering(
    pool: ScalePool, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = keys("modelopt_fp4")
    monkeypatch.setattr(VllmConfig, "compute_hash", VllmConfig.compute_hash)  # put back in the end
    integration.register()
    ours = VllmConfig.compute_hash
    monkeypatch.setattr(VllmConfig, "compute_hash", lambda self, *given, **named: ours(self, *given, **named))
    integration.unregister()
    assert keys("modelopt_fp4") == plain

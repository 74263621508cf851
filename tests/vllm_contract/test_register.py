"""Registering with vLLM and taking it back: what is replaced, when, and what is said."""

from __future__ import annotations

import importlib.metadata
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import stand_ins
import torch
import vllm._custom_ops as ops
import vllm.envs
import vllm.model_executor.kernels.linear as linear
import vllm.model_executor.kernels.linear.nvfp4.flashinfer as flashinfer_kernels
import vllm.model_executor.model_loader.base_loader as base_loader
import vllm.plugins
import vllm.utils.flashinfer as vllm_flashinfer
import vllm.v1.worker.gpu_worker
from stand_ins import (
    ALPHA,
    CPU,
    GLOBAL_SCALE,
    activation,
    as_on_cuda,
    fused_act_quant,
    kernel_and_layer,
    linear_layer,
    vllm_quantize,
)
from torch import Tensor
from vllm.platforms.interface import PlatformEnum

from safealloc import ScalePool, nvfp4_linear
from safealloc.integrations import vllm as integration
from safealloc.integrations.vllm import hooks, plugin, targets

N, K = 24, 80


@pytest.fixture
def modules_to_look_through() -> None:
    """All of them here."""


def state() -> dict[tuple[str, ...], object]:
    """Everything that a registration may change: attributes of vLLM's modules and classes, and its tables."""
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
    missing = object()
    return {key for key in before.keys() | after.keys() if before.get(key, missing) is not after.get(key, missing)}


# --- what is replaced -------------------------------------------------------------------------------------------------


def test_every_original_comes_back(pool: ScalePool) -> None:
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
    assert not any(key[0] == "sys.meta_path" for key in replaced)  # there is nothing to wait for
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


def test_many_registrations_leave_no_layers_behind(pool: ScalePool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call passes through as many frames after them as before."""
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


def test_names_that_modules_have_bound_are_replaced_there(pool: ScalePool) -> None:
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


def test_what_replaces_a_function_is_called_as_it_was(pool: ScalePool) -> None:
    """Same parameters, in the same order, with the same defaults."""
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


# --- what is said -----------------------------------------------------------------------------------------------------


def test_registering_says_one_line(pool: ScalePool, log: list[logging.LogRecord]) -> None:
    integration.register()
    (record,) = log
    assert record.levelno == logging.INFO
    assert f"registered for vLLM {stand_ins.TESTED}: " in record.getMessage()
    hooked = record.getMessage().rpartition(": ")[2].split(", ")
    assert hooked == [target.name for target in targets.TARGETS if target is not targets.STEP]
    assert plugin.registered() == tuple(hooked)
    integration.unregister()
    assert log[-1].getMessage() == "safealloc: unregistered"
    assert [record.levelno for record in log] == [logging.INFO] * 2


def with_source(monkeypatch: pytest.MonkeyPatch, module: str, old: str, new: str) -> None:
    """The plugin reads a vLLM one of whose modules is written otherwise."""
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


CHANGES = {
    "another parameter": (targets.SCALES, "    m: int,\n    n: int,", "    rows: int,\n    n: int,"),
    "another body": (targets.OUTPUTS, "return output, output_scale\n", "return output, output_scale.zero_()\n"),
    "gone": (targets.QUANTIZE_8X4, "def flashinfer_quant_nvfp4_8x4_sf_layout(", "def quant_8x4("),
    "a method gone": (targets.WARM_UP, "def compile_or_warm_up_model(", "def warm_up_model("),
}


@pytest.mark.parametrize("change", list(CHANGES))
def test_what_vllm_has_changed_is_left_as_it_is(
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
    assert f"vLLM {stand_ins.TESTED} is left as it is at: {target.name} (" in warning.getMessage()
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
    integration.register()  # and the next may work
    assert plugin.registered()


def test_a_hook_that_fails_leaves_the_others(
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
    assert "flashinfer_scaled_fp4_mm is left as it is: RuntimeError: no such luck" in warning.getMessage()


# --- the entry point --------------------------------------------------------------------------------------------------


def test_the_entry_point_is_found() -> None:
    (entry,) = [
        found for found in importlib.metadata.entry_points(group="vllm.general_plugins") if found.name == "safealloc"
    ]
    assert entry.load() is plugin.load
    assert entry.group == vllm.plugins.DEFAULT_PLUGINS_GROUP


@pytest.mark.parametrize(("setting", "expected"), [(None, True), ("1", True), ("0", False)])
def test_vllm_loads_it(pool: ScalePool, monkeypatch: pytest.MonkeyPatch, setting: str | None, expected: bool) -> None:
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
    """As the README says; without it vLLM copies none of them."""
    ray_env = pytest.importorskip("vllm.ray.ray_env", reason="this vLLM keeps it elsewhere")
    ours = {"SAFEALLOC", "SAFEALLOC_VERIFY"}
    for name in ours:
        monkeypatch.setenv(name, "1")
    assert not ours & ray_env.get_env_vars_to_copy()
    monkeypatch.setenv("VLLM_RAY_EXTRA_ENV_VAR_PREFIXES_TO_COPY", "SAFEALLOC")
    assert ours <= ray_env.get_env_vars_to_copy()


def test_the_compile_cache_key(pool: ScalePool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled code of a hooked vLLM, of a plain one and of one with our kernel first are kept apart."""

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


# --- the linear kernel ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("setting", "index"), [(None, -1), ("0", -1), ("1", 0)])
def test_the_linear_kernels_place(
    pool: ScalePool, monkeypatch: pytest.MonkeyPatch, setting: str | None, index: int
) -> None:
    """First if it is asked for; else last, behind Emulation, where "auto" does not come to it."""
    if setting is not None:
        monkeypatch.setenv("SAFEALLOC_LINEAR", setting)
    kernels = linear._POSSIBLE_NVFP4_KERNELS[PlatformEnum.CUDA]
    before = list(kernels)
    integration.register()
    assert kernels[index].__name__ == "SafeallocNvFp4LinearKernel"
    assert issubclass(kernels[index], linear.NvFp4LinearKernel)
    others = list(kernels)
    del others[index]
    assert others == before
    integration.unregister()
    assert kernels == before


def our_kernel() -> type:
    (kernel,) = [
        kernel
        for kernel in linear._POSSIBLE_NVFP4_KERNELS[PlatformEnum.CUDA]
        if kernel.__name__.startswith("Safealloc")
    ]
    return kernel


def test_the_linear_kernel_multiplies(pool: ScalePool, plugin: None) -> None:
    """On a CPU with the reference: as ``nvfp4_linear``, and as vLLM's own kernels over the stand-ins."""
    kernel = our_kernel().__new__(our_kernel())  # __init__ asks for a GPU
    layer = linear_layer(N, K)
    kernel.process_weights_after_loading(layer)
    assert kernel.backend == "reference"
    theirs, their_layer = kernel_and_layer("cutlass", N, K)
    bias = activation(1, N)[0]
    for rows in (1, 5, 32, 33, 130):
        x = activation(rows, K)
        y = kernel.apply_weights(layer, x)
        expected = nvfp4_linear(x, layer.weight, layer.weight_scale, GLOBAL_SCALE, ALPHA, backend="reference")
        assert torch.equal(y, expected)
        assert torch.equal(y, theirs.apply_weights(their_layer, x))
        assert torch.equal(kernel.apply_weights(layer, x, bias), y + bias)
    x = activation(6, 2 * K).view(2, 3, 2 * K)[..., :K]
    assert torch.equal(kernel.apply_weights(layer, x), kernel.apply_weights(layer, x.contiguous()))
    assert kernel.apply_weights(layer, x.half()).dtype == torch.float16
    assert pool.verify() == pool.stats().buffers
    assert pool.stats().live == 0


def test_where_the_linear_kernel_can_run(plugin: None) -> None:
    kernel = our_kernel()
    assert kernel.can_implement(None) == (True, None)
    assert kernel.is_supported(100) == (True, None)  # FlashInfer is installed
    supported, reason = kernel.is_supported(80)
    assert not supported
    assert reason
    assert kernel.is_supported() == (False, "it needs a CUDA device")


def test_vllm_chooses_the_kernel_that_is_first(pool: ScalePool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAFEALLOC_LINEAR", "1")
    integration.register()
    kernel = our_kernel()
    monkeypatch.setattr(kernel, "is_supported", classmethod(lambda cls, compute_capability=None: (True, None)))
    with as_on_cuda():
        assert type(linear.init_nvfp4_linear_kernel()) is kernel


# --- threads and processes --------------------------------------------------------------------------------------------


def test_hooks_serve_every_thread(plugin: None) -> None:
    """Each thread's calls, at once, from the default pool; one that is chosen by ``use_pool`` is of its thread only."""
    expected = vllm_quantize(activation(5, K))
    failures: list[BaseException] = []

    def work() -> None:
        from safealloc import default_pool

        try:
            pool = default_pool("cpu")
            for _ in range(50):
                x_fp4, scales = vllm_quantize(activation(5, K))
                assert pool.spec(scales) is not None
                assert torch.equal(x_fp4, expected[0])
                assert torch.equal(scales.view(torch.uint8), expected[1].view(torch.uint8))
            pool.verify()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_registered_by_several_threads_at_once(pool: ScalePool) -> None:
    before = state()
    barrier = threading.Barrier(4)

    def work() -> None:
        barrier.wait()
        integration.register()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert plugin.registered()
    integration.unregister()
    assert differences(before, state()) == set()


def run(program: str, **environment: str) -> str:
    """A Python process of its own; its output."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SAFEALLOC", "VLLM"))}
    result = subprocess.run(
        [sys.executable, "-c", program],
        env=kept | {"VLLM_PLUGINS": "safealloc"} | environment,
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
    _, scales = ops.create_fp4_output_tensors(5, 80, torch.device("cpu"), True, padded_n=96)
    return str(default_pool("cpu").spec(scales))

def loaded_and_allocated():
    import vllm.plugins
    vllm.plugins.load_general_plugins()
    assert plugin.registered()
    return allocate()
"""


def test_loading_does_next_to_nothing() -> None:
    """In a worker that has not begun: no CUDA, no pool, no kernel module; and modules that come later are hooked."""
    run(
        LOADED
        + """
assert plugin.registered()
assert not torch.cuda.is_initialized()
assert default._pools == {}
assert not {"vllm._custom_ops", "vllm.model_executor.kernels.linear", "vllm.v1.worker.gpu_worker"} & set(sys.modules)
waiting = [finder for finder in sys.meta_path if type(finder).__module__.startswith("safealloc")]
assert len(waiting) == 1, waiting

import vllm._custom_ops as ops
import vllm.utils.flashinfer
assert ops.create_fp4_scale_tensor.__module__ == "safealloc.integrations.vllm.hooks"
assert ops.__loader__ is ops.__spec__.loader
assert "safealloc" not in type(ops.__loader__).__module__
assert ops.flashinfer_quant_nvfp4_8x4_sf_layout is vllm.utils.flashinfer.flashinfer_quant_nvfp4_8x4_sf_layout
assert default._pools == {}
spec = allocate()
assert "rows=5" in spec and "80" in spec and "96" in spec, spec

import vllm.model_executor.kernels.linear as linear
import vllm.model_executor.kernels.linear.nvfp4.flashinfer as kernels
from vllm.platforms.interface import PlatformEnum
assert kernels.flashinfer_scaled_fp4_mm.__module__ == "safealloc.integrations.vllm.hooks"
assert linear._POSSIBLE_NVFP4_KERNELS[PlatformEnum.CUDA][0].__name__ == "SafeallocNvFp4LinearKernel"
plugin.unregister()
assert ops.create_fp4_scale_tensor.__module__ == "vllm._custom_ops"
assert kernels.flashinfer_scaled_fp4_mm.__module__ == "vllm.utils.flashinfer"
assert not [finder for finder in sys.meta_path if type(finder).__module__.startswith("safealloc")]
assert not torch.cuda.is_initialized()
""",
        SAFEALLOC_LINEAR="1",
    )


def test_a_process_that_forks_after_the_first_allocation() -> None:
    """The child's pool is its own: buffers of the parent are not handed out there."""
    run(
        LOADED
        + """
expected = allocate()
parent = default_pool("cpu")
queue = multiprocessing.get_context("fork").SimpleQueue()
def child():
    spec = allocate()
    queue.put((spec, default_pool("cpu") is not parent))
process = multiprocessing.get_context("fork").Process(target=child)
process.start()
assert queue.get() == (expected, True)
process.join()
assert process.exitcode == 0
assert allocate() == expected
""",
        SAFEALLOC_STRICT="1",
    )


def test_a_process_that_is_spawned_loads_it_too(tmp_path: Any) -> None:
    (tmp_path / "spawned_program.py").write_text(
        LOADED
        + """
if __name__ == "__main__":
    expected = allocate()
    with multiprocessing.get_context("spawn").Pool(1) as processes:
        assert processes.apply(loaded_and_allocated) == expected
"""
    )
    run(
        f"import runpy; runpy.run_path({str(tmp_path / 'spawned_program.py')!r}, run_name='__main__')",
        SAFEALLOC_STRICT="1",
    )


def test_switched_off_in_a_process() -> None:
    run(
        LOADED
        + """
def waiting():
    return [finder for finder in sys.meta_path if type(finder).__module__.startswith("safealloc")]

assert plugin.registered() is None
assert not waiting()
plugin.register()  # by hand it still can
assert waiting()
plugin.unregister()  # before vLLM's modules are imported
assert not waiting()
import vllm._custom_ops as ops
assert ops.create_fp4_scale_tensor.__module__ == "vllm._custom_ops"
assert allocate() == "None"
plugin.register()  # and after
assert ops.create_fp4_scale_tensor.__module__ == "safealloc.integrations.vllm.hooks"
assert allocate() != "None"
""",
        SAFEALLOC="0",
    )

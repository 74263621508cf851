"""The plugin in several threads, and in processes that load it, fork and spawn."""

from __future__ import annotations

import threading
from typing import Any

import torch
from support.vllm_cpu_ops import activation, vllm_quantize
from support.vllm_registration import LOADED, differences, run, state

from safealloc import ScalePool
from safealloc.integrations import vllm as integration
from safealloc.integrations.vllm import plugin as vllm_plugin

K = 80


def test_hooks_serve_every_thread(plugin: None, pool: ScalePool) -> None:
    """From the pool of the engine whose captures are under way."""
    expected = vllm_quantize(activation(5, K))
    failures: list[BaseException] = []

    def work() -> None:
        try:
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


def test_several_threads_may_register_at_once(pool: ScalePool) -> None:
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
    assert vllm_plugin.registered()
    integration.unregister()
    assert differences(before, state()) == set()


def test_loading_the_plugin_imports_and_reads_next_to_nothing() -> None:
    """None of vLLM's modules, of the hooks or of Triton, and no source of vLLM is opened."""
    run(
        """
import builtins, io, pathlib, sys
import torch
import vllm.plugins
opened = []
sys.addaudithook(lambda event, given: opened.append(str(given[0])) if event == "open" else None)
before = set(sys.modules)
vllm.plugins.load_general_plugins()
new = set(sys.modules) - before
assert "safealloc.integrations.vllm.plugin" in new
assert not {name for name in new if name.startswith(("vllm.", "triton", "flashinfer"))}, new
hooks = ("hooks", "serve", "engine", "ops", "kernel", "sites", "report")
assert not {f"safealloc.integrations.vllm.{name}" for name in hooks} & new
assert not [name for name in opened if "/vllm/" in name and "safealloc" not in name and name.endswith(".py")], opened
assert not torch.cuda.is_initialized()
waiting = [finder for finder in sys.meta_path if type(finder).__module__.startswith("safealloc")]
assert len(waiting) == 1, waiting  # for the module of vLLM's workers
"""
    )


def test_a_process_that_loads_another_model_is_as_without_the_plugin() -> None:
    """Its functions, its compile factors and its log; only the start of a worker is wrapped."""
    output = run(
        LOADED
        + """
import vllm._custom_ops as ops
import vllm.envs, vllm.utils.flashinfer
from types import SimpleNamespace
from vllm.v1.worker.gpu_worker import Worker

assert not [finder for finder in sys.meta_path if type(finder).__module__.startswith("safealloc")]
model = SimpleNamespace(quantization="fp8", hf_config=None)
worker = SimpleNamespace(
    device=torch.device("cuda"), vllm_config=SimpleNamespace(model_config=model, speculative_config=None)
)
try:
    Worker.load_model(worker)
except AttributeError as error:  # vLLM's own, of a worker that is none
    assert "_maybe_get_memory_pool_context" in str(error), error
assert plugin.registered() is None
assert ops.create_fp4_scale_tensor.__module__ == "vllm._custom_ops"
assert "SAFEALLOC" not in str(vllm.envs.compile_factors())
assert not torch.cuda.is_initialized() and default._pools == {}
assert "safealloc.integrations.vllm.hooks" not in sys.modules
""",
        VLLM_LOGGING_LEVEL="INFO",
    )
    assert "safealloc:" not in output
    assert "registered for" not in output


def test_registering_starts_no_cuda_and_makes_no_pool() -> None:
    """It imports none of vLLM's kernel modules either, and hooks modules that are imported later."""
    run(
        LOADED
        + """
plugin.register()
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


def test_a_forked_process_has_a_pool_of_its_own() -> None:
    """Buffers of the parent are not handed out in the child."""
    run(
        LOADED
        + """
plugin.register()
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


def test_a_spawned_process_loads_the_plugin(tmp_path: Any) -> None:
    (tmp_path / "spawned_program.py").write_text(
        LOADED
        + """
if __name__ == "__main__":
    plugin.register()
    expected = allocate()
    with multiprocessing.get_context("spawn").Pool(1) as processes:
        assert processes.apply(loaded_and_allocated) == expected
"""
    )
    run(
        f"import runpy; runpy.run_path({str(tmp_path / 'spawned_program.py')!r}, run_name='__main__')",
        SAFEALLOC_STRICT="1",
    )


def test_safealloc_0_keeps_the_plugin_off() -> None:
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

"""The real vLLM engine with the plugin, on a GPU; each run is a process of its own (engine_program.py)."""

from __future__ import annotations

import concurrent.futures
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.vllm_engine

HERE = Path(__file__).parent
SHARED_GPU = {"engine": {"kv_cache_memory_bytes": 2 << 30}}  # several engines at once cannot measure free memory
MIXED = {"batches": [1, 3, 8, 16, 4], "tokens": 16}  # 512 tokens
EAGER = {"mode": 0, "cudagraph_mode": "NONE"}
FULL = {"mode": 3, "cudagraph_mode": "FULL"}
PIECEWISE = {"mode": 3, "cudagraph_mode": "PIECEWISE"}
OFF = {"SAFEALLOC": "0"}
SPECULATION = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}
NGRAM = {"mode": 0, "cudagraph_mode": "FULL", "engine": SHARED_GPU["engine"] | {"speculative_config": SPECULATION}}

VENDOR = {"vendor": True, "intermediate": 2816} | MIXED  # an intermediate size that vLLM does not pad
OURS = {"SAFEALLOC_QUANTIZER": "safealloc"}
CONTRACT = {"SAFEALLOC_CONTRACT": "warn"}
NAN = {
    "batches": [3],
    "tokens": 12,
    "nan": True,
    "engine": SHARED_GPU["engine"] | {"enable_prefix_caching": False},
}

RUNS: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "eager, vLLM's own": (EAGER | MIXED, OFF),
    "eager, pool": (EAGER | MIXED | {"adversary": True}, {}),
    "eager, torch.empty": (EAGER | MIXED | {"adversary": True, "control": "empty"}, OFF),
    **{
        f"{name}, nan": (
            mode | request | NAN,
            {"SAFEALLOC_NAN": "1", "SAFEALLOC_STRICT": "0"} | environment,
        )
        for name, mode, request, environment in (
            ("FULL", FULL, {}, {}),
            ("PIECEWISE", PIECEWISE, {}, {}),
            ("FULL, our quantizers", FULL, {"vendor": True, "intermediate": 2816}, OURS),
        )
    },
    "FULL, vLLM's own": (FULL | MIXED, OFF),
    "FULL, pool": (FULL | MIXED | {"adversary": True, "corrupt": True}, {}),
    "PIECEWISE, vLLM's own": (PIECEWISE | MIXED, OFF),
    "PIECEWISE, pool": (PIECEWISE | MIXED | {"adversary": True, "corrupt": True}, {}),
    "ngram, vLLM's own": (NGRAM | MIXED, OFF),
    "ngram, pool": (NGRAM | MIXED | {"restart": True}, {}),
    "both, sleep": (MIXED | {"sleep": [1, 2], "engine": {"enable_sleep_mode": True} | SHARED_GPU["engine"]}, {}),
    "FULL, guarded": (FULL | MIXED | {"guard": True}, {"SAFEALLOC_VERIFY": "1", "SAFEALLOC_VERIFY_REPAIR": "1"}),
    "FULL, vLLM's quantizers": (FULL | VENDOR, {}),
    "FULL, our quantizers": (FULL | VENDOR | {"adversary": True}, OURS),
    "PIECEWISE, vLLM's quantizers": (PIECEWISE | VENDOR, {}),
    "PIECEWISE, our quantizers": (PIECEWISE | VENDOR | {"adversary": True}, OURS),
    "FULL, other bits": (FULL | MIXED | {"intermediate": 2816}, OURS),
    "FULL, contract": (FULL | MIXED, CONTRACT),
    "PIECEWISE, contract": (PIECEWISE | MIXED, CONTRACT),
    "our kernel": (FULL | MIXED | {"linear": "safealloc"}, {"SAFEALLOC_LINEAR": "1"}),
    "our kernel, eager": (EAGER | MIXED | {"linear": "safealloc"}, {"SAFEALLOC_LINEAR": "1"}),
}
CACHE = {**FULL, "simple": True, "sizes": [1], "layers": 2, "batches": [1], "tokens": 4}


def call(command: list[str], **settings: Any) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=240, **settings)
    except subprocess.TimeoutExpired as error:
        printed = [text.decode() if isinstance(text, bytes) else text or "" for text in (error.stdout, error.stderr)]
        return subprocess.CompletedProcess(command, -1, *printed)


def start(
    request: dict[str, Any], environment: dict[str, str], folder: Path, *, installed: bool = True
) -> dict[str, Any]:
    """Run the program; its result, or what it printed."""
    folder.mkdir(parents=True, exist_ok=True)
    question, answer = folder / "request.json", folder / "result.json"
    answer.unlink(missing_ok=True)
    question.write_text(json.dumps(request))
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if not installed:
        paths = [path for path in paths if not list(Path(path or ".").glob("safealloc*"))]
    settings = {"VLLM_CACHE_ROOT": str(folder / "cache"), "TORCHINDUCTOR_COMPILE_THREADS": "2", "SAFEALLOC_STRICT": "1"}
    done = call(
        [sys.executable, str(HERE / "engine_program.py"), str(question), str(answer)],
        env={**os.environ, **settings, "PYTHONPATH": os.pathsep.join(paths), **environment},
        cwd=folder,
    )
    result = json.loads(answer.read_text()) if answer.exists() else {}
    (folder / "output.txt").write_text(done.stdout + done.stderr)
    logged = "\n".join(line for line in done.stdout.splitlines() if "safealloc:" in line)
    cached = "load AOT compilation from" in done.stdout
    return result | {
        "exit": done.returncode,
        "from cache": cached,
        "output": logged,
        "printed": (done.stdout + done.stderr)[-6000:],
    }


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    """All runs that can share the GPU, at once; at the same time the runs that share one cache folder, in sequence."""
    folder = Path(os.environ.get("SAFEALLOC_ENGINE_FOLDER") or tempfile.mkdtemp())

    found: dict[str, Any] = {}

    def note(name: str, result: Any) -> None:
        found[name] = result
        (folder / "results.json").write_text(json.dumps(found, indent=1))

    def cached() -> list[dict[str, Any]]:
        cache = {
            "VLLM_CACHE_ROOT": str(folder / "one cache"),
            "CUDA_VISIBLE_DEVICES": str(torch.cuda.device_count() - 1),
        }
        states = [("off", OFF, True), ("on", {}, True), ("off", OFF, True), ("on", {}, True), ("gone", {}, False)]
        request = CACHE | SHARED_GPU | {"folder": str(folder / "model")}
        return [
            start(request, cache | environment, folder / f"cache {number} {name}", installed=installed)
            for number, (name, environment, installed) in enumerate(states)
        ]

    gpus = torch.cuda.device_count()
    with concurrent.futures.ThreadPoolExecutor(
        max(4, (os.cpu_count() or 8) * (2 if gpus == 1 else 3) // 4)
    ) as executor:
        caches = executor.submit(cached)
        served = executor.submit(serve, folder)
        runs = {
            name: executor.submit(
                start, SHARED_GPU | request, {"CUDA_VISIBLE_DEVICES": str(number % gpus)} | environment, folder / name
            )
            for number, (name, (request, environment)) in enumerate(RUNS.items())
        }
        for name, run in [*runs.items(), ("served", served)]:
            note(name, run.result())
        if torch.cuda.device_count() == 1:
            note("cache", caches.result())
        # Alone on the GPU, since vLLM measures what is free.
        note("0.95", start(FULL | {"batches": [4], "engine": {"gpu_memory_utilization": 0.95}}, {}, folder / "0.95"))
        if torch.cuda.device_count() > 1:
            note("two GPUs", tensor_parallel(folder))
            note("cache", caches.result())
    return found


def serve(folder: Path) -> dict[str, Any]:
    """As ``vllm serve``: the engine in a process of its own, into which vLLM loads the plugin, with our kernel."""
    request = FULL | SHARED_GPU | {"linear": "safealloc", "simple": True, "batches": [2]}
    return start(request, {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "SAFEALLOC_LINEAR": "1"}, folder / "served")


def tensor_parallel(folder: Path) -> dict[str, Any]:
    """A worker process for each of two GPUs, with our kernel, since a spawned worker has no stand-ins."""
    engine = {"tensor_parallel_size": 2, "disable_custom_all_reduce": True, **SHARED_GPU["engine"]}
    request = FULL | {"linear": "safealloc", "simple": True, "batches": [2], "intermediate": 2816, "engine": engine}
    return start(request, {"SAFEALLOC_LINEAR": "1", "NCCL_NVLS_ENABLE": "0"}, folder / "two GPUs")


@pytest.mark.parametrize("name", [*RUNS, "0.95", "served"])
def test_the_engine_starts_and_generates(results, name):
    assert results[name]["exit"] == 0, results[name]["printed"]
    assert results[name]["generated"] > 0
    if name != "served":  # its weights are uninitialized
        assert results[name]["distinct"] > 1


@pytest.mark.parametrize("mode", ["eager", "FULL", "PIECEWISE"])
def test_tokens_are_those_of_vllm_with_zeroed_scales(results, mode):
    """With an adversary that writes NaN bytes into all free memory before each step."""
    assert results[f"{mode}, pool"]["generated"] == 512
    assert results[f"{mode}, pool"]["tokens"] == results[f"{mode}, vLLM's own"]["tokens"]


def test_tokens_depend_on_the_padding(results):
    """The same adversary changes them where scales come from torch.empty, as in vLLM 0.22.1."""
    assert results["eager, torch.empty"]["tokens"] != results["eager, vLLM's own"]["tokens"]


def test_an_eager_engine_has_no_pool(results):
    assert not results["eager, pool"]["engine has a pool"]
    assert results["FULL, pool"]["engine has a pool"]


def test_speculative_decoding_is_reserved_before_the_captures_and_changes_no_token(results):
    run = results["ngram, pool"]
    assert run["tokens"] == results["ngram, vLLM's own"]["tokens"]
    assert (run["stats"]["misses"], run["stats"]["capture_fallbacks"]) == (0, 0)
    assert run["stats"]["captured"] == run["stats"]["buffers"]  # nothing in vain


def test_memory_is_given_back_and_the_next_engine_in_the_process_has_its_own(results):
    run = results["ngram, pool"]
    assert run["bytes after shutdown"] == 0
    assert run["bytes after restart"] == run["stats"]["bytes"]
    assert run["tokens after restart"] == run["tokens"]


@pytest.mark.parametrize("mode", ["FULL", "PIECEWISE"])
def test_dirty_padding_changes_tokens_is_found_and_repaired(results, mode):
    run = results[f"{mode}, pool"]
    assert run["tokens with NaN in the padding"] != run["tokens"]
    assert run["verify names it"]
    assert run["tokens after repair"] == run["tokens"]


def test_the_guard_repairs_between_steps_and_raises(results):
    """A step of replays asks for no buffer, so the check is at the worker's safe point."""
    run = results["FULL, guarded"]
    assert run["tokens"] == results["FULL, vLLM's own"]["tokens"]
    assert run["tokens with NaN in the padding"] != run["tokens"]  # of the step that found it
    assert run["verified after guard repair"] >= run["dirtied"]
    assert run["tokens after guard repair"] == run["tokens"]
    repaired = [
        line for line in run["logged"] if line.startswith("WARNING zeroed padding that somebody wrote: buffer at 0x")
    ]
    assert len(repaired) == run["dirtied"] > 0
    assert re.search(r"buffer at 0x\w+ \(.*\): \d+ padding bytes are not zero, first 0x7F at scale row ", run["raised"])


@pytest.mark.parametrize("mode", ["FULL", "PIECEWISE"])
def test_every_site_of_a_captured_step_is_served(results, mode):
    """Four linear layers in each of four layers, from buffers of the warm-up; no graph zeroes memory."""
    run = results[f"{mode}, pool"]
    (line,) = [line for line in run["logged"] if "sites per step" in line]
    assert "rank 0: serves 16 of 16 FP4 scale sites per step, in " in line
    assert mode == "PIECEWISE" or "in 6 captures" in line
    assert "bypassed: none" in line
    assert run["stats"]["capture_fallbacks"] == 0
    # Two shapes per batch size, and up to two buffers: Inductor allocates the next one before the last GEMM has read its own.
    assert 12 <= run["stats"]["captured"] <= 24
    assert run["verified"] >= run["stats"]["captured"]


@pytest.mark.parametrize("mode", ["FULL", "PIECEWISE"])
def test_inductor_neither_clones_merges_nor_reuses_buffers(results, mode):
    """Each quantization in the generated code writes its own pool buffer.

    vLLM compiles three kinds of pieces, which start, continue and end its layers: with 1, 4 and 3 quantizations.
    """
    code = results[f"{mode}, pool"]["generated code"]
    assert code["quantizations"] == 8
    assert code["into a pool buffer"] == code["quantizations"]
    assert code["reused"] == 0


def test_no_warnings_or_errors_are_logged(results):
    for name in ("FULL, pool", "PIECEWISE, pool", "eager, pool"):
        assert [line for line in results[name]["logged"] if line.startswith(("WARNING", "ERROR"))] == []


@pytest.mark.parametrize("mode", ["FULL", "PIECEWISE"])
def test_the_contract_of_scale_layouts_is_checked_without_an_alarm_and_changes_no_token(results, mode):
    run = results[f"{mode}, contract"]
    on = "INFO safealloc: the contract of scale layouts is checked (warn)"
    assert [line for line in run["logged"] if line.startswith(("WARNING", "ERROR"))] == []
    assert run["logged"].count(on) == 1
    assert "scale layout:" not in run["output"]
    assert run["tokens"] == results[f"{mode}, vLLM's own"]["tokens"]


@pytest.mark.parametrize("level", [1, 2])
def test_buffers_stay_in_place_while_the_engine_sleeps(results, level):
    run = results["both, sleep"]
    assert run[f"same addresses after sleep level {level}"]
    assert run[f"tokens after sleep level {level}"] == run["tokens"]
    assert run[f"verified after sleep level {level}"] == run["verified"]


def test_a_compile_cache_is_loaded_only_in_the_state_that_wrote_it(results):
    """Off, on, off, on, and then without the package, all in one cache folder."""
    off, on, off_again, on_again, gone = results["cache"]
    for run in results["cache"]:
        assert run["exit"] == 0, run["printed"]
    assert on["hook calls"] > 0
    assert on_again["hook calls"] > 0
    assert off["hook calls"] == off_again["hook calls"] == gone["hook calls"] == 0
    assert len({run["tokens"] for run in results["cache"]}) == 1
    assert [run["from cache"] for run in results["cache"]] == [False, False, True, True, True]


def test_the_engine_starts_with_nearly_all_memory(results):
    assert results["0.95"]["stats"]["capture_fallbacks"] == 0


def test_our_linear_kernel_serves_every_layer(results):
    """With graphs and without; every layer counts as a site."""
    for name in ("our kernel", "our kernel, eager"):
        assert results[name]["stats"]["capture_fallbacks"] == 0
        assert results[name]["verified"] > 0
    (line,) = [line for line in results["our kernel"]["logged"] if "sites per step" in line]
    assert "serves 16 of 16" in line


def test_the_plugin_works_in_an_engine_process(results):
    assert "safealloc: rank 0: serves 16 of 16" in results["served"]["output"]


def test_tensor_parallel_workers_have_a_pool_each(results):
    if "two GPUs" not in results:
        pytest.skip("needs two CUDA devices")
    run = results["two GPUs"]
    assert run["exit"] == 0, run["printed"]
    for rank in (0, 1):
        assert re.search(rf"safealloc: rank {rank}: serves 16 of 16 .* [1-9]\d* buffers", run["output"])


@pytest.mark.parametrize("mode", ["FULL", "PIECEWISE"])
def test_our_quantizers_serve_captured_steps_with_the_same_tokens_and_nothing_of_them_stays(results, mode):
    run = results[f"{mode}, our quantizers"]
    assert run["tokens"] == results[f"{mode}, vLLM's quantizers"]["tokens"]
    (line,) = [line for line in run["logged"] if "sites per step" in line]
    assert re.search(r"quantizers: ours in 16 of 16 sites, \d\.\d\d ms a step less \(measured\)", line), line
    assert run["dispatcher as before"]
    assert [line for line in run["logged"] if line.startswith(("WARNING", "ERROR"))] == []


def test_quantizers_with_other_bits_stay_and_are_named(results):
    """The usual stand-ins have exact arithmetic."""
    run = results["FULL, other bits"]
    (warning,) = [line for line in run["logged"] if line.startswith("WARNING")]
    assert "vLLM's own quantizer stays where ours is not equal on this GPU: " in warning
    assert "scaled_fp4_quant.out of 1 x 1024, bfloat16: " in warning
    (line,) = [line for line in run["logged"] if "sites per step" in line]
    assert "quantizers: ours in 0 of 16 sites" in line
    assert run["dispatcher as before"]


@pytest.mark.parametrize("mode", ["FULL", "PIECEWISE", "FULL, our quantizers"])
def test_the_first_nan_of_a_replayed_step_is_named(results, mode):
    """Planted behind the gate-and-up projection of a layer: the input of the fused quantizer of its down projection.

    The batch of three is padded to the graph of four.
    """
    run = results[f"{mode}, nan"]
    assert run["nan"]["none"]["logged"] == []
    assert run["nan"]["dead row"]["step"] is not None
    assert run["nan"]["dead row"]["logged"] == []
    for name, layer, row, column in (("element", 2, 1, 100), ("row", 1, 2, 0), ("two layers", 0, 1, 100)):
        found = run["nan"][name]
        assert found["logged"][0].startswith(
            f"first NaN in model.layers.{layer}.mlp.down_proj, row {row} of 4, column {column}, step {found['step']}, "
        ), found
        assert " of its graph of batch 4; " in found["logged"][0]

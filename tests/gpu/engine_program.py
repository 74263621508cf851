"""One run of the real vLLM engine: ``python engine_program.py REQUEST.json RESULT.json``.

The model is a small NVFP4 Llama with random weights. Its intermediate size 2832 is 177 blocks of 16, so that the down
projection has padding columns, and vLLM pads its k. vLLM loads the plugin through its entry point.
"""

from __future__ import annotations

import gc
import hashlib
import importlib.util
import json
import logging
import os
import re
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
os.environ["HF_HUB_OFFLINE"] = os.environ["VLLM_NO_USAGE_STATS"] = "1"

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from support import vllm_gpu_ops

DEFAULTS = {
    "mode": 3,
    "cudagraph_mode": "FULL_AND_PIECEWISE",
    "sizes": [1, 2, 4, 8, 16, 32],
    "batches": [3],
    "tokens": 16,
    "control": None,  # "empty": scales from torch.empty, as in vLLM 0.22.1
    "linear": "cutlass",  # or "safealloc", which the plugin registers
    "simple": False,  # stand-ins that need no safealloc
    "vendor": False,  # quantizers with the bits of vLLM's, slower than ours
    "adversary": False,
    "corrupt": False,
    "guard": False,  # dirty what graphs hold, with SAFEALLOC_VERIFY_REPAIR=1 and then as if without it
    "nan": False,  # plant NaN in steps of replays, with SAFEALLOC_NAN=1
    "sleep": [],
    "restart": False,  # shut the engine down and start another one in this process
    "layers": 4,
    "hidden": 1024,
    "intermediate": 2832,
    "engine": {},
    "folder": None,
}


def model_folder(request: dict) -> str:
    folder = request["folder"] or tempfile.mkdtemp()  # part of vLLM's compile-cache key
    os.makedirs(folder, exist_ok=True)
    hidden = request["hidden"]
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": request["intermediate"],
        "num_hidden_layers": request["layers"],
        "num_attention_heads": hidden // 128,
        "num_key_value_heads": max(1, hidden // 512),
        "head_dim": 128,
        "vocab_size": 2048,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "quantization_config": {
            "quant_method": "modelopt",
            "quant_algo": "NVFP4",
            "group_size": 16,
            "ignore": ["lm_head"],
        },
    }
    Path(folder, "config.json").write_text(json.dumps(config))
    return folder


def prepare(request: dict) -> None:
    """Install stand-in ops, filled-in weights, and the kernel that the request asks for."""
    import vllm._custom_ops as ops
    import vllm.model_executor.kernels.linear as linear
    from vllm.model_executor.kernels.linear.nvfp4.cutlass import CutlassNvFp4LinearKernel
    from vllm.model_executor.layers.quantization.modelopt import ModelOptNvFp4LinearMethod
    from vllm.platforms import current_platform

    vllm_gpu_ops.install(simple=request["simple"], vendor=request["vendor"])
    original = ModelOptNvFp4LinearMethod.process_weights_after_loading

    def process_weights_after_loading(self, layer):
        kernel_process = self.kernel.process_weights_after_loading

        def filled(layer):
            vllm_gpu_ops.fill_weights(layer)
            kernel_process(layer)

        self.kernel.process_weights_after_loading = filled
        layer.input_scale.data.fill_(1.0)
        layer.weight_scale_2.data.fill_(1.0)
        original(self, layer)

    ModelOptNvFp4LinearMethod.process_weights_after_loading = process_weights_after_loading
    if request["linear"] == "cutlass":

        class StandInKernel(CutlassNvFp4LinearKernel):
            @classmethod
            def is_supported(cls, compute_capability=None):
                return True, None

        linear._POSSIBLE_NVFP4_KERNELS[current_platform._enum].insert(0, StandInKernel)
    if request["control"] == "empty":

        def create_fp4_scale_tensor(m, n, device, is_sf_swizzled_layout):
            columns = -(-(n // 16) // 4)
            return torch.empty((-(-m // 128) * 128, columns), dtype=torch.int32, device=device)

        ops.create_fp4_scale_tensor = create_fp4_scale_tensor


def dirty_free_memory() -> None:
    blocks = [
        torch.full((nbytes,), 0x7F, dtype=torch.uint8, device="cuda")
        for nbytes in (512, 1024, 2048, 4096, 1 << 13, 1 << 14, 1 << 16, 1 << 20, 2 << 20, 20 << 20)
        for _ in range(8)
    ]
    del blocks


class Engine:
    def __init__(self, request: dict) -> None:
        from vllm import LLM, SamplingParams
        from vllm.v1.worker.gpu_worker import Worker

        self.request = request
        self.sampling = SamplingParams(max_tokens=request["tokens"], ignore_eos=True, detokenize=False, temperature=0)
        compilation = {"mode": request["mode"], "cudagraph_mode": request["cudagraph_mode"]}
        if request["cudagraph_mode"] != "NONE":
            compilation["cudagraph_capture_sizes"] = request["sizes"]
        engine = {"gpu_memory_utilization": 0.1, "max_model_len": 2048, "max_num_seqs": 32} | request["engine"]
        if request["adversary"]:
            execute = Worker.execute_model

            def execute_model(self, *given, **named):
                dirty_free_memory()
                return execute(self, *given, **named)

            Worker.execute_model = execute_model
        started = time.monotonic()
        self.llm = LLM(
            model=model_folder(request),
            load_format="dummy",
            skip_tokenizer_init=True,
            attention_backend="TRITON_ATTN",
            compilation_config=compilation,
            **engine,
        )
        self.seconds = time.monotonic() - started

    def generate(self) -> list[list[list[int]]]:
        generator = torch.Generator().manual_seed(0)
        answers = []
        for batch in self.request["batches"]:
            lengths = torch.randint(1, 60, (batch,), generator=generator).tolist()
            prompts = [
                {"prompt_token_ids": torch.randint(3, 2048, (length,), generator=generator).tolist()}
                for length in lengths
            ]
            outputs = self.llm.generate(prompts, self.sampling, use_tqdm=False)
            answers.append([list(output.outputs[0].token_ids) for output in outputs])
        return answers

    def weights(self) -> list[torch.Tensor]:
        model = self.llm.llm_engine.model_executor.driver_worker.worker.model_runner.model
        return [*model.parameters(), *model.buffers()]


def dirty_padding(buffers: list) -> None:
    """Write NaN into all padding."""
    for buffer in buffers:
        spec = buffer.spec
        mask = spec.layout.padding_mask(spec.rows, spec.k, "cuda", padded_k=spec.padded_k)
        buffer.base.view(-1)[mask] = 0x7F
    torch.cuda.synchronize()


def plant_nan(engine: Engine, pool) -> dict:
    """What is logged where a replay of the graph for 4 tokens, with 3 requests, meets NaN; the step, by our own count."""
    from vllm.v1.worker.gpu_worker import Worker

    plants, execute = vllm_gpu_ops.plants, Worker.execute_model
    steps, planted, decoding = [0], [], [0]
    todo: list = []

    def execute_model(self, scheduler_output, *given, **named):
        steps[0] += 1
        decoding[0] = decoding[0] + 1 if scheduler_output.total_num_scheduled_tokens == 3 else 0
        now = todo and decoding[0] == 4
        if now:
            planted.append(steps[0])
            for which, layer, row in todo:
                getattr(plants, which)[layer, row] = float("nan")
        result = execute(self, scheduler_output, *given, **named)
        if now:
            plants.clear()
            todo.clear()
        return result

    lines: list[str] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    handler = Collect()
    logging.getLogger("safealloc.pool").addHandler(handler)
    pool.nan.begin_step()  # where its count stands
    torch.cuda.synchronize()
    steps[0] = int(pool.nan._record[0])
    found = {}
    Worker.execute_model = execute_model
    try:
        for name, places in {
            "none": [],
            "dead row": [("elements", 1, 3)],
            "element": [("elements", 2, 1)],
            "row": [("rows", 1, 2)],
            "two layers": [("elements", 3, 0), ("elements", 0, 1)],
        }.items():
            todo[:] = places
            lines.clear()
            planted.clear()
            pool.nan._named.clear()
            engine.generate()
            torch.cuda.synchronize()
            pool.safe_point()
            found[name] = {"step": planted[0] if planted else None, "logged": list(lines)}
    finally:
        Worker.execute_model = execute
        logging.getLogger("safealloc.pool").removeHandler(handler)
    return found


def generated_code() -> dict[str, int]:
    """Inductor's use of the scale buffers: quantizations, those that write a pool buffer, and buffers that it reuses."""
    found = {"quantizations": 0, "into a pool buffer": 0, "reused": 0}
    for file in Path(os.environ["VLLM_CACHE_ROOT"]).rglob("*.py"):
        text = file.read_text(errors="replace")
        if not re.search(r"safealloc\.vllm_(fused_)?scales", text) or "async_compile" not in text:
            continue  # vLLM also writes the traced graph there
        ours: set[str] = set()
        for line in text.splitlines():
            if made := re.match(r"\s*(\w+) = torch\.ops\.safealloc\.vllm_(?:fused_)?scales\.default\(", line):
                ours.add(made[1])
            elif (alias := re.match(r"\s*(\w+) = (\w+)(\[0\])?$", line)) and alias[2] in ours:
                ours.add(alias[1])
            elif "# reuse" in line and ours & set(re.findall(r"\w+", line)):
                found["reused"] += 1
            elif re.search(r"torch\.ops\._C\.(scaled_fp4_quant\.out|silu_and_mul_nvfp4_quant\.default)\(", line):
                found["quantizations"] += 1
                found["into a pool buffer"] += bool(ours & set(re.findall(r"\w+", line)))
    return found


def dispatcher() -> list[str]:
    """What the dispatcher has for vLLM's quantization ops."""
    return [torch._C._dispatch_dump(f"_C::{name}") for name in ("scaled_fp4_quant.out", "silu_and_mul_nvfp4_quant")]


def digest(answers: list) -> str:
    return hashlib.sha256(json.dumps(answers).encode()).hexdigest()[:16]


def run(request: dict) -> dict:
    logged: list[str] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            logged.append(f"{record.levelname} {record.getMessage()}")

    prepare(request)
    log = logging.getLogger("vllm.safealloc")  # after the import of vLLM, which sets up logging anew
    log.addHandler(Collect())
    log.setLevel(logging.INFO)
    hook_calls = [0]
    if importlib.util.find_spec("safealloc") is not None:
        from safealloc.integrations.vllm.serve import allocator

        def count(function):
            def counted(*given):
                hook_calls[0] += 1
                return function(*given)

            return counted

        allocator.scales = count(allocator.scales)
    before = dispatcher()
    if request["nan"]:
        vllm_gpu_ops.plants = vllm_gpu_ops.Plants(2 * request["intermediate"])
    engine = Engine(request)
    answers = engine.generate()
    flat = [token for batch in answers for tokens in batch for token in tokens]
    result = {
        "seconds to start": round(engine.seconds, 1),
        "tokens": digest(answers),
        "generated": len(flat),
        "distinct": len(set(flat)),
        "hook calls": hook_calls[0],
        "logged": logged,
        "dispatcher as before": dispatcher() == before,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(),
    }
    if request["mode"] == 3 and os.environ.get("SAFEALLOC") != "0":
        result["generated code"] = generated_code()
    if request["simple"]:
        return result
    from support.internals import buffers_of, watch_of

    from safealloc import PaddingCorruptionError, default_pool
    from safealloc.integrations.serve import engine_of

    worker = engine.llm.llm_engine.model_executor.driver_worker.worker
    own = engine_of(worker)
    pool = default_pool("cuda:0") if own is None or own.pool is None else own.pool
    result["engine has a pool"] = own is not None and own.pool is not None
    result["stats"] = {name: getattr(pool.stats(), name) for name in pool.stats().__slots__}
    result["verified"] = pool.verify()
    result["addresses"] = sorted(buffer.address for buffer in buffers_of(pool))
    if request["nan"]:
        result["nan"] = plant_nan(engine, pool)
    for level in request["sleep"]:
        saved = [weight.detach().cpu() for weight in engine.weights()]
        engine.llm.sleep(level=level)
        dirty_free_memory()
        asleep = torch.cuda.memory_allocated()
        engine.llm.wake_up()
        if level == 2:
            for weight, copy in zip(engine.weights(), saved, strict=True):
                weight.data.copy_(copy)
        result[f"tokens after sleep level {level}"] = digest(engine.generate())
        result[f"verified after sleep level {level}"] = pool.verify()
        addresses = sorted(buffer.address for buffer in buffers_of(pool))
        result[f"same addresses after sleep level {level}"] = addresses == result["addresses"]
        result[f"bytes allocated in sleep level {level}"] = asleep
    if request["corrupt"]:
        dirty_padding(buffers_of(pool))
        result["tokens with NaN in the padding"] = digest(engine.generate())
        try:
            pool.verify()
            result["verify names it"] = False
        except PaddingCorruptionError:
            result["verify names it"] = True
        pool.verify(repair=True)
        result["tokens after repair"] = digest(engine.generate())
    if request["guard"]:
        logging.getLogger("safealloc.pool").addHandler(Collect())
        captured = [buffer for buffer in buffers_of(pool) if buffer.captures]
        result["dirtied"] = len(captured)
        dirty_padding(captured)
        result["tokens with NaN in the padding"] = digest(engine.generate())
        result["verified after guard repair"] = pool.verify()
        result["tokens after guard repair"] = digest(engine.generate())
        watch_of(pool)._repair = False
        dirty_padding(captured)
        try:
            engine.generate()
            result["raised"] = None
        except PaddingCorruptionError as error:
            result["raised"] = str(error)
    if request["restart"]:
        from vllm.distributed import cleanup_dist_env_and_memory

        from safealloc import PoolClosedError

        del worker, own
        engine.llm.llm_engine.engine_core.shutdown()
        try:
            result["bytes after shutdown"] = pool.stats().bytes
        except PoolClosedError:
            result["bytes after shutdown"] = 0
        del engine
        gc.collect()
        cleanup_dist_env_and_memory()
        engine = Engine(request)
        again = engine_of(engine.llm.llm_engine.model_executor.driver_worker.worker)
        pool = again.pool
        result["tokens after restart"] = digest(engine.generate())
        result["bytes after restart"] = pool.stats().bytes
    result["stats at the end"] = {name: getattr(pool.stats(), name) for name in pool.stats().__slots__}
    return result


if __name__ == "__main__":
    given = json.loads(Path(sys.argv[1]).read_text())
    Path(sys.argv[2]).write_text(json.dumps(run(DEFAULTS | given), indent=1))

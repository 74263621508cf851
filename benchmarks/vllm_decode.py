"""Decode latency of the real vLLM engine with each scale allocator, side by side in one run.

python -m benchmarks.vllm_decode [--json benchmarks/results/vllm-decode-h200.json] [--rounds 3]

One engine per process: a model of Llama's 8B shape with random NVFP4 weights. vLLM's own linear kernel runs with our Triton
quantizer and GEMM behind vLLM's op names (tests/support/vllm_gpu_ops.py), so that nothing but the allocator differs. The last
row is our linear kernel, quantization and GEMM in one op. It is not a comparison of allocators, since the stand-in for
vLLM's fused SiLU is plain torch. All engines are started first, then measured in turn, so that drift affects all of them
alike. Needs vLLM and a GPU of compute capability 8.9 or more.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import rich.progress
import torch

from safealloc.commands import machine, report

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "gpu"))

BATCHES = [1, 4, 8, 16, 32]
ALLOCATORS: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "vLLM's own": ({}, {"SAFEALLOC": "0"}),
    "torch.empty": ({"control": "empty"}, {"SAFEALLOC": "0"}),
    "pool": ({}, {}),
    "pool, our linear kernel": ({"linear": "safealloc"}, {"SAFEALLOC_LINEAR": "1"}),
}
MODEL = {"hidden": 4096, "intermediate": 14336, "layers": 32}
TOKENS = (8, 72)  # a step is their difference


def main() -> None:
    """Start the engines, measure in turn, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks/results/vllm-decode.json")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=20, help="of random lengths, for the time to first token")
    parser.add_argument("--layers", type=int, default=MODEL["layers"])
    parser.add_argument("--child", type=int, metavar="FD", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child is not None:
        child(given.child)
        return
    report.check_writable(given.json)
    if not torch.cuda.is_available():
        parser.error("needs a CUDA device")
    report.write_json(given.json, measure(given.rounds, given.prompts, given.layers))
    print(f"wrote {given.json}")


def measure(rounds: int, prompts: int, layers: int) -> dict[str, Any]:
    """Everything, as the JSON has it."""
    engines = {name: Child(name, *setting, layers=layers) for name, setting in ALLOCATORS.items()}
    facts = {name: engine.ask(None) for name, engine in engines.items()}
    numbers = random.Random(0)
    lengths = [numbers.randint(33, 1900) for _ in range(prompts)]
    times: dict[str, Any] = {name: {"tpot": {}, "first_token": {}, "replay": {}} for name in engines}
    jobs = [("tpot", batch) for batch in BATCHES for _ in range(rounds)]
    jobs += [("first_token", length) for length in lengths]
    jobs += [("replay", batch) for batch in BATCHES for _ in range(rounds)]
    for kind, what in rich.progress.track(jobs, description="vLLM decode"):
        for name, engine in engines.items():
            times[name][kind].setdefault(what, []).append(engine.ask({"kind": kind, "what": what}))
    for engine in engines.values():
        engine.stop()
    return {
        "benchmark": "vllm_decode",
        "versions": machine.versions() | {"vllm": facts["pool"]["vllm"]},
        "device": facts["pool"]["device"],
        "model": MODEL | {"layers": layers},
        "rounds": rounds,
        "seconds": times,
        "allocators": {
            name: facts[name] | summary(times[name], times["vLLM's own"], times["torch.empty"]) for name in engines
        },
    }


def summary(times: dict[str, Any], own: dict[str, Any], empty: dict[str, Any]) -> dict[str, Any]:
    """Medians; a ratio is the median of the ratios within a round."""

    def ratio(ours: list[float], theirs: list[float]) -> float:
        return round(statistics.median(a / b for a, b in zip(ours, theirs, strict=True)), 4)

    batches = [
        {
            "batch": batch,
            "tpot_us": round(1e6 * statistics.median(times["tpot"][batch]), 1),
            "tpot_to_vllms_own": ratio(times["tpot"][batch], own["tpot"][batch]),
            "replay_us": round(1e6 * statistics.median(times["replay"][batch]), 1),
            "replay_to_vllms_own": ratio(times["replay"][batch], own["replay"][batch]),
            "replay_over_empty_us": round(
                1e6
                * statistics.median(a - b for a, b in zip(times["replay"][batch], empty["replay"][batch], strict=True)),
                1,
            ),
        }
        for batch in BATCHES
    ]
    ours, theirs = (list(itertools.chain(*kept["first_token"].values())) for kept in (times, own))
    return {
        "batches": batches,
        "first_token_ms": round(1e3 * statistics.median(ours), 3),
        "first_token_to_vllms_own": ratio(ours, theirs),
    }


class Child:
    """An engine in its own process, which answers one question at a time."""

    def __init__(self, name: str, request: dict[str, Any], environment: dict[str, str], *, layers: int) -> None:
        self.folder = Path(tempfile.mkdtemp())
        answers, child_end = os.pipe()
        request = {"name": name, **MODEL, "layers": layers, "sizes": BATCHES, "cudagraph_mode": "FULL", **request}
        request["engine"] = {"kv_cache_memory_bytes": 4 << 30, "max_num_batched_tokens": 2048}
        self.output = (self.folder / "output.txt").open("w")
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--child", str(child_end)],
            stdin=subprocess.PIPE,
            stdout=self.output,
            stderr=subprocess.STDOUT,
            text=True,
            pass_fds=[child_end],
            cwd=self.folder,
            env={
                **os.environ,
                "VLLM_CACHE_ROOT": str(self.folder / "cache"),
                "TORCHINDUCTOR_COMPILE_THREADS": "3",
                **environment,
            },
        )
        os.close(child_end)
        self.answers = os.fdopen(answers)
        self.tell(request)

    def tell(self, question: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()

    def ask(self, question: Any) -> Any:
        if question is not None:
            self.tell(question)
        answer = self.answers.readline()
        if not answer:
            self.output.close()
            raise RuntimeError((self.folder / "output.txt").read_text()[-4000:])
        return json.loads(answer)

    def stop(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()


# --- in the engine's process --------------------------------------------------------------------------------------------


def child(descriptor: int) -> None:
    """Answer the parent's questions until it closes the pipe."""
    answers = os.fdopen(descriptor, "w")

    def answer(value: Any) -> None:
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    import engine_program

    request = engine_program.DEFAULTS | json.loads(sys.stdin.readline())
    engine_program.prepare(request)
    graphs = watch_captures()
    engine = engine_program.Engine(request)
    by_batch = dict(zip(sorted(BATCHES, reverse=True), graphs[-len(BATCHES) :], strict=True))
    answer(facts(request, engine, by_batch))
    for line in sys.stdin:
        question = json.loads(line)
        what = question["what"]
        if question["kind"] == "tpot":
            seconds = [generate(engine, [4] * what, tokens) for tokens in TOKENS]
            answer((seconds[1] - seconds[0]) / (TOKENS[1] - TOKENS[0]))
        elif question["kind"] == "first_token":
            answer(generate(engine, [what], 1))
        else:
            with Replays() as replays:
                generate(engine, [4] * what, TOKENS[1])
            answer(replays.seconds())


def watch_captures() -> list[dict[str, int] | None]:
    """Node counts by type of each graph that is captured from now on."""
    from safealloc.pool import driver
    from safealloc.pool.capture import node_counts

    counts: list[dict[str, int] | None] = []
    original_exit = torch.cuda.graph.__exit__

    def exit_and_count(self: Any, *given: Any) -> Any:
        under_way = driver.under_way(torch.cuda.current_stream().cuda_stream)
        nodes = None if under_way is None else node_counts(under_way)
        result = original_exit(self, *given)
        counts.append(nodes)
        return result

    torch.cuda.graph.__exit__ = exit_and_count
    return counts


def facts(request: dict[str, Any], engine: Any, by_batch: dict[int, dict[str, int] | None]) -> dict[str, Any]:
    import vllm

    found: dict[str, Any] = {
        "vllm": vllm.__version__,
        "device": torch.cuda.get_device_name(),
        "graph_nodes": by_batch,
        "allocated_bytes": torch.cuda.memory_allocated(),
        "reserved_bytes": torch.cuda.memory_reserved(),
        "seconds_to_start": round(engine.seconds, 1),
    }
    if os.environ.get("SAFEALLOC") != "0":
        from safealloc.integrations.serve import engine_of

        own = engine_of(engine.llm.llm_engine.model_executor.driver_worker.worker)
        if own is not None and own.pool is not None:
            stats = own.pool.stats()
            found["pool"] = {name: getattr(stats, name) for name in stats.__slots__}
    return found


def generate(engine: Any, lengths: list[int], tokens: int) -> float:
    """Seconds to generate so many tokens for prompts of these lengths."""
    from vllm import SamplingParams

    sampling = SamplingParams(max_tokens=tokens, ignore_eos=True, detokenize=False, temperature=0)
    numbers = random.Random(1)
    prompts = [{"prompt_token_ids": [numbers.randint(3, 2000) for _ in range(length)]} for length in lengths]
    engine.llm.reset_prefix_cache()
    torch.cuda.synchronize()
    start = time.perf_counter()
    engine.llm.generate(prompts, sampling, use_tqdm=False)
    return time.perf_counter() - start


class Replays:
    """Inside, events around each graph that vLLM replays measure its GPU time."""

    def __enter__(self) -> Replays:
        self.events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self.replay = replay = torch.cuda.CUDAGraph.replay

        def timed(graph: torch.cuda.CUDAGraph) -> None:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            replay(graph)
            end.record()
            self.events.append((start, end))

        torch.cuda.CUDAGraph.replay = timed
        return self

    def __exit__(self, *given: object) -> None:
        torch.cuda.CUDAGraph.replay = self.replay

    def seconds(self) -> float:
        """The median; a decode step is one graph, and the first few are not decode steps."""
        torch.cuda.synchronize()
        return statistics.median(start.elapsed_time(end) for start, end in self.events[4:]) / 1e3


if __name__ == "__main__":
    main()

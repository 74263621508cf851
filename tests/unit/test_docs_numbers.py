"""Numbers in README.md and docs/*.md, computed again from the committed results and looked up in the pages."""

from __future__ import annotations

import functools
import json
import re
import statistics
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
MIB = 2**20


@functools.cache
def read(name: str) -> Any:
    return json.loads((ROOT / f"benchmarks/results/{name}.json").read_text())


def span(values: Iterable[float], digits: int) -> str:
    """As the pages write a range: least to greatest."""
    found = sorted(values)
    return f"{found[0]:.{digits}f} to {found[-1]:.{digits}f}"


def few_rows(name: str) -> list[dict[str, Any]]:
    return [row for row in read(name)["quantize"]["few_rows"] if row["k"] >= 4096]


def pool_against(name: str, other: str, rows: list[dict[str, Any]] | None = None) -> list[float]:
    rows = few_rows(name) if rows is None else rows
    return [row["baselines"]["pool"]["us"] / row["baselines"][other]["us"] for row in rows]


def quantize() -> Iterator[tuple[str, str]]:
    h200, h100 = "bench-h200", "bench-quantize-h100"
    assert len(few_rows(h200)) == len(few_rows(h100)) == 48
    for label, other in (("`torch.empty`", "empty"), ("the linear layout", "linear")):
        cells = [pool_against(name, other) for name in (h200, h100)]
        both = " | ".join(f"median {statistics.median(cell):.2f}, {span(cell, 2)}" for cell in cells)
        yield "docs/performance.md", f"| {label} | {both} |"
    few = {
        name: [row for row in few_rows(name) if (row["layout"], row["rows"] <= 8, row["k"] >= 8192) == ("128x4", 1, 1)]
        for name in (h200, h100)
    }
    for other, chosen in (
        ("zeros", {}),
        ("padding in the kernel", few),
        ("padding in the kernel, wide stores", {}),
    ):
        yield (
            "docs/performance.md",
            " | ".join(span(pool_against(name, other, chosen.get(name)), 2) for name in (h200, h100)),
        )
    yield "README.md", f"takes {span((1 / ratio for ratio in pool_against(h200, 'zeros')), 1)} times as long"
    yield "README.md", f"ratio over 48 shapes is {statistics.median(pool_against(h200, 'empty')):.2f}"
    many = [span((100 * row["share_of_copy"] for row in read(n)["quantize"]["many_rows"]), 0) for n in (h200, h100)]
    yield "docs/performance.md", f"reaches {many[0]} % of a copy's bandwidth on the H200, and {many[1]} % on the H100"


def gemm() -> Iterator[tuple[str, str]]:
    large = [row for row in read("bench-h200")["quantize"]["gemm"] if row["n"] == row["k"] == 8192 and row["m"] <= 16]
    yield "docs/performance.md", f"reaches {span((100 * row['share_of_copy'] for row in large), 0)} % of a copy's"
    for n, text in ((8192, "of the time at 8192 x 8192"), (4096, "at 4096 x 4096")):
        rows = [row for row in read("bench-emulation-h200")["quantize"]["gemm"] if row["n"] == row["k"] == n]
        yield (
            "docs/performance.md",
            f"{span((row['us'] / row['baselines'][EMULATION]['us'] for row in rows), 2)} {text}",
        )


EMULATION = "vLLM's emulation"


def decode() -> Iterator[tuple[str, str]]:
    models = read("bench-decode-h100")["decode"]["models"]

    def shares(model: str, parallel: int, way: str = "zeros (stand-in)") -> list[float]:
        (found,) = (one for one in models if one["model"].startswith(model) and one["tensor_parallel"] == parallel)
        return [
            100
            * found["quantizations"]
            * batch["baselines"][way]["over_pool_per_quantization"]["us"]
            / batch["baselines"]["pool"]["us"]
            for batch in found["batches"]
        ]

    each = [
        batch["baselines"]["zeros (stand-in)"]["over_pool_per_quantization"]["us"]
        for m in models
        for batch in m["batches"]
    ]
    yield "docs/performance.md", f"`torch.zeros` costs {span(each, 1)} µs per quantization"
    yield "docs/performance.md", f"adds {span(shares('Llama 3.3 70B', 1), 0)} % to a step of Llama 3.3 70B on one GPU"
    yield "docs/performance.md", f"{span(shares('Llama 3.3 70B', 8), 0)} % to that of one GPU of eight"
    yield "docs/performance.md", f"{span(shares('DeepSeek-R1', 8), 0)} % to a step of DeepSeek-R1 on one"
    apart = max(abs(share) for m in models for share in shares(m["model"], m["tensor_parallel"], "empty"))
    yield "docs/performance.md", f"medians differ by at most {apart:.1f} %"


def engine() -> Iterator[tuple[str, str]]:
    found = read("vllm-decode-h200")["allocators"]

    def column(name: str, key: str) -> list[float]:
        return [batch[key] for batch in found[name]["batches"]]

    zeros = span(column("vLLM's own", "replay_over_empty_us"), 0)
    yield "docs/performance.md", f"| 673 | {zeros} µs |"
    yield "README.md", f"{zeros} µs of a step of {span((us / 1e3 for us in column('pool', 'replay_us')), 0)} ms"
    assert {found["vLLM's own"]["graph_nodes"][size]["kernel"] for size in ("1", "4", "8", "16")} == {673}
    for name in ("pool", "torch.empty"):
        assert {found[name]["graph_nodes"][size]["kernel"] for size in ("1", "4", "8", "16")} == {609}
        over = "0" if name == "torch.empty" else f"{span(column(name, 'replay_over_empty_us'), 0)} µs"
        ratio = span(column(name, "replay_to_vllms_own"), 3)
        yield "docs/performance.md", f"| 609 | {over} | {ratio} | {found[name]['first_token_to_vllms_own']:.3f} |"
        assert all(abs(other - 1) < 0.01 for other in column(name, "tpot_to_vllms_own"))


def host() -> Iterator[tuple[str, str]]:
    calls = [read(name)["host"]["calls"] for name in ("bench-host-h100", "bench-h200")]
    for names in (
        ("pool.acquire",),
        ("pool.acquire, side stream",),
        ("torch.empty", "torch.zeros"),
        ("hook in vLLM",),
        ("torch.empty as vLLM calls it (stand-in)",),
        ("torch.ops.safealloc.acquire",),
        ("bare Triton launch", "nvfp4_quantize"),
        ("nvfp4_linear",),
    ):
        cells = " | ".join(", ".join(f"{of[name]['us']:.2f}" for name in names) for of in calls)
        yield "docs/performance.md", f"| {cells} |"


def memory() -> Iterator[tuple[str, str]]:
    for group in read("bench-h200")["memory"]:
        pool, graphs = (group["bars"][name] / MIB for name in ("pool", "allocated and filled at each call"))
        yield "README.md", f"{graphs:.1f} MiB becomes {pool:.1f}"
        yield "docs/vllm.md", f"| {graphs:.1f} MiB | {pool:.1f} MiB |"
    for name in ("plan-deepseek-r1", "plan-qwen3-235b-a22b"):
        experts = read(name)["experts"]
        cells = experts["vllm_bytes"] / MIB, experts["bytes"] / MIB
        yield "docs/moe.md", f"| {cells[0]:.0f} MiB | {cells[1]:.1f} MiB |"
        if name == "plan-deepseek-r1":
            yield "README.md", f"{cells[0]:.0f} MiB becomes {cells[1]:.1f}"


def moe() -> Iterator[tuple[str, str]]:
    rows = [(row["batch"], row["baselines"]) for row in read("bench-moe-h200")["moe"]["rows"]]
    few = statistics.median(ways["pool"]["ratio_to_alone"] for batch, ways in rows if batch <= 64)
    worst = max(ways["pool"]["ratio_to_alone"] for _, ways in rows)
    yield "docs/moe.md", f"takes {few:.2f} times the quantization alone"
    yield "docs/moe.md", f"and {worst:.2f} times at worst"
    cleaner = "pool, cleaned by a separate kernel"
    launch = span((ways[cleaner]["us"] - ways["quantization alone"]["us"] for _, ways in rows), 1)
    yield "docs/moe.md", f"costs {launch} µs"
    yield "README.md", f"**cost**: {launch} µs a call"
    for way, pattern in (
        ("right-sized, zeroed", "takes 1.24 to 5.4 times"),
        ("vLLM's size, zeroed", "5.0 to 130 times"),
    ):
        ratios = sorted(ways[way]["us"] / ways["pool"]["us"] for _, ways in rows)
        low, high = re.findall(r"[\d.]+", pattern)
        assert (f"{ratios[0]:.{len(low.partition('.')[2])}f}", f"{ratios[-1]:.{len(high.partition('.')[2])}f}") == (
            low,
            high,
        )
        yield "docs/moe.md", pattern


def guard() -> Iterator[tuple[str, str]]:
    found = read("bench-guard-h200")["guard"]
    for model in ("Llama 3.1 8B", "Llama 3.3 70B"):
        steps = [step for step in found["steps"] if step["model"] == model]
        off = ", ".join(f"{step['off']['us']:.0f}" for step in steps)
        over = [", ".join(f"{step[way]['over_off']['us']:+.1f}" for step in steps) for way in ("counts", "checks")]
        yield "docs/watch.md", f"| {model} | {off} | {over[0]} | {over[1]} |"
    for call in found["host"]["calls"].values():
        assert call["us"] > 0
    acquires = {name: call["us"] for name, call in found["host"]["calls"].items() if "acquire" in name}
    every = ", ".join(f"{acquires[f'pool.acquire, verify_every={n}']:.1f}" for n in (1000, 100, 1))
    yield "docs/watch.md", f"| `pool.acquire`, N = 1000, 100, 1 | {every} |"


def first_nan() -> Iterator[tuple[str, str]]:
    steps = read("bench-nan-h100")["guard"]["steps"]
    assert all(step["nan"]["finite"] for step in steps)
    for model in ("Llama 3.1 8B", "Llama 3.3 70B"):
        over = [
            ", ".join(
                f"+{100 * step['nan'][way]['ratio_to_off'] - 100:.1f} %" for step in steps if step["model"] == model
            )
            for way in ("a node beside each quantizer", "in our quantizers")
        ]
        yield "docs/watch.md", f"| {model} | {over[0]} | {over[1]} |"
    assert read("sglang-tests-h100")["outcomes"] == {"passed": 8}


def runs() -> Iterator[tuple[str, str]]:
    tests = read("gpu-tests-h100")["outcomes"]
    assert not tests.get("failure")
    yield "docs/validation.md", f"{tests['passed']} passed and {tests['skipped']} were skipped"
    yield "docs/validation.md", f"passed {read('gpu-tests-h200')['outcomes']['passed']};"
    yield "docs/validation.md", f"all {read('engine-tests-h100')['outcomes']['passed']} tests passed"
    stress = read("pool-stress-cpu")
    yield "docs/validation.md", f"{stress['exceptions_injected']:,} exceptions"
    yield "docs/validation.md", f"{stress['re_entries'] / 1e6:.1f} million acquires"
    replays = [row for row in read("repro-h200")["replay"] if row["padding_columns"]]
    all_rows = sum(row["m"] * row["replays"] for row in replays)
    for buffer, nan in (("`torch.empty`", "nan_rows_empty"), ("pool", "nan_rows_pool")):
        yield "docs/validation.md", f"| {buffer} | {sum(row[nan] for row in replays)} of {all_rows} | 3 |"
    soak = read("soak-h100")
    counts = soak["counts"]
    planted = counts["planted and named"] + counts["guard: eager"] + counts["guard: replays"]
    failed = sum(count for name, count in counts.items() if name.startswith("failed captures"))
    yield "docs/validation.md", f"{soak['steps']} actions in {soak['seconds']:.0f} s: {counts['replays']} replays"
    yield "docs/validation.md", f"{failed} captures and"
    yield "docs/validation.md", f"{planted} padding bytes planted"
    yield "docs/validation.md", f"{counts['results compared']} results"


@pytest.mark.parametrize(
    "source",
    [quantize, gemm, decode, engine, host, memory, moe, guard, first_nan, runs],
    ids=lambda source: source.__name__,
)
def test_numbers_of_the_pages_are_those_of_the_results(source):
    pages = {page: " ".join((ROOT / page).read_text().split()) for page in {page for page, _ in source()}}
    assert [(page, text) for page, text in source() if text not in pages[page]] == []


def test_every_result_is_named_in_a_page():
    pages = "".join(path.read_text() for path in (*(ROOT / "docs").glob("*.md"), ROOT / "benchmarks/NOTES.md"))
    results = {path.name for path in (ROOT / "benchmarks/results").glob("*.json")}
    assert {name for name in results if name not in pages} == set()

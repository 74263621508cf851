"""The line after the captures, by release, GPU and what captured steps went through."""

from __future__ import annotations

from collections import Counter

import pytest

from safealloc.integrations.startup import Sites
from safealloc.integrations.vllm import report, targets
from safealloc.pool.pool import ScalePool

HOOKED = tuple(target.name for target in targets.TARGETS if target is not targets.QUANTIZE)
UNSAFE = "CuTe-DSL batched MoE"


@pytest.mark.parametrize(
    ("version", "capability", "captured", "expected"),
    [
        ("0.32.0", (10, 0), Sites(6, 16, 2), "Gives safety behind 2 fused producers, no time"),
        ("0.32.0", None, Sites(6, 16, 1), "Gives safety behind 1 fused producer, no time"),
        ("0.32.0", (10, 0), Sites(6, 16), "Gives no safety that vLLM's quantizer lacks, no time"),
        ("0.25.1", (12, 0), Sites(6, 16, 4), "Gives time of 16 fills per step"),
        ("0.24.0", (10, 3), Sites(6, 16, 4), "Gives safety at 16 sites, no time"),
        (
            "0.24.0",
            (10, 0),
            Sites(6, 16, 0, 6),
            "Gives safety at 10 sites, memory and safety at 6 expert quantizers, no time",
        ),
        ("0.25.1", (10, 0), Sites(6, 6, 0, 6), "Gives memory and safety at 6 expert quantizers, no time"),
        ("0.32.0", (10, 0), Sites(6, 6, 0, 6), "Gives memory and safety at 6 expert quantizers, no time"),
        (
            "0.32.0",
            (9, 0),
            Sites(6, 16, 4),
            "Gives safety behind 4 fused producers, no time, for validation: vLLM has no NVFP4 kernels for compute "
            "capability 9.0",
        ),
        ("0.32.0", (9, 0), Sites(), "Changes nothing: vLLM has no NVFP4 kernels for compute capability 9.0"),
        ("0.32.0", (10, 0), Sites(bypassed=Counter({"pool error": 4})), "Changes nothing here"),
        ("0.40.0", (10, 0), Sites(1, 2, 1), "What that gives in vLLM 0.40.0 is not known: its sources were not read"),
        ("?", (10, 0), Sites(1, 2, 1), "What that gives in vLLM ? is not known: its sources were not read"),
    ],
)
def test_what_the_served_sites_mean_in_a_release_and_on_a_gpu(version, capability, captured, expected):
    assert report.gain(version, capability, captured) == expected


def test_the_line_counts_served_and_bypassed_sites_and_kinds_without_a_hook():
    with ScalePool("cpu") as pool:
        pool.reserve([1, 2], 64)
        held = pool.stats()
    captured = Sites(6, 14, 2, bypassed=Counter({"pool error": 2}))
    line = report.ready("0.32.0", (10, 0), captured, held, HOOKED)
    assert line == (
        "serves 14 of 16 FP4 scale sites per step, in 6 captures; 2 buffers, 0.0 MiB, 0 fallbacks; "
        "bypassed: pool error (2). Gives safety behind 2 fused producers, no time. "
        "Of 14 kinds of padded scale sites in vLLM 0.32.0, 8 are hooked; not hooked, and not known to be zeroed: "
        f"{UNSAFE}"
    )
    without_pool = report.ready("0.32.0", (10, 0), Sites(), None, HOOKED)
    assert without_pool.startswith("serves 0 of 0 FP4 scale sites per step, in 0 captures; no pool; bypassed: none. Ch")


def test_the_line_says_where_our_quantizers_serve_and_what_that_saves():
    captured = Sites(6, 160, ours=120, quantizers=160, saved_us=210.4)
    line = report.ready("0.32.0", (10, 0), captured, None, HOOKED)
    assert "bypassed: none; quantizers: ours in 120 of 160 sites, 0.21 ms a step less (measured). Gives" in line
    assert "quantizers:" not in report.ready("0.32.0", (10, 0), Sites(6, 160), None, HOOKED)


def test_a_hook_that_is_off_counts_as_none():
    without = tuple(name for name in HOOKED if name not in ("fused_act_quant", "create_fp4_scale_tensor"))
    line = report.ready("0.32.0", (10, 0), Sites(), None, without)
    assert "3 are hooked; not hooked, and not known to be zeroed: all-reduce + RMSNorm" in line
    line = report.ready("0.24.0", (10, 0), Sites(), None, without)
    assert "not known to be zeroed: scaled_fp4_quant, all-reduce" in line

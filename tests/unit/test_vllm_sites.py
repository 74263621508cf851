"""Allocation sites by release, what safealloc changes there, and the line after the captures."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

import pytest

from safealloc.integrations.vllm import report, sites, targets
from safealloc.integrations.vllm.startup import Sites
from safealloc.pool.pool import ScalePool

RELEASES = Path(__file__).parents[1] / "vllm_releases"
COMMITTED = json.loads((RELEASES / "hooks_by_release.json").read_text())["releases"]
HOOKED = tuple(target.name for target in targets.TARGETS if target is not targets.QUANTIZE)


@pytest.fixture
def scan_sites(monkeypatch):
    monkeypatch.syspath_prepend(str(RELEASES))
    import scan_sites

    yield scan_sites
    del sys.modules["scan_sites"]


# --- the table --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", list(COMMITTED))
def test_the_committed_scan_has_the_sites_of_the_table(version):
    """If this fails, run tests/vllm_releases/check_releases.py again."""
    assert COMMITTED[version]["sites"] == [site.name for site in sites.existing(version)]


@pytest.mark.parametrize("version", list(COMMITTED))
def test_who_zeroes_dense_padding_is_what_the_sources_of_the_release_say(version):
    found = COMMITTED[version]
    expected = "zeros" if found["allocation"] == "zeros" else "kernel" if found["kernel_zeroes_padding"] else "nobody"
    assert sites.dense_padding(version) == expected


def test_versions_beyond_the_table_are_like_the_nearest_release():
    assert sites.existing("99.0.0+cu140") == sites.existing(targets.SUPPORTED[1])
    assert sites.dense_padding("99.0.0") == sites.dense_padding(targets.SUPPORTED[1])
    assert sites.dense_padding("0.18.0") == "nobody"
    assert sites.existing("0.18.0") == []


@pytest.mark.parametrize(
    ("name", "version", "hooked", "expected"),
    [
        ("create_fp4_scale_tensor", "0.32.0", HOOKED, "safety behind fused producers; no time"),
        ("create_fp4_scale_tensor", "0.25.1", HOOKED, "time: no fill per call"),
        ("create_fp4_scale_tensor", "0.24.0", HOOKED, "safety"),
        ("create_fp4_scale_tensor", "0.32.0", (), "nothing: its kernel zeroes padding"),
        ("create_fp4_scale_tensor", "0.25.1", (), "nothing: zeroed at each call"),
        ("create_fp4_scale_tensor", "0.24.0", (), "nothing: not hooked, and nobody zeroes its padding"),
        ("fused_act_quant", "0.32.0", HOOKED, "safety"),
        ("scaled_fp4_experts_quant", "0.32.0", HOOKED, "memory and safety"),
        ("mxfp4_experts_quant", "0.32.0", HOOKED, "nothing: not hooked, and nobody zeroes its padding"),
        ("8x4 quantizer", "0.32.0", HOOKED, "nothing: its kernel zeroes padding"),
        ("experts after DeepEP dispatch", "0.32.0", HOOKED, "nothing: zeroed at each call"),
    ],
)
def test_what_safealloc_changes_at_a_site(name, version, hooked, expected):
    (site,) = [one for one in sites.existing(version) if one.name == name]
    assert sites.change(site, version, hooked) == expected


# --- the scan ---------------------------------------------------------------------------------------------------------

SOURCE = """
import torch

def fp4_output(m, n):
    rounded_m = round_up(m, 128)
    return torch.empty((rounded_m, n // 4), dtype=torch.int32)  # nvfp4 scales

def nvfp4_scratch(m):
    return torch.empty((m, 8), dtype=torch.float32)

class Experts:
    if has_flashinfer():
        def apply(self, x):
            return nvfp4_quantize(x)

    def process_weights_after_loading(self, layer):
        return nvfp4_quantize(layer.weight)

def quantize_fake(m):
    return torch.empty((round_up(m, 128), 4), dtype=torch.int32)  # fp4
"""


def test_the_scan_finds_scale_shaped_allocations_and_flashinfers_quantizers(scan_sites):
    assert scan_sites.found([("a.b", SOURCE)]) == {"a.b.fp4_output", "a.b.Experts.apply"}
    assert (
        scan_sites.found([("a.b", "def f(m):\n    return torch.empty((round_up(m, 128), 4), dtype=torch.uint8)\n")])
        == set()
    )


def test_the_scan_reports_new_sites_and_gone_ones(scan_sites):
    table = {site.function for site in sites.existing("0.33.0")}
    assert scan_sites.differences("0.33.0", table) == ([], [])
    new, gone = scan_sites.differences("0.33.0", table - {"_custom_ops.mxfp4_experts_quant"} | {"layers.relu2_quant"})
    assert (new, gone) == (["layers.relu2_quant"], ["_custom_ops.mxfp4_experts_quant"])


# --- the line after the captures --------------------------------------------------------------------------------------

ZEROED_BY_NOBODY = "mxfp4_experts_quant, silu_and_mul_mxfp4_experts_quant, CuTe-DSL batched experts"


@pytest.mark.parametrize(
    ("version", "capability", "captured", "expected"),
    [
        ("0.32.0", 100, Sites(6, 16, 2), "Gives safety behind 2 fused producers, no time"),
        ("0.32.0", 100, Sites(6, 16), "Gives no safety that vLLM's quantizer lacks, no time"),
        ("0.25.1", 120, Sites(6, 16, 4), "Gives time of 16 fills per step"),
        ("0.24.0", 103, Sites(6, 16, 4), "Gives safety at 16 sites, no time"),
        (
            "0.24.0",
            100,
            Sites(6, 16, 0, 6),
            "Gives safety at 10 sites, memory and safety at 6 expert quantizers, no time",
        ),
        ("0.25.1", 100, Sites(6, 6, 0, 6), "Gives memory and safety at 6 expert quantizers, no time"),
        (
            "0.32.0",
            90,
            Sites(6, 16, 4),
            "Gives safety behind 4 fused producers, no time, for validation: compute capability 9.0 has no FP4 "
            "arithmetic, so vLLM runs NVFP4 layers weight-only",
        ),
        ("0.32.0", 100, Sites(0, 0, bypassed=Counter({"pool error": 4})), "Changes nothing here"),
        (
            "0.40.0",
            None,
            Sites(1, 2, 1),
            "Gives safety behind 1 fused producer, no time, as far as is known: 0.40.0 is newer than 0.33.0, the last "
            "that was checked",
        ),
    ],
)
def test_what_the_served_sites_mean_in_a_release_and_on_a_gpu(version, capability, captured, expected):
    assert report.gain(version, capability, captured) == expected


def test_the_line_counts_served_bypassed_and_existing_sites():
    with ScalePool("cpu") as pool:
        pool.reserve([1, 2], 64)
        held = pool.stats()
    captured = Sites(6, 14, 2, bypassed=Counter({"pool error": 2}))
    assert report.ready("0.32.0", 100, captured, held, HOOKED) == (
        "serves 14 of 16 NVFP4 scale sites per step, in 6 captures; 2 buffers, 0.0 MiB, 0 fallbacks; "
        "bypassed: pool error (2). Gives safety behind 2 fused producers, no time. "
        "vLLM 0.32.0 allocates scales in 17 functions, 4 of them hooked; not hooked, and zeroed by nobody: "
        f"{ZEROED_BY_NOBODY}"
    )
    line = report.ready("0.32.0", 100, Sites(), None, HOOKED)
    assert line.startswith(
        "serves 0 of 0 NVFP4 scale sites per step, in 0 captures; no pool; bypassed: none. Changes nothing"
    )


def test_a_hook_that_is_off_counts_as_not_hooked():
    without = tuple(name for name in HOOKED if name not in ("fused_act_quant", "create_fp4_scale_tensor"))
    assert report.places("0.32.0", without) == (
        "vLLM 0.32.0 allocates scales in 17 functions, 2 of them hooked; not hooked, and zeroed by nobody: "
        f"fused_act_quant, {ZEROED_BY_NOBODY}"
    )
    assert "zeroed by nobody: create_fp4_scale_tensor, " in report.places("0.24.0", without)

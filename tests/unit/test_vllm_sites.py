"""The table of vLLM's allocation sites, and the scan that finds them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from vllm_releases import scan_sites

from safealloc.integrations.sites import family
from safealloc.integrations.vllm import sites, targets

RELEASES = json.loads((Path(__file__).parents[1] / "vllm_releases" / "hooks_by_release.json").read_text())["releases"]
BY_NAME = {site.name: site for site in sites.SITES}


@pytest.mark.parametrize("version", RELEASES)
def test_which_releases_fill_agrees_with_their_wheels(version):
    assert sites.fills(version) == (RELEASES[version]["allocation"] == "zeros")


@pytest.mark.parametrize("version", RELEASES)
def test_which_kernels_zero_padding_agrees_with_the_wheels(version):
    dense = BY_NAME["scaled_fp4_quant"].zeroed_by(version)
    assert (dense == "kernel") == RELEASES[version]["kernel_zeroes_padding"]


def test_names_are_unique():
    assert len(BY_NAME) == len(sites.SITES)


def test_every_hook_that_answers_with_scales_serves_a_site():
    serving = {targets.SCALES, targets.FUSED_ACT_QUANT, targets.ATTENTION_FUSION, targets.EXPERTS, targets.MX_EXPERTS}
    assert {site.hook for site in sites.SITES} == {*serving, None}


@pytest.mark.parametrize(
    ("name", "version", "zeroed", "change"),
    [
        ("scaled_fp4_quant", "0.19.1", "nobody", "safety"),
        ("scaled_fp4_quant", "0.28.0", "fill", "time: no fill"),
        ("scaled_fp4_quant", "0.33.0", "kernel", "nothing"),
        ("all-reduce + RMSNorm + FP4", "0.28.0", "fill", "time: no fill"),
        ("all-reduce + RMSNorm + FP4", "0.33.0", "nobody", "safety"),
        ("SiLU + FP4, function", "0.30.0", "nobody", "safety"),
        ("NVFP4 expert quantizers", "0.28.0", "nobody", "safety, memory"),
        ("MXFP4 expert quantizers", "0.33.0", "nobody", "safety, memory"),
        ("linear NVFP4 scales", "0.28.0", "no padding", "nothing"),
        ("8x4 NVFP4", "0.33.0", "kernel", "nothing: no hook"),
    ],
)
def test_what_changes_at_a_site(name, version, zeroed, change):
    site = BY_NAME[name]
    assert (site.zeroed_by(version), site.change(version)) == (zeroed, change)


def test_a_site_exists_from_its_first_release_on():
    site = BY_NAME["SiLU + FP4, function"]
    assert [site.exists(version) for version in ("0.29.0", "0.30.0", "0.33.0+cu130")] == [False, True, True]


@pytest.mark.parametrize(
    ("capability", "expected"),
    [((10, 0), "SM10x"), ((10, 3), "SM10x"), ((12, 1), "SM12x"), ((9, 0), None), (None, None)],
)
def test_gpu_families(capability, expected):
    assert family(capability) == expected


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("def f(m):\n    sf = torch.empty((m, 4), dtype=torch.uint8)", ["a.py:f"]),
        ("def f(m):\n    x, out_scale = y, torch.zeros(m, 4, dtype=torch.int32, device=d).view(FP8)", ["a.py:f"]),
        (
            "class A:\n    def f(self, scale):\n        self.scale_2 = scale.new_empty(4, dtype=scale.dtype)",
            ["a.py:A.f"],
        ),
        ("def swizzle_scale(m):\n    return torch.empty((m, 4), dtype=torch.float8_e4m3fn)", ["a.py:swizzle_scale"]),
        ("def f(x):\n    return mxfp8_quantize(x) if x.shape else x.scale", ["a.py:f"]),
        ("def f(m):\n    data = torch.empty((m, 4), dtype=torch.uint8)  # scale", []),
        ("def f(m):\n    scale = torch.empty((m, 4), dtype=torch.float32)  # uint8", []),
        ("def f(m, scale):\n    scale = g(m)  # uint8", []),
    ],
)
def test_what_the_scan_finds(text, found):
    assert scan_sites.scan({"a.py": text}) == found


def test_places_that_are_no_sites_are_left_out():
    sources = {
        "models/x/amd/model.py": "def f():\n    scale = torch.empty(4, dtype=torch.uint8)",
        "a.py": "class A:\n    def create_weights(self):\n        scale = torch.empty(4, dtype=torch.uint8)",
    }
    assert len(scan_sites.scan(sources)) == 2
    assert scan_sites.missing(sources) == []
    assert scan_sites.left_out("a.py:A.create_weights") == "weights"


def test_the_script_names_what_the_table_lacks(tmp_path, capsys):
    (tmp_path / "a.py").write_text("def f():\n    scale = torch.empty(4, dtype=torch.uint8)")
    assert scan_sites.main([str(tmp_path)]) == 1
    assert capsys.readouterr().out == f"{tmp_path} a.py:f\n"
    (tmp_path / "a.py").write_text("")
    assert scan_sites.main([str(tmp_path)]) == 0

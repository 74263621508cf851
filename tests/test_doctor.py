"""``safealloc doctor``: what it finds, and that nothing that is broken breaks it."""

from __future__ import annotations

import json
import os

import pytest
import torch
from test_cli import ROOT, run_safealloc

from safealloc import optional
from safealloc.backends import GEMMS, QUANTIZERS
from safealloc.cli import main


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    path = tmp_path_factory.mktemp("doctor") / "result.json"
    assert main(["doctor", "--json", str(path)]) == 0
    return json.loads(path.read_text())


def test_every_package_has_a_version_or_a_reason(result):
    named = ["safealloc", "python", "torch", "triton", "flashinfer", "vllm", "cuda.bindings", "matplotlib"]
    assert set(result["versions"]) == {*named, "CUDA (torch)", "CUDA driver"}
    for found in result["versions"].values():
        assert found["version"] or found["reason"]
    assert result["versions"]["torch"] == {"version": torch.__version__, "reason": None}
    for package in ("triton", "flashinfer", "vllm"):
        assert result["versions"][package]["reason"] == optional.missing(package)


def test_every_backend_is_usable_or_refused_for_each_layout(result):
    assert len(result["devices"]) == 1 + (torch.cuda.device_count() if torch.cuda.is_available() else 0)
    for device in result["devices"]:
        assert device["name"]
        for found, table, layouts in (
            (device["quantizers"], QUANTIZERS, {"128x4", "8x4", "linear"}),
            (device["gemms"], GEMMS, {"128x4", "8x4"}),
        ):
            assert [row["name"] for row in found] == list(table)
            for row in found:
                assert {*row["usable"], *row["refused"]} == layouts
                assert not {*row["usable"]} & {*row["refused"]}
                assert all(row["refused"].values())
                assert {*row["auto"]} <= {*row["usable"]}
            automatic = [layout for row in found for layout in row["auto"]]
            assert sorted(automatic) == sorted(layouts)


def test_the_cpu(result):
    cpu = result["devices"][0]
    assert (cpu["device"], cpu["capability"]) == ("cpu", None)
    reference = next(row for row in cpu["gemms"] if row["name"] == "reference")
    assert reference["usable"] == ["128x4", "8x4"]
    assert "CPU" in cpu["graph_lifetimes"]


def test_inductor_is_told_or_the_reason_is(result):
    assert result["inductor"] is None or "torch" in result["inductor"]


@pytest.mark.gpu
def test_a_gpu_tells_when_its_graphs_are_gone(result):
    assert result["devices"][1]["graph_lifetimes"] is None


def test_an_import_that_fails_in_its_own_way_is_a_reason(tmp_path):
    package = tmp_path / "flashinfer"
    package.mkdir()
    (package / "__init__.py").write_text("print('noise')\nassert False, 'no CUDA toolkit'\n")
    path = tmp_path / "result.json"
    done = run_safealloc("doctor", "--json", str(path), PYTHONPATH=os.pathsep.join((str(tmp_path), str(ROOT))))
    assert done.returncode == 0, done.stderr
    reason = "importing flashinfer failed: AssertionError: no CUDA toolkit"
    result = json.loads(path.read_text())
    assert result["versions"]["flashinfer"]["reason"] == reason
    gemms = {row["name"]: row for row in result["devices"][0]["gemms"]}
    assert gemms["trtllm"]["refused"] == {"128x4": reason, "8x4": reason}
    assert reason in done.stdout
    assert "noise" not in done.stdout
    assert "\x1b" not in done.stdout


def test_an_inductor_without_what_is_needed_is_a_reason(monkeypatch, tmp_path):
    from safealloc.errors import SafeAllocError

    def refuse(op):
        raise SafeAllocError("this torch cannot")

    monkeypatch.setattr("safealloc.commands.doctor.forbid_reuse", refuse)
    path = tmp_path / "result.json"
    assert main(["doctor", "--json", str(path)]) == 0
    assert json.loads(path.read_text())["inductor"] == "this torch cannot"

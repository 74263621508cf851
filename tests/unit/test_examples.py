"""The programs in examples/ run, print what their docstrings promise, and fail where they should."""

from __future__ import annotations

import ast
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"

# name: what it prints, in this order
PRINTED = {
    "own_producer": ["step 0: the result is off by", "hits=2", "2 buffers have clean padding"],
    "replace_flashinfer_mm": [
        "NaN in 994 padding bytes changed 0 results",
        "refused: a_descale was written in layout_128x4",
    ],
    "first_nan": ["first NaN in model.layers.2.mlp.down_proj, row 3 of 8, column 17, step 7, "],
    "plan_and_doctor": [
        "LlamaForCausalLM: 10 buffers",
        "down_proj: k=8192, n=2048",
        "quantizer reference: 128x4 and 8x4",
    ],
    "pool_around_capture": [
        "the graph uses 1 pool buffer of 2048 bytes",
        "buffers have clean padding after 3 replays",
    ],
}
NEEDS_A_GPU = {"pool_around_capture"}


def program(name: str) -> Path:
    return EXAMPLES / f"{name}.py"


def run(name: str, capsys: pytest.CaptureFixture[str]) -> str:
    state = torch.random.get_rng_state()
    try:
        runpy.run_path(str(program(name)), run_name="__main__")
    finally:
        torch.random.set_rng_state(state)
    return capsys.readouterr().out


def check_printed(name: str, printed: str) -> None:
    position = 0
    for text in PRINTED[name]:
        position = printed.find(text, position)
        assert position >= 0, f"{name} did not print {text!r} (in this order):\n{printed}"


def test_every_example_is_tested_and_says_what_it_shows():
    files = sorted(EXAMPLES.glob("*.py"))
    assert {file.stem for file in files} == {*PRINTED, "test_own_kernels"}
    for file in files:
        docstring = ast.get_docstring(ast.parse(file.read_text()))
        assert len(docstring or "") > 100, file.name


@pytest.mark.parametrize("name", sorted(PRINTED.keys() - NEEDS_A_GPU))
def test_example_prints_what_it_shows(name, capsys):
    check_printed(name, run(name, capsys))


@pytest.mark.gpu
@pytest.mark.parametrize("name", sorted(NEEDS_A_GPU))
def test_gpu_example_prints_what_it_shows(name, capsys):
    check_printed(name, run(name, capsys))


@pytest.mark.skipif(torch.cuda.is_available(), reason="shows what happens without a CUDA device, and there is one")
@pytest.mark.parametrize("name", sorted(NEEDS_A_GPU))
def test_gpu_example_says_that_it_needs_a_gpu(name, capsys):
    with pytest.raises(SystemExit, match="needs a CUDA device"):
        run(name, capsys)


def test_audit_of_own_kernels_passes_in_pytest():
    arguments = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(program("test_own_kernels"))]
    finished = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "6 passed" in finished.stdout

"""The real SGLang engine with the plugin, on a GPU; each run is a process of its own (sglang_program.py).

Below Blackwell, FlashInfer is a stand-in (sglang_standins): its calls and its allocations, our kernels' arithmetic.
"""

from __future__ import annotations

import concurrent.futures
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.sglang_engine

HERE = Path(__file__).parent
OFF, LEFT = {"SAFEALLOC": "0"}, {"STANDIN_PADDING": "left"}
RUNS = {
    "SGLang's own": OFF,
    "pool": {},
    "SGLang's own, padding left": OFF | LEFT,
    "pool, padding left": LEFT,
}


def start(environment: dict[str, str], folder: Path) -> dict[str, Any]:
    folder.mkdir()
    paths = os.pathsep.join([str(HERE / "sglang_standins"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(HERE / "sglang_program.py")],
        env={**os.environ, "SAFEALLOC_STRICT": "1", "PYTHONPATH": paths, **environment},
        capture_output=True,
        text=True,
        timeout=280,
        cwd=folder,
    )
    printed = done.stdout + done.stderr
    tokens = re.search(r"^TOKENS (.*)$", printed, re.MULTILINE)
    return {
        "exit": done.returncode,
        "tokens": json.loads(tokens[1]) if tokens else None,
        "log": [line for line in printed.splitlines() if "safealloc" in line and "server_args" not in line],
        "printed": printed[-6000:],
    }


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("sglang")
    with concurrent.futures.ThreadPoolExecutor(len(RUNS)) as executor:
        runs = {name: executor.submit(start, environment, folder / name) for name, environment in RUNS.items()}
        found = {name: run.result() for name, run in runs.items()}
    if path := os.environ.get("SAFEALLOC_ENGINE_FOLDER"):
        (Path(path) / "sglang.json").write_text(json.dumps(found, indent=1))
    return found


@pytest.mark.parametrize("name", RUNS)
def test_runs_to_the_end(results: dict[str, Any], name: str) -> None:
    assert results[name]["tokens"], results[name]["printed"]


@pytest.mark.parametrize("name", ["pool", "pool, padding left"])
def test_every_quantizer_in_the_graphs_writes_into_the_pool(results: dict[str, Any], name: str) -> None:
    log = "\n".join(results[name]["log"])
    assert "safealloc: registered for SGLang" in re.sub(r"safealloc [\d.]+:", "safealloc:", log), log
    line = next(line for line in results[name]["log"] if "serves" in line)
    assert "serves 16 of 16 FP4 scale sites per step" in line  # 4 layers of 4 linears
    assert "in 4 captures" in line
    assert " 0 fallbacks; bypassed: none" in line
    assert "ERROR" not in log


def test_tokens_are_those_of_sglang_alone(results: dict[str, Any]) -> None:
    assert results["pool"]["tokens"] == results["SGLang's own"]["tokens"]
    assert results["SGLang's own"]["log"] == []


def test_stale_padding_changes_tokens_without_the_pool_and_not_with_it(results: dict[str, Any]) -> None:
    expected = results["SGLang's own"]["tokens"]
    assert results["SGLang's own, padding left"]["tokens"] != expected
    assert results["pool, padding left"]["tokens"] == expected

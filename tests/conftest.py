"""Which tests run on this machine, in how many processes, and what the end of the run says about those that did not.

A test whose hardware or package is missing is skipped with the reason. Tests marked slow run where ``-m`` or ``--slow`` asks
for them, or where they are named (``file.py::test``).
"""

from __future__ import annotations

import gc
import importlib.util
import os
from collections import Counter
from typing import Any

import pytest
import torch

_LEFT_OUT = pytest.StashKey[int]()  # how many slow tests were left out

# Inductor compiles scalar CPU code: to find out which vector instructions work, it compiles ten programs in each process.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "0")

PROCESSES = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
torch.set_num_threads(max(1, torch.get_num_threads() // PROCESSES))  # of all processes together: one per core


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests marked slow as well")


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the number
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Run in one process per core, where nothing else was asked for and no GPU would be shared."""
    parallel = config.pluginmanager.hasplugin("xdist") and not hasattr(config, "workerinput")
    if parallel and config.option.numprocesses is None and not _names_tests(config) and not torch.cuda.is_available():
        config.option.numprocesses = "auto"


@pytest.fixture(scope="module", autouse=True)
def quick_collections() -> None:
    """Tests collect garbage hundreds of times: what pytest, Inductor and earlier modules hold is left out of that."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    gc.unfreeze()  # or libraries complain at exit that their objects were leaked


def _names_tests(config: pytest.Config) -> bool:
    return any("::" in argument for argument in config.args)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    _leave_out_slow(config, items)
    _skip_what_cannot_run(items)


def _leave_out_slow(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.option.slow or config.option.markexpr or _names_tests(config):
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    if slow:
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item.get_closest_marker("slow") is None]
    _note_left_out(config, len(slow))
    if hasattr(config, "workeroutput"):  # a process of pytest-xdist: every one collects all tests
        config.workeroutput["slow"] = len(slow)


def _note_left_out(config: pytest.Config, count: int) -> None:
    config.stash[_LEFT_OUT] = count


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    _note_left_out(node.config, getattr(node, "workeroutput", {}).get("slow", 0))


def _refusal(marker: str) -> str | None:
    """Why tests with this marker cannot run on this machine, or ``None``."""
    needed = (10, 0) if marker == "sm100" else (8, 9)
    wanted = f"needs a CUDA device of compute capability {needed[0]}.{needed[1]} or more"
    if not torch.cuda.is_available():
        return f"{wanted}: torch {torch.__version__} sees no CUDA device"
    capability = torch.cuda.get_device_capability()
    if capability < needed:
        return f"{wanted}: {torch.cuda.get_device_name()} has {capability[0]}.{capability[1]}"
    for framework, name in (("vllm", "vLLM"), ("sglang", "SGLang")):
        if marker == f"{framework}_engine" and importlib.util.find_spec(framework) is None:
            return f"starts the {name} engine: {framework} is not installed"
    return None


def _skip_what_cannot_run(items: list[pytest.Item]) -> None:
    reasons: dict[str, str | None] = {}
    for item in items:
        for marker in ("gpu", "vllm_engine", "sglang_engine", "sm100"):
            if item.get_closest_marker(marker) is None:
                continue
            if marker not in reasons:
                reasons[marker] = _refusal(marker)
            reason = reasons[marker]
            if reason is not None:
                item.add_marker(pytest.mark.skip(reason=reason))
                break


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """One line for each reason why something did not run."""
    reasons: Counter[str] = Counter()
    for report in terminalreporter.stats.get("skipped", []):
        if isinstance(report.longrepr, tuple):
            reasons[report.longrepr[2].removeprefix("Skipped: ")] += 1
    left_out = config.stash.get(_LEFT_OUT, 0)
    if not reasons and not left_out:
        return
    terminalreporter.section("not run")
    for reason, count in reasons.most_common():
        terminalreporter.line(f"{count:5} {reason}")
    if left_out:
        terminalreporter.line(f"{left_out:5} marked slow: pytest -m slow runs them, pytest --slow runs all tests")

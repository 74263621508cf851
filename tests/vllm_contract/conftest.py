"""Tests of one release of vLLM on CPU tensors: skipped where it is not installed, each starts with the plugin unregistered.

With ``SAFEALLOC_REQUIRE_VLLM=1`` they fail instead of being skipped.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from support import vllm_installed

from safealloc import ScalePool, settings, use_pool
from safealloc.integrations import patches
from safealloc.integrations import vllm as integration

_missing = vllm_installed.missing()
if _missing is None:
    from support.vllm_cpu_ops import capturing, mm_calls  # before a test module imports vLLM


class _Unavailable(pytest.Module):
    """A test module that cannot be imported here."""

    def collect(self) -> list[pytest.Item]:
        if os.environ.get("SAFEALLOC_REQUIRE_VLLM", "0") == "1":
            raise self.CollectError(f"SAFEALLOC_REQUIRE_VLLM=1, and {_missing}")
        pytest.skip(str(_missing), allow_module_level=True)


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    return None if _missing is None else _Unavailable.from_parent(parent, path=module_path)


class _Modules(dict[str, ModuleType]):
    """``sys.modules`` whose values are only vLLM's modules and ours."""

    def get(self, name: str, default: object = None) -> object:  # type: ignore[override]
        return sys.modules.get(name, default)

    def values(self) -> list[ModuleType]:  # type: ignore[override]
        return [module for name, module in list(sys.modules.items()) if name.partition(".")[0] in ("vllm", "safealloc")]


@pytest.fixture
def modules_to_look_through(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlashInfer and its compilers import thousands; searching them takes a second per registration."""
    monkeypatch.setattr(patches, "sys", SimpleNamespace(modules=_Modules(), meta_path=sys.meta_path))


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch, modules_to_look_through: None) -> Iterator[None]:
    for name in (*settings.MEANINGS, "VLLM_PLUGINS"):
        monkeypatch.delenv(name, raising=False)
    integration.unregister()
    mm_calls.clear()
    yield
    integration.unregister()
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def pool() -> Iterator[ScalePool]:
    """The default pool of the CPU, and of an engine whose captures are under way."""
    with ScalePool("cpu") as pool, use_pool(pool), capturing(pool):
        yield pool


@pytest.fixture
def plugin(pool: ScalePool) -> Iterator[None]:
    """The plugin is registered."""
    integration.register()
    yield
    integration.unregister()


@pytest.fixture
def stale() -> Iterator[None]:
    """``torch.empty`` returns scale bytes that are all NaN, like memory that was used before may be."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def log() -> Iterator[list[logging.LogRecord]]:
    """What the plugin logs; vLLM's logger does not propagate to pytest's."""
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    logger = logging.getLogger("vllm.safealloc")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    yield records
    logger.removeHandler(handler)
    logger.setLevel(level)

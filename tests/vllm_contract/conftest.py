"""Each test starts with a vLLM that nothing is registered with, and leaves one behind."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace

import pytest
import torch

from safealloc import ScalePool, use_pool
from safealloc.integrations import vllm as integration
from safealloc.integrations.vllm import patches
from safealloc.pool.guard import POISON, REPAIR, VERIFY

VARIABLES = (
    *("SAFEALLOC", "SAFEALLOC_LINEAR", "SAFEALLOC_MAX_ROWS", "SAFEALLOC_STRICT", "VLLM_PLUGINS"),
    *(VERIFY, REPAIR, POISON),
)


class _Modules(dict[str, ModuleType]):
    """``sys.modules`` whose values are vLLM's modules and ours alone."""

    def get(self, name: str, default: object = None) -> object:  # type: ignore[override]
        return sys.modules.get(name, default)

    def values(self) -> list[ModuleType]:  # type: ignore[override]
        return [module for name, module in list(sys.modules.items()) if name.partition(".")[0] in ("vllm", "safealloc")]


@pytest.fixture
def modules_to_look_through(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlashInfer and its compilers bring thousands, and to look through them at each registration takes a second."""
    monkeypatch.setattr(patches, "sys", SimpleNamespace(modules=_Modules(), meta_path=sys.meta_path))


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch, modules_to_look_through: None) -> Iterator[None]:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    integration.unregister()
    if "stand_ins" in sys.modules:
        sys.modules["stand_ins"].mm_calls.clear()
    yield
    integration.unregister()
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def pool() -> Iterator[ScalePool]:
    """The default pool of the CPU."""
    with ScalePool("cpu") as pool, use_pool(pool):
        yield pool


@pytest.fixture
def plugin(pool: ScalePool) -> Iterator[None]:
    """The plugin is registered."""
    integration.register()
    yield
    integration.unregister()


@pytest.fixture
def stale() -> Iterator[None]:
    """``torch.empty`` returns scale bytes that are all NaN, as memory that other work wrote before may be."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def log() -> Iterator[list[logging.LogRecord]]:
    """What the plugin says; vLLM's logger does not propagate to where pytest listens."""
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

"""Tests beside one release of SGLang on CPU tensors: skipped where it is not installed.

With ``SAFEALLOC_REQUIRE_SGLANG=1`` they fail instead of being skipped.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support import sglang_installed

from safealloc import settings

_missing = sglang_installed.missing()
if _missing is None:
    sglang_installed.install()


class _Unavailable(pytest.Module):
    """A test module that cannot be imported here."""

    def collect(self) -> list[pytest.Item]:
        if os.environ.get("SAFEALLOC_REQUIRE_SGLANG", "0") == "1":
            raise self.CollectError(f"SAFEALLOC_REQUIRE_SGLANG=1, and {_missing}")
        pytest.skip(str(_missing), allow_module_level=True)


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    return None if _missing is None else _Unavailable.from_parent(parent, path=module_path)


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    from safealloc.integrations import sglang as integration

    for name in settings.MEANINGS:
        monkeypatch.delenv(name, raising=False)
    integration.unregister()
    yield
    integration.unregister()
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def stale() -> Iterator[None]:
    """``torch.empty`` returns scale bytes that are all NaN, like memory that was used before may be."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)

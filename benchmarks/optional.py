"""Packages that may be missing."""

from __future__ import annotations

import importlib
from types import ModuleType


def load(name: str) -> ModuleType | str:
    """The module, or one sentence why it cannot be imported."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        return f"{error.name or name} is not installed"
    except Exception as error:  # a compiled package may fail in any way
        return f"importing {name} failed: {type(error).__name__}: {error}"

"""Optional dependencies: a module, or one sentence why it is not there."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType


@functools.cache
def load(name: str) -> ModuleType | str:
    """The module, or why it cannot be imported; whatever an import raises is a reason, never a crash."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        return f"{error.name or name} is not installed"
    except (Exception, SystemExit) as error:
        return f"importing {name} failed: {type(error).__name__}: {error}".rstrip(": ")


def missing(name: str) -> str | None:
    """Why ``name`` cannot be used, or ``None``."""
    module = load(name)
    return module if isinstance(module, str) else None


def require(name: str) -> ModuleType:
    """The module.

    Raises:
        ImportError: with the reason.
    """
    module = load(name)
    if isinstance(module, str):
        raise ImportError(module)
    return module

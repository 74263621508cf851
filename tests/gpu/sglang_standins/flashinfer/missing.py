"""What SGLang imports of FlashInfer at its start and these runs never call."""

from __future__ import annotations

from typing import Any


def attribute(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)

    def fail(self: object, *given: Any, **named: Any) -> None:
        raise NotImplementedError(f"the stand-in for FlashInfer has no {name}")

    return type(name, (), {"__init__": fail})

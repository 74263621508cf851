"""The actions by name; importing a module of them registers them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from support.soak.walk import Soak

Action = Callable[[Soak], None]
_ACTIONS: dict[str, Action] = {}
_ON_CUDA: set[str] = set()


def action(*, cuda: bool = False) -> Callable[[Action], Action]:
    """Register an action under its function's name; ``cuda``: a CPU cannot do it."""

    def register(function: Action) -> Action:
        _ACTIONS[function.__name__] = function
        if cuda:
            _ON_CUDA.add(function.__name__)
        return function

    return register


def actions(device: torch.device) -> dict[str, Action]:
    """All that the device can do, by name."""
    from support.soak import calls, corruption, graphs, interrupts, lifetimes, refusals  # noqa: F401  # they register themselves

    return {name: one for name, one in _ACTIONS.items() if device.type == "cuda" or name not in _ON_CUDA}

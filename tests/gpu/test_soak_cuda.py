"""The random walk of ``soak.py`` on a GPU, for half a minute."""

from __future__ import annotations

import pytest
import torch
from soak import run
from soak_actions import actions
from soak_state import Soak

pytest.importorskip("triton", reason="it launches the kernels")

pytestmark = pytest.mark.gpu


def test_nothing_is_lost():
    device = torch.device("cuda", 0)
    result = run(Soak(device, 1, actions(device)), seconds=25)
    assert result["losses"] == []
    assert set(result["actions"]) == set(actions(device))
    assert all(tally["tried"] for tally in result["actions"].values())

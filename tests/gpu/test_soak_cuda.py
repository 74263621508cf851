"""The random walk of ``support.soak`` on a GPU, for half a minute."""

from __future__ import annotations

import pytest
import torch
from support.soak.registry import actions
from support.soak.walk import Soak, run

pytest.importorskip("triton", reason="it launches the kernels")

pytestmark = pytest.mark.gpu


def test_all_actions_without_a_loss():
    device = torch.device("cuda", 0)
    result = run(Soak(device, 1, actions(device)), seconds=25, at_most=100)
    assert result["losses"] == []
    assert set(result["actions"]) == set(actions(device))
    assert all(tally["tried"] for tally in result["actions"].values())

"""What ``safealloc doctor`` reports about the pool's guard beside a vLLM that every hook fits."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Callable
from typing import Any

import pytest
from rich.console import Console
from support.vllm_source import VERSION, stand_in

from safealloc.commands import doctor_vllm
from safealloc.integrations.vllm import targets
from safealloc.settings import POISON, VERIFY, VERIFY_REPAIR


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (VERIFY, VERIFY_REPAIR, POISON):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def doctor(monkeypatch: pytest.MonkeyPatch) -> Callable[[], tuple[doctor_vllm.VllmFinding, str]]:
    """Looks at a vLLM that every hook fits; what it finds and prints."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "vllm"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(targets, "installed", lambda: (VERSION, stand_in().get))

    def look() -> tuple[doctor_vllm.VllmFinding, str]:
        found = doctor_vllm.look(None)
        out = Console(file=io.StringIO(), width=10_000, markup=False, highlight=False)
        doctor_vllm.show(found, out)
        return found, re.sub(" +", " ", out.file.getvalue())  # type: ignore[attr-defined]

    return look


def test_the_doctor_lists_the_variables_of_the_guard(
    doctor: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    found, text = doctor()
    assert not {VERIFY, VERIFY_REPAIR, POISON} & set(found.plugin.environment)
    assert f"\n{targets.STEP.name} - registered with SAFEALLOC_VERIFY only, which is not set\n" in text
    assert "\nSAFEALLOC_VERIFY not set padding is not checked\n" in text
    assert "\nSAFEALLOC_VERIFY_REPAIR not set what SAFEALLOC_VERIFY finds is raised\n" in text
    assert "\nSAFEALLOC_POISON not set the real bytes of new buffers are undefined\n" in text
    environment = {VERIFY: "100", VERIFY_REPAIR: "1", POISON: "1"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    found, text = doctor()
    assert found.plugin.environment.items() >= environment.items()
    assert f"\n{targets.STEP.name} yes\n" in text
    assert "\nSAFEALLOC_VERIFY 100 padding is checked once in 100 calls or replays\n" in text
    assert "\nSAFEALLOC_VERIFY_REPAIR 1 what SAFEALLOC_VERIFY finds is zeroed and logged\n" in text
    assert "\nSAFEALLOC_POISON 1 the real bytes of new buffers are NaN\n" in text
    monkeypatch.setenv(VERIFY, "1")
    assert "\nSAFEALLOC_VERIFY 1 padding is checked at each call and replay\n" in doctor()[1]


@pytest.mark.parametrize("name", [VERIFY, VERIFY_REPAIR, POISON])
def test_the_doctor_reports_values_that_no_pool_takes(
    doctor: Callable[[], Any], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, "often")
    _, text = doctor()
    assert f"\n{name} often no pool can be made: {name} must be " in text
    assert text.count("no pool can be made") == 1

"""The ``SAFEALLOC_*`` environment variables: one module reads them, and only the default pool obeys those of a pool."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import safealloc
from safealloc import ScalePool, default_pool, settings
from safealloc.pool import default

WATCH = ("SAFEALLOC_VERIFY", "SAFEALLOC_VERIFY_REPAIR", "SAFEALLOC_POISON", "SAFEALLOC_NAN")


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in settings.MEANINGS:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("text", ["-1", "x", "1.5", " 1", "1e3", str(1 << 31), "9" * 5000, "٣"])
def test_verify_must_be_a_whole_number_below_2_to_the_31(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("SAFEALLOC_VERIFY", text)
    with pytest.raises(ValueError, match=r"SAFEALLOC_VERIFY must be a whole number below 2\*\*31"):
        settings.watch()


@pytest.mark.parametrize("name", WATCH[1:])
@pytest.mark.parametrize("text", ["2", "yes", "true", "-0"])
def test_switches_must_be_0_or_1(monkeypatch: pytest.MonkeyPatch, name: str, text: str) -> None:
    monkeypatch.setenv(name, text)
    with pytest.raises(ValueError, match=f"{name} must be 0 or 1, got '{text}'"):
        settings.watch()


def test_variables_that_are_empty_or_not_set_are_off(monkeypatch: pytest.MonkeyPatch) -> None:
    assert settings.watch() == settings.WatchSettings(0, False, False)
    for name in WATCH:
        monkeypatch.setenv(name, "")
    assert settings.watch() == settings.WatchSettings(0, False, False)
    assert not settings.watching()
    for name, text in zip(WATCH, ("100", "1", "1", "1"), strict=True):
        monkeypatch.setenv(name, text)
    assert settings.watch() == settings.WatchSettings(100, True, True, True)
    assert settings.watching()


def test_the_default_pool_obeys_them_and_a_pool_made_by_hand_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(default, "_pools", {})
    monkeypatch.setenv("SAFEALLOC_POISON", "1")
    layout = safealloc.SfLayout.layout_linear
    assert (default_pool("cpu").acquire(3, 64, layout) == 0x7F).all()
    with ScalePool("cpu") as pool:
        assert not (pool.acquire(3, 64, layout) == 0x7F).any()


def test_the_default_pool_names_a_variable_with_a_wrong_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(default, "_pools", {})
    monkeypatch.setenv("SAFEALLOC_VERIFY", "often")
    with pytest.raises(ValueError, match=r"SAFEALLOC_VERIFY .* got 'often'"):
        default_pool("cpu")
    with ScalePool("cpu") as pool:
        pool.acquire(1, 16, safealloc.SfLayout.layout_8x4)


def test_the_switches_of_the_plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    assert settings.enabled()
    assert not settings.strict()
    assert not settings.linear()
    for name, text in {"": "0", "_STRICT": "1", "_LINEAR": "1"}.items():
        monkeypatch.setenv(f"SAFEALLOC{name}", text)
    assert not settings.enabled()
    assert settings.strict()
    assert settings.linear()


def test_the_quantizer_is_vllms_unless_ours_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not settings.quantizer()
    for text, ours in {"": False, "vllm": False, "safealloc": True}.items():
        monkeypatch.setenv("SAFEALLOC_QUANTIZER", text)
        assert settings.quantizer() is ours
    monkeypatch.setenv("SAFEALLOC_QUANTIZER", "1")
    with pytest.raises(ValueError, match="SAFEALLOC_QUANTIZER must be vllm or safealloc, got '1'"):
        settings.quantizer()


def test_the_contract_is_off_unless_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert settings.contract() == "off"
    for text, mode in {"": "off", "off": "off", "warn": "warn", "error": "error"}.items():
        monkeypatch.setenv("SAFEALLOC_CONTRACT", text)
        assert settings.contract() == mode
    monkeypatch.setenv("SAFEALLOC_CONTRACT", "1")
    with pytest.raises(ValueError, match="SAFEALLOC_CONTRACT must be off, warn or error, got '1'"):
        settings.contract()


def test_given_lists_every_variable_with_its_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAFEALLOC_STRICT", "1")
    given = {name: value for name, value, _ in settings.given()}
    assert set(given) == set(settings.MEANINGS)
    assert {name for name, value in given.items() if value is not None} == {"SAFEALLOC_STRICT"}


def test_no_other_module_reads_them() -> None:
    package = Path(safealloc.__file__).parent
    read = re.compile(r"environ(\.get\(|\[)\s*[\"']SAFEALLOC")
    assert [path for path in package.rglob("*.py") if read.search(path.read_text())] == []

"""Patches beside another plugin's: what somebody else has put on top stays; and all modules are looked through once."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest

from safealloc.integrations import patches as patches_module
from safealloc.integrations.patches import Patches


@pytest.fixture
def patches():
    made = Patches()
    yield made
    made.restore()


class Worker:
    def step(self) -> str:
        return "original"


@pytest.fixture
def module(monkeypatch):
    made = ModuleType("patched_by_two")
    made.f, made.g, made.table = (lambda: "f"), (lambda: "g"), {"key": "value"}
    made.Worker = type("Worker", (), dict(vars(Worker)))
    monkeypatch.setitem(sys.modules, made.__name__, made)
    return made


@pytest.fixture
def passes(monkeypatch):
    """How often all modules were looked through."""
    seen = []

    class Modules(dict):
        def values(self):
            seen.append(1)
            return sys.modules.values()

    monkeypatch.setattr(patches_module, "sys", SimpleNamespace(modules=Modules(), meta_path=sys.meta_path))
    return seen


def test_many_functions_are_replaced_and_restored_in_one_pass_each(patches, module, passes):
    f, g = module.f, module.g
    with patches.one_pass():
        patches.rebind(f, "new f")
        with patches.one_pass():  # part of the outer one
            patches.rebind(g, "new g")
        assert passes == []
        assert module.f is f
    assert (module.f, module.g, passes) == ("new f", "new g", [1])
    patches.restore()
    assert (module.f, module.g, passes) == (f, g, [1, 1])


def test_one_pass_does_what_one_replacement_after_the_other_would(patches, module):
    f, g = module.f, module.g
    with patches.one_pass():
        patches.rebind(f, "first")
        patches.rebind("first", "second")
        patches.rebind(g, "first")
    assert (module.f, module.g) == ("second", "first")
    patches.restore()
    assert (module.f, module.g) == (f, g)


def test_what_was_noted_before_an_error_is_replaced_and_can_be_restored(patches, module):
    f = module.f
    with pytest.raises(ZeroDivisionError), patches.one_pass():
        patches.rebind(f, "new")
        raise ZeroDivisionError
    assert module.f == "new"
    patches.restore()
    assert module.f is f


def test_a_wrapper_on_top_of_a_replaced_function_stays(patches, module):
    def ours():
        return "ours"

    def theirs():
        return ours()

    patches.rebind(module.f, ours)
    module.f = theirs
    patches.restore()
    assert module.f is theirs


def test_a_wrapper_on_top_of_a_method_stays_and_works(patches, module):
    patches.wrap(module.Worker, "step", lambda original, self: f"ours({original(self)})")
    ours = module.Worker.step
    assert ours.__name__ == "step"

    def theirs(self):
        return f"theirs({ours(self)})"

    module.Worker.step = theirs
    patches.restore()
    assert module.Worker.step is theirs
    assert module.Worker().step() == "theirs(ours(original))"


def test_a_method_is_restored_where_nobody_is_on_top(patches, module):
    original = vars(module.Worker)["step"]
    patches.wrap(module.Worker, "step", lambda original, self, more="": original(self) + more)
    assert module.Worker().step(more="!") == "original!"
    patches.restore()
    assert vars(module.Worker)["step"] is original


def test_an_item_of_a_table_is_restored_unless_somebody_replaced_it_again(patches, module):
    patches.set_item(module.table, "key", "ours")
    assert module.table == {"key": "ours"}
    patches.restore()
    assert module.table == {"key": "value"}
    patches.set_item(module.table, "key", "ours")
    module.table["key"] = "theirs"
    patches.restore()
    assert module.table == {"key": "theirs"}

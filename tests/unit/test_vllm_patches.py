"""Replacing names in other packages' modules, now or at import, and restoring them: modules are in a temporary folder."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import textwrap
import threading
import types

import pytest

from safealloc.integrations.patches import Patches


@pytest.fixture
def patches():
    made = Patches()
    yield made
    made.restore()


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes a module; what is imported of it is forgotten afterwards, and ``sys.meta_path`` must be as before."""
    before, finders = set(sys.modules), list(sys.meta_path)
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(name, text):
        file = tmp_path.joinpath(*name.split(".")).with_suffix(".py")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(textwrap.dedent(text))
        importlib.invalidate_caches()
        return file

    yield write
    for name in set(sys.modules) - before:
        del sys.modules[name]
    assert [finder for finder in sys.meta_path if finder not in finders] == []


@pytest.fixture(autouse=True)
def _restored_before_modules_are_forgotten(write, patches):
    """Tear down ``patches`` first."""


@pytest.fixture
def replacement():
    """No global of this module: that would be put back too."""
    return lambda: "replacement"


@pytest.fixture
def replace_f(patches, replacement):
    return lambda module: patches.rebind(module.f, replacement)


# --- rebind -----------------------------------------------------------------------------------------------------------


def test_an_object_is_replaced_under_every_name_in_every_module(write, patches, replacement):
    write("one", "def f(): return 'original'\nalias = f\nother = len\n")
    write("two", "from one import f as g, alias\nimport one\n")
    one, two = importlib.import_module("one"), importlib.import_module("two")
    original = one.f
    patches.rebind(original, replacement)
    assert [one.f, one.alias, two.g, two.alias, two.one.f] == [replacement] * 5
    assert one.other is len
    write("three", "from one import f\n")
    three = importlib.import_module("three")
    assert three.f is replacement
    patches.restore()
    assert [one.f, one.alias, two.g, two.alias, three.f] == [original] * 5


def test_an_equal_object_is_not_replaced(write, patches, replacement):
    write("one", "class Equal:\n    __eq__ = lambda self, other: True\nf, g = Equal(), Equal()\n")
    one = importlib.import_module("one")
    g = one.g
    patches.rebind(one.f, replacement)
    assert one.f is replacement
    assert one.g is g


def test_restore_puts_names_back_in_one_pass_and_undoes_the_rest_in_reverse_order(write, patches, replacement):
    write("one", "def f(): ...\n")
    one = importlib.import_module("one")
    original = one.f
    undone, another = [], types.SimpleNamespace()
    patches.undo_by(lambda: undone.append((1, one.f)))
    patches.rebind(original, replacement)
    patches.undo_by(lambda: undone.append((2, one.f)))
    patches.rebind(replacement, another)
    patches.undo_by(lambda: undone.append((3, one.f)))
    patches.restore()
    assert undone == [(3, original), (2, original), (1, original)]  # names first, in one pass
    assert one.f is original
    patches.restore()
    assert len(undone) == 3


def test_entries_of_sys_modules_that_are_not_modules_are_skipped(write, patches, monkeypatch, replacement):
    write("one", "def f(): ...\n")
    one = importlib.import_module("one")

    class Slots:
        __slots__ = ()

    monkeypatch.setitem(sys.modules, "blocked", None)
    monkeypatch.setitem(sys.modules, "slots", Slots())
    monkeypatch.setitem(sys.modules, "namespace", types.SimpleNamespace(f=one.f))
    patches.rebind(one.f, replacement)
    assert one.f is replacement
    assert sys.modules["namespace"].f is replacement


def test_a_lazy_module_is_not_loaded(write, patches, monkeypatch, replacement):
    write("one", "def f(): ...\n")
    write("lazy", "raise RuntimeError('loaded')\n")
    spec = importlib.util.find_spec("lazy")
    spec.loader = importlib.util.LazyLoader(spec.loader)
    lazy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(lazy)
    monkeypatch.setitem(sys.modules, "lazy", lazy)
    patches.rebind(importlib.import_module("one").f, replacement)


# --- set --------------------------------------------------------------------------------------------------------------


class Base:
    def method(self):
        return "base"

    @staticmethod
    def static():
        return "static"

    @classmethod
    def of_class(cls):
        return cls


class Derived(Base):
    def own(self):
        return "own"


def test_an_attribute_of_a_class_is_set_and_restored(patches):
    original = vars(Derived)["own"]
    patches.set(Derived, "own", lambda self: "replaced")
    assert Derived().own() == "replaced"
    patches.restore()
    assert vars(Derived)["own"] is original


def test_an_inherited_attribute_is_set_and_removed_again(patches):
    patches.set(Derived, "method", lambda self: "replaced")
    assert (Derived().method(), Base().method()) == ("replaced", "base")
    patches.restore()
    assert "method" not in vars(Derived)
    assert Derived().method() == "base"


def test_static_and_class_methods_are_restored_as_such(patches):
    before = {name: vars(Base)[name] for name in ("static", "of_class")}
    for name in before:
        patches.set(Base, name, lambda self: "replaced")
    patches.restore()
    assert {name: vars(Base)[name] for name in before} == before
    assert (Base.static(), Derived().of_class()) == ("static", Derived)


def test_an_attribute_that_was_set_twice_is_restored(patches):
    original = vars(Derived)["own"]
    patches.set(Derived, "own", 1)
    patches.set(Derived, "own", 2)
    patches.restore()
    assert vars(Derived)["own"] is original


def test_an_undo_that_fails_does_not_stop_the_others(patches):
    patches.set(Derived, "own", 1)
    patches.undo_by(lambda: [].remove(0))
    try:
        with pytest.raises(ValueError, match="not in list"):
            patches.restore()
        assert Derived().own() == "own"
    finally:
        patches.restore()


# --- when_imported ----------------------------------------------------------------------------------------------------


def test_an_imported_module_is_handled_at_once(write, patches, replace_f, replacement):
    write("one", "def f(): ...\n")
    one = importlib.import_module("one")
    finders = list(sys.meta_path)
    patches.when_imported("one", replace_f)
    assert one.f is replacement
    assert sys.meta_path == finders


def test_a_module_is_handled_when_it_is_imported(write, patches, replace_f, replacement):
    write("one", "def f(): return 'original'\nat_import = f()\n")
    write("two", "from one import f\n")
    finders = list(sys.meta_path)
    patches.when_imported("one", replace_f)
    assert "one" not in sys.modules
    assert sys.meta_path[1:] == finders
    two = importlib.import_module("two")
    one = sys.modules["one"]
    assert (two.f, one.f, one.at_import) == (replacement, replacement, "original")
    assert sys.meta_path == finders
    patches.restore()
    assert one.f is two.f is not replacement


def test_several_actions_and_modules_are_handled_in_order(write, patches):
    write("one", "import two\n")
    write("two", "")
    write("three", "")
    done = []
    for at, name in enumerate(("one", "two", "one", "three")):
        patches.when_imported(name, lambda module, at=at: done.append((at, module.__name__)))
    importlib.import_module("one")
    assert done == [(1, "two"), (0, "one"), (2, "one")]
    assert len([finder for finder in sys.meta_path if type(finder).__module__ == Patches.__module__]) == 1
    importlib.import_module("three")
    assert done[3:] == [(3, "three")]


def test_a_submodule_is_handled_before_its_package_binds_names(write, patches, replace_f, replacement):
    write("package.__init__", "from package.inner import f\n")
    write("package.inner", "def f(): ...\n")
    patches.when_imported("package.inner", replace_f)
    package = importlib.import_module("package")
    assert package.f is package.inner.f is replacement
    assert importlib.util.find_spec("package").submodule_search_locations


def test_a_module_sees_its_own_loader_only(write, patches, replace_f):
    text = "import sys\nseen = __spec__.loader, __loader__\ndef f(): ...\n"
    write("plain", text)
    write("one", text)
    plain = importlib.import_module("plain")
    patches.when_imported("one", replace_f)
    one = importlib.import_module("one")
    assert one.__spec__.loader is one.__loader__ is one.seen[0] is one.seen[1]
    assert type(one.__loader__) is type(plain.__loader__)
    assert one.__loader__.get_source("one") == text
    assert one.__file__ == one.__spec__.origin == one.__loader__.path
    assert one.__cached__ == one.__spec__.cached is not None


def test_finding_a_spec_imports_nothing(write, patches):
    file = write("one", "def f(): ...\n")
    done = []
    patches.when_imported("one", done.append)
    spec = importlib.util.find_spec("one")
    assert spec.origin == spec.loader.get_filename("one") == str(file)
    assert "def f()" in spec.loader.get_source("one")
    assert "one" not in sys.modules
    assert done == []
    assert importlib.import_module("one") is done[0]


def test_an_error_in_a_module_is_raised_unchanged(write, patches, replace_f, replacement):
    file = write("one", "def f(): ...\nimport no_such_module\n")
    patches.when_imported("one", replace_f)
    with pytest.raises(ModuleNotFoundError, match="No module named 'no_such_module'") as raised:
        importlib.import_module("one")
    assert raised.value.name == "no_such_module"
    assert raised.value.__cause__ is raised.value.__context__ is None
    assert "one" not in sys.modules
    file.write_text("def f(): return 'mended, and longer than before'\n")
    importlib.invalidate_caches()
    assert importlib.import_module("one").f is replacement  # it is still waited for


def test_restore_after_an_import_error_leaves_no_finder(write, patches, replace_f):
    finders = list(sys.meta_path)
    write("one", "raise SystemExit(3)\n")
    patches.when_imported("one", replace_f)
    with pytest.raises(SystemExit):
        importlib.import_module("one")
    patches.restore()
    assert sys.meta_path == finders


def test_a_missing_module_is_not_found(write, patches, replace_f):
    patches.when_imported("no_such_module", replace_f)
    with pytest.raises(ModuleNotFoundError, match="No module named 'no_such_module'"):
        importlib.import_module("no_such_module")


def test_after_restore_no_import_is_waited_for(write, patches, replace_f, replacement):
    write("one", "def f(): ...\n")
    finders = list(sys.meta_path)
    patches.when_imported("one", replace_f)
    patches.restore()
    assert sys.meta_path == finders
    assert importlib.import_module("one").f is not replacement


def test_patches_can_be_used_again_after_restore(write, patches, replace_f, replacement):
    write("one", "def f(): ...\n")
    patches.when_imported("one", replace_f)
    patches.restore()
    patches.when_imported("one", replace_f)
    assert importlib.import_module("one").f is replacement


def test_restore_while_a_module_executes_skips_its_actions(write, patches):
    """The import of a module unregisters the hooks."""
    write("one", "import sys\nsys.modules['the_patches'].restore()\ndef f(): ...\n")
    done = []
    sys.modules["the_patches"] = patches
    patches.when_imported("one", done.append)
    importlib.import_module("one")
    assert done == []


def test_reload_of_a_patched_module_brings_back_its_own_function(write, patches, replace_f, replacement):
    write("one", "def f(): ...\n")
    patches.when_imported("one", replace_f)
    one = importlib.import_module("one")
    assert importlib.reload(one) is one
    own = one.f
    assert own is not replacement
    assert type(one.__spec__.loader) is type(one.__loader__) is importlib.machinery.SourceFileLoader
    patches.restore()
    assert one.f is own


def test_reload_after_restore(write, patches, replace_f, replacement):
    write("one", "def f(): ...\n")
    patches.when_imported("one", replace_f)
    one = importlib.import_module("one")
    patches.restore()
    assert importlib.reload(one).f is not replacement


def test_a_module_that_is_being_imported_is_handled_at_the_next_import(write, patches, replace_f, replacement):
    write("three", "")
    write("one", "import two\ndef f(): ...\n")
    write("two", "import sys\nsys.modules['the_patches'].when_imported('one', sys.modules['the_action'])\n")
    sys.modules["the_patches"], sys.modules["the_action"] = patches, replace_f
    one = importlib.import_module("one")
    importlib.import_module("three")
    assert one.f is replacement


def test_a_module_that_is_being_imported_is_not_touched(write, patches):
    write("one", "import two\ndef f(): ...\n")
    write("two", "import sys\nsys.modules['the_patches'].when_imported('one', sys.modules['the_action'])\n")
    begun = []
    sys.modules["the_patches"] = patches
    sys.modules["the_action"] = lambda module: begun.append(hasattr(module, "f"))
    importlib.import_module("one")
    assert False not in begun


def test_a_circular_import_is_handled(write, patches, replace_f, replacement):
    write("one", "import two\ndef f(): ...\n")
    write("two", "import one\npartial = hasattr(one, 'f')\ndef call(): return one.f()\n")
    patches.when_imported("one", replace_f)
    one = importlib.import_module("one")
    assert one.f is replacement
    assert not one.two.partial
    assert one.two.call() == "replacement"


def test_a_loader_that_is_not_from_importlib_works(write, patches, replace_f, replacement):
    class Loader:  # not of importlib.abc.Loader
        def create_module(self, spec):
            return None

        def exec_module(self, module):
            module.f = lambda: None

    class Finder(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path, target=None):
            return importlib.machinery.ModuleSpec(name, Loader()) if name == "made_up" else None

    finder = Finder()
    sys.meta_path.insert(0, finder)
    try:
        patches.when_imported("made_up", replace_f)
        assert importlib.import_module("made_up").f is replacement
        assert type(sys.modules["made_up"].__loader__) is Loader
    finally:
        sys.meta_path.remove(finder)


# --- threads ----------------------------------------------------------------------------------------------------------


def together(*calls):
    """Run calls in threads that start at once, and raise their first error."""
    errors, start = [], threading.Barrier(len(calls))

    def run(call):
        start.wait()
        try:
            call()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(call,), daemon=True) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive(), "deadlock"
    if errors:
        raise errors[0]


def test_a_module_imported_by_many_threads_is_handled_once_and_before_any_thread_sees_it(write, patches, replacement):
    write("one", "import time\ntime.sleep(0.05)\ndef f(): ...\ntime.sleep(0.05)\n")
    done, seen = [], []

    def action(module):
        done.append(module)
        patches.rebind(module.f, replacement)

    patches.when_imported("one", action)
    together(*[lambda: seen.append(importlib.import_module("one").f)] * 8)
    assert len(done) == 1
    assert seen == [replacement] * 8


def test_many_modules_imported_by_many_threads_are_all_handled(write, patches, replace_f, replacement):
    finders = list(sys.meta_path)
    names = [f"module_{index}" for index in range(32)]
    for name in names:
        write(name, "import time\ntime.sleep(0.001)\ndef f(): ...\n")
        patches.when_imported(name, replace_f)
    together(*(lambda name=name: importlib.import_module(name) for name in names))
    assert all(sys.modules[name].f is replacement for name in names)
    assert sys.meta_path == finders
    patches.restore()
    assert not any(sys.modules[name].f is replacement for name in names)


def test_no_lock_is_held_while_an_action_runs(write, patches):
    write("one", "")
    importlib.import_module("one")
    waits = []

    def action(module):
        other = threading.Thread(target=patches.undo_by, args=(list,))
        other.start()
        other.join(0.5)
        waits.append(other.is_alive())

    patches.when_imported("one", action)
    assert waits == [False]


def test_modules_that_import_each_other_in_two_threads_do_not_deadlock(write, patches, replace_f, replacement):
    for name, other in (("left", "right"), ("right", "left")):
        write(name, f"import time\ntime.sleep(0.02)\nimport {other}\ndef f(): ...\n")
        patches.when_imported(name, replace_f)
    together(lambda: importlib.import_module("left"), lambda: importlib.import_module("right"))
    assert sys.modules["left"].f is sys.modules["right"].f is replacement


def test_restore_while_a_waited_for_module_is_being_imported(write, patches):
    write("one", "import two\nthe_patches = __import__('the_patches')\nthe_patches.restore()\n")
    write("two", "import sys\nsys.modules['the_patches'].when_imported('one', sys.modules['the_action'])\n")
    done = []
    sys.modules["the_patches"], sys.modules["the_action"] = patches, done.append
    importlib.import_module("one")
    assert done == []


def test_a_module_whose_import_failed_is_waited_for_again(write, patches, replace_f, replacement):
    file = write("one", "import two\nraise ValueError('first')\n")
    write("two", "import sys\nsys.modules['the_patches'].when_imported('one', sys.modules['the_action'])\n")
    sys.modules["the_patches"], sys.modules["the_action"] = patches, replace_f
    with pytest.raises(ValueError, match="first"):
        importlib.import_module("one")
    file.write_text("def f(): return 'mended, and longer than it was before'\n")
    importlib.invalidate_caches()
    assert importlib.import_module("one").f is replacement

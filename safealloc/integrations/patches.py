"""Replaces names in other packages' modules, now or when they are imported, and restores the originals."""

from __future__ import annotations

import contextlib
import functools
import importlib.abc
import importlib.machinery
import sys
import threading
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from types import ModuleType
from typing import Any

Action = Callable[[ModuleType], None]
Pair = tuple[object, object]
"""An object, and what replaces it."""


class Patches:
    """What was replaced, and how to undo it. What somebody else has put in its place since then is left alone.

    Only one instance at a time may wait for imports.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._waiting = _WaitingForImports()
        self._rebound: list[Pair] = []
        self._undo: list[Callable[[], None]] = []
        self._local = threading.local()

    def when_imported(self, module: str, action: Action) -> None:
        """Call ``action`` with a module: now if it is imported, else right after it is."""
        imported = sys.modules.get(module)
        if imported is not None and not _being_imported(imported):
            action(imported)  # without the lock: it may import what another thread is importing
        else:
            with self._lock:
                self._waiting.add(module, action)

    @contextlib.contextmanager
    def one_pass(self) -> Iterator[None]:
        """Inside, :meth:`rebind` only takes notes; at the end, all modules are looked through once."""
        if getattr(self._local, "pairs", None) is not None:
            yield  # part of an outer pass
            return
        pairs: list[Pair] = []
        self._local.pairs = pairs
        try:
            yield
        finally:
            self._local.pairs = None
            with self._lock:
                _rebind(pairs)
                self._rebound += pairs

    def rebind(self, original: object, replacement: object) -> None:
        """Replace an object by another under every name that some module has bound it to."""
        with self.one_pass():
            self._local.pairs.append((original, replacement))

    def set(self, holder: Any, name: str, value: object) -> None:
        """Set an attribute of a class or an object."""
        with self._lock:
            own = name in vars(holder)
            original = vars(holder).get(name)
            setattr(holder, name, value)

        def undo() -> None:
            if vars(holder).get(name) is value:
                setattr(holder, name, original) if own else delattr(holder, name)

        self.undo_by(undo)

    def set_item(self, table: MutableMapping[Any, Any], key: object, value: object) -> None:
        """Replace a value of a table."""
        with self._lock:
            original, table[key] = table[key], value

        def undo() -> None:
            if table.get(key) is value:
                table[key] = original

        self.undo_by(undo)

    def wrap(self, holder: Any, name: str, around: Callable[..., Any]) -> None:
        """Turn calls of a method into ``around(original, self, ...)``."""
        original = getattr(holder, name)

        @functools.wraps(original)
        def wrapped(self: Any, *given: Any, **named: Any) -> Any:
            return around(original, self, *given, **named)

        self.set(holder, name, wrapped)

    def undo_by(self, undo: Callable[[], None]) -> None:
        """Call ``undo`` at :meth:`restore`."""
        with self._lock:
            self._undo.append(undo)

    def restore(self) -> None:
        """Restore every original, last replaced first, and stop waiting for imports."""
        with self._lock:
            self._waiting.stop()
            rebound, self._rebound = self._rebound, []
            _rebind([(replacement, original) for original, replacement in reversed(rebound)])
            with contextlib.ExitStack() as undo:  # in reverse order; all are called, even if one fails
                while self._undo:
                    undo.callback(self._undo.pop(0))


def _being_imported(module: ModuleType) -> bool:
    """Whether the import of a module has begun and not ended, so that names may be missing."""
    return bool(getattr(getattr(module, "__spec__", None), "_initializing", False))


def _rebind(pairs: Sequence[Pair]) -> None:
    """In one pass through all modules, as if one pair were done after the other."""
    final: dict[int, object] = {}
    for original, replacement in reversed(pairs):
        final[id(original)] = final.get(id(replacement), replacement)
    for module in list(sys.modules.values()) if final else ():
        bound = None
        with contextlib.suppress(AttributeError):  # getattr would load a module of importlib.util.LazyLoader
            bound = object.__getattribute__(module, "__dict__")
        if isinstance(bound, dict):
            for name in [name for name, value in list(bound.items()) if id(value) in final]:
                bound[name] = final[id(bound[name])]


class _WaitingForImports(importlib.abc.MetaPathFinder):
    """First on ``sys.meta_path`` while an import is waited for; it finds nothing itself."""

    def __init__(self) -> None:
        self._actions: dict[str, list[Action]] = {}

    def add(self, module: str, action: Action) -> None:
        self._actions.setdefault(module, []).append(action)
        if self not in sys.meta_path:
            sys.meta_path.insert(0, self)

    def stop(self) -> None:
        self._actions.clear()
        with contextlib.suppress(ValueError):  # two threads may stop at once
            sys.meta_path.remove(self)

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        self._act_on_finished_imports()
        if name not in self._actions:
            return None
        finders = (finder for finder in list(sys.meta_path) if finder is not self and hasattr(finder, "find_spec"))
        spec = next((spec for finder in finders if (spec := finder.find_spec(name, path, target)) is not None), None)
        if spec is not None and spec.loader is not None and hasattr(spec.loader, "exec_module"):
            spec.loader = _Loader(spec.loader, lambda module: self._imported(name, module))
        return spec

    def _act_on_finished_imports(self) -> None:
        """Of modules that were being imported when :meth:`add` was called; noticed at the next import of any module."""
        for name in list(self._actions):
            module = sys.modules.get(name)
            if module is not None and not _being_imported(module):
                self._imported(name, module)

    def _imported(self, name: str, module: ModuleType) -> None:
        for action in self._actions.pop(name, []):
            action(module)
        if not self._actions:
            self.stop()


class _Loader(importlib.abc.Loader):
    """Wraps another loader and calls back when it has executed; the module itself only sees the other loader."""

    def __init__(self, loader: importlib.abc.Loader, done: Action) -> None:
        self._loader = loader
        self._done = done

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        module.__loader__ = self._loader
        self._loader.exec_module(module)
        self._done(module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

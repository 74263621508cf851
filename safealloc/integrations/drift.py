"""What an integration hooks in a framework, and whether a given release has it: its sources are read, not imported.

The plugin, ``safealloc doctor`` and the check of every supported release use an integration's table of targets. A function is
not hooked if its signature is not in the table, if the hook replaces its body and that has changed, if what it relies on has
changed, or if another plugin has replaced it first.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import importlib.util
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Literal

Source = Callable[[str], str | None]
"""The source of a module by its dotted name, or ``None``."""


@dataclass(frozen=True, slots=True)
class Target:
    """One function, method or class of a framework."""

    name: str  # in the log and in doctor's table
    module: str  # where it is defined, by dotted name
    attributes: tuple[str, ...]  # its name there, Class.method for a method; of several the first that exists counts
    parameters: tuple[tuple[str, ...], ...] = ()  # the lists of names that the hook accepts; empty for a class
    since: str = "0"  # the first release that has it
    bodies: tuple[str, ...] = ()  # digests of those that the hook replaces; empty where it calls the original
    group: str = ""  # targets of one module that are hooked together or not at all
    replaced: bool = True  # else hooks only rely on it


Status = Literal["hooked", "as known", "changed", "missing", "not yet there"]


@dataclass(frozen=True, slots=True)
class Finding:
    """Whether a release has a target."""

    target: Target
    # "hooked" if the hook fits, "as known" if nothing is replaced and hooks may rely on it, "changed" or "missing" if the
    # framework's own code is left alone, "not yet there" in a release older than the target
    status: Status
    attribute: str = ""  # the name that was found
    detail: str = ""  # why it is not hooked


def installed(package: str) -> tuple[str, Source] | None:
    """Version and sources of an installed package, or ``None``; imports nothing."""
    try:
        version = importlib.metadata.version(package)
        spec = importlib.util.find_spec(package)
    except (importlib.metadata.PackageNotFoundError, ImportError, ValueError):
        return None
    if spec is None or not spec.submodule_search_locations:
        return None
    root = Path(spec.submodule_search_locations[0]).parent

    def source(module: str) -> str | None:
        path = root.joinpath(*module.split("."))
        for file in (path.with_suffix(".py"), path / "__init__.py"):
            if file.is_file():
                return file.read_text(encoding="utf-8")
        return None

    return version, source


def check(framework: str, targets: Sequence[Target], version: str, source: Source) -> list[Finding]:
    """One finding per target; the framework is named as the log names it."""
    trees = {module: parsed(source, module) for module in {target.module for target in targets}}
    found = [_check(framework, target, version, trees[target.module]) for target in targets]
    unfit = {
        one.target.group: one.target for one in found if one.target.group and one.status not in ("hooked", "as known")
    }
    for index, one in enumerate(found):
        other = unfit.get(one.target.group)
        if other is not None and one.status == "hooked":
            detail = f"it goes with {other.name}, which is not as it is known"
            found[index] = Finding(one.target, "changed", one.attribute, detail)
    return found


def replaced_by(targets: Sequence[Target], finding: Finding, module: ModuleType) -> str | None:
    """Who has replaced a function that has to be the framework's own, or one of its group; ``None`` where nobody has.

    The live function is the framework's own if its code is from the file of its module and has its name.
    """
    group = [target for target in targets if target.group and target.group == finding.target.group]
    for target in group or [finding.target]:
        for name in target.attributes if target.bodies else ():
            live = getattr(module, name, None)
            code = getattr(live, "__code__", None)
            own = code is not None and (code.co_filename, code.co_qualname) == (module.__file__, name)
            if live is not None and not own:
                where = getattr(live, "__module__", None) or type(live).__module__
                return f"{where}.{getattr(live, '__qualname__', type(live).__qualname__)} instead of {name}"
    return None


def release(version: str) -> tuple[int, ...]:
    """The numbers of a version."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:3])


def parsed(source: Source, module: str) -> ast.Module | str | None:
    """The tree of a module, or why there is none; ``None`` where there is no such module."""
    try:
        text = source(module)
        return None if text is None else ast.parse(text)
    except (OSError, SyntaxError, ValueError) as error:  # ValueError: it is not UTF-8
        return f"the source of {module} cannot be read: {type(error).__name__}: {error}"


def _check(framework: str, target: Target, version: str, tree: ast.Module | str | None) -> Finding:
    if isinstance(tree, str):
        return Finding(target, "changed", detail=tree)
    found = [(name, node) for name in target.attributes if (node := find(tree, name)) is not None]
    if not found:
        if release(version) < release(target.since):
            return Finding(target, "not yet there", detail=f"{framework} has it since {target.since}")
        return Finding(target, "missing", detail=f"{target.module} has no {' or '.join(target.attributes)}")
    attribute, node = found[0]
    if target.parameters:
        if not isinstance(node, ast.FunctionDef):
            return Finding(target, "changed", attribute, "it is not a function")
        given = _parameters(node.args)
        if given not in target.parameters:
            return Finding(target, "changed", attribute, f"its parameters are ({', '.join(given)})")
    if target.bodies and digest(node) not in target.bodies:
        return Finding(target, "changed", attribute, f"its body is not one that is known ({digest(node)})")
    return Finding(target, "hooked" if target.replaced else "as known", attribute)


def _parameters(given: ast.arguments) -> tuple[str, ...]:
    """Names, with a ``*`` before keyword-only ones."""
    names = [argument.arg for argument in (*given.posonlyargs, *given.args)]
    if given.vararg or given.kwonlyargs:
        names.append(f"*{given.vararg.arg if given.vararg else ''}")
    names += [argument.arg for argument in given.kwonlyargs]
    return (*names, f"**{given.kwarg.arg}") if given.kwarg else tuple(names)


def digest(node: ast.AST) -> str:
    """Digest of a function's body without its docstring and comments; the same in every version of Python."""
    body = list(getattr(node, "body", []))
    if body and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
        body = body[1:]
    text = "\n".join(_structure(statement) for statement in body)
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def _structure(value: object) -> str:
    """A syntax tree as text; the output of ``ast.unparse`` and ``ast.dump`` depends on Python's version.

    Empty fields are left out, since a newer Python may have added them, and so are fields without meaning for the code.
    Python 3.12 splits the text of an f-string differently from 3.11.
    """
    if isinstance(value, list):
        return f"[{', '.join(map(_structure, value))}]"
    if not isinstance(value, ast.AST):
        return repr(value)
    fields = {name: field for name, field in ast.iter_fields(value) if name not in ("ctx", "kind", "type_comment")}
    if isinstance(value, ast.JoinedStr):
        fields["values"] = _joined(value.values)
    given = (f"{name}={_structure(field)}" for name, field in fields.items() if field is not None and field != [])
    none = "value=None" if isinstance(value, ast.Constant) and value.value is None else ""
    return f"{type(value).__name__}({', '.join(given)}{none})"


def _joined(parts: list[ast.expr]) -> list[str | ast.expr]:
    joined: list[str | ast.expr] = []
    for part in parts:
        text = str(part.value) if isinstance(part, ast.Constant) else None
        if text is None:
            joined.append(part)
        elif joined and isinstance(joined[-1], str):
            joined[-1] += text
        elif text:
            joined.append(text)
    return joined


def find(tree: ast.Module | str | None, name: str) -> ast.stmt | None:
    """The definition of ``name`` or ``Class.method``, also below an ``if``, but not inside another function or class."""
    if not isinstance(tree, ast.Module):
        return None
    first, _, rest = name.partition(".")
    for node in _statements(tree.body):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name == first:
            return find(ast.Module(node.body, []), rest) if rest else node
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if not rest and any(isinstance(assigned, ast.Name) and assigned.id == first for assigned in targets):
            return node
    return None


def _statements(body: Sequence[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements of a module or class, including those below ``if``, ``try`` and ``with``."""
    for node in body:
        yield node
        if isinstance(node, (ast.If, ast.Try, ast.With)):
            yield from _statements(node.body)
        if isinstance(node, ast.Try):
            yield from _statements([statement for handler in node.handlers for statement in handler.body])
        if isinstance(node, (ast.If, ast.Try)):
            yield from _statements(node.orelse)

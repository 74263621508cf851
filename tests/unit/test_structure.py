"""The rooms of the package: imports run one way, and no file imports another's private names."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import safealloc

PACKAGE = Path(safealloc.__file__).parent
LAYERS = ("formats", "kernels", "pool", "ops", "audit", "integrations", "commands")
"""Lowest first: a layer imports itself and those before it."""
SHARED = ("_checks", "_optional", "_version", "errors", "settings")
"""Modules beside the layers, which every layer may import."""


def imports(folder: Path) -> Iterator[tuple[str, str, str]]:
    """File, module and name of each import of this package's own; the name is ``""`` for a whole module."""
    for file in sorted(folder.rglob("*.py")):
        where = str(file.relative_to(PACKAGE))
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                yield from ((where, alias.name, "") for alias in node.names if alias.name.startswith("safealloc"))
            elif isinstance(node, ast.ImportFrom) and (node.level or str(node.module).startswith("safealloc")):
                yield from ((where, "." * node.level + (node.module or ""), alias.name) for alias in node.names)


def test_layers_import_only_those_below() -> None:
    found = 0
    for number, own in enumerate(LAYERS):
        for where, module, name in imports(PACKAGE / own):
            _, *parts = [*module.split("."), name]
            assert parts[0] in LAYERS[: number + 1] or parts[0] in SHARED or own in LAYERS[-3:], f"{where}: {module}"
            assert parts[0] not in LAYERS[number + 1 :], f"{where}: {module} is above {own}"
            found += 1
    assert found > 100


def test_no_file_imports_a_private_name_of_another() -> None:
    for where, module, name in imports(PACKAGE):
        shared = module == "safealloc" and name in SHARED
        assert shared or not name.startswith("_") or name.startswith("__"), f"{where}: {name} of {module}"


def test_no_file_is_longer_than_500_lines() -> None:
    lengths = {str(file.relative_to(PACKAGE)): len(file.read_text().splitlines()) for file in PACKAGE.rglob("*.py")}
    assert {file: length for file, length in lengths.items() if length > 500} == {}

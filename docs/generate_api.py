"""Writes docs/api.md from docstrings: every public name of safealloc and safealloc.audit, and the settings.

python docs/generate_api.py [--check]

``--check`` writes nothing and exits with 1 where the committed page is out of date.
"""

from __future__ import annotations

import argparse
import dataclasses
import enum
import inspect
import re
import sys
import textwrap
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/api.md"
sys.path.insert(0, str(ROOT))  # this checkout, whatever is installed

import safealloc  # noqa: E402
import safealloc.audit  # noqa: E402
from safealloc import settings  # noqa: E402

ROOMS = {
    # where a name is defined: its section
    "safealloc.pool": "Pools and captures",
    "safealloc.ops": "Quantizers and GEMMs",
    "safealloc.formats": "Formats and layouts",
    "safealloc.errors": "Errors",
}
AUDIT = "Audit"
SETTINGS = "Settings"
SECTIONS = re.compile(r"^(Args|Attributes|Returns|Raises|Yields):\n", re.MULTILINE)
TITLES = {"Args": "Arguments"}
ENTRY = re.compile(r"^(\*{0,2}\w[\w.]*(?:, \*{0,2}\w[\w.]*)*): ")
WIDTH = 120
INTERNAL = {"ScalePool.note_graph"}  # public to other modules of the package, not to users


# --- What is on the page --------------------------------------------------------------------------------------------------


def public(module: types.ModuleType) -> Iterator[tuple[str, Any]]:
    for name in module.__all__:
        if not name.startswith("_"):
            yield name, getattr(module, name)


def section_of(value: Any) -> str:
    for room, section in ROOMS.items():
        if value.__module__ == room or value.__module__.startswith(f"{room}."):
            return section
    raise SystemExit(f"{value.__module__}.{value.__qualname__} is in no room that has a section: add it to ROOMS")


def members(cls: type) -> Iterator[tuple[str, Any]]:
    """Methods and properties that the class itself or a base in this package documents, in the order of the source."""
    bases = [base for base in reversed(cls.__mro__) if base.__module__.startswith("safealloc")]
    found = {name: value for base in bases for name, value in vars(base).items() if not name.startswith("_")}
    for name, value in found.items():
        function = getattr(value, "__func__", value)  # of a class method
        documented = isinstance(value, property) or (inspect.isfunction(function) and function.__doc__)
        if documented and f"{cls.__name__}.{name}" not in INTERNAL:
            yield name, value


# --- Signatures -----------------------------------------------------------------------------------------------------------


def source_of(value: Any) -> str:
    """A default or an annotation as the source has it, on every version of Python and torch."""
    if isinstance(value, str):
        return value
    if isinstance(value, enum.Enum):
        return f"{type(value).__name__}.{value.name}"
    return value.__name__ if isinstance(value, type) else str(value)


def default_of(value: Any) -> str:
    if isinstance(value, str):
        return f'"{value}"'
    if type(value) is int and value >= 1 << 20 and value % (1 << 20) == 0:
        return f"{value >> 20} << 20"
    text = source_of(value)
    return text if len(text) < WIDTH // 2 else "..."


def arguments_of(found: inspect.Signature) -> Iterator[str]:
    keyword_only = False
    for name, parameter in found.parameters.items():
        if name in ("self", "cls"):
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and not keyword_only:
            yield "*"
        keyword_only |= parameter.kind in (parameter.KEYWORD_ONLY, parameter.VAR_POSITIONAL)
        text = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "") + name
        if parameter.annotation is not parameter.empty:
            text += f": {source_of(parameter.annotation)}"
        if parameter.default is not parameter.empty:
            text += f" = {default_of(parameter.default)}"
        yield text


def signature(name: str, called: Callable[..., Any]) -> str:
    """A block of code: one line, or a line for each argument."""
    found = inspect.signature(called)
    arguments = list(arguments_of(found))
    if isinstance(called, type):
        language, line = "text", f"class {name}({{}})"  # the call, which is no class statement
    else:
        returned = "" if found.return_annotation is found.empty else f" -> {source_of(found.return_annotation)}"
        language, line = "python", f"def {name}({{}}){returned}: ..."
    text = line.format(", ".join(arguments))
    if len(text) > WIDTH:
        text = line.format("\n" + "".join(f"    {argument},\n" for argument in arguments))
    return f"```{language}\n{text}\n```"


# --- Docstrings as Markdown -----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Links:
    """The page's headings by dotted name, seen from inside a class where ``within`` names one."""

    anchors: dict[str, str]
    within: str = ""

    def link(self, target: str) -> str:
        """A name as code, with a link where it has a heading."""
        name = re.sub(r"^~?(safealloc\.)?(audit\.)?", "", target)
        for known in (f"{self.within}.{name}", name):
            if known in self.anchors:
                return f"[`{name}`](#{self.anchors[known]})"
        return f"`{target.lstrip('~')}`"


def markdown(docstring: str | None, links: Links) -> str:
    """Sections become lists, roles become links to this page's headings, double backticks single ones."""
    head, *sections = SECTIONS.split(inspect.cleandoc(docstring or ""))
    parts = [inline(head.strip(), links)]
    for title, body in zip(sections[::2], sections[1::2], strict=True):
        text, behind = indented(body)
        parts += [f"**{TITLES.get(title, title)}**", entries(text, links), inline(behind, links)]
    return "\n\n".join(part for part in parts if part)


def inline(text: str, links: Links) -> str:
    text = re.sub(r":\w+:`([^`]+)`", lambda role: links.link(role[1]), text)
    return re.sub(r"``(.+?)``", r"`\1`", text)


def indented(body: str) -> tuple[str, str]:
    """The indented text that a section is, and the paragraphs behind it."""
    lines = body.split("\n")
    end = next((number for number, line in enumerate(lines) if line and not line.startswith(" ")), len(lines))
    return textwrap.dedent("\n".join(lines[:end])).strip(), "\n".join(lines[end:]).strip()


def entries(text: str, links: Links) -> str:
    """Lines of ``name, name: meaning`` as a list; text without names as it is."""
    if not ENTRY.match(text):
        return inline(text, links)
    found = []
    for line in text.split("\n"):
        if entry := ENTRY.match(line):
            shown = ", ".join(links.link(name) for name in entry[1].split(", "))
            found.append(f"- {shown}: {line[entry.end() :]}")
        else:
            found.append(f"  {line.strip()}" if line.strip() else "")
    return inline("\n".join(found), links)


# --- The page -------------------------------------------------------------------------------------------------------------


def anchor(heading: str) -> str:
    """As GitHub makes it of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def page() -> str:
    sections: dict[str, list[tuple[str, Any]]] = {section: [] for section in (*ROOMS.values(), AUDIT)}
    for name, value in public(safealloc):
        sections[section_of(value)].append((name, value))
    sections[AUDIT] = list(public(safealloc.audit))
    headings = [name for found in sections.values() for name, _ in found]
    headings += [
        f"{name}.{member}"
        for found in sections.values()
        for name, value in found
        if isinstance(value, type)
        for member, _ in members(value)
    ]
    links = Links({heading: anchor(heading) for heading in headings})
    parts = [
        "# API",
        "Every public name, generated from the docstrings by `python docs/generate_api.py`.",
        "\n".join(f"- [{section}](#{anchor(section)})" for section in (*sections, SETTINGS)),
    ]
    for section, found in sections.items():
        parts.append(f"## {section}")
        if section == AUDIT:
            parts.append(markdown(safealloc.audit.__doc__, links))
        for name, value in sorted(found, key=lambda pair: is_report(pair[1])):
            parts += [f"### {name}", *described(name, value, links)]
    parts += [f"## {SETTINGS}", *settings_table(links)]
    return "\n\n".join(parts) + "\n"


def is_report(value: Any) -> bool:
    """Whether it is only returned or raised: such names come last in their section."""
    return dataclasses.is_dataclass(value) or (isinstance(value, type) and issubclass(value, BaseException))


def described(name: str, value: Any, links: Links) -> Iterator[str]:
    if inspect.isfunction(value):
        yield signature(name, value)
        yield markdown(value.__doc__, links)
    elif isinstance(value, type):
        yield from of_class(name, value, dataclasses.replace(links, within=name))
    else:
        yield from constant(name, links)


def of_class(name: str, cls: type, links: Links) -> Iterator[str]:
    if issubclass(cls, enum.Enum):
        yield "\n".join(f"- `{name}.{member.name}` is {member.value!r}" for member in cls)
    elif issubclass(cls, BaseException):
        yield f"Derives from {', '.join(links.link(base.__name__) for base in cls.__bases__)}."
    else:
        yield signature(name, cls)
    yield markdown(cls.__doc__, links)
    for member, value in members(cls):
        yield f"#### {name}.{member}"
        if isinstance(value, property) and value.fget is not None:
            yield f"A property: `{source_of(value.fget.__annotations__['return'])}`."
        else:
            yield signature(member, getattr(value, "__func__", value))
        if value.__doc__:
            yield markdown(value.__doc__, links)


def constant(name: str, links: Links) -> Iterator[str]:
    """A constant of the audit, and the text below it in the source: Python keeps no docstrings of constants."""
    for path in sorted((ROOT / "safealloc/audit").glob("*.py")):
        assigned = re.search(rf'^({name} = .+)\n"""((?s:.+?))"""', path.read_text(), re.MULTILINE)
        if assigned:
            yield f"```python\n{assigned[1]}\n```"
            yield inline(assigned[2], links)
            return
    raise SystemExit(f"safealloc.audit.{name} has no text below it")


def settings_table(links: Links) -> Iterator[str]:
    yield markdown(settings.__doc__, links)
    rows = [f"| `{name}` | {meaning} |" for name, meaning in settings.MEANINGS.items()]
    yield "\n".join(["| Variable | Meaning |", "|---|---|", *rows])


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where the page is out of date")
    arguments = parser.parse_args(given)
    if not arguments.check:
        PAGE.write_text(page())
    elif not PAGE.exists() or PAGE.read_text() != page():
        print("docs/api.md is out of date: run python docs/generate_api.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What README.md and docs/*.md say: their Python, links, command lines and names, and the picture of a tile."""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib
import io
import itertools
import re
import runpy
import shlex
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import safealloc
from safealloc import ScalePool, SfLayout, cli, settings

ROOT = Path(safealloc.__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
pytestmark = pytest.mark.skipif(not PAGES[0].exists(), reason="needs a checkout: README.md is not installed")
pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path, language: str) -> list[str]:
    return [code for found, code in FENCE.findall(page.read_text()) if found == language]


def prose(page: Path) -> str:
    return FENCE.sub("", page.read_text())


def test_the_readme_is_one_screen_and_links_every_page():
    guides = {
        "concepts",
        "formats",
        "vllm",
        "sglang",
        "moe",
        "audit",
        "watch",
        "troubleshooting",
        "api",
        "performance",
        "validation",
        "blackwell",
    }
    assert {page.stem for page in PAGES} == {"README", *guides}
    readme = PAGES[0].read_text()
    assert len(readme.splitlines()) <= 150
    assert [page.name for page in PAGES[1:] if f"(docs/{page.name})" not in readme] == []


def test_every_block_of_code_is_closed():
    for page in PAGES:
        assert page.read_text().count("```") == 2 * len(FENCE.findall(page.read_text())), page.name


# --- Python ---------------------------------------------------------------------------------------------------------------


@pages
def test_python_compiles_and_imports_names_that_exist(page):
    for code in blocks(page, "python"):
        for node in ast.walk(ast.parse(code, page.name)):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] == "safealloc":
                module = importlib.import_module(node.module)
                assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []


def examples() -> list[Any]:
    """Python that prints, and needs no GPU."""
    found = []
    for page in PAGES:
        for number, code in enumerate(blocks(page, "python")):
            if "print(" in code and ('device="cuda"' not in code or "cuda.is_available()" in code):
                found.append(pytest.param(code, id=f"{page.name}-{number}"))
    return found


def test_there_are_examples():
    assert len(examples()) >= 5


@pytest.mark.parametrize("code", examples())
def test_an_example_prints_what_its_comments_say(code):
    """A print's comment is its output, up to a semicolon."""
    expected = [line.partition("  # ")[2].partition("; ")[0] for line in code.splitlines() if "print(" in line]
    printed = io.StringIO()
    before = safealloc.set_foreign_scales("zero")
    try:
        with contextlib.redirect_stdout(printed):
            exec(compile(code, "example", "exec"), {"__name__": "example"})
        assert safealloc.set_foreign_scales("zero") == "zero"
    finally:
        safealloc.set_foreign_scales(before)
    assert printed.getvalue().splitlines() == expected


@pytest.mark.parametrize("layout", SfLayout)
@pytest.mark.parametrize(("rows", "k"), [(1, 16), (5, 80), (40, 496), (300, 576)])
def test_the_formulas_give_the_offsets_of_each_layout(layout, rows, k):
    text = "".join(block for page in PAGES for block in blocks(page, "text"))
    (formula,) = re.findall(rf"^{layout.name.removeprefix('layout_')}: +(.+)$", text, re.MULTILINE)
    formula = formula.replace("/", "//").replace("ceil(cols // 4)", "-(-cols // 4)")
    cols = k // 16
    expected = [[eval(formula, {"r": r, "c": c, "cols": cols}) for c in range(cols)] for r in range(rows)]
    assert layout.offsets(rows, k).tolist() == expected


def test_row_0_reads_scales_of_other_rows_in_the_wrong_layout():
    """28 of 32 are those of rows 2, 4, ... 14."""
    row_of = torch.empty(4096, dtype=torch.int64)
    row_of[SfLayout.layout_128x4.offsets(128, 512)] = torch.arange(128)[:, None].expand(-1, 32)
    read = row_of[SfLayout.layout_8x4.offsets(1, 512)][0].tolist()
    assert sorted(read) == [row for row in range(0, 16, 2) for _ in range(4)]


# --- Links ----------------------------------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """As GitHub derives them from headings."""
    headings = re.findall(r"^#+ +(.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pages
def test_relative_links_and_pictures_exist(page):
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.is_file() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    assert broken == []


@pages
def test_files_that_are_named_exist(page):
    named = re.findall(
        r"(?<![\w/.-])((?:benchmarks|docs|safealloc|tests)/[\w./-]+\.(?:py|md|json|png))", page.read_text()
    )
    assert [name for name in named if not (ROOT / name).is_file()] == []


# --- Command lines --------------------------------------------------------------------------------------------------------


def command_lines(page: Path) -> list[list[str]]:
    """The commands of bash blocks, without variables set before them; flags in a comment count as given too."""
    found = []
    for line in "".join(blocks(page, "bash")).replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        flags = re.findall(r"(?<!\S)--[\w-]+", line.partition(" # ")[2])
        for end, command in itertools.groupby([*words, *flags], lambda word: word in ("&&", "|", ";")):
            if not end:
                found.append(list(itertools.dropwhile(re.compile(r"\w+=").match, command)))
    return [words for words in found if words]


class ParsedError(Exception):
    """A command line was parsed, and goes no further."""


@pytest.fixture
def complaint(monkeypatch) -> Callable[[Callable[[list[str]], int], list[str]], str | None]:
    """What a program's parser objects to, or ``None``; nothing is run."""
    parse_args = argparse.ArgumentParser.parse_args

    def parse_and_stop(parser: argparse.ArgumentParser, *given: Any) -> None:
        parse_args(parser, *given)
        raise ParsedError

    def complaint(main: Callable[[list[str]], int], words: list[str]) -> str | None:
        printed = io.StringIO()
        try:
            with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(printed):
                main(words)
        except ParsedError:
            return None
        except SystemExit as exit_:
            return printed.getvalue() if exit_.code else None
        raise AssertionError(f"{words} ran without being parsed")

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    return complaint


@pages
def test_safealloc_parses_its_command_lines(page, complaint):
    given = [words[1:] for words in command_lines(page) if words[0] == "safealloc"]
    for span in re.findall(r"`safealloc ([^`]+)`", page.read_text()):
        words = span.split()
        given.append(words if len(words) > 1 else [*words, "--help"])  # a command's name alone
    assert {" ".join(words): found for words in given if (found := complaint(cli.main, words))} == {}


@pages
def test_benchmarks_parse_their_command_lines(page, complaint):
    from benchmarks.command import main  # in a checkout, as the pages are

    spans = [span.split() for span in re.findall(r"`(python -m benchmarks[^`]*)`", prose(page))]
    given = [words[3:] for words in [*command_lines(page), *spans] if words[:3] == ["python", "-m", "benchmarks"]]
    given = [words for words in given if not any(mark in word for word in words for mark in "[|")]  # a list of choices
    assert {" ".join(words): found for words in given if (found := complaint(main, words))} == {}


@pages
def test_pytest_markers_and_scripts_of_command_lines_exist(page):
    options = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    markers = {marker.partition(":")[0] for marker in options["markers"]}
    spans = [shlex.split(span) for span in re.findall(r"`((?:pytest|python) [^`]+)`", prose(page))]
    for words in [*command_lines(page), *spans]:
        if words[0] == "pytest" and "-m" in words:
            assert set(words[words.index("-m") + 1].split()) - {"and", "or", "not"} <= markers, words
        if words[0] == "python" and words[1].startswith(("benchmarks/", "tests/", "docs/", "examples/")):
            source = (ROOT / words[1]).read_text()
            assert [word for word in words[2:] if word.startswith("--") and f'"{word}"' not in source] == [], words


# --- Names ----------------------------------------------------------------------------------------------------------------


def resolve(dotted: str) -> Any:
    """What ``safealloc.a.b`` or ``ScalePool.a`` names.

    Raises:
        AttributeError, ImportError: nothing.
    """
    first, *rest = dotted.split(".")
    here = {"safealloc": safealloc, "ScalePool": ScalePool, "SfLayout": SfLayout}[first]
    for name in rest:
        if not hasattr(here, name):
            importlib.import_module(f"{here.__name__}.{name}")
        here = getattr(here, name)
    return here


@pages
def test_names_exist(page):
    text = re.sub(r"\]\([^)]*\)", "]", page.read_text())  # but not in links
    named = set(re.findall(r"(?<![\w./-])((?:safealloc|ScalePool|SfLayout)(?:\.[A-Za-z_]\w*)+)", text))
    named |= {f"ScalePool{method}" for method in re.findall(r"`(\.[a-z]\w*)\(", text)}  # as README.md's table has them
    missing = []
    for name in sorted(named):
        try:
            resolve(name)
        except (AttributeError, ImportError):
            missing.append(name)
    assert missing == []


@pages
def test_environment_variables_are_settings(page):
    named = set(re.findall(r"\bSAFEALLOC(?:_[A-Z]+)*\b(?![_*])", page.read_text()))
    assert named <= {*settings.MEANINGS, "SAFEALLOC_REQUIRE_VLLM"}  # the last is read by tests


def test_every_setting_is_documented():
    text = "".join(page.read_text() for page in PAGES)
    assert [name for name in settings.MEANINGS if f"`{name}" not in text] == []


# --- The picture of a tile ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plot() -> SimpleNamespace:
    pytest.importorskip("matplotlib", reason="the picture needs matplotlib")
    return SimpleNamespace(**runpy.run_path(str(ROOT / "benchmarks/plot_tile.py")))


def test_the_picture_of_a_tile_shows_the_layout(plot):
    kinds, offsets, memory = plot.kinds(), plot.offsets(), plot.in_memory()
    for (row, column), offset in zip(itertools.product(range(128), range(8)), offsets.ravel(), strict=True):
        assert offset == column // 4 * 512 + row % 32 * 16 + row // 32 * 4 + column % 4
        kind = plot.PADDING_ROW if row >= 5 else plot.PADDING_COLUMN if column >= 5 else plot.VALID
        assert (kinds[row, column], memory[offset]) == (kind, kind)


def test_the_committed_picture_of_a_tile_is_up_to_date(plot, tmp_path):
    from PIL import Image

    drawn, committed = tmp_path / "tile.png", ROOT / "docs/tile.png"
    plot.main([str(drawn)])
    assert committed.stat().st_size < 300_000
    with Image.open(drawn) as fresh, Image.open(committed) as kept:
        assert kept.size == fresh.size
        assert kept.text["Description"] == fresh.text["Description"] == plot.description()

"""docs/api.md: it is the one that the docstrings make, and it has every public name."""

from __future__ import annotations

import inspect
import re
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest

import safealloc
import safealloc.audit
from safealloc import ScalePool, settings

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs/api.md"


@pytest.fixture(scope="module")
def generator() -> SimpleNamespace:
    return SimpleNamespace(**runpy.run_path(str(ROOT / "docs/generate_api.py")))


@pytest.fixture(scope="module")
def text() -> str:
    return PAGE.read_text()


@pytest.fixture
def links(generator):
    return generator.Links({"capture": "capture", "ScalePool.acquire": "scalepoolacquire"}, within="ScalePool")


def headings(text: str) -> list[str]:
    return re.findall(r"^#{3,4} (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)


def test_the_committed_page_is_up_to_date(generator, text):
    assert text == generator.page(), "run: python docs/generate_api.py"


def test_check_fails_where_the_page_is_out_of_date(generator, tmp_path, capsys, monkeypatch):
    page = tmp_path / "api.md"
    monkeypatch.setitem(generator.main.__globals__, "PAGE", page)
    assert generator.main(["--check"]) == 1
    assert "run python docs/generate_api.py" in capsys.readouterr().err
    assert generator.main([]) == 0
    assert generator.main(["--check"]) == 0
    page.write_text(page.read_text().replace("acquire", "obtain"))
    assert generator.main(["--check"]) == 1


def test_every_public_name_has_a_heading(text):
    public = {name for name in (*safealloc.__all__, *safealloc.audit.__all__) if not name.startswith("_")}
    found = headings(text)
    assert public <= set(found)
    assert len(found) == len(set(found)), "a heading that is there twice has an anchor that nobody can know"


def test_every_method_of_a_pool_has_a_heading(generator, text):
    methods = {name for name, _ in inspect.getmembers(ScalePool, inspect.isfunction) if name[0] != "_"}
    shown = {f"ScalePool.{name}" for name in methods} - generator.INTERNAL
    assert len(shown) > 10
    assert shown <= set(headings(text))


def test_every_setting_has_a_row(text):
    rows = dict(re.findall(r"^\| `(SAFEALLOC\w*)` \| (.+) \|$", text, re.MULTILINE))
    assert rows == settings.MEANINGS


def test_no_markup_of_docstrings_is_left(text):
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    assert re.findall(r":\w+:`[^`]*`|``[^`]+``|^(?:Args|Returns|Raises|Attributes):", prose, re.MULTILINE) == []


def test_sections_of_a_docstring_become_lists(generator, links):
    docstring = """Do it, as :meth:`acquire` does.

    Args:
        rows, k: of the
            matrix.
        **rest: as :func:`safealloc.capture` takes it.

    Returns:
        uint8 ``[rows]``.

    A last paragraph.
    """
    assert generator.markdown(docstring, links).split("\n\n") == [
        "Do it, as [`acquire`](#scalepoolacquire) does.",
        "**Arguments**",
        "- `rows`, `k`: of the\n  matrix.\n- `**rest`: as [`capture`](#capture) takes it.",
        "**Returns**",
        "uint8 `[rows]`.",
        "A last paragraph.",
    ]


def test_a_signature_is_as_the_source_has_it(generator):
    def call(
        self, rows: int, *names: str, layout: int = safealloc.SfLayout.layout_8x4, size: int = 64 << 20
    ) -> None: ...

    assert generator.signature("call", call).splitlines()[1] == (
        "def call(rows: int, *names: str, layout: int = SfLayout.layout_8x4, size: int = 64 << 20) -> None: ..."
    )

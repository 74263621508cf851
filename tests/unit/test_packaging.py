"""An editable install is a path to this checkout, and works from any folder, also from the one that holds the checkout."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
import tomllib
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

CHECKOUT = Path(__file__).resolve().parents[2]
FROM_OUTSIDE = """
import importlib.metadata
import safealloc
[entry] = [one for one in importlib.metadata.entry_points(group="vllm.general_plugins") if one.name == "safealloc"]
entry.load()
print(safealloc.ScalePool.__module__, safealloc.__file__)
"""


def test_the_build_backend_is_hatchling():
    """Its editable installs are a line in a .pth file; a finder would lose to a folder named safealloc."""
    build = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["build-system"]
    assert build["build-backend"] == "hatchling.build"


def editable() -> Path:
    """The folder that is installed; skips where the package is not installed, or not editable."""
    try:
        text = importlib.metadata.distribution("safealloc").read_text("direct_url.json")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("safealloc is not installed")
    about = json.loads(text or "{}")
    if not about.get("dir_info", {}).get("editable"):
        pytest.skip("safealloc is not installed in editable mode")
    return Path(unquote(urlsplit(about["url"]).path)).resolve()


def test_an_editable_install_imports_from_the_folder_above_it(monkeypatch):
    folder = editable()
    monkeypatch.delenv("PYTHONPATH", raising=False)
    done = subprocess.run(
        [sys.executable, "-c", FROM_OUTSIDE],
        cwd=folder.parent,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["safealloc.pool.pool", str(folder / "safealloc/__init__.py")]


def test_an_editable_install_is_a_path():
    folder = editable()
    site = Path(str(importlib.metadata.distribution("safealloc").locate_file("")))
    lines = [line for file in site.glob("*safealloc*.pth") for line in file.read_text().splitlines()]
    assert str(folder) in lines

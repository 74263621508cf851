"""MkDocs hooks: the site has the repository's folders, so that links work there as they are written for a checkout."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
SERVED = ("*.md", "LICENSE", "docs/*.md", "docs/*.png", "benchmarks/*.md", "benchmarks/results/*.json", "examples/*.py")
LINKED = ("benchmarks/*.py", "tests/**/*.py", "safealloc/**/*.py")  # sources, copied for pages that link to them


def slug(heading: str, separator: str) -> str:
    """A heading's anchor as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", separator)


def on_config(config: Any) -> Any:
    config.mdx_configs["toc"] = {"slugify": slug, "permalink": True}
    return config


def on_files(files: Files, config: Any) -> Files:
    paths = sorted({path for pattern in (*SERVED, *LINKED) for path in ROOT.glob(pattern)})
    own = [File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)) for path in paths]
    of_theme = [file for file in files if not file.src_uri.endswith((".md", ".png", ".py"))]
    return Files([*of_theme, *own])

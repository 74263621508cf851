"""Which hooks fit each release of SGLang, by the sources in its wheel; writes ``hooks_by_release.json`` beside this file.

Usage: ``python tests/sglang_releases/check_releases.py FOLDER``, a folder of wheels: ``pip download --no-deps sglang==...``.
"""

from __future__ import annotations

import argparse
import json
import re
import zipfile
from pathlib import Path
from typing import Any

from safealloc.integrations import drift
from safealloc.integrations.sglang import targets

COMMITTED = Path(__file__).with_name("hooks_by_release.json")


def check(wheel: Path) -> tuple[str, dict[str, str]]:
    """Version of a wheel, and the status of each target, with the reason where it is left alone."""
    version = wheel.name.split("-")[1]
    with zipfile.ZipFile(wheel) as files:
        names = set(files.namelist())

        def source(module: str) -> str | None:
            path = module.replace(".", "/")
            found = [name for name in (f"{path}.py", f"{path}/__init__.py") if name in names]
            return files.read(found[0]).decode() if found else None

        return version, {one.target.name: one.status for one in targets.check(version, source)}


def as_json(wheels: list[Path]) -> dict[str, Any]:
    found = dict(sorted(map(check, wheels), key=lambda one: drift.release(one[0])))
    return {
        "command": "tests/sglang_releases/check_releases.py",
        "supported": list(targets.SUPPORTED),
        "targets": [target.name for target in targets.TARGETS],
        "releases": found,
    }


def table(result: dict[str, Any]) -> str:
    """As ``docs/sglang.md`` shows it."""
    lines = ["| SGLang | hooks that fit | not yet there |", "|---|---|---|"]
    for version, hooks in result["releases"].items():
        fit = sum(status == "hooked" for status in hooks.values())
        absent = ", ".join(name for name, status in hooks.items() if status == "not yet there") or "-"
        lines.append(f"| {version} | {fit} of {len(hooks)} | {absent} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=re.split(r"\n\n", __doc__ or "")[0])
    parser.add_argument("folder", type=Path)
    oldest = drift.release(targets.SUPPORTED[0])
    wheels = [
        wheel
        for wheel in parser.parse_args().folder.glob("sglang-*.whl")
        if drift.release(wheel.name.split("-")[1]) >= oldest
    ]
    result = as_json(wheels)
    COMMITTED.write_text(json.dumps(result, indent=2) + "\n")
    print(table(result))


if __name__ == "__main__":
    main()

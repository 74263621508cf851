"""Adds one environment's test run to the table of all of them; ``nox -s tests`` calls it in each.

python benchmarks/matrix.py junit.xml benchmarks/results/matrix-cpu.json -- PYTEST-ARGUMENTS

Exits with 1 where a test failed.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

PACKAGES = ("torch", "triton", "numpy", "pytest", "hypothesis")


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    git = ["git", "rev-parse", "--short", "HEAD"]
    found = subprocess.run(git, capture_output=True, text=True, check=False, cwd=Path(__file__).parent)
    return found.stdout.strip() or None


def cell(junit: Path, arguments: list[str]) -> dict[str, object]:
    """What one run says: this interpreter, the packages beside it, and the outcomes in its JUnit file."""
    cases = list(ElementTree.parse(junit).iter("testcase"))
    outcomes = Counter(
        next((child.tag for child in case if child.tag in ("failure", "error", "skipped")), "passed") for case in cases
    )
    failed = [
        f"{case.get('classname')}::{case.get('name')}"
        for case in cases
        if case.find("failure") is not None or case.find("error") is not None
    ]
    return {
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
        "commit": commit(),
        "date": datetime.now(UTC).date().isoformat(),
        "command": " ".join(["pytest", *arguments]),
        "outcomes": dict(outcomes),
        "failed": failed,
        "seconds": round(sum(float(case.get("time", 0)) for case in cases), 1),
    }


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("junit", type=Path)
    parser.add_argument("table", type=Path)
    parser.add_argument("arguments", nargs="*")
    arguments = parser.parse_args(given)
    new = cell(arguments.junit, arguments.arguments)
    cells = json.loads(arguments.table.read_text())["cells"] if arguments.table.exists() else []
    cells = [old for old in cells if (old["python"], old["torch"]) != (new["python"], new["torch"])] + [new]
    cells.sort(key=lambda row: [[int(part) for part in row[of].split("+")[0].split(".")] for of in ("torch", "python")])
    arguments.table.write_text(
        json.dumps({"machine": platform.machine(), "device": "cpu", "cells": cells}, indent=1) + "\n"
    )
    print(new["outcomes"])
    return 1 if new["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())

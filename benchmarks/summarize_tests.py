"""Turn a pytest JUnit file into the summary that is committed beside the benchmark results.

pytest -m gpu --junitxml junit.xml; python -m benchmarks.summarize_tests junit.xml benchmarks/results/gpu-tests-h200.json
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import xml.etree.ElementTree as ElementTree
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

import torch


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("junit", type=Path, nargs="+")
    parser.add_argument("summary", type=Path)
    arguments = parser.parse_args()
    tests = []
    for case in (case for junit in arguments.junit for case in ElementTree.parse(junit).iter("testcase")):
        kinds = {child.tag: child.get("message", "") for child in case if child.tag in ("failure", "error", "skipped")}
        outcome = next(iter(kinds), "passed")
        test = {
            "name": f"{case.get('classname')}::{case.get('name')}",
            "outcome": outcome,
            "seconds": float(case.get("time", 0)),
        }
        if outcome != "passed":
            test["message"] = kinds[outcome].splitlines()[0] if kinds[outcome] else ""
        tests.append(test)
    cuda = torch.cuda.is_available()
    summary = {
        "date": datetime.now(UTC).date().isoformat(),
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "capability": "%d.%d" % torch.cuda.get_device_capability() if cuda else None,  # noqa: UP031
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "triton", "cuda-bindings", "flashinfer-python", "vllm")},
        "cuda": torch.version.cuda,
        "command": "pytest tests -m gpu",
        "processes": len(arguments.junit),
        "outcomes": dict(Counter(test["outcome"] for test in tests)),
        "seconds": round(sum(test["seconds"] for test in tests), 1),
        "tests": tests,
    }
    arguments.summary.write_text(json.dumps(summary, indent=1) + "\n")
    print(summary["outcomes"])


if __name__ == "__main__":
    main()

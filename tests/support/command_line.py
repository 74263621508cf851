"""The command line as its own process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import safealloc

ROOT = Path(safealloc.__file__).resolve().parents[1]


def run_safealloc(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """``python -m safealloc`` with its output piped."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return subprocess.run(
        [sys.executable, "-m", "safealloc", *arguments],
        env={**os.environ, "PYTHONPATH": path, "COLUMNS": "40", **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )

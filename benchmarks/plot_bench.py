"""Draw docs/bench-*.png from what ``safealloc bench --json`` wrote.

python benchmarks/plot_bench.py [benchmarks/results/bench-h200.json] [docs]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from safealloc.bench.plots import draw

ROOT = Path(__file__).resolve().parents[1]

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("result", nargs="?", type=Path, default=ROOT / "benchmarks/results/bench-h200.json")
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT / "docs")
    given = parser.parse_args()
    for picture in draw(json.loads(given.result.read_text()), given.folder):
        print(f"wrote {picture}")

"""Latency of the quantiser and the GEMM with each way to keep padding clean: ``safealloc bench quantize``.

python benchmarks/quantize.py [--quick] [--json FILE] [--plot FOLDER]
"""

from __future__ import annotations

import sys

from safealloc.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", "quantize", *sys.argv[1:]]))

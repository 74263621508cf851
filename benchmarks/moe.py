"""Latency of quantising rows routed to experts, with each way to keep padding clean: ``safealloc bench moe``.

python benchmarks/moe.py [--quick] [--json FILE] [--plot FOLDER]
"""

from __future__ import annotations

import sys

from safealloc.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", "moe", *sys.argv[1:]]))

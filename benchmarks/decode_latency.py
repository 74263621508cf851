"""GPU time of a model's linear layers at decode with each way to keep padding clean: ``safealloc bench decode``.

python benchmarks/decode_latency.py [--quick] [--json FILE] [--plot FOLDER]
"""

from __future__ import annotations

import sys

from safealloc.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", "decode", *sys.argv[1:]]))

"""Time on the host with each way to keep padding clean: ``safealloc bench host``.

python benchmarks/host.py [--quick] [--json FILE] [--plot FOLDER]
"""

from __future__ import annotations

import sys

from safealloc.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", "host", *sys.argv[1:]]))

"""What ``SAFEALLOC_VERIFY`` costs a decode step and a call on the host: ``safealloc bench guard``.

python benchmarks/guard.py [--quick] [--json FILE]
"""

from __future__ import annotations

import sys

from safealloc.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", "guard", *sys.argv[1:]]))

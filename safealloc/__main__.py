"""``python -m safealloc``."""

import sys

from safealloc.cli import main

sys.exit(main())

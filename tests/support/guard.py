"""What a captured graph's checks do, without a GPU."""

from __future__ import annotations

from safealloc import ScalePool


def replay_checks(pool: ScalePool) -> None:
    """Run the check of every buffer that graphs hold, as the node in each graph does at a replay."""
    assert pool._guard is not None
    for buffer, watched in pool._guard._watched.items():
        pool._guard._check(buffer, watched.slot)

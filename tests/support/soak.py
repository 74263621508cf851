"""A random walk over everything that a pool promises: captures, replays, failures, threads and streams, against an oracle.

``python tests/soak.py --device cuda --seconds 480 --seed 0 --json FILE`` runs it, ``--only KIND,...`` a part of it. After
each action every byte of every buffer that is no scale has to be zero, by the formulas below and not by the package's; what
was computed has to be the reference's; and what was refused has to have left the pool as it was. What is not counts as lost.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from soak_actions import actions
from soak_state import Soak

from safealloc.commands import machine, report


def run(
    soak: Soak, *, seconds: float | None = None, steps: int | None = None, say: Callable[[str], None] | None = None
) -> dict[str, Any]:
    """Steps until the time is over or the number is reached; what was tried and lost, for JSON."""
    began = time.monotonic()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        while (seconds is None or time.monotonic() - began < seconds) and (steps is None or soak.steps < steps):
            soak.step(say)
        try:
            soak.finish()
        except Exception as error:
            soak.losses.append({"step": soak.steps, "action": "finish", "what": repr(error)[-2000:]})
    return {
        "command": "tests/soak.py",
        "device": str(soak.device),
        "device_name": machine.device_name(soak.device),
        "versions": machine.versions(),
        "seed": soak.seed,
        "seconds": round(time.monotonic() - began, 1),
        "steps": soak.steps,
        "actions": {name: vars(tally) for name, tally in soak.tallies.items()},
        "counts": dict(sorted(soak.counts.items())),
        "peaks": dict(soak.peaks),
        "lost": len(soak.losses),
        "losses": soak.losses,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=480)
    parser.add_argument("--steps", "--actions", type=int, dest="steps", help="so many at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="kinds of actions, with commas in between")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--verbose", action="store_true", help="name each action on standard error, before it is tried")
    given = parser.parse_args()
    try:
        report.check_writable(given.json)
    except report.UsageError as error:
        parser.error(str(error))
    device = torch.device(given.device)
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
    soak = Soak(device, given.seed, actions(device), filter(None, given.only.split(",")))
    say = functools.partial(print, file=sys.stderr, flush=True) if given.verbose else None
    result = run(soak, seconds=given.seconds, steps=given.steps, say=say)
    report.write_json(given.json, result)
    rows = [((name, *map(str, tally.values())), not tally["lost"]) for name, tally in result["actions"].items()]
    report.table(report.console(), "Soak", ("action", "tried", "done", "refused", "lost"), rows)
    for name, count in result["counts"].items():
        print(f"{name}: {count}")
    for loss in result["losses"][:20]:
        print(f"step {loss['step']}, {loss['action']}: {loss['what']}")
    print(f"{result['steps']} steps in {result['seconds']} s, {result['lost']} lost")
    return 1 if result["lost"] else 0


if __name__ == "__main__":
    sys.exit(main())

"""A random walk over everything that a pool promises: captures, replays, failures, threads and streams, against an oracle.

In tests/, ``python -m support.soak --device cuda --seconds 480 --seed 0 --json FILE`` runs it, ``--only NAME,...`` a part of
it. After each action every byte of every buffer that is no scale has to be zero, by formulas that are not the package's; what
was computed has to be the reference's; and what was refused has to have left the pool as it was. Anything else is a loss.
"""

from __future__ import annotations

import argparse
import functools
import json
import platform
import sys
from pathlib import Path
from typing import Any

import torch
from support.soak.registry import actions
from support.soak.walk import Soak, run

import safealloc


def machine(device: torch.device) -> dict[str, Any]:
    """What the result depends on."""
    return {
        "command": "python -m support.soak",
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "versions": {
            "safealloc": safealloc.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
        },
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m support.soak", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=480)
    parser.add_argument("--steps", "--actions", type=int, dest="steps", help="at most so many")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="names of actions, separated by commas")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--verbose", action="store_true", help="name each action on standard error before it is tried")
    given = parser.parse_args()
    if given.json is not None:
        try:
            given.json.touch()  # a file that cannot be written fails now and not in eight minutes
        except OSError as error:
            parser.error(f"--json {given.json}: {error.strerror}")
    device = torch.device(given.device)
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
    soak = Soak(device, given.seed, actions(device), filter(None, given.only.split(",")))
    log = functools.partial(print, file=sys.stderr, flush=True) if given.verbose else None
    result = machine(device) | run(soak, seconds=given.seconds, steps=given.steps, log=log)
    if given.json is not None:
        given.json.write_text(json.dumps(result, indent=1) + "\n")
    for name, tally in result["actions"].items():
        print(f"{name}: " + ", ".join(f"{count} {what}" for what, count in tally.items()))
    for name, count in result["counts"].items():
        print(f"{name}: {count}")
    for loss in result["losses"][:20]:
        print(f"step {loss['step']}, {loss['action']}: {loss['what']}")
    print(f"{result['steps']} steps in {result['seconds']} s, {result['lost']} lost")
    return 1 if result["lost"] else 0


if __name__ == "__main__":
    sys.exit(main())

"""A framework's places that allocate block scales for activations, and what the pool changes there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from safealloc.integrations import drift

Family = Literal["SM10x", "SM12x"]
"""GPUs with NVFP4 kernels: compute capability 10.x (B200, B300, GB200), and 12.x (RTX 50, GB10)."""

Padding = Literal["fill", "kernel", "nobody", "no padding", "not read"]
"""Who zeroes it: ``torch.zeros`` at each call, the producer, or nobody; "not read" if the producer's code was not."""


@dataclass(frozen=True, slots=True)
class Site:
    """One producer of block scales, with the memory it writes to."""

    name: str  # in the log and in doctor's table
    where: str  # functions of the framework that allocate for it, separated by spaces
    scales: str  # format and layout
    padding: Padding | None  # who zeroes it; ``None`` where that depends on the release
    hook: drift.Target | None  # which hook serves it, or ``None``
    default: tuple[Family, ...] = ()  # GPUs on which the framework takes it unless told otherwise
    when: str = ""  # what else has to be true
    since: str = "0"  # first release that was read with it

    def exists(self, version: str) -> bool:
        return drift.release(version) >= drift.release(self.since)

    def zeroed_by(self, version: str) -> Padding:
        """Who zeroes its padding in a release without the plugin."""
        return self.padding or "not read"

    def change(self, version: str) -> str:
        """What the pool changes there, in a few words."""
        zeroed = self.zeroed_by(version)
        if self.hook is None:
            return "nothing" if zeroed == "no padding" else "nothing: no hook"
        return {"fill": "time: no fill", "nobody": "safety"}.get(zeroed, "nothing")


def family(capability: tuple[int, int] | None) -> Family | None:
    """The GPUs that a compute capability belongs to, or ``None`` if there are no NVFP4 kernels for it."""
    families: dict[int, Family] = {10: "SM10x", 12: "SM12x"}
    return None if capability is None else families.get(capability[0])

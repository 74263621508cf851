"""What the plugin tells vLLM's log: one line when a worker is ready, and one for each kind of failure."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch

from safealloc.errors import SafeAllocError
from safealloc.integrations.vllm import sites, targets


def ready_line(
    rank: int,
    version: str,
    capability: tuple[int, int] | None,
    served: Mapping[str, int] | int,
    not_served: Mapping[str, int],
    buffers: int,
    nbytes: int,
    fallbacks: int,
    captures: int,
) -> str:
    """What is served, what is not, and what that changes on this GPU in this release of vLLM.

    ``served`` are calls per step by the name of a :class:`~safealloc.integrations.vllm.sites.Site`, or all together, and
    ``not_served`` calls of hooked sites by why vLLM serves them itself. The pool has ``buffers`` of ``nbytes`` bytes in all;
    ``captures`` CUDA graphs hold some, and ``fallbacks`` had none reserved. ``capability`` is ``None`` without a GPU.
    """
    count = served if isinstance(served, int) else sum(served.values())
    total = count + sum(not_served.values())
    left = ", ".join(f"{reason} ({calls})" for reason, calls in not_served.items() if calls)
    return (
        f"safealloc: rank {rank}: serves {count} of {total} hooked scale sites per step, in {captures} captures "
        f"({buffers} buffers, {nbytes / 2**20:.1f} MiB, {fallbacks} fallbacks); {_meaning(version, capability, served)}; "
        f"not served: {left or 'none'}; sites without a hook are not counted, see safealloc doctor"
    )


def _meaning(version: str, capability: tuple[int, int] | None, served: Mapping[str, int] | int) -> str:
    if not (served if isinstance(served, int) else any(served.values())):
        if capability is not None and sites.family(capability) is None:
            return f"nothing changes: vLLM has no NVFP4 kernels for compute capability {'.'.join(map(str, capability))}"
        return "nothing changes"
    if not targets.release(version) or targets.release(version) > targets.release(targets.SUPPORTED[1]):
        return f"what that changes in vLLM {version} is not known, it was not read"
    if isinstance(served, int):
        with_kernel = "safety behind fused producers, no time saved"
        alone = f"safety: nobody else zeroes padding in vLLM {version}, no time saved"
        by_padding = {"fill": f"saves fills (up to {served})", "kernel": with_kernel}
        return by_padding.get(sites.SITES[0].zeroed_by(version), alone)
    known = {site.name: site for site in sites.SITES}
    by = {name: known[name].zeroed_by(version) if name in known else "not read" for name in served}
    fills, unsafe, unknown = (
        sum(calls for name, calls in served.items() if by[name] == zeroed) for zeroed in ("fill", "nobody", "not read")
    )
    parts = [f"safety behind producers that zero no padding ({unsafe})"] if unsafe else []
    parts += [f"saves fills ({fills})" if fills else "no time saved"]
    parts += [f"not known elsewhere ({unknown})"] if unknown else []
    return ", ".join(parts)


class FailureLog:
    """Logs the first failure of each kind: of each type, at each place."""

    def __init__(self) -> None:
        self._logged: dict[tuple[type[BaseException], str], object] = {}

    def log(self, logger: logging.Logger, where: str, error: BaseException) -> bool:
        """Log an error if it is the first of its kind, and return whether it is; ``where`` is as in "while reserving"."""
        first = object()
        if self._logged.setdefault((type(error), where), first) is not first:  # one step, also among threads
            return False
        logger.error(
            "safealloc: %s %s; further errors of this kind are not logged: %s: %s",
            *(_what(error), where, type(error).__name__, error),
        )
        return True


def _what(error: BaseException) -> str:
    """Only safealloc's own errors are called pool errors."""
    if isinstance(error, SafeAllocError):
        return "pool error"
    if isinstance(error, torch.OutOfMemoryError):
        return "the GPU is out of memory"
    accelerator = getattr(torch, "AcceleratorError", ())  # newer than the oldest torch
    if isinstance(error, accelerator) or (isinstance(error, RuntimeError) and "CUDA error" in str(error)):
        return "a CUDA error, perhaps of an earlier kernel that is not ours,"
    return "unexpected error"

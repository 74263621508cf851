"""What the plugin says of an engine whose graphs are captured."""

from __future__ import annotations

from collections.abc import Collection

from safealloc.integrations import drift, report
from safealloc.integrations.sites import family
from safealloc.integrations.startup import Sites
from safealloc.integrations.vllm import sites, targets
from safealloc.pool.reports import PoolStats


def ready(
    version: str, capability: tuple[int, int] | None, captured: Sites, held: PoolStats | None, hooked: Collection[str]
) -> str:
    """The line after the captures.

    Args:
        version: of vLLM.
        capability: compute capability; ``None`` on a CPU.
        captured: the sites that captured steps went through.
        held: what the engine's pool holds, or ``None`` where it has none.
        hooked: the names of the targets that are hooked.
    """
    of_pool, sites_left = report.served(captured, held), report.left("vLLM", version, sites.SITES, hooked)
    return f"{of_pool}. {gain(version, capability, captured)}. {sites_left}"


def gain(version: str, capability: tuple[int, int] | None, captured: Sites) -> str:
    """What the served sites mean in a release and on a GPU."""
    validates = capability is not None and family(capability) is None
    if not captured.served:
        return f"Changes nothing: {_no_kernels(capability)}" if validates else "Changes nothing here"
    if not drift.release(version) or drift.release(version) > drift.release(targets.SUPPORTED[1]):
        return f"What that gives in vLLM {version} is not known: its sources were not read"
    dense, gains = captured.served - captured.grouped, []
    zeroed = sites.SITES[0].zeroed_by(version)
    if zeroed == "kernel" and captured.fused:
        gains.append(f"safety behind {report.count(captured.fused, 'fused producer')}")
    elif zeroed == "nobody" and dense:
        gains.append(f"safety at {report.count(dense, 'site')}")
    elif zeroed == "kernel" and not captured.grouped:
        gains.append("no safety that vLLM's quantizer lacks")
    if captured.grouped:
        gains.append(f"memory and safety at {report.count(captured.grouped, 'expert quantizer')}")
    gains.append(f"time of {report.count(dense, 'fill')} per step" if zeroed == "fill" and dense else "no time")
    if validates:
        gains.append(f"for validation: {_no_kernels(capability)}")
    return f"Gives {', '.join(gains)}"


def _no_kernels(capability: tuple[int, int] | None) -> str:
    return f"vLLM has no NVFP4 kernels for compute capability {'.'.join(map(str, capability or ()))}"

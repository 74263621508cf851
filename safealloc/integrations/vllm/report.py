"""What the plugin says of an engine whose graphs are captured."""

from __future__ import annotations

from collections.abc import Collection

from safealloc.integrations.vllm import sites, targets
from safealloc.integrations.vllm.startup import Sites
from safealloc.pool.reports import PoolStats


def ready(
    version: str, capability: int | None, captured: Sites, held: PoolStats | None, hooked: Collection[str]
) -> str:
    """The line after the captures.

    Args:
        version: of vLLM.
        capability: compute capability, 10 * major + minor; ``None`` on a CPU.
        captured: the sites that captured steps went through.
        held: what the engine's pool holds, or ``None`` where it has none.
        hooked: the names of the targets that are hooked.
    """
    total = captured.served + sum(captured.bypassed.values())
    bypassed = "; ".join(f"{reason} ({count})" for reason, count in captured.bypassed.items()) or "none"
    pool = "no pool"
    if held is not None:
        pool = f"{held.buffers} buffers, {held.bytes / 2**20:.1f} MiB, {held.capture_fallbacks} fallbacks"
    return (
        f"serves {captured.served} of {total} NVFP4 scale sites per step, in {captured.captures} captures; {pool}; "
        f"bypassed: {bypassed}. {gain(version, capability, captured)}. {places(version, hooked)}"
    )


def gain(version: str, capability: int | None, captured: Sites) -> str:
    """What the served sites mean in a release and on a GPU."""
    if not captured.served:
        return "Changes nothing here"
    dense, gains = captured.served - captured.grouped, []
    padding = sites.dense_padding(version)
    if padding == "kernel" and captured.fused:
        gains.append(f"safety behind {_count(captured.fused, 'fused producer')}")
    elif padding == "nobody" and dense:
        gains.append(f"safety at {_count(dense, 'site')}")
    if captured.grouped:
        gains.append(f"memory and safety at {_count(captured.grouped, 'expert quantizer')}")
    gains.append(f"time of {_count(dense, 'fill')} per step" if padding == "zeros" and dense else "no time")
    if padding == "kernel" and not captured.fused and not captured.grouped:
        gains.insert(0, "no safety that vLLM's quantizer lacks")
    if (unused := without_fp4(capability)) is not None:
        gains.append(f"for validation: {unused}")
    if targets.release(version) > targets.release(targets.SUPPORTED[1]):
        gains.append(f"as far as is known: {version} is newer than {targets.SUPPORTED[1]}, the last that was checked")
    return f"Gives {', '.join(gains)}"


def without_fp4(capability: int | None) -> str | None:
    """Why vLLM does not quantize activations to FP4 on a GPU, or ``None`` where it does."""
    if capability is None or capability >= 100:
        return None
    return f"compute capability {capability / 10} has no FP4 arithmetic, so vLLM runs NVFP4 layers weight-only"


def places(version: str, hooked: Collection[str]) -> str:
    """How many allocation sites a release has, and which are not hooked although nobody zeroes their padding."""
    found = sites.existing(version)
    left = [one for one in found if not sites.is_hooked(one, hooked)]
    dirty = [one.name for one in left if (one.padding or sites.dense_padding(version)) == "nobody"]
    rest = f"; not hooked, and zeroed by nobody: {', '.join(dirty)}" if dirty else ""
    return f"vLLM {version} allocates scales in {len(found)} functions, {len(found) - len(left)} of them hooked{rest}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"

"""What the plugin says of an engine whose graphs are captured."""

from __future__ import annotations

from collections.abc import Collection

from safealloc.integrations.vllm import sites, targets
from safealloc.integrations.vllm.startup import Sites
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
    total = captured.served + sum(captured.bypassed.values())
    bypassed = "; ".join(f"{reason} ({count})" for reason, count in captured.bypassed.items()) or "none"
    pool = "no pool"
    if held is not None:
        pool = f"{held.buffers} buffers, {held.bytes / 2**20:.1f} MiB, {held.capture_fallbacks} fallbacks"
    quantizers = ""
    if captured.quantizers:
        less = f"{captured.saved_us / 1000:.2f} ms a step less (measured)"
        quantizers = f"; quantizers: ours in {captured.ours} of {captured.quantizers} sites, {less}"
    return (
        f"serves {captured.served} of {total} NVFP4 scale sites per step, in {captured.captures} captures; {pool}; "
        f"bypassed: {bypassed}{quantizers}. {gain(version, capability, captured)}. {left(version, hooked)}"
    )


def gain(version: str, capability: tuple[int, int] | None, captured: Sites) -> str:
    """What the served sites mean in a release and on a GPU."""
    validates = capability is not None and sites.family(capability) is None
    if not captured.served:
        return f"Changes nothing: {_no_kernels(capability)}" if validates else "Changes nothing here"
    if not targets.release(version) or targets.release(version) > targets.release(targets.SUPPORTED[1]):
        return f"What that gives in vLLM {version} is not known: its sources were not read"
    dense, gains = captured.served - captured.grouped, []
    zeroed = sites.SITES[0].zeroed_by(version)
    if zeroed == "kernel" and captured.fused:
        gains.append(f"safety behind {_count(captured.fused, 'fused producer')}")
    elif zeroed == "nobody" and dense:
        gains.append(f"safety at {_count(dense, 'site')}")
    elif zeroed == "kernel" and not captured.grouped:
        gains.append("no safety that vLLM's quantizer lacks")
    if captured.grouped:
        gains.append(f"memory and safety at {_count(captured.grouped, 'expert quantizer')}")
    gains.append(f"time of {_count(dense, 'fill')} per step" if zeroed == "fill" and dense else "no time")
    if validates:
        gains.append(f"for validation: {_no_kernels(capability)}")
    return f"Gives {', '.join(gains)}"


def left(version: str, hooked: Collection[str]) -> str:
    """How many kinds of allocation sites a release has, and which are not hooked although nobody zeroes their padding."""
    found = [site for site in sites.SITES if site.exists(version) and site.zeroed_by(version) != "no padding"]
    without = [site for site in found if site.hook is None or site.hook.name not in hooked]
    unsafe = [site.name for site in without if site.zeroed_by(version) in ("nobody", "not read")]
    rest = f"; not hooked, and not known to be zeroed: {', '.join(unsafe)}" if unsafe else ""
    return (
        f"Of {len(found)} kinds of padded scale sites in vLLM {version}, {len(found) - len(without)} are hooked{rest}"
    )


def _no_kernels(capability: tuple[int, int] | None) -> str:
    return f"vLLM has no NVFP4 kernels for compute capability {'.'.join(map(str, capability or ()))}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"

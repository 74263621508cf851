"""What an integration says of an engine whose graphs are captured."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from safealloc.integrations.sites import Site
from safealloc.integrations.startup import Sites
from safealloc.pool.reports import PoolStats


def served(captured: Sites, held: PoolStats | None) -> str:
    """How many sites the pool serves, what it holds (``None``: there is none), and why the others are bypassed."""
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
        f"serves {captured.served} of {total} FP4 scale sites per step, in {captured.captures} captures; {pool}; "
        f"bypassed: {bypassed}{quantizers}"
    )


def left(framework: str, version: str, sites: Iterable[Site], hooked: Collection[str]) -> str:
    """How many kinds of allocation sites a release has, and which are not hooked although nobody zeroes their padding."""
    found = [site for site in sites if site.exists(version) and site.zeroed_by(version) != "no padding"]
    without = [site for site in found if site.hook is None or site.hook.name not in hooked]
    unsafe = [site.name for site in without if site.zeroed_by(version) in ("nobody", "not read")]
    rest = f"; not hooked, and not known to be zeroed: {', '.join(unsafe)}" if unsafe else ""
    hooks = f"{len(found) - len(without)} are hooked{rest}"
    return f"Of {len(found)} kinds of padded scale sites in {framework} {version}, {hooks}"


def count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"

"""Bytes of scale buffers for vLLM's captured batch sizes: computed, not measured."""

from __future__ import annotations

from typing import Any

from benchmarks.models import MODELS
from safealloc.formats.layout import SfLayout
from safealloc.formats.spec import ScaleSpec
from safealloc.integrations.vllm.sizes import MAX_CAPTURE_SIZES, capture_sizes

MODEL = "Llama 3.3 70B, TP 1"


def memory() -> list[dict[str, Any]]:
    """For each of vLLM's largest captured batch sizes: how many sizes there are, and bytes by where they come from."""
    ks = {site.k for model in MODELS if model.title == MODEL for site in model.sites}
    groups = []
    for largest in MAX_CAPTURE_SIZES:
        sizes = capture_sizes(largest)
        buffers = [ScaleSpec(rows, k, SfLayout.layout_128x4).nbytes for k in ks for rows in sizes]
        bars = {"pool": sum(buffers), "allocated and filled at each call": max(buffers)}
        groups.append({"sizes": len(sizes), "largest": largest, "bars": bars})
    return groups

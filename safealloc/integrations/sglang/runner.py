"""What is read of SGLang's model runner and layers; it imports nothing of SGLang for that."""

from __future__ import annotations

from typing import Any

import torch

from safealloc.formats.format import ScaleFormat
from safealloc.formats.layout import SfLayout
from safealloc.integrations.startup import Site, Steps

_WORDS = ("fp4", "mxfp8")


def may_have_blocks(model_runner: Any) -> bool:
    """Whether a model may have NVFP4 or MXFP8 layers, by its configuration; unknown quantization may."""
    config = getattr(model_runner, "model_config", None)
    method = getattr(config, "quantization", None)
    written = getattr(getattr(config, "hf_config", None), "quantization_config", None)
    if method is None and not written:
        return False
    text = f"{method} {written}".lower()
    return any(word in text for word in _WORDS) or method in ("modelopt", "compressed-tensors", "quark")


def device(model_runner: Any) -> torch.device:
    """The device of a runner, with its index."""
    kind = str(model_runner.device)
    return torch.device(kind if ":" in kind or kind == "cpu" else f"{kind}:{getattr(model_runner, 'gpu_id', 0)}")


def steps(model_runner: Any) -> Steps:
    """Rows of the decode graphs that may be captured: requests times the rows of a request.

    SGLang knows the sizes only after it has sized memory, in ``get_batch_sizes_to_capture``, which takes some of these.
    """
    args = model_runner.server_args
    if getattr(args, "disable_cuda_graph", False):
        return Steps({})
    phase = _field(_field(getattr(args, "cuda_graph_config", None), "decode"), "bs")
    sizes = phase or getattr(args, "cuda_graph_bs", None) or ()
    width = 1
    if getattr(args, "speculative_algorithm", None):
        width = getattr(args, "speculative_num_draft_tokens", None) or 1
    return Steps(dict.fromkeys(sorted({size * width for size in sizes}), 1))


def _field(config: Any, name: str) -> Any:
    """Of an object, or of a dictionary, as users give it."""
    return config.get(name) if isinstance(config, dict) else getattr(config, name, None)


def sites(model: Any) -> set[Site]:
    """The dense sites of a model's linear layers."""
    found = set()
    for layer in model.modules():
        k = getattr(layer, "input_size_per_partition", None)
        method = getattr(layer, "quant_method", None)
        if not isinstance(k, int) or method is None:
            continue
        scheme = type(getattr(layer, "scheme", None)).__name__
        if "fp4" in f"{type(method).__name__} {scheme}".lower() and k % 16 == 0:
            found.add(Site(k, SfLayout.layout_128x4, None))
        elif getattr(method, "use_mxfp8", False) and k % 32 == 0:
            found.add(Site(k, SfLayout.layout_128x4, None, ScaleFormat.mxfp8))
    return found

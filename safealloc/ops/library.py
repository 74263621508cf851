"""The ``torch.library`` namespace ``torch.ops.safealloc``, and the shape of a pool buffer in traced code."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
from torch import Tensor

from safealloc.formats.format import ScaleFormat
from safealloc.formats.layout import SfLayout

library = torch.library.Library("safealloc", "FRAGMENT")
"""Where every op of this package is registered, each beside the function it makes opaque."""

# PyTorch asks for the module that registers an op. A file that inspect does not know is searched for among all modules, which
# takes 25 to 70 ms in a process of vLLM.
inspect.modulesbyfile.setdefault(__file__, __name__)


def register(schema: str, function: Callable[..., object], fake: Callable[..., object], *tags: torch.Tag) -> None:
    """Make an op of ``function``; ``fake`` returns tensors of the same shapes to a compiler."""
    name = schema.partition("(")[0]
    library.define(schema, tags=(torch.Tag.pt2_compliant_tag, *tags))
    library.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"safealloc::{name}", fake, lib=library)


def empty_scales(
    rows: int,
    k: int,
    layout: SfLayout,
    device: torch.device,
    padded_k: int | None = None,
    format: ScaleFormat = ScaleFormat.nvfp4,
) -> Tensor:
    """A tensor of the shape that a pool buffer has; the numbers may be symbolic."""
    shape = layout.round_up(rows, (k if padded_k is None else padded_k) // format.block_size)
    return torch.empty(shape, dtype=torch.uint8, device=device)

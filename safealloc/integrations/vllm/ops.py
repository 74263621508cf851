"""How vLLM's code calls the allocator: directly in eager code, through an opaque op in traced code.

The ops allocate, so they must not be folded or merged. They have the shapes and dtypes of what they replace, so that vLLM's
fusion passes match.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch._guards import active_fake_mode

from safealloc import settings
from safealloc.errors import SafeAllocError
from safealloc.formats.format import ScaleFormat
from safealloc.formats.layout import SfLayout
from safealloc.integrations.startup import INDUCTOR
from safealloc.integrations.vllm.serve import allocator
from safealloc.integrations.vllm.worker import logger
from safealloc.ops.inductor import forbid_reuse
from safealloc.ops.library import empty_scales, library

_is_compiling = torch.compiler.is_compiling
_dispatch_modes = torch._C._len_torch_dispatch_stack


def _traced() -> bool:
    return _is_compiling() or (_dispatch_modes() > 0 and active_fake_mode() is not None)


def scales(m: int, n: int, device: torch.device, padded_n: int | None, fused: bool = False) -> Tensor:
    """int32 ``[rounded_m, rounded_n // 4]`` in 128x4; ``fused``: for a producer that leaves padding unwritten."""
    if _traced():
        op = torch.ops.safealloc.vllm_fused_scales if fused else torch.ops.safealloc.vllm_scales
        result: Tensor = op(m, n, device, padded_n)
        return result
    if allocator.engine is None and not fused:  # eager work and prefill, at vLLM's own cost
        return allocator.vllm_scale_tensor(m, padded_n or n, device, True)
    return allocator.scales(m, n, device, padded_n, fused)


def grouped_scales(
    rows: int,
    k: int,
    topk: int,
    expert_offsets: Tensor,
    blockscale_offsets: Tensor,
    format: ScaleFormat = ScaleFormat.nvfp4,
) -> Tensor | None:
    """What :meth:`Allocator.grouped_scales` returns; in traced code ``None``.

    vLLM's MoE layers are opaque to ``torch.compile``, so they are never traced.
    """
    return None if _traced() else allocator.grouped_scales(rows, k, topk, expert_offsets, blockscale_offsets, format)


@functools.cache
def bypassed_in_compiled_code() -> str | None:
    """Why compiled code gets vLLM's own memory, which Inductor may reuse, or ``None`` where it gets pool buffers."""
    try:
        forbid_reuse(torch.ops.safealloc.vllm_scales.default)
        forbid_reuse(torch.ops.safealloc.vllm_fused_scales.default)
    except SafeAllocError as error:
        if settings.strict():
            raise
        logger.error("safealloc: in compiled code vLLM allocates its own scales: %s", error)
        return INDUCTOR
    return None


_ALLOCATES = (torch.Tag.nondeterministic_seeded, torch.Tag.pt2_compliant_tag)
_SCALES = "(SymInt m, SymInt n, Device device, SymInt? padded_n=None) -> Tensor"


def _scales_op(m: int, n: int, device: torch.device, padded_n: int | None = None) -> Tensor:
    return allocator.scales(m, n, device, padded_n, False, bypassed_in_compiled_code())


def _fused_scales_op(m: int, n: int, device: torch.device, padded_n: int | None = None) -> Tensor:
    return allocator.scales(m, n, device, padded_n, True, bypassed_in_compiled_code())


def _zero_scales_op(m: int, n: int, device: torch.device, padded_n: int | None = None) -> Tensor:
    return allocator.zero_scales(m, n, device, padded_n)


def _scales_fake(m: int, n: int, device: torch.device, padded_n: int | None = None) -> Tensor:
    bypassed_in_compiled_code()
    return empty_scales(m, n, SfLayout.layout_128x4, device, padded_n).view(torch.int32)


for _name, _real in (
    ("vllm_scales", _scales_op),
    ("vllm_fused_scales", _fused_scales_op),
    ("vllm_zero_scales", _zero_scales_op),
):
    library.define(f"{_name}{_SCALES}", tags=_ALLOCATES)
    library.impl(_name, _real, "CompositeExplicitAutograd")
    torch.library.register_fake(f"safealloc::{_name}", _scales_fake, lib=library)

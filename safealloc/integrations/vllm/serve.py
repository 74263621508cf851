"""Which of vLLM's calls get a pool buffer.

That is decided per call, since the same compiled code serves all batch sizes: a call in a capture, or in the warm-up just
before it, gets a buffer of its engine's pool; everything else is vLLM's own allocation. Where that is ``torch.empty``, it is
zeroed for producers that leave padding unwritten. MoE layers are different: vLLM allocates for the largest
possible number of rows, and does not zero that, so that calls which no pool serves get zeroed memory of the size that they
need.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from safealloc.formats.format import ScaleFormat
from safealloc.formats.layout import SfLayout
from safealloc.integrations import serve, startup
from safealloc.integrations.serve import zero_padding
from safealloc.integrations.startup import GroupedSite, Site
from safealloc.integrations.vllm import targets
from safealloc.integrations.vllm.engine import Engine, captured_steps
from safealloc.integrations.vllm.worker import is_second_runner, logger, query_length
from safealloc.ops.grouped import clean_grouped_scales

# Used in every call, and in Python 3.11 looking up a member of an enum takes 0.2 us.
_LAYOUT_128X4 = SfLayout.layout_128x4


class Allocator(serve.Allocator):
    """Answers the calls of one process."""

    framework, logger = "vLLM", logger

    def __init__(self) -> None:
        # vLLM's own function, which the hook sets. Where nothing is hooked, code that was compiled before still asks.
        self.vllm_scale_tensor: Callable[..., Tensor] = lambda m, n, device, is_sf_swizzled_layout: _zeros(m, n, device)
        # Columns of the input by layer, of the layers on our linear kernel.
        self.linear_ks: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        super().__init__()

    # --- calls --------------------------------------------------------------------------------------------------------

    def scales(
        self,
        m: int,
        n: int,
        device: torch.device,
        padded_n: int | None,
        fused: bool = False,
        bypassed: str | None = None,
    ) -> Tensor:
        """What ``create_fp4_scale_tensor`` returns for a swizzled layout: int32 ``[rounded_m, rounded_n // 4]``.

        ``padded_n`` is the n of the GEMM, where vLLM pads it; ``fused`` says that the producer leaves padding unwritten, and
        ``bypassed`` is why no pool serves the call, if the caller knows.
        """
        engine = self.engine
        if engine is None or not self.enabled:
            return self._vllm_scales(m, n, device, padded_n, fused)
        if padded_n == n:
            padded_n = None
        pool = engine.pool
        if pool is None:  # the profile run
            tensor = self._vllm_scales(m, n, device, padded_n, fused)
            self.note(engine.observe, Site(n, _LAYOUT_128X4, padded_n), tensor)
            return tensor
        bypassed = bypassed or engine.bypassed(m)
        if bypassed is None:
            try:
                tensor = pool.acquire(m, n, _LAYOUT_128X4, padded_k=padded_n).view(torch.int32)
            except Exception as error:
                bypassed = self.handle_error(error)
        if bypassed is not None:
            tensor = self._vllm_scales(m, n, device, padded_n, fused)
        self.note(engine.count, bypassed or (startup.FUSED if fused else startup.PLAIN))
        return tensor

    def zero_scales(self, m: int, n: int, device: torch.device, padded_n: int | None) -> Tensor:
        """Like :meth:`scales`, but zeroed per call and not from the pool, for a producer that leaves rows unwritten."""
        if self.engine is not None:
            self.note(self.engine.count, startup.ATTENTION_FUSION)
        return _zeros(m, padded_n or n, device)

    def _vllm_scales(self, m: int, n: int, device: torch.device, padded_n: int | None, fused: bool) -> Tensor:
        tensor = self.vllm_scale_tensor(m, padded_n or n, device, True)
        if fused and m > 0 and not allocates_zeros():
            zero_padding(tensor, m, n)
        return tensor

    def grouped_scales(
        self,
        rows: int,
        k: int,
        topk: int,
        expert_offsets: Tensor,
        blockscale_offsets: Tensor,
        format: ScaleFormat = ScaleFormat.nvfp4,
    ) -> Tensor | None:
        """Scales in 128x4 for an expert quantizer that writes valid scales only: every other byte is zero.

        Args:
            rows: of all experts together, tokens times experts per token (``topk``).
            k: columns in elements, a multiple of the format's block size.
            expert_offsets, blockscale_offsets: int32 ``[experts + 1]``, vLLM's.
            format: of the scales.

        Returns:
            int32 ``[padded_rows, padded_cols // 4]`` with rows for the worst grouping; ``None`` where vLLM has to allocate.
        """
        if not self.enabled or rows < 1:
            return None
        experts = expert_offsets.shape[0] - 1
        engine = self.engine
        tensor = None
        if engine is not None and engine.pool is None:
            self.note(engine.observe_grouped, GroupedSite(k, experts, topk, format))
        elif engine is not None and engine.pool is not None:
            bypassed = engine.bypassed(-(-rows // (topk * engine.steps.ranks)))
            if bypassed is None:
                try:
                    tensor = engine.pool.acquire_grouped(rows, k, experts, _LAYOUT_128X4, format=format)
                    # Before the producer runs: if it fails, what it wrote is in the record, and the next call zeroes it.
                    if not engine.op_cleans or format is not ScaleFormat.nvfp4:
                        clean_grouped_scales(tensor, expert_offsets, blockscale_offsets, rows)
                    tensor = tensor.view(torch.int32)
                except Exception as error:
                    tensor, bypassed = None, self.handle_error(error)
            self.note(engine.count, bypassed or startup.GROUPED)
        if tensor is None:
            tensor = _zeros(_LAYOUT_128X4.grouped_rows(rows, experts), k, expert_offsets.device, format)
        return tensor

    # --- an engine's life ---------------------------------------------------------------------------------------------

    def begin(self, worker: Any) -> Engine | None:
        """The engine of a worker that is about to measure memory; ``None`` where nothing will be captured."""
        self.end(worker)
        if not self.enabled or worker.device.type not in ("cuda", "cpu") or torch.version.hip is not None:
            return None
        steps = captured_steps(worker.vllm_config, query_length(worker), second_runner=is_second_runner(worker))
        if not steps.copies:
            return None
        model = getattr(worker.model_runner, "model", None)
        layers = set(model.modules()) if isinstance(model, torch.nn.Module) else set()
        engine = Engine(steps, worker.device, [k for layer, k in self.linear_ks.items() if layer in layers])
        self.begun(worker, engine)
        return engine


@functools.cache
def allocates_zeros() -> bool:
    """Whether this vLLM zeroes the scales that it allocates; where its sources are not found, it is taken not to."""
    found = targets.installed()
    return found is not None and targets.own_allocation(found[1]) == "zeros"


def _zeros(m: int, n: int, device: torch.device, format: ScaleFormat = ScaleFormat.nvfp4) -> Tensor:
    """int32 ``[rounded_m, rounded_n // 4]``."""
    padded_rows, padded_cols = _LAYOUT_128X4.round_up(m, n // format.block_size)
    return torch.zeros((padded_rows, padded_cols // 4), dtype=torch.int32, device=device)


allocator = Allocator()

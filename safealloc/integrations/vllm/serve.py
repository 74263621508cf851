"""Which of vLLM's calls get a pool buffer.

That is decided per call, since the same compiled code serves all batch sizes: a step that a CUDA graph may hold gets a pool
buffer, everything else vLLM's own allocation. MoE layers are different: vLLM allocates for the largest possible number of
rows, and does not zero that, so that calls which the pool does not serve get zeroed memory of the size that they need.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from safealloc import settings
from safealloc.errors import PaddingCorruptionError
from safealloc.formats.format import BLOCK_SIZE
from safealloc.formats.layout import SfLayout
from safealloc.integrations.vllm import startup
from safealloc.integrations.vllm.startup import GroupedSite, Site, Sites, StartUp, Steps
from safealloc.integrations.vllm.worker import forward_context, logger, workspace_locked
from safealloc.ops.grouped import clean_grouped_scales
from safealloc.ops.quantize import nvfp4_quantize
from safealloc.pool.default import default_pool
from safealloc.pool.pool import ScalePool

# Used in every call, and in Python 3.11 looking up a member of an enum takes 0.2 us.
_LAYOUT_128X4, _LAYOUT_8X4 = SfLayout.layout_128x4, SfLayout.layout_8x4


class Allocator:
    """Answers the calls of one process."""

    def __init__(self) -> None:
        # vLLM's own functions, which the hooks set. Where nothing is hooked, code that was compiled before still asks.
        self.vllm_scale_tensor: Callable[..., Tensor] = lambda m, n, device, is_sf_swizzled_layout: _zeros(m, n, device)
        self.vllm_quantize_8x4: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
        self.reset()

    def reset(self) -> None:
        """As if no engine had started, and nothing were hooked."""
        self.enabled = False  # whether the plugin is registered
        self.steps: Steps | None = None  # what the engine is configured for, once one has started
        self.max_rows = settings.max_rows() or sys.maxsize  # of a call that the pool serves
        self.loading = 0  # loads of weights that are under way
        # Columns of the input by layer, of the layers on our linear kernel.
        self.linear_ks: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self.pool: ScalePool | None = None  # where the last buffer came from
        self.start_up: StartUp | None = None  # from before vLLM measures memory until after its last capture
        self.logs_growth = False  # whether to log a warning when the pool grows
        self._error_logged = False
        self._misses = 0  # of the pool, when its growth was last looked at

    # --- calls --------------------------------------------------------------------------------------------------------

    def scales(self, m: int, n: int, device: torch.device, padded_n: int | None, bypassed: str | None = None) -> Tensor:
        """What ``create_fp4_scale_tensor`` returns for a swizzled layout: int32 ``[rounded_m, rounded_n // 4]``.

        ``padded_n`` is the n of the GEMM, where vLLM pads it; ``bypassed`` is why the call is left to vLLM, if the caller
        knows.
        """
        if padded_n == n:
            padded_n = None
        bypassed = bypassed or self._bypassed(m)
        if bypassed is None:
            try:
                pool = self._pool(device)
                tensor = pool.acquire(m, n, _LAYOUT_128X4, padded_k=padded_n).view(torch.int32)
                if self.logs_growth and pool.misses != self._misses:
                    self._log_growth(pool, f"{m} rows, k={n}, layout_128x4")
            except Exception as error:
                bypassed = self._handle_error(error)
        if bypassed is not None:
            tensor = self.vllm_scale_tensor(m, padded_n or n, device, True)
        if self.start_up is not None:
            self._in_start_up(self.start_up.observe, m, Site(n, _LAYOUT_128X4, padded_n), tensor, bypassed)
        return tensor

    def zero_scales(self, m: int, n: int, device: torch.device, padded_n: int | None) -> Tensor:
        """Like :meth:`scales`, but zeroed per call and not from the pool, for a producer that leaves rows unwritten."""
        tensor = _zeros(m, padded_n or n, device)
        if self.start_up is not None:
            self._in_start_up(self.start_up.count, startup.ATTENTION_FUSION)
        return tensor

    def quantized_8x4(self, a: Tensor, a_global_sf: Tensor, bypassed: str | None = None) -> tuple[Tensor, Tensor]:
        """What ``flashinfer_quant_nvfp4_8x4_sf_layout`` returns: uint8 ``[m, n // 2]`` and 8x4 scales, uint8.

        FlashInfer's quantizer allocates its result, so ours is called instead.
        """
        m, n = a.shape
        bypassed = bypassed or self._bypassed(m)
        if bypassed is None:
            try:
                pool = self._pool(a.device)
                data, tensor = nvfp4_quantize(a.contiguous(), a_global_sf, layout=_LAYOUT_8X4, pool=pool)
                if self.logs_growth and pool.misses != self._misses:
                    self._log_growth(pool, f"{m} rows, k={n}, layout_8x4")
            except Exception as error:
                bypassed = self._handle_error(error)
        if bypassed is not None:
            if self.vllm_quantize_8x4 is None:
                raise RuntimeError("vLLM's own 8x4 quantizer is not known: the hook is not registered")
            data, tensor = self.vllm_quantize_8x4(a, a_global_sf)
        if self.start_up is not None:
            self._in_start_up(self.start_up.observe, m, Site(n, _LAYOUT_8X4, None), tensor, bypassed)
        return data, tensor

    def grouped_scales(
        self, rows: int, k: int, topk: int, expert_offsets: Tensor, blockscale_offsets: Tensor
    ) -> Tensor | None:
        """Scales in 128x4 for an expert quantizer that writes valid scales only: every other byte is zero.

        Args:
            rows: of all experts together, tokens times experts per token (``topk``).
            k: columns in elements, a multiple of 16.
            expert_offsets, blockscale_offsets: int32 ``[experts + 1]``, vLLM's.

        Returns:
            int32 ``[padded_rows, padded_cols // 4]`` with rows for the worst grouping; ``None`` where vLLM has to allocate.
        """
        experts = expert_offsets.shape[0] - 1
        ranks = 1 if self.steps is None else self.steps.ranks
        bypassed = self._bypassed(-(-rows // (topk * ranks)))
        if bypassed in (startup.UNREGISTERED, startup.NO_ROWS):
            return None
        if self.start_up is not None and bypassed != startup.OUTSIDE_A_STEP:
            self._in_start_up(self.start_up.reserve_grouped, GroupedSite(k, experts, topk))
        if bypassed is None:
            try:
                pool = self._pool(expert_offsets.device)
                tensor = pool.acquire_grouped(rows, k, experts, _LAYOUT_128X4)
                # Before the producer runs: if it fails, what it wrote is in the record, and the next call zeroes it.
                clean_grouped_scales(tensor, expert_offsets, blockscale_offsets, rows)
                tensor = tensor.view(torch.int32)
                if self.logs_growth and pool.misses != self._misses:
                    self._log_growth(pool, f"{rows} rows grouped by {experts} experts, k={k}, layout_128x4")
            except Exception as error:
                bypassed = self._handle_error(error)
        if bypassed is not None:
            tensor = _zeros(_LAYOUT_128X4.grouped_rows(rows, experts), k, expert_offsets.device)
        if self.start_up is not None:
            self._in_start_up(self.start_up.count, bypassed)
        return tensor

    def safe_point(self) -> None:
        """Raise, or repair, what the checks of ``SAFEALLOC_VERIFY`` have found; a step of replays asks for no buffer.

        Raises:
            PaddingCorruptionError: as :meth:`ScalePool.safe_point`.
        """
        if self.pool is not None:
            try:
                self.pool.safe_point()
            except Exception as error:
                self._handle_error(error)

    def _bypassed(self, m: int) -> str | None:
        """Why a call is left to vLLM, or ``None``."""
        if not self.enabled:
            return startup.UNREGISTERED
        if m > self.max_rows:
            return startup.ABOVE_MAX_ROWS
        if m < 1:  # a data-parallel rank without a token
            return startup.NO_ROWS
        if self.loading or (self.steps is not None and forward_context() is None):
            return startup.OUTSIDE_A_STEP
        return None

    def _pool(self, device: torch.device) -> ScalePool:
        pool = default_pool(device)
        if pool is not self.pool:
            # vLLM captures all its graphs into one memory pool by torch.cuda.graph, and replays one after the other.
            pool.shared_captures(synchronized=True)
            self.pool = pool
            if self.start_up is not None:
                self.start_up.pool = pool
        return pool

    def _handle_error(self, error: Exception) -> str:
        """Raise a pool error, or log it if it is the first; returns why vLLM allocates instead."""
        if is_raised(error):
            raise error
        if not self._error_logged:
            self._error_logged = True
            failed = "safealloc: the pool failed and vLLM allocates instead; further errors are not logged: %s: %s"
            logger.error(failed, type(error).__name__, error)
        return startup.POOL_ERROR

    # --- start-up -----------------------------------------------------------------------------------------------------

    def begin(self, vllm_config: Any, device: torch.device) -> None:
        """Call before vLLM measures memory: from here on each shape is reserved when it is first seen."""
        self.steps = Steps.of(vllm_config)
        self.max_rows = self.steps.max_rows
        self.start_up, self.logs_growth = None, False
        if device.type == "cuda":
            self.start_up = StartUp(self._pool(device), self.steps, self.linear_ks)
            self.start_up.reserve_linear()

    def ready(self) -> Sites:
        """Call after vLLM's last capture; returns the sites that its graphs went through. From here on growth is logged."""
        start_up, self.start_up = self.start_up, None
        sites = Sites() if start_up is None else start_up.sites()
        sites.served += len(self.linear_ks)
        if self.pool is not None:
            sites.captures = self.pool.captures()
            if self.steps is not None and self.steps.rows:  # without graphs, batches come as they come
                self._misses, self.logs_growth = self.pool.misses, True
        return sites

    def _in_start_up(self, method: Callable[..., None], *given: Any) -> None:
        """Call a method of the start-up, whose reservations may fail."""
        try:
            method(*given)
        except Exception as error:
            self._handle_error(error)

    def _log_growth(self, pool: ScalePool, shape: str) -> None:
        """Log a warning, once, if vLLM has stopped growing its own memory."""
        self._misses = pool.misses
        if workspace_locked():
            self.logs_growth = False
            grows = "safealloc: the pool still grows after vLLM's warm-up, for %s; such shapes share a cache of %d MiB"
            logger.warning(grows, shape, pool.cache_bytes >> 20)


def is_raised(error: Exception) -> bool:
    """Whether a pool error is raised instead of logged: dirty padding always is, since tokens may be wrong."""
    return settings.strict() or isinstance(error, PaddingCorruptionError)


def _zeros(m: int, n: int, device: torch.device) -> Tensor:
    """int32 ``[rounded_m, rounded_n // 4]``."""
    padded_rows, padded_cols = _LAYOUT_128X4.round_up(m, n // BLOCK_SIZE)
    return torch.zeros((padded_rows, padded_cols // 4), dtype=torch.int32, device=device)


allocator = Allocator()

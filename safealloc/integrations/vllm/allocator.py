"""Which of vLLM's calls get a pool buffer.

A call is answered at run time, since compiled code serves all batch sizes: with a pool buffer for a step that a CUDA graph
may hold, with vLLM's own allocation for everything else. For rows routed to experts, vLLM allocates as for the most tokens
there could ever be, and nobody zeroes that: there, everything else is as large as it has to be, and zeroed at each call.
"""

from __future__ import annotations

import logging
import os
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from safealloc.errors import PaddingCorruptionError
from safealloc.formats.format import BLOCK_SIZE
from safealloc.formats.layout import MAX_ROWS_8X4, SfLayout
from safealloc.ops.grouped import clean_grouped_scales
from safealloc.ops.quantize import nvfp4_quantize
from safealloc.pool.default import default_pool
from safealloc.pool.guard import VERIFY
from safealloc.pool.pool import ScalePool

# Below vLLM's logger, whose handlers and level a user has set up; one of our own would print nothing.
logger = logging.getLogger("vllm.safealloc")

_128x4, _8x4 = SfLayout.layout_128x4, SfLayout.layout_8x4

ABOVE_MAX_ROWS = "prefill above the largest captured batch"
OUTSIDE_A_STEP = "weights at load time"
NO_ROWS = "no rows"
POOL_ERROR = "pool error"
UNREGISTERED = "the plugin is not registered"
INDUCTOR = "Inductor cannot be told to leave a pool buffer alone"
ATTENTION_FUSION = "attention fusion, which leaves dead rows unwritten: zeroed at each step"


@dataclass
class Steps:
    """What one worker's engine is configured for.

    Attributes:
        rows: batch sizes of its CUDA graphs, in tokens.
        max_rows: up to here the pool serves; prefill above it is vLLM's.
        copies: micro-batches that run at once.
        ranks: data-parallel ranks, whose tokens an expert layer gathers.
    """

    rows: tuple[int, ...]
    max_rows: int
    copies: int = 1
    ranks: int = 1

    @classmethod
    def of(cls, vllm_config: Any) -> Steps:
        """From a ``VllmConfig``."""
        compilation, parallel = vllm_config.compilation_config, vllm_config.parallel_config
        mode = compilation.cudagraph_mode
        captures = mode is not None and mode.value != 0 and not vllm_config.model_config.enforce_eager
        rows = set(compilation.cudagraph_capture_sizes or ()) if captures else set()
        most = max([vllm_config.scheduler_config.max_num_seqs, *rows])
        copies = 1
        if getattr(parallel, "use_ubatching", False) or getattr(parallel, "enable_dbo", False):
            copies = 2
            rows |= {part for size in rows for part in (size // 2, size - size // 2) if part}
        ranks = getattr(parallel, "data_parallel_size", 1)
        return cls(tuple(sorted(rows)), max_rows_wanted() or most, copies, ranks)

    @property
    def most_rows(self) -> int:
        """Tokens of the largest step that is prepared for: a captured one, if there are any."""
        return min(max(self.rows, default=self.max_rows), self.max_rows)


def max_rows_wanted() -> int | None:
    """``SAFEALLOC_MAX_ROWS``, if it is a number."""
    text = os.environ.get("SAFEALLOC_MAX_ROWS", "")
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 19 else None


@dataclass
class Sites:
    """Allocation sites that captured steps went through.

    Attributes:
        captures: CUDA graphs that hold pool buffers; several a batch size where vLLM splits its model.
        served: sites a step that the pool serves.
        bypassed: sites a step that vLLM serves, by reason.
    """

    captures: int = 0
    served: int = 0
    bypassed: Counter[str] = field(default_factory=Counter)


_Site = tuple[int, SfLayout, int | None]  # n, layout, padded_n
_ExpertSite = tuple[int, int, int]  # k, experts, experts a token


@dataclass
class _StartUp:
    """What is seen from before vLLM measures memory until after its last capture.

    Attributes:
        live: tensors of vLLM's own that a site was given, while somebody holds them.
        copies: buffers of a site that are reserved for each captured batch size.
        experts: sites of expert quantizers, for each of which one buffer a micro-batch is reserved.
        passes: captured steps: how often a site was served (``None``), or bypassed and why.
        pass_of: the step of a forward context.
    """

    live: dict[_Site, list[StorageWeakRef]] = field(default_factory=dict)
    copies: Counter[_Site] = field(default_factory=Counter)
    experts: set[_ExpertSite] = field(default_factory=set)
    passes: list[Counter[str | None]] = field(default_factory=list)
    pass_of: dict[int, tuple[Callable[[], Any], Counter[str | None]]] = field(default_factory=dict)

    def count(self, bypassed: str | None) -> None:
        """One allocation in a capture."""
        context = _forward_context()
        known = self.pass_of.get(id(context))
        if known is None or known[0]() is not context:
            known = self.pass_of[id(context)] = (_weak(context), Counter())
            self.passes.append(known[1])
        known[1][bypassed] += 1

    def held(self, site: _Site, tensor: Tensor) -> int:
        """How many tensors of vLLM's own, this one among them, are held; their storage goes with the last holder."""
        live = [storage for storage in self.live.get(site, ()) if not storage.expired()]
        self.live[site] = [*live, StorageWeakRef(tensor.untyped_storage())]
        return len(live) + 1

    def sites(self, captures: int, layers: int) -> Sites:
        """Sites a step, the largest of all steps; ``layers`` serve themselves."""
        found = Sites(captures, layers + max((counts[None] for counts in self.passes), default=0))
        for counts in self.passes:
            for reason, count in counts.items():
                if reason is not None:
                    found.bypassed[reason] = max(found.bypassed[reason], count)
        return found


class Allocator:
    """One process's answers.

    Attributes:
        scale_tensor, quantize_8x4: vLLM's own functions, which the hooks tell it.
        enabled: whether the plugin is registered.
        pool: what it hands out from, once it has.
    """

    def __init__(self) -> None:
        self.scale_tensor: Callable[[int, int, torch.device, bool], Tensor] = _own_scale_tensor
        self.quantize_8x4: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
        self.reset()

    def reset(self) -> None:
        """As if no engine had been seen, and nothing hooked."""
        self.enabled = False
        self.steps: Steps | None = None
        self.loading = 0  # loads under way
        self.linear_ks: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()  # by layer on our kernel
        self.pool: ScalePool | None = None  # what it hands out from
        self._max_rows = max_rows_wanted() or sys.maxsize
        self._start_up: _StartUp | None = None
        self._watching = self._failed = False
        self._misses = 0

    # --- answers ------------------------------------------------------------------------------------------------------

    def scales(self, m: int, n: int, device: torch.device, padded_n: int | None, bypassed: str | None = None) -> Tensor:
        """What ``create_fp4_scale_tensor`` returns for a swizzled layout: int32 ``[rounded_m, rounded_n // 4]``.

        Args:
            m, n, device: vLLM's.
            padded_n: the n of the GEMM, where vLLM pads it.
            bypassed: why the call is left to vLLM, if the caller knows.
        """
        if padded_n == n:
            padded_n = None
        bypassed = bypassed or self._bypassed(m)
        if bypassed is None:
            try:
                pool = self._pool(device)
                tensor = pool.acquire(m, n, _128x4, padded_k=padded_n).view(torch.int32)
                if self._watching and pool.misses != self._misses:
                    self._grew(pool, f"{m} rows, k={n}, {_128x4.name}")
            except Exception as error:
                bypassed = self._fail(error)
        if bypassed is not None:
            tensor = self.scale_tensor(m, n if padded_n is None else padded_n, device, True)
        if self._start_up is not None:
            self._observe(self._start_up, m, n, _128x4, padded_n, tensor, bypassed)
        return tensor

    def zero_scales(self, m: int, n: int, device: torch.device, padded_n: int | None) -> Tensor:
        """The same, zeroed at every step, for a producer that leaves real rows unwritten."""
        tensor = _zeros(m, n if padded_n is None else padded_n, device)
        if self._start_up is not None:
            self._observe(self._start_up, m, n, _128x4, padded_n, tensor, ATTENTION_FUSION)
        return tensor

    def quantized_8x4(self, a: Tensor, a_global_sf: Tensor, bypassed: str | None = None) -> tuple[Tensor, Tensor]:
        """What ``flashinfer_quant_nvfp4_8x4_sf_layout`` returns: uint8 ``[m, n // 2]`` and 8x4 scales, uint8.

        FlashInfer's quantizer allocates by itself, so ours writes here.
        """
        m, n = a.shape
        bypassed = bypassed or self._bypassed(m)
        if bypassed is None:
            try:
                pool = self._pool(a.device)
                data, tensor = nvfp4_quantize(a.contiguous(), a_global_sf, layout=_8x4, pool=pool)
                if self._watching and pool.misses != self._misses:
                    self._grew(pool, f"{m} rows, k={n}, {_8x4.name}")
            except Exception as error:
                bypassed = self._fail(error)
        if bypassed is not None:
            if self.quantize_8x4 is None:
                raise RuntimeError("vLLM's own 8x4 quantizer is not known: the hook is not registered")
            data, tensor = self.quantize_8x4(a, a_global_sf)
        if self._start_up is not None:
            self._observe(self._start_up, m, n, _8x4, None, tensor, bypassed)
        return data, tensor

    def expert_scales(
        self, rows: int, k: int, topk: int, expert_offsets: Tensor, blockscale_offsets: Tensor
    ) -> Tensor | None:
        """Scales in 128x4 for an expert quantizer that writes real scales only: every other byte is zero.

        Args:
            rows: routed rows, tokens times experts a token.
            k: columns in elements, a multiple of 16.
            topk: experts a token.
            expert_offsets, blockscale_offsets: int32 ``[experts + 1]``, vLLM's.

        Returns:
            int32 ``[padded_rows, padded_cols // 4]`` with rows for the worst routing; ``None`` where vLLM has to allocate.
        """
        ranks = 1 if self.steps is None else self.steps.ranks
        bypassed = self._bypassed(-(-rows // (topk * ranks)))
        if bypassed in (UNREGISTERED, NO_ROWS):
            return None
        start_up, experts = self._start_up, expert_offsets.shape[0] - 1
        capturing = start_up is not None and torch.cuda.is_current_stream_capturing()
        if start_up is not None and not capturing and bypassed != OUTSIDE_A_STEP:
            self._reserve_for_experts(start_up, (k, experts, topk))
        if bypassed is None:
            try:
                pool = self._pool(expert_offsets.device)
                tensor = pool.acquire_grouped(rows, k, experts, _128x4)
                # Before the producer: what it leaves if it fails is in the record, for the next step to clear.
                clean_grouped_scales(tensor, expert_offsets, blockscale_offsets, rows)
                tensor = tensor.view(torch.int32)
                if self._watching and pool.misses != self._misses:
                    self._grew(pool, f"{rows} rows routed to {experts} experts, k={k}, {_128x4.name}")
            except Exception as error:
                bypassed = self._fail(error)
        if bypassed is not None:
            tensor = _zeros(_128x4.grouped_rows(rows, experts), k, expert_offsets.device)
        if start_up is not None and capturing:
            start_up.count(bypassed)
        return tensor

    def safe_point(self) -> None:
        """Raise, or heal, what the checks of ``SAFEALLOC_VERIFY`` have found; a step of replays alone asks for no buffer.

        Raises:
            PaddingCorruptionError: as :meth:`ScalePool.safe_point`.
        """
        if self.pool is not None:
            try:
                self.pool.safe_point()
            except Exception as error:
                self._fail(error)

    def _bypassed(self, m: int) -> str | None:
        """Why a call is left to vLLM, or ``None``."""
        if not self.enabled:
            return UNREGISTERED
        if m > self._max_rows:
            return ABOVE_MAX_ROWS
        if m < 1:  # a data-parallel rank without a token
            return NO_ROWS
        if self.loading or (self.steps is not None and _forward_context() is None):
            return OUTSIDE_A_STEP
        return None

    def _fail(self, error: Exception) -> str:
        if is_raised(error):
            raise error
        if not self._failed:
            self._failed = True
            logger.error(
                "safealloc: the pool failed, and serves neither this call nor further ones that fail: %s: %s",
                type(error).__name__,
                error,
            )
        return POOL_ERROR

    def _pool(self, device: torch.device) -> ScalePool:
        pool = default_pool(device)
        if pool is not self.pool:
            pool.shared_captures()  # vLLM captures all its graphs into one memory pool, and replays one after the other
            self.pool = pool
        return pool

    def _grew(self, pool: ScalePool, shape: str) -> None:
        self._misses = pool.misses
        if _workspace_locked():
            self._watching = False
            logger.warning(
                "safealloc: the pool still grows after vLLM's warm-up, for %s; such shapes share a cache of %d MiB",
                shape,
                pool.cache_bytes >> 20,
            )

    # --- start-up -----------------------------------------------------------------------------------------------------

    def begin(self, vllm_config: Any, device: torch.device) -> None:
        """Before vLLM measures memory: what it will capture is known, so each shape is reserved when it is first seen."""
        self.steps = Steps.of(vllm_config)
        self._max_rows = self.steps.max_rows
        self._start_up, self._watching = None, False
        if device.type != "cuda":
            return
        self._pool(device)
        self._start_up = _StartUp()
        for k in set(self.linear_ks.values()):
            self._reserve(k, _8x4, None, 1)
            self._reserve(k, _128x4, None, 1)

    def ready(self) -> Sites:
        """After vLLM's last capture: what its graphs went through. From here on growth is said."""
        start_up, self._start_up = self._start_up or _StartUp(), None
        if self.pool is None:
            return start_up.sites(0, len(self.linear_ks))
        if self.steps is not None and self.steps.rows:  # without graphs, batches come as they come
            self._misses, self._watching = self.pool.misses, True
        return start_up.sites(self.pool.captures(), len(self.linear_ks))

    def _observe(
        self,
        start_up: _StartUp,
        m: int,
        n: int,
        layout: SfLayout,
        padded_n: int | None,
        tensor: Tensor,
        bypassed: str | None,
    ) -> None:
        """Before a capture: see how many of a shape are held at once, and reserve as many for each captured batch size."""
        if torch.cuda.is_current_stream_capturing():
            start_up.count(bypassed)
            return
        site = n, layout, padded_n
        if bypassed is None:
            assert self.pool is not None
            held = self.pool.held(m, n, layout, padded_k=padded_n)
        elif bypassed == ABOVE_MAX_ROWS:
            held = start_up.held(site, tensor)
        else:
            return
        if held > start_up.copies[site]:
            start_up.copies[site] = held
            try:
                self._reserve(n, layout, padded_n, held)
            except Exception as error:
                self._fail(error)

    def _reserve(self, n: int, layout: SfLayout, padded_n: int | None, copies: int) -> None:
        assert self.steps is not None
        assert self.pool is not None
        rows: Iterable[int] = self.steps.rows
        if layout is _8x4:
            rows = [size for size in rows if size <= MAX_ROWS_8X4]
        elif n in self.linear_ks.values():  # up to there our own kernel takes 8x4
            rows = [size for size in rows if size > MAX_ROWS_8X4]
        self.pool.reserve(rows, n, layout, copies * self.steps.copies, padded_k=padded_n)

    def _reserve_for_experts(self, start_up: _StartUp, site: _ExpertSite) -> None:
        """Before a capture, the first time a site is seen: the buffer of the largest step serves all others too."""
        if site in start_up.experts:
            return
        start_up.experts.add(site)
        assert self.steps is not None
        assert self.pool is not None
        k, experts, topk = site
        try:
            self.pool.reserve(
                self.steps.most_rows * self.steps.ranks * topk, k, _128x4, self.steps.copies, experts=experts
            )
        except Exception as error:
            self._fail(error)


def strict() -> bool:
    """Whether a pool error is raised instead of logged."""
    return os.environ.get("SAFEALLOC_STRICT", "0") == "1"


def is_raised(error: Exception) -> bool:
    """Whether a pool error is raised instead of logged: padding that was found dirty always is, since tokens may be wrong."""
    return strict() or isinstance(error, PaddingCorruptionError)


def watched() -> bool:
    """Whether ``SAFEALLOC_VERIFY`` is set; a value that is no number the pool refuses itself."""
    return os.environ.get(VERIFY, "") not in ("", "0")


def _weak(context: Any) -> Callable[[], Any]:
    return (lambda: None) if context is None else weakref.ref(context)


def _forward_context() -> Any:
    """The forward context of vLLM, which is set while a model runs."""
    module = sys.modules.get("vllm.forward_context")
    return None if module is None else module._forward_context


def _workspace_locked() -> bool:
    """Whether vLLM allows its own scratch memory to grow no more; true where there is none to ask."""
    module = sys.modules.get("vllm.v1.worker.workspace")
    manager = getattr(module, "_manager", None)
    return manager is None or bool(manager.is_locked())


def _zeros(m: int, n: int, device: torch.device) -> Tensor:
    """int32 ``[rounded_m, rounded_n // 4]``."""
    padded_rows, padded_cols = _128x4.round_up(m, n // BLOCK_SIZE)
    return torch.zeros((padded_rows, padded_cols // 4), dtype=torch.int32, device=device)


def _own_scale_tensor(m: int, n: int, device: torch.device, is_sf_swizzled_layout: bool) -> Tensor:
    """``create_fp4_scale_tensor`` where nothing is hooked, and code that was compiled before still asks."""
    return _zeros(m, n, device)


allocator = Allocator()

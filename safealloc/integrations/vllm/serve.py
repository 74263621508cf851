"""Which of vLLM's calls get a pool buffer.

That is decided per call, since the same compiled code serves all batch sizes: a call in a capture, or in the warm-up just
before it, gets a buffer of its engine's pool; everything else is vLLM's own allocation. Where that is ``torch.empty``, it is
zeroed for producers that leave padding unwritten. MoE layers are different: vLLM allocates for the largest
possible number of rows, and does not zero that, so that calls which no pool serves get zeroed memory of the size that they
need.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import Tensor

from safealloc import settings
from safealloc.errors import PaddingCorruptionError, PoolClosedError, SafeAllocError
from safealloc.formats.format import BLOCK_SIZE, ScaleFormat
from safealloc.formats.layout import SfLayout
from safealloc.integrations.vllm import startup, targets
from safealloc.integrations.vllm.startup import Engine, GroupedSite, Site, Steps
from safealloc.integrations.vllm.worker import is_second_runner, logger, query_length
from safealloc.ops.grouped import clean_grouped_scales
from safealloc.pool.default import use_pool

# Used in every call, and in Python 3.11 looking up a member of an enum takes 0.2 us.
_LAYOUT_128X4 = SfLayout.layout_128x4
ENGINE = "_safealloc_engine"
"""Attribute of a worker: its :class:`Engine`."""


class Allocator:
    """Answers the calls of one process."""

    def __init__(self) -> None:
        # vLLM's own function, which the hook sets. Where nothing is hooked, code that was compiled before still asks.
        self.vllm_scale_tensor: Callable[..., Tensor] = lambda m, n, device, is_sf_swizzled_layout: _zeros(m, n, device)
        # Columns of the input by layer, of the layers on our linear kernel.
        self.linear_ks: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self._engines: set[Engine] = set()
        self.engine: Engine | None = None  # whose profile run or captures are under way
        self.reset()

    def reset(self) -> None:
        """As if nothing were hooked; gives back what the engines have."""
        self.enabled = False  # whether the plugin is registered
        self.hooked: Collection[str] = ()  # names of the targets that are hooked
        self._logged: set[tuple[type, str]] = set()  # kinds of errors
        for engine in list(self._engines):
            if engine is self.engine:
                self.engine = None
            self._end(engine)

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
                bypassed = self._handle_error(error)
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
                    tensor, bypassed = None, self._handle_error(error)
            self.note(engine.count, bypassed or startup.GROUPED)
        if tensor is None:
            tensor = _zeros(_LAYOUT_128X4.grouped_rows(rows, experts), k, expert_offsets.device, format)
        return tensor

    def _handle_error(self, error: Exception) -> str:
        """Raise an error, or log it if it is the first of its kind; returns why vLLM allocates instead."""
        self.log_error(error, "vLLM allocates instead")
        return startup.POOL_ERROR if isinstance(error, SafeAllocError) else startup.OTHER_ERROR

    def note(self, note: Callable[..., None], *given: Any) -> None:
        """Call what only keeps accounts; its errors do not reach vLLM."""
        try:
            note(*given)
        except Exception as error:
            self.log_error(error, "the line after the captures may be wrong")

    def log_error(self, error: Exception, what: str) -> None:
        """Log an error, once per kind, unless :func:`is_raised` says otherwise."""
        if is_raised(error):
            raise error
        if (type(error), what) not in self._logged:
            self._logged.add((type(error), what))
            source = "the pool failed" if isinstance(error, SafeAllocError) else "an error was met"
            logger.error("safealloc: %s; %s; logged once: %s: %s", source, what, type(error).__name__, error)

    # --- an engine's life ---------------------------------------------------------------------------------------------

    def begin(self, worker: Any) -> Engine | None:
        """The engine of a worker that is about to measure memory; ``None`` where nothing will be captured."""
        self.end(worker)
        if not self.enabled or worker.device.type not in ("cuda", "cpu") or torch.version.hip is not None:
            return None
        steps = Steps.of(worker.vllm_config, query_length(worker), second_runner=is_second_runner(worker))
        if not steps.copies:
            return None
        model = getattr(worker.model_runner, "model", None)
        layers = set(model.modules()) if isinstance(model, torch.nn.Module) else set()
        engine = Engine(steps, worker.device, [k for layer, k in self.linear_ks.items() if layer in layers])
        self._engines.add(engine)
        setattr(worker, ENGINE, engine)
        weakref.finalize(worker, self._end, engine).atexit = False
        return engine

    @contextlib.contextmanager
    def working(self, engine: Engine) -> Iterator[None]:
        """Inside, calls are those of the engine's profile run, or of its captures and their warm-ups."""
        before = self.engine
        with contextlib.ExitStack() as stack:
            stack.callback(setattr, self, "engine", before)
            self.engine = engine
            if engine.pool is not None:
                try:
                    try:
                        stack.enter_context(use_pool(engine.pool))  # for our linear kernel
                    except PoolClosedError:  # by somebody else
                        engine.reserve()
                        stack.enter_context(use_pool(engine.pool))
                except Exception as error:
                    self.log_error(error, "vLLM allocates instead")
            yield

    def end(self, worker: Any) -> None:
        """Give back what a worker's engine has; a no-op where it has nothing."""
        engine = engine_of(worker)
        if engine is not None:
            delattr(worker, ENGINE)
            self._end(engine)

    def _end(self, engine: Engine) -> None:
        self._engines.discard(engine)
        try:
            engine.close()
        except Exception as error:
            logger.error("safealloc: an engine's pool was not closed: %s: %s", type(error).__name__, error)


def engine_of(worker: Any) -> Engine | None:
    """The engine of a worker, once its sizes are known."""
    engine: Engine | None = getattr(worker, ENGINE, None)
    return engine


def is_raised(error: Exception) -> bool:
    """Whether an error is raised instead of logged: dirty padding always is, since tokens may be wrong."""
    return settings.strict() or isinstance(error, PaddingCorruptionError)


@functools.cache
def allocates_zeros() -> bool:
    """Whether this vLLM zeroes the scales that it allocates; where its sources are not found, it is taken not to."""
    found = targets.installed()
    return found is not None and targets.own_allocation(found[1]) == "zeros"


def zero_padding(scales: Tensor, m: int, n: int) -> None:
    """Zero the tiles with padding rows or columns before a producer writes; int32 ``[rounded_m, rounded_n // 4]`` in 128x4.

    A fill of a slice costs the host a fifth of what a Triton launch costs, and few producers have padding columns.
    """
    tile = _LAYOUT_128X4.tile
    full_rows, full_tiles = m // tile.rows * tile.rows, n // BLOCK_SIZE // tile.cols
    if full_rows < scales.shape[0]:
        scales[full_rows:].zero_()
    if full_tiles < scales.shape[1]:  # one int32 is a row of a tile
        scales.view(-1, scales.shape[1], tile.rows)[:, full_tiles:].zero_()


def _zeros(m: int, n: int, device: torch.device, format: ScaleFormat = ScaleFormat.nvfp4) -> Tensor:
    """int32 ``[rounded_m, rounded_n // 4]``."""
    padded_rows, padded_cols = _LAYOUT_128X4.round_up(m, n // format.block_size)
    return torch.zeros((padded_rows, padded_cols // 4), dtype=torch.int32, device=device)


allocator = Allocator()

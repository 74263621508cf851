"""A worker's start-up, from before vLLM measures memory until after its last capture.

The batch sizes that will be captured are known from the configuration. The shapes that layers ask for are seen in the profile
run and the warm-up: when one is first seen, buffers are reserved for every batch size that will be captured.
"""

from __future__ import annotations

import functools
import operator
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from safealloc import settings
from safealloc.formats.layout import MAX_ROWS_8X4, SfLayout
from safealloc.integrations.vllm.worker import forward_context
from safealloc.pool.pool import ScalePool

# Why vLLM allocates for a call.
ABOVE_MAX_ROWS = "prefill above the largest captured batch"
OUTSIDE_A_STEP = "weights at load time"
NO_ROWS = "no rows"
POOL_ERROR = "pool error"
UNREGISTERED = "the plugin is not registered"
INDUCTOR = "Inductor cannot be kept from reusing a pool buffer"
ATTENTION_FUSION = "attention fusion, which leaves rows without a token unwritten: zeroed per step"


@dataclass
class Steps:
    """What one worker's engine is configured for."""

    rows: tuple[int, ...]  # batch sizes of its CUDA graphs, in tokens
    max_rows: int  # of a call that the pool serves; prefill above it is vLLM's
    copies: int = 1  # micro-batches that run at once
    ranks: int = 1  # data-parallel ranks, whose tokens an expert layer gathers

    @classmethod
    def of(cls, vllm_config: Any) -> Steps:
        """From a ``VllmConfig``."""
        compilation, parallel = vllm_config.compilation_config, vllm_config.parallel_config
        mode = compilation.cudagraph_mode
        captures = mode is not None and mode.value != 0 and not vllm_config.model_config.enforce_eager
        rows = set(compilation.cudagraph_capture_sizes or ()) if captures else set()
        largest = max([vllm_config.scheduler_config.max_num_seqs, *rows])
        copies = 1
        if getattr(parallel, "use_ubatching", False) or getattr(parallel, "enable_dbo", False):
            copies = 2
            rows |= {part for size in rows for part in (size // 2, size - size // 2) if part}
        ranks = getattr(parallel, "data_parallel_size", 1)
        return cls(tuple(sorted(rows)), settings.max_rows() or largest, copies, ranks)

    @property
    def most_rows(self) -> int:
        """Tokens of the largest step that buffers are reserved for: a captured one, if there are any."""
        return min(max(self.rows, default=self.max_rows), self.max_rows)


@dataclass
class Sites:
    """Allocation sites that captured steps went through."""

    captures: int = 0  # CUDA graphs that hold pool buffers; several per batch size where vLLM splits its model
    served: int = 0  # sites per step that the pool serves
    bypassed: Counter[str | None] = field(default_factory=Counter)  # sites per step that vLLM serves, by reason


class Site(NamedTuple):
    """What the calls of one dense allocation site have in common."""

    k: int
    layout: SfLayout
    padded_k: int | None


class GroupedSite(NamedTuple):
    """What the calls of one expert quantizer have in common; ``topk`` is experts per token."""

    k: int
    experts: int
    topk: int


class StartUp:
    """What a worker's start-up has shown so far, and what was reserved for it."""

    def __init__(self, pool: ScalePool, steps: Steps, linear_ks: Mapping[Any, int]) -> None:
        self.pool = pool  # where buffers are reserved
        self._steps = steps
        self._linear_ks = linear_ks  # columns of the input by layer, of the layers on our linear kernel
        self._copies: Counter[Site] = Counter()  # buffers of a site that are reserved for each captured batch size
        self._grouped: set[GroupedSite] = set()  # for each, one buffer per micro-batch is reserved
        self._vllm_tensors: dict[Site, list[StorageWeakRef]] = {}  # while their storage is alive
        self._passes: list[Counter[str | None]] = []  # per captured step: calls by reason; None is served
        self._pass_of: dict[int, tuple[Callable[[], Any], Counter[str | None]]] = {}  # by id of the forward context

    def reserve_linear(self) -> None:
        """Reserve for the layers on our linear kernel, whose shapes are known before the profile run."""
        for k in set(self._linear_ks.values()):
            for layout in (SfLayout.layout_8x4, SfLayout.layout_128x4):
                self._reserve(Site(k, layout, None), 1)

    def observe(self, rows: int, site: Site, tensor: Tensor, bypassed: str | None) -> None:
        """Note an answered call: count it in a capture; before one, reserve as many buffers as the site holds at once.

        ``tensor`` are the scales that were returned, and ``bypassed`` is why they are vLLM's own, or ``None``.
        """
        if torch.cuda.is_current_stream_capturing():
            self.count(bypassed)
            return
        if bypassed is None:
            held = self.pool.held(rows, site.k, site.layout, padded_k=site.padded_k)
        elif bypassed == ABOVE_MAX_ROWS:
            held = self._vllm_tensors_held(site, tensor)
        else:
            return
        if held > self._copies[site]:
            self._copies[site] = held
            self._reserve(site, held)

    def reserve_grouped(self, site: GroupedSite) -> None:
        """Outside a capture, reserve when a site is first seen; the buffer of the largest step serves all others too."""
        if site in self._grouped or torch.cuda.is_current_stream_capturing():
            return
        self._grouped.add(site)
        rows = self._steps.most_rows * self._steps.ranks * site.topk
        self.pool.reserve(rows, site.k, SfLayout.layout_128x4, self._steps.copies, experts=site.experts)

    def count(self, bypassed: str | None) -> None:
        """In a capture, count an answered call."""
        if not torch.cuda.is_current_stream_capturing():
            return
        context = forward_context()
        known = self._pass_of.get(id(context))
        if known is None or known[0]() is not context:
            alive = (lambda: None) if context is None else weakref.ref(context)
            known = self._pass_of[id(context)] = (alive, Counter())
            self._passes.append(known[1])
        known[1][bypassed] += 1

    def sites(self) -> Sites:
        """Served sites, and bypassed ones by reason: of each the largest number in any captured step."""
        largest: Counter[str | None] = functools.reduce(operator.or_, self._passes, Counter())
        return Sites(served=largest.pop(None, 0), bypassed=largest)

    def _vllm_tensors_held(self, site: Site, tensor: Tensor) -> int:
        """How many tensors that vLLM allocated for a site are alive, including this one."""
        held = [storage for storage in self._vllm_tensors.get(site, ()) if not storage.expired()]
        self._vllm_tensors[site] = [*held, StorageWeakRef(tensor.untyped_storage())]
        return len(held) + 1

    def _reserve(self, site: Site, copies: int) -> None:
        rows: Iterable[int] = self._steps.rows
        if site.layout is SfLayout.layout_8x4:
            rows = [size for size in rows if size <= MAX_ROWS_8X4]
        elif site.k in self._linear_ks.values():  # up to there our own kernel takes 8x4
            rows = [size for size in rows if size > MAX_ROWS_8X4]
        self.pool.reserve(rows, site.k, site.layout, copies * self._steps.copies, padded_k=site.padded_k)

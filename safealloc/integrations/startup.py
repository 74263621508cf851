"""A worker's engine: which batch sizes it captures, which shapes its layers ask for, and the pool made for both.

The batch sizes follow from the configuration by the framework's own rules. The shapes are seen in a profile run, or read from
the layers. Then, and before the framework measures memory, buffers are reserved for every captured batch size.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from safealloc import settings
from safealloc.formats.format import ScaleFormat
from safealloc.formats.layout import MAX_ROWS_8X4, SfLayout
from safealloc.integrations.host import capture_under_way, capturing
from safealloc.pool.pool import ScalePool

# What a served site is.
PLAIN, FUSED, GROUPED = "plain", "fused", "grouped"

# Of quantizers: calls of our kernel and of the framework's, and nanoseconds that ours take less.
OURS, THEIRS, SAVED = "ours", "theirs", "saved"

TRTLLM = "flashinfer_nvfp4_quantize"
"""The op that quantizes to 8x4."""

# Why the framework allocates for a call in a capture or its warm-up.
ABOVE_MAX_ROWS = "prefill above the largest captured batch"
NO_ROWS = "no rows"
POOL_ERROR = "pool error"
INDUCTOR = "Inductor cannot be kept from reusing a pool buffer"
OTHER_ERROR = "an error that is not the pool's"
ATTENTION_FUSION = "attention fusion, which leaves rows without a token unwritten: zeroed per step"


@dataclass
class Steps:
    """What one worker's engine captures."""

    copies: dict[int, int]  # by rows in tokens: micro-batches of that size that run at once
    ranks: int = 1  # data-parallel ranks, whose tokens an expert layer gathers

    @property
    def most_rows(self) -> int:
        """Tokens of the largest captured step."""
        return max(self.copies, default=0)


@dataclass
class Sites:
    """Allocation sites that captured steps went through."""

    captures: int = 0  # CUDA graphs that hold pool buffers; several per batch size where the model is split
    served: int = 0  # sites per step that the pool serves
    fused: int = 0  # of these, sites of a producer that leaves padding unwritten
    grouped: int = 0  # of these, expert quantizers
    bypassed: Counter[str] = field(default_factory=Counter)  # sites per step that the framework serves, by reason
    # In the step in which our quantizers save most:
    ours: int = 0  # calls of ours
    quantizers: int = 0  # of these and of the framework's
    saved_us: float = 0.0  # what was measured at start-up, summed up


class Site(NamedTuple):
    """What the calls of one dense allocation site have in common."""

    k: int
    layout: SfLayout
    padded_k: int | None
    format: ScaleFormat = ScaleFormat.nvfp4


class GroupedSite(NamedTuple):
    """What the calls of one expert quantizer have in common; ``topk`` is experts per token."""

    k: int
    experts: int
    topk: int
    format: ScaleFormat = ScaleFormat.nvfp4


class Launch(NamedTuple):
    """What the calls of one quantization op have in common; ``experts`` is 0 where rows are not grouped."""

    op: str
    k: int
    dtype: torch.dtype
    experts: int = 0


class Engine:
    """One worker's engine; it has a pool from the end of the profile run to the engine's own end."""

    step_under_way: Callable[[], Any] = staticmethod(capture_under_way)
    """What tells one captured step from another."""

    def __init__(self, steps: Steps, device: torch.device, linear_ks: Sequence[int] = ()) -> None:
        self.steps = steps
        self.device = device
        self.pool: ScalePool | None = None
        self.launches: set[Launch] = set()  # of quantizers in the profile run, where ours are asked for
        # Microseconds that our quantizer takes less for so many rows; ``None`` where the framework's stays.
        self.saved: Callable[[Launch, int], float | None] = lambda launch, rows: None
        self.op_cleans = False  # NVFP4 expert quantizers see to the scales of the previous step themselves
        self._linear_ks = linear_ks  # columns of the input of each layer on our linear kernel
        self._copies: Counter[Site] = Counter()  # tensors of a site that the profile run held at once
        self._grouped: set[GroupedSite] = set()
        self._observed: dict[Site, list[StorageWeakRef]] = {}  # of the profile run, while their storage is alive
        self._passes: list[Counter[str]] = []  # per captured step: calls by what was served, or by reason
        self._pass_of: dict[int, tuple[Callable[[], Any], Counter[str]]] = {}  # by id of the forward context or capture

    # --- profile run --------------------------------------------------------------------------------------------------

    def observe(self, site: Site, tensor: Tensor) -> None:
        """Note a tensor that was allocated in the profile run."""
        alive = [storage for storage in self._observed.get(site, ()) if not storage.expired()]
        self._observed[site] = [*alive, StorageWeakRef(tensor.untyped_storage())]
        self._copies[site] = max(self._copies[site], len(alive) + 1)

    def observe_grouped(self, site: GroupedSite) -> None:
        """Note a call of an expert quantizer in the profile run."""
        self._grouped.add(site)

    def expect(self, site: Site) -> None:
        """Note a site of the layers, where no profile run shows it."""
        self._copies[site] = max(1, self._copies[site])

    def reserve(self) -> None:
        """Make the pool, with buffers for what was observed; none where nothing was, or nothing is captured.

        Raises:
            SafeAllocError: as :class:`ScalePool` and :meth:`ScalePool.reserve`.
        """
        self._observed.clear()
        linear = {Site(k, layout, None) for k in self._linear_ks for layout in SfLayout if layout.tile.rows > 1}
        sites = self._copies | Counter(dict.fromkeys(linear, 1))
        if not self.steps.copies or not (sites or self._grouped):
            return
        self.pool = pool = ScalePool(self.device, **dataclasses.asdict(settings.watch()))
        # All graphs are captured into one memory pool by torch.cuda.graph, and replayed one after the other.
        pool.shared_captures(synchronized=True)
        for site, held in sites.items():
            for copies in set(self.steps.copies.values()):
                rows = [size for size in self._rows(site) if self.steps.copies[size] == copies]
                pool.reserve(rows, site.k, site.layout, held * copies, padded_k=site.padded_k, format=site.format)
        for launch in self.launches:
            if launch.op == TRTLLM:
                held = max(1, self._copies[Site(launch.k, SfLayout.layout_128x4, None)])
                for copies in set(self.steps.copies.values()):
                    rows = [size for size in self.rows_of(launch) if self.steps.copies[size] == copies]
                    pool.reserve(rows, launch.k, SfLayout.layout_8x4, held * copies)
        most = self.steps.most_rows * self.steps.ranks
        for grouped in self._grouped:  # the buffer of the largest step serves all others too
            copies = max(self.steps.copies.values())
            shape = most * grouped.topk, grouped.k, SfLayout.layout_128x4, copies
            pool.reserve(*shape, experts=grouped.experts, format=grouped.format)

    def _rows(self, site: Site) -> Iterable[int]:
        if site.layout is SfLayout.layout_8x4:  # only our own kernel takes it
            return [size for size in self.steps.copies if size <= MAX_ROWS_8X4]
        if site.k in self._linear_ks and site not in self._copies:
            return [size for size in self.steps.copies if size > MAX_ROWS_8X4]
        return self.steps.copies

    def rows_of(self, launch: Launch) -> list[int]:
        """Rows of the calls of a launch in captured steps."""
        if launch.op == TRTLLM:
            return [size for size in self.steps.copies if size <= MAX_ROWS_8X4]
        if not launch.experts:
            return list(self.steps.copies)
        topks = {site.topk for site in self._grouped if (site.k, site.experts) == (launch.k, launch.experts)}
        ranks = {1, self.steps.ranks}
        return sorted({size * topk * rank for size in self.steps.copies for topk in topks for rank in ranks})

    # --- captures -----------------------------------------------------------------------------------------------------

    def bypassed(self, tokens: int) -> str | None:
        """Why a call in a capture or its warm-up is left to the framework, or ``None``."""
        if tokens < 1:  # a data-parallel rank without a token
            return NO_ROWS
        return ABOVE_MAX_ROWS if tokens > self.steps.most_rows else None

    def count(self, answer: str, by: int = 1) -> None:
        """In a capture, count a call by what was served, or by why it was bypassed."""
        if not capturing():
            return
        context = self.step_under_way()
        known = self._pass_of.get(id(context))
        if known is None or known[0]() is not context:
            alive = (lambda: None) if context is None else weakref.ref(context)
            known = self._pass_of[id(context)] = (alive, Counter())
            self._passes.append(known[1])
        known[1][answer] += by

    def captured(self) -> Sites:
        """Give back what no graph took, after the last capture; returns the sites that the graphs went through.

        Served sites, and bypassed ones by reason: of each the largest number in any captured step.
        """
        captures = 0
        if self.pool is not None:
            self.pool.trim(reserved=True)
            captures = self.pool.captures()
        largest: Counter[str] = functools.reduce(operator.or_, self._passes, Counter())
        best = max(self._passes, key=lambda one: (one[SAVED], one[OURS] + one[THEIRS]), default=Counter())
        quantizers = best[OURS], best[OURS] + best[THEIRS], best[SAVED] / 1000
        self._passes, self._pass_of = [], {}
        plain, fused, grouped, *_ = (largest.pop(kind, 0) for kind in (PLAIN, FUSED, GROUPED, OURS, THEIRS, SAVED))
        return Sites(captures, plain + fused + grouped + len(self._linear_ks), fused, grouped, largest, *quantizers)

    def close(self) -> None:
        """Give the memory back; what living graphs use, when they are gone."""
        pool, self.pool = self.pool, None
        if pool is not None:
            pool.close()

"""What the random walk changes: pools, graphs and work for them; one step of it, and what is checked after each."""

from __future__ import annotations

import contextlib
import gc
import random
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from support.internals import buffers_of
from support.soak.oracle import NAN, LossError, NotApplicableError, check, has_padding, offsets, valid_bytes
from support.soak.work import KS, Dense, Grouped, N, Work
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from safealloc import SafeAllocError, ScalePool, ScaleSpec, capture, nvfp4_quantize
from safealloc.pool.buffer import Buffer

MOST_GRAPHS = 16
MIB = 1 << 20

POOLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "strict": {"growth_in_capture": "error", "max_bytes": 8 * MIB, "cache_bytes": 256 << 10},
    "raising": {"verify_every": 2},
    "repairing": {"verify_every": 1, "verify_repair": True},
}


@dataclass(eq=False)
class Captured:
    """A graph that is alive, and what it has to keep."""

    graph: torch.cuda.CUDAGraph
    works: list[Work]
    pool: ScalePool
    owners: dict[int, Hashable]  # of its handle's buffers, by address

    @property
    def addresses(self) -> set[int]:
        return set(self.owners)


@dataclass
class Tally:
    """How often an action was tried, and how that ended."""

    tried: int = 0
    done: int = 0
    refused: int = 0
    lost: int = 0


class Soak:
    """Pools, graphs and everything random; ``step`` does one action and checks everything."""

    def __init__(
        self, device: torch.device, seed: int, actions: Mapping[str, Callable[[Soak], None]], only: Iterable[str] = ()
    ) -> None:
        self.device, self.seed = device, seed
        self.numbers = random.Random(seed)
        self.generator = torch.Generator(device).manual_seed(seed)
        self.on_cuda = device.type == "cuda"
        self.global_scale = torch.tensor([448 * 6 / 5.0], device=device)
        self.alpha = 1 / self.global_scale**2
        self.weights: dict[int, tuple[Tensor, Tensor]] = {}
        self.paddings: dict[ScaleSpec, Tensor] = {}
        only = tuple(only)
        if unknown := set(only) - set(actions):
            raise ValueError(f"no such action here: {', '.join(sorted(unknown))} (there are {', '.join(actions)})")
        self.actions = actions
        self.chosen = only or tuple(actions)
        self.tallies = {name: Tally() for name in self.chosen}
        self.losses: list[dict[str, Any]] = []
        self.counts: Counter[str] = Counter()
        self.peaks: Counter[str] = Counter()
        self.graphs: list[Captured] = []
        self.compiled: Callable[..., Tensor] | None = None
        self.steps = 0
        with ScalePool(device) as pool:
            for k in KS:
                weight, scales = nvfp4_quantize(self.random(N, k), self.global_scale, pool=pool)
                self.weights[k] = weight, scales.clone()
        self.streams = [torch.cuda.Stream(device) for _ in range(2)] if self.on_cuda else []
        self.allocated_before = self.allocated()
        self.pools: dict[str, ScalePool] = {}
        self.poisoned: set[str] = set()  # names of pools whose new buffers are NaN where scales will be
        for name in POOLS:
            self.make_pool(name)

    # --- what actions use ---------------------------------------------------------------------------------------------

    def random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device=self.device, generator=self.generator).bfloat16()

    def make_pool(self, name: str) -> ScalePool:
        poison = self.numbers.random() < 0.5
        (self.poisoned.add if poison else self.poisoned.discard)(name)
        self.pools[name] = ScalePool(self.device, **POOLS[name], poison=poison)
        return self.pools[name]

    def pool(self, *names: str) -> ScalePool:
        return self.pools[self.numbers.choice(names or tuple(POOLS))]

    def work(self, pool: ScalePool) -> Work:
        grouped = self.numbers.random() < 0.3
        return Grouped(self, pool) if grouped else Dense(self, pool)

    def captured(self, pool: ScalePool, works: list[Work], share: bool = False) -> Captured:
        """A graph of these works, which ran once before."""
        self.make_room_for_a_graph()
        for work in works:
            work.run()
        theirs = [one for one in self.graphs if one.pool is pool]
        handle = self.numbers.choice(theirs).graph.pool() if share and theirs else None
        with capture(pool=pool, graph_pool=handle) as graph:
            for work in works:
                work.run()
        owners = {buffer.address: buffer.owner for buffer in buffers_of(pool) if buffer.owner == graph.pool()}
        used = len(pool.graph_report(graph).buffers)
        check(used <= len(owners), f"a graph uses {used} buffers, of which the pool holds {len(owners)}")
        one = Captured(graph, works, pool, owners)
        self.graphs.append(one)
        return one

    def make_room_for_a_graph(self) -> None:
        if len(self.graphs) >= MOST_GRAPHS:
            del self.graphs[self.numbers.randrange(len(self.graphs))]

    def main_stream(self) -> torch.cuda.Stream:
        return torch.cuda.current_stream(self.device)

    def replay(self, one: Captured, times: int = 1) -> None:
        """Replay a graph with new inputs, and check its results."""
        for work in one.works:
            work.renew()
        for _ in range(times):
            one.graph.replay()
        self.counts["replays"] += times
        self.check_results(one.works)

    def replay_all(self) -> None:
        for one in self.graphs:
            self.replay(one)

    def check_results(self, works: list[Work]) -> None:
        self.synchronize()
        self.counts["results compared"] += len(works)
        for work in works:
            wrong = work.wrong()
            check(wrong is None, f"not the reference's: {wrong}")

    def synchronize(self) -> None:
        if self.on_cuda:
            torch.cuda.synchronize(self.device)

    def allocated(self) -> int:
        """Bytes that tensors hold on the device, without cuBLAS's workspaces; 0 on a CPU."""
        if not self.on_cuda:
            return 0
        self.synchronize()
        gc.collect()
        torch._C._cuda_clearCublasWorkspaces()
        return torch.cuda.memory_allocated(self.device)

    @contextlib.contextmanager
    def unchanged(self, pool: ScalePool, *, cache: bool = True) -> Iterator[None]:
        """What fails inside has to leave the pool as it was. ``cache=False``: out of memory, where the cache may go."""

        def state() -> dict[int, str]:
            return {buffer.address: str(buffer.spec) for buffer in buffers_of(pool)}

        before = state()
        kept = {buffer.address for buffer in buffers_of(pool) if buffer.kept} if not cache else before.keys()
        yield
        gc.collect()
        now = state()
        check(
            now.items() <= before.items() and kept <= now.keys(), f"a failure changed the pool: {before} became {now}"
        )

    def corrupt(self, buffer: Buffer) -> tuple[int, int]:
        """Write one padding byte; which scale row and column it is."""
        padding = (~valid_bytes(buffer)).nonzero().flatten()
        offset = int(padding[self.numbers.randrange(len(padding))])
        rows, cols = buffer.base.shape
        places = offsets(rows, cols, cols // 4, buffer.spec.layout, self.device)
        buffer.base.view(-1)[offset : offset + 1] = NAN
        self.synchronize()
        row, column = (int(index) for index in (places == offset).nonzero()[0])
        return row, column

    def padding(self, buffer: Buffer) -> Tensor:
        """Which bytes of a buffer are padding now, bool ``[nbytes]``."""
        if buffer.spec.record:
            return ~valid_bytes(buffer)
        if buffer.spec not in self.paddings:
            self.paddings[buffer.spec] = ~valid_bytes(buffer)
        return self.paddings[buffer.spec]

    def padded_buffer(self, pool: ScalePool) -> Buffer:
        found = [buffer for buffer in buffers_of(pool) if has_padding(buffer)]
        if not found:
            raise NotApplicableError("no buffer has padding")
        return self.numbers.choice(found)

    # --- a step, and what is checked after it -------------------------------------------------------------------------

    def step(self, log: Callable[[str], None] | None = None) -> None:
        """One action, whose name is logged before it is tried."""
        least = min(tally.tried for tally in self.tallies.values())
        rare = [name for name, tally in self.tallies.items() if tally.tried == least]
        name = self.numbers.choice(rare if self.numbers.random() < 0.3 else self.chosen)
        tally = self.tallies[name]
        self.steps += 1
        tally.tried += 1
        if log is not None:
            log(f"step {self.steps}: {name}")
        try:
            self.actions[name](self)
            self.check_everything(replay=self.steps % 20 == 0)
            tally.done += 1
        except NotApplicableError:
            tally.refused += 1
        except Exception as error:
            tally.lost += 1
            what = str(error) if isinstance(error, LossError) else "".join(traceback.format_exception(error)[-6:])
            self.losses.append({"step": self.steps, "action": name, "what": what[-2000:]})
            self.start_over()

    def start_over(self) -> None:
        """New pools and no graphs, so that one loss is counted once."""
        self.graphs.clear()
        for name, pool in list(self.pools.items()):
            with contextlib.suppress(SafeAllocError):
                pool.close()
            self.make_pool(name)
        gc.collect()

    def check_everything(self, replay: bool) -> None:
        """Padding of every buffer by the oracle's formulas, addresses, counters; ``replay``: all graphs too."""
        self.synchronize()
        self.counts["inspections"] += 1
        for name, pool in self.pools.items():
            pool.safe_point()  # silent: nothing is corrupt
            buffers = buffers_of(pool)
            self.counts["buffers inspected"] += len(buffers)
            self.counts["bytes inspected"] += sum(buffer.nbytes for buffer in buffers)
            check(not any(buffer.address % 512 for buffer in buffers), f"a buffer of the pool {name!r} is not aligned")
            stale = [(buffer.base.view(-1) * self.padding(buffer)).count_nonzero() for buffer in buffers]
            for buffer, count in zip(buffers, torch.stack(stale).tolist() if stale else (), strict=True):
                check(count == 0, f"{count} bytes of padding are not zero in {buffer.spec} of the pool {name!r}")
            self.check_counters(name, pool, buffers)
            self.peaks["buffers of a pool"] = max(self.peaks["buffers of a pool"], len(buffers))
        for one in self.graphs:
            if one.pool in self.pools.values():
                there = {buffer.address: buffer.owner for buffer in buffers_of(one.pool)}
                check(one.addresses <= there.keys(), "a buffer that a graph uses is gone")
                check(one.owners.items() <= there.items(), "a buffer that a graph uses was given to somebody else")
        self.peaks["graphs"] = max(self.peaks["graphs"], len(self.graphs))
        if replay:
            self.replay_all()

    def check_counters(self, name: str, pool: ScalePool, buffers: list[Buffer]) -> None:
        """Between actions nobody holds a buffer."""
        stats = pool.stats()
        nbytes = sum(buffer.nbytes for buffer in buffers)
        check(stats.bytes == nbytes, f"pool {name!r} counts {stats.bytes} bytes and has {nbytes}")
        check(stats.buffers == len(buffers), f"pool {name!r} counts {stats.buffers} buffers and has {len(buffers)}")
        check(stats.live == 0, f"pool {name!r} counts {stats.live} buffers that somebody holds")
        check(nbytes <= POOLS[name].get("max_bytes", nbytes), f"pool {name!r} holds {nbytes} bytes, beyond its limit")
        cached = sum(buffer.nbytes for buffer in buffers if not buffer.kept)
        limit = POOLS[name].get("cache_bytes", 64 * MIB)
        check(cached <= limit, f"the cache of the pool {name!r} has {cached} bytes, its limit is {limit}")
        graphs = {address for one in self.graphs if one.pool is pool for address in one.addresses}
        check(
            stats.captured >= len(graphs), f"pool {name!r} counts {stats.captured} captured, graphs have {len(graphs)}"
        )
        misnamed = [buffer.spec for buffer in buffers if pool.spec(buffer.base) != buffer.spec]
        check(not misnamed, f"pool {name!r} does not know {misnamed}")

    # --- the end ------------------------------------------------------------------------------------------------------

    def unused_storages(self, pool: ScalePool) -> list[StorageWeakRef]:
        """Memory that has to be gone once the pool is closed: nobody holds it and no graph uses it."""
        unused = [buffer for buffer in buffers_of(pool) if not buffer.captures and not buffer.held()]
        return [StorageWeakRef(buffer.storage) for buffer in unused]

    def check_gone(self, storages: list[StorageWeakRef]) -> None:
        if not all(storage.expired() for storage in storages):
            gc.collect()
        left = sum(not storage.expired() for storage in storages)
        check(left == 0, f"{left} of {len(storages)} buffers outlive their pool, and nobody holds them")

    def finish(self) -> None:
        """Close everything; nothing may be left."""
        self.replay_all()
        for name in self.pools:  # no variable here holds one
            storages = self.unused_storages(self.pools[name])
            self.pools[name].close()
            self.check_gone(storages)
        self.replay_all()  # graphs outlive their pool
        self.graphs.clear()
        self.pools.clear()
        self.paddings.clear()
        # What only destroyed graphs used is freed when a pool, any pool, is called next; the driver reports destroyed
        # graphs from a thread of its own.
        self.counts["bytes left to the next call of a pool"] = max(0, self.allocated() - self.allocated_before)
        until = time.monotonic() + 5
        with ScalePool(self.device) as last:
            last.take_back()
            while self.allocated() > self.allocated_before and time.monotonic() < until:
                time.sleep(0.1)
                last.take_back()
        left = self.allocated() - self.allocated_before
        check(left <= 0, f"{left} bytes were not given back")


def run(
    soak: Soak,
    *,
    seconds: float | None = None,
    at_most: float | None = None,
    steps: int | None = None,
    log: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Steps until the time is over or the number is reached; what was tried and lost, for JSON.

    With ``at_most``, also seconds, it goes on until every action was tried.
    """
    began = time.monotonic()

    def is_over() -> bool:
        passed = time.monotonic() - began
        if seconds is not None and passed >= seconds:
            return at_most is None or passed >= at_most or all(tally.tried for tally in soak.tallies.values())
        return steps is not None and soak.steps >= steps

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        while not is_over():
            soak.step(log)
        try:
            soak.finish()
        except Exception as error:
            soak.losses.append({"step": soak.steps, "action": "finish", "what": repr(error)[-2000:]})
    return {
        "seed": soak.seed,
        "seconds": round(time.monotonic() - began, 1),
        "steps": soak.steps,
        "actions": {name: vars(tally) for name, tally in soak.tallies.items()},
        "counts": dict(sorted(soak.counts.items())),
        "peaks": dict(soak.peaks),
        "lost": len(soak.losses),
        "losses": soak.losses,
    }

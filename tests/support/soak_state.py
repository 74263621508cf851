"""What the random walk of ``soak.py`` walks over: pools, graphs, work for them, and the oracle that looks at all."""

from __future__ import annotations

import contextlib
import gc
import os
import random
import time
import traceback
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from safealloc import (
    SafeAllocError,
    ScalePool,
    ScaleSpec,
    SfLayout,
    capture,
    mm_fp4,
    nvfp4_quantize,
    nvfp4_quantize_grouped,
    silu_and_mul_nvfp4_quantize_grouped,
)
from safealloc.kernels import reference, reference_grouped
from safealloc.pool.buffer import Buffer

L128, L8 = SfLayout.layout_128x4, SfLayout.layout_8x4
ROWS = (1, 2, 5, 8, 17, 33, 64, 129, 200)
KS = (64, 80, 208, 512, 1008)
N = 32  # of every GEMM
NAN = 0x7F  # as e4m3
MOST_GRAPHS = 16
MIB = 1 << 20


class NotNowError(Exception):
    """An action that cannot be had in this state; nothing was tried."""


class LossError(Exception):
    """The package broke a promise."""


def check(condition: bool, what: str) -> None:
    if not condition:
        raise LossError(what)


# --- the oracle's own arithmetic ----------------------------------------------------------------------------------------


def offsets(rows: int, cols: int, col_tiles: int, layout: SfLayout, device: torch.device) -> Tensor:
    """Where the scales of a ``[rows, cols]`` matrix of scales lie, by the published formulas."""
    r = torch.arange(rows, device=device)[:, None]
    c = torch.arange(cols, device=device)[None, :]
    if layout is L128:
        return ((r // 128) * col_tiles + c // 4) * 512 + (r % 32) * 16 + ((r % 128) // 32) * 4 + c % 4
    if layout is L8:
        return ((r // 8) * col_tiles + c // 4) * 32 + (r % 8) * 4 + c % 4
    return r * cols + c


def real(buffer: Buffer) -> Tensor:
    """Which bytes of a buffer hold scales now, bool ``[nbytes]``."""
    spec, device = buffer.spec, buffer.base.device
    padded_rows, padded_cols = buffer.base.shape
    cols = spec.k // 16
    places = offsets(padded_rows, cols, padded_cols // 4, spec.layout, device)
    row = torch.arange(padded_rows, device=device)[:, None]
    if buffer.record is None:
        there = (row < spec.rows).expand(-1, cols)
    elif spec.experts is None:  # rows that hold scales, for each 32 columns
        there = row < buffer.record.repeat_interleave(32)[:cols]
    else:  # the scale row of each row, from 1
        there = torch.isin(row, buffer.record[buffer.record > 0] - 1).expand(-1, cols)
    found = torch.zeros(buffer.base.numel(), dtype=torch.bool, device=device)
    found[places[there]] = True
    return found


# --- work --------------------------------------------------------------------------------------------------------------


class Dense:
    """Quantize a static input and, mostly, multiply it; everything it saw is kept in static memory."""

    def __init__(self, soak: Soak, pool: ScalePool) -> None:
        numbers = soak.numbers
        self.soak, self.pool = soak, pool
        self.rows, self.k, self.layout = numbers.choice(ROWS), numbers.choice(KS), numbers.choice((L128, L8))
        self.x = torch.empty(self.rows, self.k, dtype=torch.bfloat16, device=soak.device)
        self.data = torch.empty(self.rows, self.k // 2, dtype=torch.uint8, device=soak.device)
        self.scales = torch.empty(self.layout.padded_shape(self.rows, self.k), dtype=torch.uint8, device=soak.device)
        self.y = torch.empty(self.rows, N, dtype=torch.bfloat16, device=soak.device)
        self.valid = torch.empty(1, dtype=torch.int32, device=soak.device) if numbers.random() < 0.3 else None
        self.renew()

    def renew(self) -> None:
        """Another input, in the same place; of a padded batch other rows are valid, and NaN is in the others."""
        self.x.copy_(self.soak.random(self.rows, self.k))
        if self.valid is not None:
            valid = self.soak.numbers.randint(0, self.rows)
            self.valid.fill_(valid)
            self.x[valid:] = float("nan")
        for seen in (self.data, self.scales, self.y):
            seen.fill_(NAN)

    def run(self) -> None:
        soak = self.soak
        x_fp4, scales = nvfp4_quantize(
            self.x, soak.global_scale, layout=self.layout, pool=self.pool, valid_rows=self.valid
        )
        self.data.copy_(x_fp4)
        self.scales.copy_(scales)
        weight, weight_scale = soak.weights[self.k]
        mm_fp4(x_fp4, weight.T, scales, weight_scale.T, soak.alpha, out=self.y)

    def wrong(self) -> str | None:
        """What of the last run is not the reference's, padding that the GEMM saw included."""
        soak = self.soak
        data, scales, y = torch.empty_like(self.data), torch.zeros_like(self.scales), torch.empty_like(self.y)
        x = self.x if self.valid is None else self.x.nan_to_num(0.0)  # rows of zeros have zero scales
        reference.quantize(x, soak.global_scale, data, scales, self.layout)
        weight, weight_scale = soak.weights[self.k]
        reference.mm(data, weight, scales, weight_scale, soak.alpha, y, self.layout)
        if not torch.equal(self.data, data):
            return f"{self}: data"
        if not torch.equal(self.scales, scales):
            return f"{self}: {int((self.scales != scales).sum())} of {scales.numel()} scale bytes"
        if not torch.allclose(self.y, y, rtol=2**-7, atol=1e-3 * float(y.abs().max())):
            return f"{self}: the GEMM's result"
        return None

    def __str__(self) -> str:
        return f"[{self.rows}, {self.k}] in {self.layout.name}"


class Grouped:
    """Quantize rows routed to experts, otherwise at each renewal; some are routed nowhere."""

    def __init__(self, soak: Soak, pool: ScalePool) -> None:
        numbers = soak.numbers
        self.soak, self.pool = soak, pool
        self.rows, self.k, self.layout = numbers.choice((3, 16, 40)), numbers.choice((80, 208)), L128
        self.experts, self.silu = numbers.choice((4, 7)), numbers.random() < 0.5
        device = soak.device
        self.x = torch.empty(self.rows, self.k * (1 + self.silu), dtype=torch.bfloat16, device=device)
        self.global_scales = torch.rand(self.experts, device=device, generator=soak.generator) * 100 + 1
        self.offsets = [torch.zeros(self.experts + 1, dtype=torch.int32, device=device) for _ in range(2)]
        self.data = torch.empty(self.rows, self.k // 2, dtype=torch.uint8, device=device)
        shape = (self.layout.grouped_rows(self.rows, self.experts), self.layout.padded_shape(1, self.k)[1])
        self.scales = torch.empty(shape, dtype=torch.uint8, device=device)
        self.renew()

    def renew(self) -> None:
        """Another input and another routing, in the same place."""
        numbers = self.soak.numbers
        self.x.copy_(self.soak.random(*self.x.shape))
        counts = [0] * self.experts
        for _ in range(numbers.randint(0, self.rows)):
            counts[numbers.randrange(self.experts)] += 1
        starts, places = [0], [0]
        for count in counts:
            starts.append(starts[-1] + count)
            places.append(places[-1] + -(-count // 128) * 128)
        for offset, values in zip(self.offsets, (starts, places), strict=True):
            offset.copy_(torch.tensor(values, dtype=torch.int32))
        for seen in (self.data, self.scales):
            seen.fill_(NAN)

    def run(self) -> None:
        quantize = silu_and_mul_nvfp4_quantize_grouped if self.silu else nvfp4_quantize_grouped
        x_fp4, scales = quantize(self.x, self.global_scales, *self.offsets, layout=self.layout, pool=self.pool)
        self.data.copy_(x_fp4)
        self.scales.copy_(scales)

    def wrong(self) -> str | None:
        data, scales = torch.empty_like(self.data), torch.zeros_like(self.scales)
        given = (self.x, self.global_scales, data, scales, self.layout, None, *self.offsets)
        reference_grouped.quantize(*given, silu_and_mul=self.silu)
        for what, ours, theirs in (("data", self.data, data), ("scales", self.scales, scales)):
            if not torch.equal(ours, theirs):
                return f"{self.rows} rows of {self.k} for {self.experts} experts: {what}"
        return None


Work = Dense | Grouped


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
    tried: int = 0
    done: int = 0
    refused: int = 0
    lost: int = 0


# --- the state ---------------------------------------------------------------------------------------------------------

POOLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "compact": {"compact": True},
    "strict": {"growth_in_capture": "error", "max_bytes": 8 * MIB, "cache_bytes": 256 << 10},
    "raising": {"verify": 2},
    "healing": {"verify": 1, "repair": True},
}


class Soak:
    """Pools, graphs and everything random; ``step`` does one action and lets the oracle look."""

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
        self.baseline = self.allocated()
        self.pools: dict[str, ScalePool] = {}
        self.poisoned: set[str] = set()  # names of pools whose new buffers are NaN where scales will be
        for name in POOLS:
            self.make_pool(name)

    # --- what actions use ---

    def random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device=self.device, generator=self.generator).bfloat16()

    def make_pool(self, name: str) -> ScalePool:
        options = dict(POOLS[name])
        wanted = {"SAFEALLOC_VERIFY": options.pop("verify", 0), "SAFEALLOC_VERIFY_REPAIR": options.pop("repair", False)}
        wanted["SAFEALLOC_POISON"] = self.numbers.random() < 0.5
        (self.poisoned.add if wanted["SAFEALLOC_POISON"] else self.poisoned.discard)(name)
        before = {variable: os.environ.get(variable) for variable in wanted}
        os.environ.update({variable: str(int(value)) for variable, value in wanted.items()})
        try:
            self.pools[name] = ScalePool(self.device, **options)
        finally:
            for variable, value in before.items():
                os.environ.pop(variable)
                if value is not None:
                    os.environ[variable] = value
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
        """With new inputs, and looked at."""
        for work in one.works:
            work.renew()
        for _ in range(times):
            one.graph.replay()
        self.counts["replays"] += times
        self.look_at(one.works)

    def look_at(self, works: list[Work]) -> None:
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
    def untouched(self, pool: ScalePool, *, cache: bool = True) -> Iterator[None]:
        """What fails inside has to leave the pool as it was; but for its cache, where the machine had no memory."""

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

    def dirty(self, buffer: Buffer) -> tuple[int, int]:
        """Write one padding byte; which scale row and column it is."""
        padding = (~real(buffer)).nonzero().flatten()
        offset = int(padding[self.numbers.randrange(len(padding))])
        rows, cols = buffer.base.shape
        places = offsets(rows, cols, cols // 4, buffer.spec.layout, self.device)
        buffer.base.view(-1)[offset : offset + 1] = NAN
        self.synchronize()
        row, column = (int(index) for index in (places == offset).nonzero()[0])
        return row, column

    def padding(self, buffer: Buffer) -> Tensor:
        """Which bytes of a buffer are padding now, bool ``[nbytes]``."""
        if buffer.record is not None:
            return ~real(buffer)
        if buffer.spec not in self.paddings:
            self.paddings[buffer.spec] = ~real(buffer)
        return self.paddings[buffer.spec]

    def padded_buffer(self, pool: ScalePool) -> Buffer:
        found = [buffer for buffer in buffers_of(pool) if not bool(real(buffer).all())]
        if not found:
            raise NotNowError("no buffer has padding")
        return self.numbers.choice(found)

    # --- a step, and what the oracle sees ---

    def step(self, say: Callable[[str], None] | None = None) -> None:
        """One action, whose name is said before."""
        least = min(tally.tried for tally in self.tallies.values())
        rare = [name for name, tally in self.tallies.items() if tally.tried == least]
        name = self.numbers.choice(rare if self.numbers.random() < 0.3 else self.chosen)
        tally = self.tallies[name]
        self.steps += 1
        tally.tried += 1
        if say is not None:
            say(f"step {self.steps}: {name}")
        try:
            self.actions[name](self)
            self.look(every=self.steps % 20 == 0)
            tally.done += 1
        except NotNowError:
            tally.refused += 1
        except Exception as error:
            tally.lost += 1
            what = str(error) if isinstance(error, LossError) else "".join(traceback.format_exception(error)[-6:])
            self.losses.append({"step": self.steps, "action": name, "what": what[-2000:]})
            self.recover()

    def recover(self) -> None:
        """Begin anew, so that one loss is counted once."""
        self.graphs.clear()
        for name, pool in list(self.pools.items()):
            with contextlib.suppress(SafeAllocError):
                pool.close()
            self.make_pool(name)
        gc.collect()

    def look(self, every: bool) -> None:
        """Padding of every buffer by our own formulas, addresses, counters; now and then all graphs are replayed too."""
        self.synchronize()
        self.counts["looks"] += 1
        for name, pool in self.pools.items():
            pool.safe_point()  # silent: nothing is dirty
            buffers = buffers_of(pool)
            self.counts["buffers looked at"] += len(buffers)
            self.counts["bytes looked at"] += sum(buffer.nbytes for buffer in buffers)
            check(not any(buffer.address % 512 for buffer in buffers), f"a buffer of the pool {name!r} is not aligned")
            stale = [(buffer.base.view(-1) * self.padding(buffer)).count_nonzero() for buffer in buffers]
            for buffer, count in zip(buffers, torch.stack(stale).tolist() if stale else (), strict=True):
                check(count == 0, f"{count} bytes of padding are not zero in {buffer.spec} of the pool {name!r}")
            self.look_at_counters(name, pool, buffers)
            self.peaks["buffers of a pool"] = max(self.peaks["buffers of a pool"], len(buffers))
        for one in self.graphs:
            if one.pool in self.pools.values():
                there = {buffer.address: buffer.owner for buffer in buffers_of(one.pool)}
                check(one.addresses <= there.keys(), "a buffer that a graph uses is gone")
                check(one.owners.items() <= there.items(), "a buffer that a graph uses was given to somebody else")
        self.peaks["graphs"] = max(self.peaks["graphs"], len(self.graphs))
        if every:
            self.replay_all()

    def look_at_counters(self, name: str, pool: ScalePool, buffers: list[Buffer]) -> None:
        """Between actions nobody holds a buffer."""
        stats = pool.stats()
        nbytes = sum(buffer.nbytes for buffer in buffers)
        check(stats.bytes == nbytes, f"pool {name!r} says {stats.bytes} bytes and has {nbytes}")
        check(stats.buffers == len(buffers), f"pool {name!r} says {stats.buffers} buffers and has {len(buffers)}")
        check(stats.live == 0, f"pool {name!r} says that somebody holds {stats.live} of its buffers")
        check(nbytes <= POOLS[name].get("max_bytes", nbytes), f"pool {name!r} holds {nbytes} bytes, beyond its limit")
        cached = sum(buffer.nbytes for buffer in buffers if not buffer.kept)
        limit = POOLS[name].get("cache_bytes", 64 * MIB)
        check(cached <= limit, f"the cache of the pool {name!r} has {cached} bytes, its limit is {limit}")
        graphs = {address for one in self.graphs if one.pool is pool for address in one.addresses}
        check(stats.captured >= len(graphs), f"pool {name!r} says {stats.captured} captured, graphs have {len(graphs)}")
        misnamed = [buffer.spec for buffer in buffers if pool.spec(buffer.base) != buffer.spec]
        check(not misnamed, f"pool {name!r} does not know {misnamed}")

    def storages(self, pool: ScalePool) -> list[StorageWeakRef]:
        """Memory that has to be gone once the pool is closed: of what nobody holds and no graph uses."""
        unused = [buffer for buffer in buffers_of(pool) if buffer.capture is None and not buffer.held()]
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
            storages = self.storages(self.pools[name])
            self.pools[name].close()
            self.check_gone(storages)
        self.replay_all()  # graphs outlive their pool
        self.graphs.clear()
        self.pools.clear()
        self.paddings.clear()
        # What only destroyed graphs used is let go of when a pool, any pool, is called next; the driver tells of
        # destroyed graphs from a thread of its own.
        self.counts["bytes left to the next call of a pool"] = max(0, self.allocated() - self.baseline)
        until = time.monotonic() + 5
        with ScalePool(self.device) as last:
            last.take_back()
            while self.allocated() > self.baseline and time.monotonic() < until:
                time.sleep(0.1)
                last.take_back()
        left = self.allocated() - self.baseline
        check(left <= 0, f"{left} bytes were not given back")

    def replay_all(self) -> None:
        for one in self.graphs:
            self.replay(one)


def buffers_of(pool: ScalePool) -> list[Buffer]:
    return list(pool._inventory.by_address.values())

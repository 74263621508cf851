"""A random walk over the pool against a model of what it promises; streams are numbers here, as raw streams are."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from support.internals import buffers_of

from safealloc import PaddingCorruptionError, PoolExhaustedError, ScaleFormat, ScalePool, ScaleSpec, SfLayout

SPECS = [
    ScaleSpec(1, 64, SfLayout.layout_128x4),
    ScaleSpec(5, 48, SfLayout.layout_8x4),
    ScaleSpec(5, 48, SfLayout.layout_8x4, 128),
    ScaleSpec(8, 64, SfLayout.layout_8x4),  # no padding
    ScaleSpec(3, 80, SfLayout.layout_linear),
    ScaleSpec(130, 80, SfLayout.layout_128x4),
    ScaleSpec(1, 128, SfLayout.layout_128x4, format=ScaleFormat.mxfp8),  # as many bytes as the first
    ScaleSpec(5, 96, SfLayout.layout_8x4, format=ScaleFormat.mxfp4),
    ScaleSpec(5, 96, SfLayout.layout_8x4, 256, ScaleFormat.mxfp8),
]
CACHE, LIMIT = 2600, 9000


class StreamPool(ScalePool):
    """A CPU pool with a current stream."""

    stream = 1

    def __init__(self, *given, **named):
        super().__init__(*given, **named)
        self._raw_stream = lambda index: self.stream


@dataclass(eq=False)
class Model:
    """One buffer as the model knows it."""

    spec: ScaleSpec
    stream: int | None  # None: reserved and unused
    kept: bool
    held: object = None
    dirty: set[int] = field(default_factory=set)


class PoolMachine(RuleBasedStateMachine):
    @initialize()
    def make(self) -> None:
        self.pool = StreamPool("cpu", cache_bytes=CACHE, max_bytes=LIMIT)
        self.buffers: dict[int, Model] = {}
        self.cache: OrderedDict[int, None] = OrderedDict()
        self.loose: dict[int, Model] = {}
        self.hits = self.misses = self.evictions = 0

    def teardown(self) -> None:
        if hasattr(self, "pool"):
            self.pool.close()

    # --- the model ---

    def total(self) -> int:
        return sum(m.spec.nbytes for m in (*self.buffers.values(), *self.loose.values()))

    def evict(self, nbytes: int) -> bool:
        victims = []
        for address in self.cache:
            if nbytes <= 0:
                break
            if self.buffers[address].held is None:
                victims.append(address)
                nbytes -= self.buffers[address].spec.nbytes
        if nbytes > 0:
            return False
        for address in victims:
            del self.buffers[address], self.cache[address]
        self.evictions += len(victims)
        return True

    def cached(self) -> int:
        return sum(self.buffers[a].spec.nbytes for a in self.cache)

    def live(self) -> list[Model]:
        return [m for m in (*self.buffers.values(), *self.loose.values()) if m.held is not None]

    # --- what users do ---

    @rule(spec=st.sampled_from(SPECS))
    def acquire(self, spec: ScaleSpec) -> None:
        stream = self.pool.stream
        matching = [a for a, m in self.buffers.items() if m.spec == spec and m.held is None]
        idle = [a for a in matching if self.buffers[a].stream == stream]
        idle = idle or [a for a in matching if self.buffers[a].stream is None]
        fits = bool(idle)
        if not idle:
            fits = spec.nbytes <= CACHE - self.cached() or (
                spec.nbytes <= CACHE and self.evict(self.cached() + spec.nbytes - CACHE)
            )
            if not self.evict(self.total() + spec.nbytes - LIMIT):
                with pytest.raises(PoolExhaustedError):
                    self.pool.acquire(spec.rows, spec.k, spec.layout, padded_k=spec.padded_k, format=spec.format)
                return
        buffer = self.pool.acquire(spec.rows, spec.k, spec.layout, padded_k=spec.padded_k, format=spec.format)
        address = buffer.data_ptr()
        start, end = address, address + spec.nbytes
        for other in self.live():
            theirs = other.held.data_ptr() if isinstance(other.held, torch.Tensor) else other.held.ctypes.data
            theirs -= other.offset
            assert end <= theirs or start >= theirs + other.spec.nbytes
        if idle:
            assert address in idle
            model = self.buffers[address]
            self.hits += 1
        else:
            self.misses += 1
            model = Model(spec, stream, kept=False)
            (self.buffers if fits else self.loose)[address] = model
            if fits:
                self.cache[address] = None
        model.stream = stream
        model.held, model.offset = buffer, 0
        if address in self.cache:
            self.cache.move_to_end(address)
        if not model.dirty:
            assert not any(padding.any() for padding in spec.padding_views(buffer))
        assert self.pool.spec(buffer) == spec

    @precondition(lambda self: self.live())
    @rule(data=st.data(), kind=st.sampled_from(["view", "dtype", "numpy", "fresh"]))
    def hold_it_another_way(self, data: st.DataObject, kind: str) -> None:
        model = data.draw(st.sampled_from(self.live()))
        if not isinstance(model.held, torch.Tensor) or model.offset:
            return
        tensor = model.held.view(torch.uint8)
        if kind == "view":
            model.held, model.offset = tensor.view(-1)[1:], 1
        elif kind == "dtype":
            model.held = tensor.view(torch.float8_e4m3fn)
        elif kind == "numpy":
            model.held = tensor.numpy()
        else:
            model.held = tensor.detach()

    @precondition(lambda self: self.live())
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        model = data.draw(st.sampled_from(self.live()))
        model.held = None
        self.loose = {a: m for a, m in self.loose.items() if m.held is not None}

    @precondition(lambda self: self.live())
    @rule(data=st.data(), value=st.integers(0, 255))
    def write_real_bytes(self, data: st.DataObject, value: int) -> None:
        model = data.draw(st.sampled_from(self.live()))
        if isinstance(model.held, torch.Tensor) and not model.offset:
            spec = model.spec
            offsets = spec.layout.offsets(spec.rows, spec.k, padded_k=spec.padded_k, format=spec.format).view(-1)
            model.held.view(torch.uint8).view(-1)[offsets] = value

    @precondition(lambda self: self.live())
    @rule(data=st.data())
    def corrupt(self, data: st.DataObject) -> None:
        model = data.draw(st.sampled_from(self.live()))
        spec = model.spec
        padding = (
            spec.layout.padding_mask(spec.rows, spec.k, padded_k=spec.padded_k, format=spec.format)
            .nonzero()
            .view(-1)
            .tolist()
        )
        if padding and isinstance(model.held, torch.Tensor) and not model.offset:
            byte = data.draw(st.sampled_from(padding))
            model.held.view(torch.uint8).view(-1)[byte] = 0x7F
            model.dirty.add(byte)

    @rule(repair=st.booleans())
    def verify(self, repair: bool) -> None:
        everything = {**self.buffers, **self.loose}
        dirty = {address: model for address, model in everything.items() if model.dirty}
        if dirty and not repair:
            with pytest.raises(PaddingCorruptionError) as error:
                self.pool.verify()
            assert {c.address: c.count for c in error.value.corruptions} == {a: len(m.dirty) for a, m in dirty.items()}
        else:
            assert self.pool.verify(repair=repair) == len(everything)
            for model in dirty.values():
                model.dirty.clear()

    @rule()
    def trim(self) -> None:
        idle = [address for address in self.cache if self.buffers[address].held is None]
        assert self.pool.trim() == sum(self.buffers[address].spec.nbytes for address in idle)
        for address in idle:
            del self.buffers[address], self.cache[address]

    @rule(spec=st.sampled_from([spec for spec in SPECS if spec.padded_k is None]), copies=st.integers(1, 2))
    def reserve(self, spec: ScaleSpec, copies: int) -> None:
        unused = sum(m.spec == spec and m.stream is None for m in self.buffers.values())
        missing = max(0, copies - unused)
        before = {buffer.address for buffer in buffers_of(self.pool)}
        if not self.evict(self.total() + missing * spec.nbytes - LIMIT):
            with pytest.raises(PoolExhaustedError):
                self.pool.reserve(spec.rows, spec.k, spec.layout, copies, format=spec.format)
            return
        self.pool.reserve(spec.rows, spec.k, spec.layout, copies, format=spec.format)
        made = {buffer.address for buffer in buffers_of(self.pool)} - (before & set(self.buffers))
        assert len(made) == missing
        for address in made:
            self.buffers[address] = Model(spec, None, kept=True)

    @rule(stream=st.sampled_from([1, 2]))
    def switch_stream(self, stream: int) -> None:
        self.pool.stream = stream

    # --- what must hold ---

    @invariant()
    def counts_agree(self) -> None:
        if not hasattr(self, "pool"):
            return
        stats = self.pool.stats()
        assert stats.buffers == len(self.buffers)
        assert stats.bytes == sum(model.spec.nbytes for model in self.buffers.values())
        assert stats.live == sum(model.held is not None for model in self.buffers.values())
        assert (stats.hits, stats.misses, stats.evictions) == (self.hits, self.misses, self.evictions)
        assert sum(self.buffers[a].spec.nbytes for a in self.cache if self.buffers[a].held is None) <= CACHE
        assert self.total() <= LIMIT


PoolMachine.TestCase.settings = settings(
    max_examples=60, stateful_step_count=60, deadline=None, suppress_health_check=list(HealthCheck)
)
TestPool = PoolMachine.TestCase

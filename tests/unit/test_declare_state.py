"""A random walk over memory that is made, declared, viewed, written and reused, against a model of what is known of it."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor

from safealloc import LayoutMismatchError, ScaleFormat, ScalePool, ScaleSpec, SfLayout, check, declare, spec

NBYTES = 4096  # of each storage, so that memory is reused
SPECS = [
    ScaleSpec(300, 64, SfLayout.layout_128x4),
    ScaleSpec(384, 64, SfLayout.layout_128x4),
    ScaleSpec(384, 64, SfLayout.layout_8x4),
    ScaleSpec(101, 64, SfLayout.layout_8x4),
    ScaleSpec(256, 128, SfLayout.layout_128x4),
    ScaleSpec(17, 128, SfLayout.layout_linear),
    ScaleSpec(300, 128, SfLayout.layout_128x4, format=ScaleFormat.mxfp8),  # as many bytes as the first
    ScaleSpec(300, 32, SfLayout.layout_128x4, 64, ScaleFormat.nvfp4),
]
OFFSETS = [0, 512, 1024, 2048]


@dataclass(eq=False)
class Memory:
    """One storage as the model knows it."""

    tensors: list[Tensor]  # of it, the first is all of it
    declared: dict[int, ScaleSpec] = field(default_factory=dict)  # by offset


_library = torch.library.Library("test_declare_state", "FRAGMENT")
_library.define("produce(Tensor x, int which) -> Tensor")
_library.define("read(Tensor x) -> Tensor")


def _produce(x: Tensor, which: int) -> Tensor:
    """Scales in new memory, declared where they are written."""
    held = SPECS[which]
    memory = torch.empty(NBYTES, dtype=torch.uint8)
    scales = memory[: held.scale_bytes]
    scales.fill_(which)
    declare(scales, held.rows, held.k, held.layout, padded_k=held.padded_k, format=held.format)
    return memory


_library.impl("produce", _produce, "CompositeExplicitAutograd")
_library.impl("read", lambda x: x.sum(), "CompositeExplicitAutograd")
torch.library.register_fake("test_declare_state::produce", lambda x, which: x.new_empty(NBYTES), lib=_library)
torch.library.register_fake("test_declare_state::read", lambda x: x.new_empty((), dtype=torch.int64), lib=_library)


def _compiled(function: Callable[..., object]) -> Callable[..., object]:
    return torch.compile(function, backend="aot_eager", dynamic=False, fullgraph=True)


compiled_writes = [
    _compiled(lambda tensor: tensor.add_(1)),
    _compiled(lambda tensor: (tensor[3:9].fill_(2), None)[1]),
]
compiled_read = _compiled(lambda tensor: torch.ops.test_declare_state.read(tensor) + tensor.sum())
compiled_produce = _compiled(lambda tensor, which: torch.ops.test_declare_state.produce(tensor * 2, which))

WRITES: list[Callable[[Tensor], object]] = [
    lambda tensor: tensor.zero_(),
    lambda tensor: tensor[:1].fill_(1),
    lambda tensor: tensor.detach().add_(1),
    lambda tensor: tensor.view(torch.float8_e4m3fn).view(torch.uint8).zero_(),
    lambda tensor: torch.add(tensor, 1, out=tensor),
    lambda tensor: tensor.copy_(torch.zeros_like(tensor)),
]
some = st.integers(0, 1 << 16)


class DeclareMachine(RuleBasedStateMachine):
    @initialize()
    def make(self) -> None:
        self.memories: list[Memory] = []
        self.pool = ScalePool("cpu", cache_bytes=1 << 16)
        self.buffers: list[tuple[Tensor, ScaleSpec]] = []
        self.addresses: set[int] = set()

    def teardown(self) -> None:
        if hasattr(self, "pool"):
            self.buffers.clear()
            self.pool.close()

    def memory(self, index: int) -> Memory:
        return self.memories[index % len(self.memories)]

    def tensor(self, memory: Memory, index: int) -> Tensor:
        return memory.tensors[index % len(memory.tensors)]

    # --- memory ---

    @precondition(lambda self: len(self.memories) < 6)
    @rule()
    def allocate(self) -> None:
        tensor = torch.empty(NBYTES, dtype=torch.uint8)
        assert spec(tensor) is None, "new memory"
        self.addresses.add(tensor.data_ptr())
        self.memories.append(Memory([tensor]))

    @precondition(lambda self: self.memories)
    @rule(index=some)
    def free(self, index: int) -> None:
        self.memories.remove(self.memory(index))

    @precondition(lambda self: self.memories)
    @rule(
        index=some, start=st.sampled_from([0, 1, 16, 64, *OFFSETS]), length=st.sampled_from([32, 64, 512, 1024, 2048])
    )
    def view(self, index: int, start: int, length: int) -> None:
        memory = self.memory(index)
        if len(memory.tensors) < 8:
            memory.tensors.append(memory.tensors[0][start : start + length])

    @rule(which=st.integers(0, 3))
    def acquire(self, which: int) -> None:
        held = SPECS[which]
        if len(self.buffers) > 3:
            self.buffers.pop(0)
        self.buffers.append((self.pool.acquire(held.rows, held.k, held.layout, format=held.format), held))

    # --- what is said of it ---

    def say(self, memory: Memory, offset: int, held: ScaleSpec) -> None:
        end = offset + held.scale_bytes
        memory.declared = {
            at: one for at, one in memory.declared.items() if at + one.scale_bytes <= offset or end <= at
        } | {offset: held}

    @precondition(lambda self: self.memories)
    @rule(index=some, which=st.integers(0, len(SPECS) - 1), offset=st.sampled_from(OFFSETS), shape=st.booleans())
    def declare(self, index: int, which: int, offset: int, shape: bool) -> None:
        memory, held = self.memory(index), SPECS[which]
        tensor = memory.tensors[0][offset : offset + held.scale_bytes]
        if tensor.numel() == held.scale_bytes:
            tensor = tensor.view(held.padded_shape) if shape else tensor
            declare(tensor, held.rows, held.k, held.layout, padded_k=held.padded_k, format=held.format)
            self.say(memory, offset, held)
        else:
            with pytest.raises(ValueError, match=f"have {held.scale_bytes} bytes"):
                declare(tensor, held.rows, held.k, held.layout, padded_k=held.padded_k, format=held.format)

    @precondition(lambda self: len(self.memories) < 6)
    @rule(which=st.integers(0, len(SPECS) - 1), compiled=st.booleans())
    def produce(self, which: int, compiled: bool) -> None:
        """By an op, in eager and in compiled code."""
        x = torch.zeros(16, dtype=torch.uint8)
        if compiled:
            compiled_produce(x, which)  # where this call compiles, it declares nothing
        tensor = compiled_produce(x, which) if compiled else torch.ops.test_declare_state.produce(x, which)
        assert isinstance(tensor, Tensor)
        self.memories.append(Memory([tensor], {0: SPECS[which]}))

    # --- writes and reads ---

    @precondition(lambda self: self.memories)
    @rule(index=some, view=some, how=st.integers(0, len(WRITES) - 1), inference=st.booleans())
    def write(self, index: int, view: int, how: int, inference: bool) -> None:
        memory = self.memory(index)
        with torch.inference_mode(inference and how != 3):  # a dtype view is an inference tensor there
            WRITES[how](self.tensor(memory, view))
        memory.declared.clear()

    @precondition(lambda self: self.memories)
    @rule(index=some, how=st.integers(0, 1), inference=st.booleans())
    def write_compiled(self, index: int, how: int, inference: bool) -> None:
        memory = self.memory(index)
        with torch.inference_mode(inference):
            compiled_writes[how](memory.tensors[0])
        memory.declared.clear()

    @precondition(lambda self: self.memories)
    @rule(index=some, view=some)
    def read(self, index: int, view: int) -> None:
        memory = self.memory(index)
        tensor = self.tensor(memory, view)
        tensor.clone().zero_()
        torch.cat([tensor, tensor])
        compiled_read(memory.tensors[0])

    # --- what is known ---

    def expected(self, memory: Memory, tensor: Tensor) -> tuple[ScaleSpec | None, ScaleSpec | None]:
        """The declaration that a tensor lies in, and what it holds."""
        start, nbytes = tensor.storage_offset(), tensor.numel()
        for offset, held in memory.declared.items():
            if offset <= start and start + nbytes <= offset + held.scale_bytes:
                if (start, nbytes) == (offset, held.scale_bytes):
                    return held, held
                width = held.padded_shape[1]
                tile = held.layout.tile.rows * width
                first = (start - offset) // width
                if (start - offset) % tile or nbytes % tile or first >= held.rows:
                    return held, None
                rows = min(held.rows - first, nbytes // width)
                return held, ScaleSpec(rows, held.k, held.layout, held.padded_k, held.format)
        return None, None

    @invariant()
    def is_what_was_said_last(self) -> None:
        for memory in getattr(self, "memories", ()):
            whole = memory.tensors[0]
            ranges = [whole[at : at + one.scale_bytes] for at, one in memory.declared.items()]
            for tensor in itertools.chain(memory.tensors, ranges):
                around, held = self.expected(memory, tensor)
                assert spec(tensor) == held
                if around is None:  # no false alarm, whatever it is read as
                    assert check(tensor, 7, 64, SfLayout.layout_8x4) is None
                elif held is None:
                    with pytest.raises(LayoutMismatchError):
                        check(tensor, around.rows, around.k, around.layout, format=around.format)
                else:
                    k = held.k if held.padded_k is None else held.padded_k
                    assert check(tensor, held.rows, k, held.layout, format=held.format) == held
                    other = SfLayout((held.layout + 1) % 3)
                    with pytest.raises(LayoutMismatchError, match=f"{held.layout.name} .* {other.name}"):
                        check(tensor, held.rows, k, other, format=held.format)

    @invariant()
    def pools_know_their_buffers(self) -> None:
        for buffer, held in getattr(self, "buffers", ()):
            assert spec(buffer) == held == self.pool.spec(buffer)


TestDeclare = DeclareMachine.TestCase
TestDeclare.settings = settings(
    max_examples=60, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
)

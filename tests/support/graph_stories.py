"""What strangers do with a captured graph, told over the driver's calls or over a stand-in for them."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from support.internals import buffers_of

from safealloc import CaptureGrowthError, ScalePool, SfLayout

LAYOUT = SfLayout.layout_128x4
SHAPE = (128, 64, LAYOUT)  # without padding
MARK = 7
Launch = Callable[[], object]
Story = Iterator[tuple[int, Launch | None]]


class World:
    """A pool, and graphs that write its buffers."""

    def __init__(self, pool: ScalePool, raw: Any) -> None:
        self.pool = pool
        self.raw = raw
        self.stream, self._other, self._looks_on = (raw.new_stream() for _ in range(3))
        self.addresses: list[int] = []

    def graph(self, into: Any = None, *, writes: int = 1, mode: str = "THREAD_LOCAL") -> tuple[Any, int]:
        """A graph that writes a buffer of the pool, captured by nobody that the pool knows; the buffer's address."""
        graph = self.raw.capture(functools.partial(self.write, writes), mode, into)
        return graph, self.addresses[-1]

    def write(self, times: int = 1) -> None:
        """Write a buffer on the current stream, and let go of it."""
        scales = self.pool.acquire(*SHAPE)
        self.addresses.append(scales.data_ptr())
        for _ in range(times):
            self.raw.fill(scales, MARK)

    def launch(self, executable: Any) -> Launch:
        return functools.partial(self.raw.launch, executable, self.stream)

    def launch_writes(self, launch: Launch, address: int) -> bool:
        """Whether a launch writes the buffer."""
        (base,) = [buffer.base for buffer in buffers_of(self.pool) if buffer.address == address]
        base.zero_()
        self.raw.synchronize()
        launch()
        self.raw.synchronize()
        return bool((base == MARK).all())

    def handed_out(self) -> set[int]:
        """What a capture on a handle of its own and eager work on two streams get now, all of it held at once."""
        held: list[torch.Tensor] = []

        def acquire_all() -> None:
            with contextlib.suppress(CaptureGrowthError):
                while True:
                    held.append(self.pool.acquire(*SHAPE))

        graph = self.raw.capture(acquire_all, stream=self._looks_on)
        for stream in (self._other, self.stream):
            with self.raw.on(stream):
                held += [self.pool.acquire(*SHAPE) for _ in range(3)]
        found = {tensor.data_ptr() for tensor in held}
        assert len(found) == len(held), "two live tensors share memory"
        self.raw.destroy(graph)
        return found

    def comes_back(self, address: int) -> bool:
        return self.in_the_end(lambda: self.pool.take_back() or address in self.handed_out())

    def in_the_end(self, condition: Callable[[], bool]) -> bool:
        """Whether it becomes true: destructors run on a thread of the driver."""
        end = time.monotonic() + 20
        while time.monotonic() < end:
            self.raw.synchronize()
            if condition():
                return True
            time.sleep(0.01)
        return False


# --- stories: each step is an address, and what may still write it -------------------------------------------------------


def a_graph_that_is_not_instantiated_any_more(world: World) -> Story:
    graph, address = world.graph()
    executable = world.raw.instantiate(graph)
    world.raw.destroy(executable)
    yield address, None  # it can be instantiated again
    world.raw.destroy(graph)


def the_second_instantiation(world: World) -> Story:
    graph, address = world.graph()
    first, second = world.raw.instantiate(graph), world.raw.instantiate(graph)
    world.raw.destroy(graph)
    yield address, world.launch(first)
    world.raw.destroy(first)
    yield address, world.launch(second)
    world.raw.destroy(second)


def a_clone_of_a_clone(world: World) -> Story:
    graph, address = world.graph()
    clone = world.raw.clone(graph)
    world.raw.destroy(graph)
    yield address, None
    second = world.raw.clone(clone)
    world.raw.destroy(clone)
    executable = world.raw.instantiate(second)
    world.raw.destroy(second)
    yield address, world.launch(executable)
    world.raw.destroy(executable)


def a_child_graph(world: World) -> Story:
    graph, address = world.graph()
    parent = world.raw.create()
    world.raw.add_child(parent, graph)
    world.raw.destroy(graph)
    yield address, None
    executable = world.raw.instantiate(parent)
    world.raw.destroy(parent)
    yield address, world.launch(executable)
    world.raw.destroy(executable)


def a_child_of_a_child_in_a_clone(world: World) -> Story:
    graph, address = world.graph()
    middle, parent = world.raw.create(), world.raw.create()
    world.raw.add_child(middle, graph)
    world.raw.add_child(parent, middle)
    clone = world.raw.clone(parent)
    world.raw.destroy(graph, middle, parent)
    yield address, None
    executable = world.raw.instantiate(clone)
    world.raw.destroy(clone)
    yield address, world.launch(executable)
    world.raw.destroy(executable)


def an_executable_updated_to_another_graph(world: World) -> Story:
    """It writes what the second capture was given, also when the second graph is gone."""
    first, _ = world.graph()
    second, address = world.graph()
    executable = world.raw.instantiate(first)
    assert world.raw.update(executable, second)
    world.raw.destroy(first, second)
    yield address, world.launch(executable)
    world.raw.destroy(executable)


def an_executable_updated_there_and_back(world: World) -> Story:
    first, address = world.graph()
    second, _ = world.graph()
    executable = world.raw.instantiate(first)
    assert world.raw.update(executable, second)
    assert world.raw.update(executable, first)
    world.raw.destroy(first, second)
    yield address, world.launch(executable)
    world.raw.destroy(executable)


def an_executable_whose_update_was_refused(world: World) -> Story:
    first, address = world.graph()
    longer, _ = world.graph(writes=2)
    executable = world.raw.instantiate(first)
    assert not world.raw.update(executable, longer)
    world.raw.destroy(first, longer)
    yield address, None
    world.raw.destroy(executable)


def a_child_node_set_to_another_graph(world: World) -> Story:
    first, _ = world.graph()
    second, address = world.graph()
    parent = world.raw.create()
    node = world.raw.add_child(parent, first)
    executable = world.raw.instantiate(parent)
    world.raw.set_child(executable, node, second)
    world.raw.destroy(parent, first, second)
    yield address, world.launch(executable)
    world.raw.destroy(executable)


def the_body_of_a_conditional_node(world: World) -> Story:
    parent = world.raw.create()
    _, address = world.graph(into=world.raw.add_conditional(parent))
    yield address, None
    executable = world.raw.instantiate(parent)
    yield address, world.launch(executable)
    world.raw.destroy(parent)
    yield address, world.launch(executable)
    world.raw.destroy(executable)


def a_body_captured_while_its_parent_is(world: World) -> Story:
    stream = world.raw.new_stream()

    def parent() -> None:
        world.write()
        world.graph(into=world.raw.add_conditional_in_capture(stream))
        world.write()

    graph = world.raw.capture(parent, stream=stream)
    before, body, after = world.addresses
    assert before == after != body
    executable = world.raw.instantiate(graph)
    world.raw.destroy(graph)
    yield body, world.launch(executable)
    yield before, world.launch(executable)
    world.raw.destroy(executable)


def a_body_of_an_executable_that_was_updated(world: World) -> Story:
    parents = [world.raw.create() for _ in range(2)]
    addresses = [world.graph(into=world.raw.add_conditional(parent))[1] for parent in parents]
    executable = world.raw.instantiate(parents[0])
    updated = world.raw.update(executable, parents[1])
    world.raw.destroy(*parents)
    yield addresses[updated], world.launch(executable)
    world.raw.destroy(executable)


def two_captures_into_one_graph(world: World) -> Story:
    """Nothing orders them."""
    graph = world.raw.create()
    (_, first), (_, second) = world.graph(into=graph), world.graph(into=graph)
    assert first != second
    executable = world.raw.instantiate(graph)
    world.raw.destroy(graph)
    yield first, world.launch(executable)
    yield second, world.launch(executable)
    world.raw.destroy(executable)


STORIES: list[Callable[[World], Story]] = [
    a_graph_that_is_not_instantiated_any_more,
    the_second_instantiation,
    a_clone_of_a_clone,
    a_child_graph,
    a_child_of_a_child_in_a_clone,
    an_executable_updated_to_another_graph,
    an_executable_updated_there_and_back,
    an_executable_whose_update_was_refused,
    a_child_node_set_to_another_graph,
    the_body_of_a_conditional_node,
    a_body_captured_while_its_parent_is,
    a_body_of_an_executable_that_was_updated,
    two_captures_into_one_graph,
]


def tell(world: World, story: Callable[[World], Story]) -> None:
    """A buffer stays with what may write it, and comes back afterwards."""
    steps = 0
    for address, launch in story(world):
        steps += 1
        for _ in range(3):
            world.raw.synchronize()
            world.pool.take_back()
            assert address not in world.handed_out()
        if launch is not None:
            assert world.launch_writes(launch, address), "the story is told wrong: nothing writes the buffer"
            assert address not in world.handed_out()
    assert steps
    assert world.addresses
    for address in set(world.addresses):
        assert world.comes_back(address)
    assert world.in_the_end(lambda: world.pool.captures() == 0)


def check_that_an_update_gives_back(world: World) -> None:
    """What an updated executable does not write any more comes back, and what it writes now does not."""
    first, left = world.graph()
    second, kept = world.graph()
    executable = world.raw.instantiate(first)
    assert world.raw.update(executable, second)
    world.raw.destroy(first)
    assert world.comes_back(left)
    assert kept not in world.handed_out()
    world.raw.destroy(executable, second)

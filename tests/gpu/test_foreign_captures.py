"""Graphs that somebody else makes, clones, nests and updates: a buffer stays with whatever may still write it."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support.internals import buffers_of
from support.raw_graphs import MODES, RawGraphs

from safealloc import CaptureGrowthError, ScalePool, SfLayout, capture

pytestmark = pytest.mark.gpu
LAYOUT = SfLayout.layout_128x4
SHAPE = (128, 64, LAYOUT)  # without padding
MARK = 7
Launch = Callable[[], object]
Story = Iterator[tuple[int, Launch | None]]


class World:
    """A pool, and graphs that write its buffers."""

    def __init__(self, pool: ScalePool) -> None:
        self.pool = pool
        self.raw = RawGraphs()
        self.stream, self._looks_on = torch.cuda.Stream(), torch.cuda.Stream()
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
            scales.fill_(MARK)

    def launch(self, executable: Any) -> Launch:
        return functools.partial(self.raw.launch, executable, self.stream)

    def launch_writes(self, launch: Launch, address: int) -> bool:
        """Whether a launch writes the buffer."""
        (base,) = [buffer.base for buffer in buffers_of(self.pool) if buffer.address == address]
        base.zero_()
        torch.cuda.synchronize()
        launch()
        torch.cuda.synchronize()
        return bool((base == MARK).all())

    def handed_out(self) -> set[int]:
        """What a capture on a handle of its own and eager work on two streams get now, all of it held at once."""
        held: list[torch.Tensor] = []

        def acquire_all() -> None:
            with contextlib.suppress(CaptureGrowthError):
                while True:
                    held.append(self.pool.acquire(*SHAPE))

        graph = self.raw.capture(acquire_all, stream=self._looks_on)
        for stream in (torch.cuda.current_stream(), self.stream):
            with torch.cuda.stream(stream):
                held += [self.pool.acquire(*SHAPE) for _ in range(3)]
        found = {tensor.data_ptr() for tensor in held}
        assert len(found) == len(held), "two live tensors share memory"
        self.raw.destroy(graph)
        return found

    def comes_back(self, address: int) -> bool:
        return in_the_end(lambda: self.pool.take_back() or address in self.handed_out())


def in_the_end(condition: Callable[[], bool]) -> bool:
    """Whether it becomes true: destructors run on a thread of the driver."""
    end = time.monotonic() + 20
    while time.monotonic() < end:
        torch.cuda.synchronize()
        if condition():
            return True
        time.sleep(0.01)
    return False


@pytest.fixture
def world() -> Iterator[World]:
    with ScalePool("cuda", growth_in_capture="error") as pool:
        scales = pool.acquire(*SHAPE).fill_(MARK)  # loads the kernels of the tests
        torch.zeros(1, device="cuda").add_(1)
        torch.zeros(2, dtype=torch.uint8, device="cuda")[1:].copy_(scales.view(-1)[:1])
        torch.cuda._sleep(1)
        del scales
        pool.trim()
        pool.reserve(*SHAPE, copies=4)
        yield World(pool)


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
    clone = world.raw("cuGraphClone", graph)
    world.raw.destroy(graph)
    yield address, None
    second = world.raw("cuGraphClone", clone)
    world.raw.destroy(clone)
    executable = world.raw.instantiate(second)
    world.raw.destroy(second)
    yield address, world.launch(executable)
    world.raw.destroy(executable)


def a_child_graph(world: World) -> Story:
    graph, address = world.graph()
    parent = world.raw("cuGraphCreate", 0)
    world.raw.add_child(parent, graph)
    world.raw.destroy(graph)
    yield address, None
    executable = world.raw.instantiate(parent)
    world.raw.destroy(parent)
    yield address, world.launch(executable)
    world.raw.destroy(executable)


def a_child_of_a_child_in_a_clone(world: World) -> Story:
    graph, address = world.graph()
    middle, parent = world.raw("cuGraphCreate", 0), world.raw("cuGraphCreate", 0)
    world.raw.add_child(middle, graph)
    world.raw.add_child(parent, middle)
    clone = world.raw("cuGraphClone", parent)
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


def an_executable_of_torch_updated_to_a_graph_of_another_handle(world: World) -> Story:
    graphs = [torch.cuda.CUDAGraph(keep_graph=True) for _ in range(2)]
    for graph in graphs:
        with capture(graph, pool=world.pool):
            world.write()
    first, second = (world.raw.driver.CUgraph(graph.raw_cuda_graph()) for graph in graphs)
    executable = world.raw.instantiate(first)
    assert world.raw.update(executable, second)
    for graph in graphs:
        graph.reset()
    yield world.addresses[1], world.launch(executable)
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
    parent = world.raw("cuGraphCreate", 0)
    node = world.raw.add_child(parent, first)
    executable = world.raw.instantiate(parent)
    world.raw("cuGraphExecChildGraphNodeSetParams", executable, node, second)
    world.raw.destroy(parent, first, second)
    yield address, world.launch(executable)
    world.raw.destroy(executable)


def the_body_of_a_conditional_node(world: World) -> Story:
    parent = world.raw("cuGraphCreate", 0)
    _, address = world.graph(into=world.raw.add_conditional(parent))
    yield address, None
    executable = world.raw.instantiate(parent)
    yield address, world.launch(executable)
    world.raw.destroy(parent)
    yield address, world.launch(executable)
    world.raw.destroy(executable)


def a_body_captured_while_its_parent_is(world: World) -> Story:
    stream = torch.cuda.Stream()

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
    parents = [world.raw("cuGraphCreate", 0) for _ in range(2)]
    addresses = [world.graph(into=world.raw.add_conditional(parent))[1] for parent in parents]
    executable = world.raw.instantiate(parents[0])
    updated = world.raw.update(executable, parents[1])
    world.raw.destroy(*parents)
    yield addresses[updated], world.launch(executable)
    world.raw.destroy(executable)


def two_captures_into_one_graph(world: World) -> Story:
    """Nothing orders them."""
    graph = world.raw("cuGraphCreate", 0)
    (_, first), (_, second) = world.graph(into=graph), world.graph(into=graph)
    assert first != second
    executable = world.raw.instantiate(graph)
    world.raw.destroy(graph)
    yield first, world.launch(executable)
    yield second, world.launch(executable)
    world.raw.destroy(executable)


def a_raw_capture_of_torch(world: World, mode: str) -> Story:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(torch.cuda.Stream()):
        graph.capture_begin(capture_error_mode=mode.lower())
        world.write()
        graph.capture_end()
    yield world.addresses[-1], graph.replay
    graph.reset()


def a_capture_in_mode(world: World, mode: str) -> Story:
    graph, address = world.graph(mode=mode)
    executable = world.raw.instantiate(graph)
    world.raw.destroy(graph)
    yield address, world.launch(executable)
    world.raw.destroy(executable)


STORIES = [
    a_graph_that_is_not_instantiated_any_more,
    the_second_instantiation,
    a_clone_of_a_clone,
    a_child_graph,
    a_child_of_a_child_in_a_clone,
    an_executable_updated_to_another_graph,
    an_executable_of_torch_updated_to_a_graph_of_another_handle,
    an_executable_updated_there_and_back,
    an_executable_whose_update_was_refused,
    a_child_node_set_to_another_graph,
    the_body_of_a_conditional_node,
    a_body_captured_while_its_parent_is,
    a_body_of_an_executable_that_was_updated,
    two_captures_into_one_graph,
    *(functools.partial(story, mode=mode) for story in (a_raw_capture_of_torch, a_capture_in_mode) for mode in MODES),
]


def _name(story: Any) -> str:
    return (
        story.__name__
        if callable(story) and hasattr(story, "__name__")
        else f"{story.func.__name__}_{story.keywords['mode']}"
    )


@pytest.mark.parametrize("story", STORIES, ids=_name)
def test_a_buffer_stays_with_what_may_write_it_and_comes_back_afterwards(
    world: World, story: Callable[[World], Story]
) -> None:
    steps = 0
    for address, launch in story(world):
        steps += 1
        for _ in range(3):
            torch.cuda.synchronize()
            world.pool.take_back()
            assert address not in world.handed_out()
        if launch is not None:
            assert world.launch_writes(launch, address), "the story is told wrong: nothing writes the buffer"
            assert address not in world.handed_out()
    assert steps
    assert world.addresses
    for address in set(world.addresses):
        assert world.comes_back(address)
    assert in_the_end(lambda: world.pool.captures() == 0)


def test_what_an_updated_executable_does_not_write_any_more_comes_back(world: World) -> None:
    first, left = world.graph()
    second, _ = world.graph()
    executable = world.raw.instantiate(first)
    assert world.raw.update(executable, second)
    world.raw.destroy(first)
    assert world.comes_back(left)
    world.raw.destroy(executable, second)


@pytest.mark.parametrize("what", ["destroyed", "updated"])
def test_a_launch_in_flight_keeps_the_buffer_until_it_is_over(world: World, what: str) -> None:
    def slow() -> None:
        torch.cuda._sleep(int(1e9))
        world.write()

    def fast() -> None:
        torch.cuda._sleep(1)
        world.write()

    first, second = world.raw.capture(slow), world.raw.capture(fast)
    address = world.addresses[0]
    executable = world.raw.instantiate(first)
    world.raw.destroy(first)
    world.raw.launch(executable, world.stream)
    over = torch.cuda.Event()
    over.record(world.stream)
    if what == "updated":
        assert world.raw.update(executable, second)
    else:
        world.raw.destroy(executable)
    looks = 0
    while True:
        world.pool.take_back()
        found = world.handed_out()
        if over.query():
            break
        assert address not in found
        looks += 1
    assert looks or what == "updated", "the launch was over at once; an update may wait for it"
    assert world.comes_back(address)
    world.raw.destroy(second, *([executable] if what == "updated" else []))


@pytest.mark.parametrize("shared", [False, True], ids=["a handle each", "one handle"])
@pytest.mark.parametrize("mode", MODES)
def test_two_captures_with_forks_under_way_at_once_share_only_what_runs_one_after_the_other(
    world: World, mode: str, shared: bool
) -> None:
    world.pool.reserve(*SHAPE, copies=8)
    branches = [(torch.cuda.Stream(), torch.cuda.Stream()) for _ in range(2)]  # where each capture began, and a fork
    seen = [torch.zeros(2, dtype=torch.uint8, device="cuda") for _ in range(2)]
    got: dict[tuple[int, int], set[int]] = {}
    torch.cuda.synchronize()
    with world.pool.shared_captures() if shared else contextlib.nullcontext():
        for began, fork in branches:
            world.raw.begin(began, mode)
            fork.wait_stream(began)
        for _ in range(2):
            for branch, number in ((0, 0), (1, 1), (1, 0), (0, 1)):
                with torch.cuda.stream(branches[number][branch]):
                    scales = world.pool.acquire(*SHAPE)
                    got.setdefault((number, branch), set()).add(scales.data_ptr())
                    scales.fill_(10 * number + branch + 1)
                    torch.cuda._sleep(1_000_000)
                    seen[number][branch : branch + 1].copy_(scales.view(-1)[:1])
                    del scales
        graphs = []
        for began, fork in branches:
            began.wait_stream(fork)
            graphs.append(world.raw.end(began))
    for number in range(2):
        assert got[number, 0].isdisjoint(got[number, 1])
    assert all(len(addresses) == 1 for addresses in got.values()), "free again, in the order of one stream"
    of_first, of_second = (got[number, 0] | got[number, 1] for number in range(2))
    assert shared or of_first.isdisjoint(of_second)
    executables = [world.raw.instantiate(graph) for graph in graphs]
    for _ in range(20):
        for executable, (stream, _) in zip(executables, branches, strict=True):
            world.raw.launch(executable, branches[0][0] if shared else stream)
    torch.cuda.synchronize()
    assert [one.tolist() for one in seen] == [[1, 2], [11, 12]]
    world.raw.destroy(*graphs, *executables)
    assert all(world.comes_back(address) for address in of_first | of_second)


@pytest.mark.parametrize("mode", MODES)
def test_a_reader_stream_that_is_capturing_keeps_its_capture_and_the_buffer(world: World, mode: str) -> None:
    reader, total = torch.cuda.Stream(), torch.zeros(1, device="cuda")
    with torch.cuda.stream(world.stream):
        scales = world.pool.acquire(*SHAPE)
        address = scales.data_ptr()
    torch.cuda.synchronize()
    with torch.cuda.stream(reader):
        torch.cuda._sleep(1_000_000)
        copy = scales.clone()
    world.pool.record_stream(scales, reader)
    del scales
    others = []

    def body() -> None:
        total.add_(1)
        with torch.cuda.stream(world.stream):
            others.append(world.pool.acquire(*SHAPE).data_ptr())
        total.add_(1)

    graph = world.raw.capture(body, mode, stream=reader)
    assert others
    assert others[0] != address
    executable = world.raw.instantiate(graph)
    world.raw.launch(executable, reader)
    torch.cuda.synchronize()
    assert total.item() == 2
    assert world.comes_back(address)
    world.raw.destroy(graph, executable)
    del copy


@pytest.mark.parametrize("mode", MODES)
def test_a_miss_on_another_stream_leaves_a_capture_of_the_same_thread_alone(world: World, mode: str) -> None:
    """A new buffer takes ``cudaMalloc``, which a capture forbids that is not relaxed."""
    total = torch.zeros(1, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.empty_cache()

    def body() -> None:
        total.add_(1)
        with torch.cuda.stream(world.stream):
            for rows in (1 << 10, 1 << 14, 1 << 15):  # 1, 16 and 32 MiB: segments of their own
                world.pool.acquire(rows, 1 << 14, LAYOUT)
        total.add_(1)

    before = world.pool.misses
    graph = world.raw.capture(body, mode)
    assert world.pool.misses == before + 3
    executable = world.raw.instantiate(graph)
    world.raw.launch(executable, world.stream)
    torch.cuda.synchronize()
    assert total.item() == 2
    world.raw.destroy(graph, executable)


def test_a_capture_that_ends_in_an_error_gives_its_buffer_back(world: World) -> None:
    stream, fork = torch.cuda.Stream(), torch.cuda.Stream()
    world.raw.begin(stream)
    with torch.cuda.stream(stream):
        world.write()
    fork.wait_stream(stream)
    with torch.cuda.stream(fork):
        world.write()  # never joined
    first, second = world.addresses
    assert first != second
    error, *_ = world.raw.driver.cuStreamEndCapture(world.raw.stream(stream))
    assert error == world.raw.driver.CUresult.CUDA_ERROR_STREAM_CAPTURE_UNJOINED
    assert world.comes_back(first)
    assert world.comes_back(second)

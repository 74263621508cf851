"""Graphs that somebody else makes, clones, nests and updates: a buffer stays with whatever may still write it."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator

import pytest
import torch
from support.graph_stories import LAYOUT, MARK, SHAPE, STORIES, Story, World, check_that_an_update_gives_back, tell
from support.raw_graphs import MODES, RawGraphs

from safealloc import ScalePool, capture

pytestmark = pytest.mark.gpu


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
        yield World(pool, RawGraphs())


@pytest.mark.parametrize("story", STORIES, ids=lambda story: story.__name__)
def test_a_buffer_stays_with_what_may_write_it_and_comes_back_afterwards(
    world: World, story: Callable[[World], Story]
) -> None:
    tell(world, story)


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


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("story", [a_raw_capture_of_torch, a_capture_in_mode])
def test_captures_in_every_mode(world: World, story: Callable[[World, str], Story], mode: str) -> None:
    tell(world, functools.partial(story, mode=mode))


def test_an_executable_of_torch_updated_to_a_graph_of_another_handle(world: World) -> None:
    tell(world, an_executable_of_torch_updated_to_a_graph_of_another_handle)


def test_what_an_updated_executable_does_not_write_any_more_comes_back(world: World) -> None:
    check_that_an_update_gives_back(world)


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

"""Graphs that somebody else makes, clones, nests and updates, with a stand-in for CUDA that follows its rules."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

import pytest
from support.fake_graphs import FakeGraphs
from support.graph_stories import SHAPE, STORIES, Story, World, check_that_an_update_gives_back, tell

from safealloc import ScalePool
from safealloc.pool import driver

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="semaphores are libc's")


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    graphs = FakeGraphs(monkeypatch)
    with ScalePool("cpu", growth_in_capture="error") as pool:
        pool._raw_stream = lambda index: graphs.current
        pool._capturing = lambda stream: stream in graphs.capturing
        pool._capture = lambda: driver.under_way(graphs.current)
        pool.reserve(*SHAPE, copies=4)
        yield World(pool, graphs)


@pytest.mark.parametrize("story", STORIES, ids=lambda story: story.__name__)
def test_a_buffer_stays_with_what_may_write_it_and_comes_back_afterwards(
    world: World, story: Callable[[World], Story]
) -> None:
    tell(world, story)


def test_what_an_updated_executable_does_not_write_any_more_comes_back(world: World) -> None:
    check_that_an_update_gives_back(world)

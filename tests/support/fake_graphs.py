"""A stand-in for :class:`support.raw_graphs.RawGraphs`: graphs that write a CPU's memory and own user objects.

Who owns them follows the CUDA Programming Guide, "CUDA User Objects": clones, child graphs and executable graphs copy the
references of a graph; an update replaces those of its target.
"""

# ruff: noqa: N802 - functions of the CUDA driver have their names

from __future__ import annotations

import contextlib
import ctypes
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from support.fake_captures import FakeCuda
from support.graph_stories import SHAPE
from torch import Tensor

from safealloc import ScaleSpec

NBYTES = ScaleSpec(*SHAPE).nbytes


class Graph:
    """Nodes: an address that is written and the value, or a graph; and references to user objects."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.nodes: list[tuple[int, int] | Graph] = []
        self.references: list[int] = []

    def topology(self) -> list[Any]:
        return [node.topology() if isinstance(node, Graph) else "write" for node in self.nodes]


class FakeGraphs(FakeCuda):
    """Streams are numbers; what is launched is over at once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(monkeypatch)
        self.current = 1
        self._streams = iter(range(2, 1 << 30))
        self._graphs: dict[int, Graph] = {}
        self._counts: Counter[int] = Counter()

    def new_stream(self) -> int:
        return next(self._streams)

    @contextlib.contextmanager
    def on(self, stream: int) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before

    def synchronize(self) -> None:
        pass

    def fill(self, tensor: Tensor, value: int) -> None:
        self._graphs[self.capturing[self.current][1]].nodes.append((tensor.data_ptr(), value))

    def capture(
        self, body: Callable[[], object], mode: str = "", into: Graph | None = None, stream: int | None = None
    ) -> Graph:
        stream = stream or self.new_stream()
        graph = into or self.create()
        self.capturing[stream] = next(self._ids), graph.number
        with self.on(stream):
            body()
        del self.capturing[stream]
        return graph

    def create(self) -> Graph:
        graph = Graph(next(self._ids))
        self._graphs[graph.number] = graph
        return graph

    def clone(self, graph: Graph) -> Graph:
        copy = self.create()
        copy.nodes = [self.clone(node) if isinstance(node, Graph) else node for node in graph.nodes]
        copy.references = list(graph.references)
        self._counts.update(copy.references)
        return copy

    instantiate = clone

    def launch(self, executable: Graph, stream: int) -> None:
        for node in executable.nodes:
            if isinstance(node, Graph):
                self.launch(node, stream)
            else:
                ctypes.memset(node[0], node[1], NBYTES)

    def destroy(self, *graphs: Graph) -> None:
        for graph in graphs:
            self.destroy(*(node for node in graph.nodes if isinstance(node, Graph)))
            for number in graph.references:
                self._counts[number] -= 1
                if not self._counts[number]:
                    self.run_destructor(number)
            del self._graphs[graph.number]

    def update(self, executable: Graph, graph: Graph) -> bool:
        if executable.topology() != graph.topology():
            return False
        new, old = self.clone(graph), self.create()
        old.nodes, old.references = executable.nodes, executable.references
        executable.nodes, executable.references = new.nodes, new.references
        del self._graphs[new.number]
        self.destroy(old)
        return True

    def add_child(self, parent: Graph, child: Graph) -> int:
        parent.nodes.append(self.clone(child))
        return len(parent.nodes) - 1

    def set_child(self, executable: Graph, node: int, child: Graph) -> None:
        old = executable.nodes[node]
        assert isinstance(old, Graph)
        executable.nodes[node] = self.clone(child)
        self.destroy(old)

    def add_conditional(self, graph: Graph) -> Graph:
        body = self.create()
        graph.nodes.append(body)
        return body

    def add_conditional_in_capture(self, stream: int) -> Graph:
        return self.add_conditional(self._graphs[self.capturing[stream][1]])

    def cuGraphRetainUserObject(self, graph: Any, user_object: Any, count: int, flags: int) -> int:
        self._graphs[graph.value].references.append(user_object.value)
        self._counts[user_object.value] += 1
        return 0

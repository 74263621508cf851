"""CUDA graphs by the driver's own calls, as a stranger makes them: ``cuda.bindings``, nothing of ``torch.cuda.graph``."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch

MODES = ("GLOBAL", "THREAD_LOCAL", "RELAXED")


class RawGraphs:
    """Calls of the driver by name, each of which has to succeed, and what is put together of them."""

    def __init__(self) -> None:
        reason = "graphs are made by cuda.bindings"
        self.driver: Any = pytest.importorskip("cuda.bindings.driver", reason=reason)
        major = int(pytest.importorskip("cuda.bindings").__version__.split(".")[0])
        self._edge_data: tuple[None, ...] = (None,) if major >= 13 else ()

    def __call__(self, name: str, *arguments: Any) -> Any:
        error, *values = getattr(self.driver, name)(*arguments)
        assert error == self.driver.CUresult.CUDA_SUCCESS, f"{name}: {error.name}"
        return values[0] if len(values) == 1 else tuple(values)

    def stream(self, stream: torch.cuda.Stream) -> Any:
        return self.driver.CUstream(stream.cuda_stream)

    # --- streams ------------------------------------------------------------------------------------------------------

    def new_stream(self) -> torch.cuda.Stream:
        return torch.cuda.Stream()

    def on(self, stream: torch.cuda.Stream) -> AbstractContextManager[Any]:
        return torch.cuda.stream(stream)

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def fill(self, tensor: torch.Tensor, value: int) -> None:
        """Write a tensor on the current stream."""
        tensor.fill_(value)

    # --- captures -----------------------------------------------------------------------------------------------------

    def begin(self, stream: torch.cuda.Stream, mode: str = "THREAD_LOCAL", into: Any = None) -> None:
        """Begin a capture, into a graph that is there already where one is given."""
        mode = getattr(self.driver.CUstreamCaptureMode, f"CU_STREAM_CAPTURE_MODE_{mode}")
        if into is None:
            self("cuStreamBeginCapture", self.stream(stream), mode)
        else:
            self("cuStreamBeginCaptureToGraph", self.stream(stream), into, None, None, 0, mode)

    def end(self, stream: torch.cuda.Stream) -> Any:
        return self("cuStreamEndCapture", self.stream(stream))

    def capture(
        self,
        body: Callable[[], object],
        mode: str = "THREAD_LOCAL",
        into: Any = None,
        stream: torch.cuda.Stream | None = None,
    ) -> Any:
        """The graph of what ``body`` launches on a stream, which is current then."""
        stream = stream or self.new_stream()
        with self.on(stream):
            self.begin(stream, mode, into)
            try:
                body()
            finally:
                graph = self.end(stream)
        return graph

    # --- graphs -------------------------------------------------------------------------------------------------------

    def create(self) -> Any:
        return self("cuGraphCreate", 0)

    def clone(self, graph: Any) -> Any:
        return self("cuGraphClone", graph)

    def instantiate(self, graph: Any) -> Any:
        return self("cuGraphInstantiate", graph, 0)

    def launch(self, executable: Any, stream: torch.cuda.Stream) -> None:
        self("cuGraphLaunch", executable, self.stream(stream))

    def destroy(self, *graphs: Any) -> None:
        """Graphs and executable graphs."""
        for graph in graphs:
            executable = isinstance(graph, self.driver.CUgraphExec)
            self("cuGraphExecDestroy" if executable else "cuGraphDestroy", graph)

    def update(self, executable: Any, graph: Any) -> bool:
        """``cuGraphExecUpdate``; False where the driver finds that the graphs differ too much."""
        error, _ = self.driver.cuGraphExecUpdate(executable, graph)
        if error == self.driver.CUresult.CUDA_ERROR_GRAPH_EXEC_UPDATE_FAILURE:
            return False
        assert error == self.driver.CUresult.CUDA_SUCCESS, error.name
        return True

    def add_child(self, parent: Any, child: Any) -> Any:
        """A node that is a copy of a graph."""
        return self("cuGraphAddChildGraphNode", parent, None, 0, child)

    def set_child(self, executable: Any, node: Any, child: Any) -> None:
        """Change what a node of an executable graph is a copy of."""
        self("cuGraphExecChildGraphNodeSetParams", executable, node, child)

    def add_conditional(self, graph: Any) -> Any:
        """The empty body of a new conditional node, which runs at each launch."""
        return self._conditional(graph, [None, *self._edge_data, 0])[1]

    def add_conditional_in_capture(self, stream: torch.cuda.Stream) -> Any:
        """The same, of a node that comes next in a capture under way."""
        status, _, graph, *dependencies = self("cuStreamGetCaptureInfo", self.stream(stream))
        assert status == self.driver.CUstreamCaptureStatus.CU_STREAM_CAPTURE_STATUS_ACTIVE
        node, body = self._conditional(graph, dependencies)
        replace = self.driver.CUstreamUpdateCaptureDependencies_flags.CU_STREAM_SET_CAPTURE_DEPENDENCIES
        self("cuStreamUpdateCaptureDependencies", self.stream(stream), [node], *self._edge_data, 1, replace.value)
        return body

    def _conditional(self, graph: Any, dependencies: list[Any]) -> tuple[Any, Any]:
        context = self("cuCtxGetCurrent")
        parameters = self.driver.CUgraphNodeParams()
        parameters.type = self.driver.CUgraphNodeType.CU_GRAPH_NODE_TYPE_CONDITIONAL
        runs = (1, self.driver.CU_GRAPH_COND_ASSIGN_DEFAULT)
        parameters.conditional.handle = self("cuGraphConditionalHandleCreate", graph, context, *runs)
        parameters.conditional.type = self.driver.CUgraphConditionalNodeType.CU_GRAPH_COND_TYPE_IF
        parameters.conditional.size = 1
        parameters.conditional.ctx = context
        node = self("cuGraphAddNode", graph, *dependencies, parameters)
        return node, parameters.conditional.phGraph_out[0]

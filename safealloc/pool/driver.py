"""Which CUDA graph capture a stream is in, and how long its graph lives.

PyTorch tells whether the current stream is capturing, but neither which capture it is nor when a graph that somebody else
made is gone. The CUDA driver tells both, for every capture of the process, whoever began it:

- ``cuStreamGetCaptureInfo`` gives a capture an id, the same on each stream that was forked into it, never used again.
- A *user object* retained by the graph under capture follows it into the executable graph, and its destructor runs when the
  last of them is destroyed and no replay is in flight (CUDA Programming Guide, "CUDA User Objects"). The destructor runs on
  a thread of the driver, where Python must not: here it is libc's ``sem_post``, and the semaphore is looked at later.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Callable, Hashable

import torch

_ACTIVE = 1  # CU_STREAM_CAPTURE_STATUS_ACTIVE
_NO_DESTRUCTOR_SYNC = 1  # CU_USER_OBJECT_NO_DESTRUCTOR_SYNC, the only kind there is
_MOVE = 1  # CU_GRAPH_USER_OBJECT_MOVE: the graph takes over our reference
_SEM_T_BYTES = 64  # sizeof(sem_t) is 32 on 64-bit glibc and musl


class Capture:
    """One capture, and the graph that came out of it.

    Attributes:
        id: the driver's number for the capture, unique in the process.
        graph: the ``CUgraph``, valid while the capture is under way.
        handle: the graph memory-pool handle that the graph was captured with, if who began the capture said so.
    """

    def __init__(self, capture_id: int, graph: int) -> None:
        self.id = capture_id
        self.graph = graph
        self.handle: Hashable | None = None
        self._kept: dict[int, object] = {}
        self._destroyed = _Semaphore()
        # A driver without user objects: what the graph may touch is never reused.
        self._followed = _retain(graph, self._destroyed) and _retain(graph, _all_destroyed())

    @property
    def alive(self) -> bool:
        """False once the graph is destroyed and its last replay is over (or its capture failed)."""
        return not self._followed or self._destroyed.value == 0

    def keep(self, thing: object) -> None:
        """Hold ``thing`` until the graph is gone, even if everybody else forgets it."""
        self._kept[id(thing)] = thing


_lock = threading.Lock()
_captures: dict[int, Capture] = {}  # by id; owns what living graphs use
_found_destroyed = 0


def under_way(stream: int) -> Capture | None:
    """The capture that a raw CUDA stream is part of, or ``None``.

    Args:
        stream: ``torch.cuda.Stream.cuda_stream``.
    """
    status, capture_id, graph = ctypes.c_int(), ctypes.c_ulonglong(), ctypes.c_void_p()
    error = _libcuda().cuStreamGetCaptureInfo_v2(
        ctypes.c_void_p(stream), ctypes.byref(status), ctypes.byref(capture_id), ctypes.byref(graph), None, None
    )
    if error or status.value != _ACTIVE or graph.value is None:
        return None
    with _lock:
        capture = _captures.get(capture_id.value)
        if capture is None:
            capture = _captures[capture_id.value] = Capture(capture_id.value, graph.value)
        return capture


def destroyed() -> int:
    """How many graphs were found destroyed so far; lets go of what only they used.

    One look at one semaphore where nothing has changed: an engine holds thousands of graphs.
    """
    global _found_destroyed
    if not _captures or _all_destroyed().value == _found_destroyed:
        return _found_destroyed
    with _lock:
        dead = [capture for capture in _captures.values() if not capture.alive]
        for capture in dead:
            del _captures[capture.id]
        _found_destroyed += len(dead)
        return _found_destroyed


def stream_queries(device: torch.device) -> tuple[Callable[[int], int], Callable[[int], bool]]:
    """Two functions: the current raw stream of a device index, and whether a raw stream is capturing.

    For one thread at a time.
    """
    if device.type == "cuda":
        return torch._C._cuda_getCurrentRawStream, StreamStatus().capturing
    return _no_stream, _never_capturing


def _no_stream(index: int) -> int:
    return 0


def _never_capturing(stream: int) -> bool:
    return False


class StreamStatus:
    """Whether a raw stream is capturing, without what it takes to find out which capture; for one thread at a time.

    On the path of every acquire. The driver is asked directly, with the interpreter's lock held: what PyTorch has looks up
    the current device and its context first, and costs more.
    """

    def __init__(self) -> None:
        self._status = ctypes.c_int()
        self._reference = ctypes.byref(self._status)
        self._query = ctypes.PyDLL("libcuda.so.1").cuStreamIsCapturing
        self._pointers: dict[int, ctypes.c_void_p] = {}

    def capturing(self, stream: int) -> bool:
        """True in a capture, an invalidated one too; of stream 0, which CUDA does not capture, nobody needs to ask."""
        pointer = self._pointers.get(stream)
        if pointer is None:
            pointer = self._pointers[stream] = ctypes.c_void_p(stream)
        if self._query(pointer, self._reference):
            raise RuntimeError(f"cuStreamIsCapturing failed for stream {stream:#x}")
        return self._status.value != 0


class _Semaphore:
    """A ``sem_t`` that is never freed: graphs may outlive the interpreter, and the driver posts it when they go."""

    def __init__(self) -> None:
        self.address = ctypes.c_void_p(_libc().calloc(1, _SEM_T_BYTES))
        _libc().sem_init(self.address, 0, 0)

    @property
    def value(self) -> int:
        value = ctypes.c_int()
        _libc().sem_getvalue(self.address, ctypes.byref(value))
        return value.value


@functools.cache
def _all_destroyed() -> _Semaphore:
    """Posted once for each graph that is destroyed."""
    return _Semaphore()


def _retain(graph: int, semaphore: _Semaphore) -> bool:
    """Have the graph post the semaphore when it goes."""
    user_object = ctypes.c_void_p()
    post = ctypes.cast(_libc().sem_post, ctypes.c_void_p)
    error = _libcuda().cuUserObjectCreate(ctypes.byref(user_object), semaphore.address, post, 1, _NO_DESTRUCTOR_SYNC)
    return not error and not _libcuda().cuGraphRetainUserObject(ctypes.c_void_p(graph), user_object, 1, _MOVE)


@functools.cache
def _libcuda() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


@functools.cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None)
    libc.calloc.restype = ctypes.c_void_p
    return libc

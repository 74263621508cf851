"""Which CUDA graph capture a stream is in, and how long its graph lives.

PyTorch tells whether the current stream is capturing, but neither which capture it is nor when a graph that somebody else
made is gone. The CUDA driver tells both, for every capture of the process, whoever began it:

- ``cuStreamGetCaptureInfo`` gives a capture an id, the same on each stream that was forked into it, never used again.
- A *user object* retained by the graph under capture follows it into clones, child graphs and executable graphs, and an
  executable graph that is updated has those of the graph that it was updated to. Its destructor runs when the last of them is
  destroyed and no replay is in flight (CUDA Programming Guide, "CUDA User Objects"). That is on a thread of the driver, where
  Python must not run: here it is libc's ``sem_post``, and the semaphore is looked at later.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Callable, Hashable, Iterator

import torch

from safealloc import _torch

_ACTIVE = 1  # CU_STREAM_CAPTURE_STATUS_ACTIVE
_NO_DESTRUCTOR_SYNC = 1  # CU_USER_OBJECT_NO_DESTRUCTOR_SYNC, the only kind there is
_RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED
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


_captures: dict[int, Capture] = {}  # by id; owns what living graphs use. No lock: finalizers may come in at any line
_found_destroyed: list[int] = []  # the same numbers, of those whose graphs are gone


def under_way(stream: int) -> Capture | None:
    """The capture that a raw CUDA stream is part of, or ``None``; stream 0 is never in one.

    Args:
        stream: ``torch.cuda.Stream.cuda_stream``.
    """
    if not stream:
        return None
    status, capture_id, graph = ctypes.c_int(), ctypes.c_ulonglong(), ctypes.c_void_p()
    error = _libcuda().cuStreamGetCaptureInfo_v2(
        ctypes.c_void_p(stream), ctypes.byref(status), ctypes.byref(capture_id), ctypes.byref(graph), None, None
    )
    if error or status.value != _ACTIVE or graph.value is None:
        return None
    capture = _captures.get(capture_id.value)
    if capture is None:
        made = Capture(capture_id.value, graph.value)
        capture = _captures.setdefault(capture_id.value, made)
        if capture is not made:  # a finalizer came in; the graph will post for this one too
            _captures[-id(made)] = made
    return capture


def destroyed() -> int:
    """How many graphs were found destroyed so far; lets go of what only they used.

    One look at one semaphore where nothing has changed: an engine holds thousands of graphs. A graph posts two semaphores,
    one after the other, and is looked for until it was found.
    """
    if _captures and _all_destroyed().value != len(_found_destroyed):
        for number in [number for number, capture in list(_captures.items()) if not capture.alive]:
            if _captures.pop(number, None) is not None:
                _found_destroyed.append(number)
    return len(_found_destroyed)


def current_stream(device: torch.device) -> Callable[[int], int]:
    """What tells the raw stream that is current, by the index of the device; on a CPU always 0."""
    return _torch.current_raw_stream if device.type == "cuda" else _no_stream


def capture_query(device: torch.device) -> Callable[[int], bool]:
    """What tells whether a raw stream is capturing, an invalidated capture too; on a CPU always false."""
    return _stream_status().capturing if device.type == "cuda" else _never


def _no_stream(index: int) -> int:
    return 0


def _never(stream: int) -> bool:
    return False


class _StreamStatus:
    """Whether a raw stream is capturing, without what it takes to find out which capture.

    On the path of every acquire. The driver is asked directly, with the interpreter's lock held: what PyTorch has looks up
    the current device and its context first, and costs more. Each stream has an answer of its own, so that whoever comes in
    between the question and the look, a thread or a handler, leaves an answer about the same stream.
    """

    def __init__(self) -> None:
        self._query = ctypes.PyDLL("libcuda.so.1").cuStreamIsCapturing
        self._streams: dict[int, tuple[ctypes.c_void_p, object, ctypes.c_int]] = {}

    def capturing(self, stream: int) -> bool:
        """True in a capture, an invalidated one too; of stream 0, which CUDA does not capture, nobody needs to ask."""
        try:
            pointer, reference, answer = self._streams[stream]
        except KeyError:
            pointer, reference, answer = self._add(stream)
        if error := self._query(pointer, reference):
            raise RuntimeError(f"cuStreamIsCapturing failed with {error} for stream {stream:#x}")
        return answer.value != 0

    def _add(self, stream: int) -> tuple[ctypes.c_void_p, object, ctypes.c_int]:
        answer = ctypes.c_int()
        return self._streams.setdefault(stream, (ctypes.c_void_p(stream), ctypes.byref(answer), answer))


@functools.cache
def _stream_status() -> _StreamStatus:
    return _StreamStatus()


def may_record(stream: int) -> bool:
    """Whether an event can be recorded on a raw stream without ending up in somebody's capture, or ending one."""
    try:
        return not _stream_status().capturing(stream)
    except RuntimeError:  # of stream 0 it says that a stream which waits for it is capturing
        return False


def record_event(stream: int, device: torch.device) -> torch.cuda.Event:
    """An event recorded on a raw stream, for which :func:`may_record` is true."""
    on = torch.cuda.ExternalStream(stream, device=device) if stream else torch.cuda.default_stream(device)
    event = torch.cuda.Event()
    event.record(on)
    return event


@contextlib.contextmanager
def relaxed() -> Iterator[None]:
    """Inside, this thread may allocate and ask events, also while it or another captures in a mode that forbids that."""
    mode = ctypes.c_int(_RELAXED)
    exchange = _libcuda().cuThreadExchangeStreamCaptureMode
    try:
        exchange(ctypes.byref(mode))
        yield
    finally:
        if mode.value != _RELAXED:  # else it was relaxed before, or an interrupt came before it was exchanged
            exchange(ctypes.byref(mode))


def event_passed(event: torch.cuda.Event) -> bool:
    """Whether an event has passed, also while a capture is under way."""
    with relaxed():
        return bool(event.query())


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

"""Memory of PyTorch's caching allocator that nobody else allocates from or unmaps."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch

from safealloc.errors import SafeAllocError

_T = TypeVar("_T")


def check_allocator() -> None:
    """Raises: SafeAllocError: PyTorch allocates CUDA memory otherwise than by its native caching allocator."""
    backend = torch.cuda.get_allocator_backend()
    if backend != "native":
        raise SafeAllocError(
            f"a pool needs PyTorch's native CUDA allocator, this process has {backend!r} (PYTORCH_CUDA_ALLOC_CONF or "
            "torch.cuda.memory.change_current_allocator), which has no private memory pools"
        )


class PrivateMemory:
    """A private pool of the CUDA caching allocator, as graphs have theirs.

    What is allocated in :meth:`allocate` lies outside of any memory pool that was active before: a graph's, or a framework's
    that unmaps its memory to sleep. This is what a ``torch.cuda.MemPool`` is too; but destroying one of those while any
    thread captures a graph or is in a ``use_mem_pool`` aborts the process (an internal assertion in a destructor, seen in
    torch 2.11), and a pool may be closed or forgotten at any time. Releasing only the id is safe then.
    """

    def __init__(self, device: torch.device) -> None:
        self._index = device.index
        self.id = torch.cuda.graph_pool_handle()
        # One reference of our own, which the begin and release of allocate() do not bring to zero.
        torch._C._cuda_beginAllocateCurrentThreadToPool(self._index, self.id)
        torch._C._cuda_endAllocateToPool(self._index, self.id)
        self.release = weakref.finalize(self, _release, self._index, self.id)
        """Let ``torch.cuda.empty_cache`` have what is free here, now and later; what is in use stays. Once, at any time."""
        self.release.atexit = False

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Inside, this thread allocates here; for short programs: an interrupt at its end is not mended."""
        with torch.cuda.use_mem_pool(self, device=torch.device("cuda", self._index)):  # type: ignore[arg-type]
            yield

    def allocate(self, make: Callable[[], _T]) -> _T:
        """What ``make`` returns, with all that it allocates on this thread from here."""
        begun = [True]  # before it is: what is interrupted in between is ended in vain, which is harmless
        try:
            try:
                torch._C._cuda_beginAllocateCurrentThreadToPool(self._index, self.id)
            except RuntimeError:  # this thread allocates here already: a signal handler or a finalizer came in
                begun.clear()
            return make()
        finally:
            try:
                self._end(begun)
            finally:  # an interrupt in the line above would leave this thread allocating here for ever
                self._end(begun)

    def _end(self, begun: list[bool]) -> None:
        if begun:
            with contextlib.suppress(RuntimeError):  # it had not begun
                torch._C._cuda_endAllocateToPool(self._index, self.id)
                begun.clear()
                torch._C._cuda_releasePool(self._index, self.id)
            begun.clear()


def end_recording(device: torch.device, handle: tuple[int, int]) -> None:
    """Tell the allocator that a capture is over which failed to end.

    ``CUDAGraph.capture_end`` raises before it does so (seen in torch 2.11), and then ``empty_cache`` stops working.
    """
    try:
        torch._C._cuda_endAllocateToPool(device.index, handle)
    except RuntimeError:  # it did end
        return
    _release(device.index, handle)


def _release(index: int, handle: tuple[int, int]) -> None:
    torch._C._cuda_releasePool(index, handle)

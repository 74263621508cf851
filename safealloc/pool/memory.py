"""Memory of PyTorch's caching allocator that nobody else allocates from or unmaps."""

from __future__ import annotations

import contextlib
import weakref

import torch


class PrivateMemory:
    """A private pool of the CUDA caching allocator, as graphs have theirs.

    What is allocated in :meth:`active` lies outside of any memory pool that was active before: a graph's, or a framework's
    that unmaps its memory to sleep. This is what a ``torch.cuda.MemPool`` is too; but destroying one of those while any
    thread captures a graph or is in a ``use_mem_pool`` aborts the process (an internal assertion in a destructor, seen in
    torch 2.11), and a pool may be closed or forgotten at any time. Releasing only the id is safe then.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.id = torch.cuda.graph_pool_handle()  # what use_mem_pool looks at
        # One reference of our own, which use_mem_pool's begin and release do not bring to zero.
        torch._C._cuda_beginAllocateCurrentThreadToPool(device.index, self.id)
        torch._C._cuda_endAllocateToPool(device.index, self.id)
        self.release = weakref.finalize(self, _release, device.index, self.id)
        """Let ``torch.cuda.empty_cache`` have what is free here, now and later; what is in use stays. Once, at any time."""
        self.release.atexit = False

    def active(self) -> contextlib.AbstractContextManager[None]:
        """Inside, this thread allocates here."""
        return torch.cuda.use_mem_pool(self, device=self.device)  # type: ignore[arg-type]


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

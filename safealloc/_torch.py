"""Private names of PyTorch that a pool needs, in one place, with a test of each when it is imported.

A name that is gone, or that behaves otherwise than it did in torch 2.9 to 2.14, becomes a reason in :data:`REASONS`: a pool
logs it when it is made and takes the slower public way, and ``safealloc doctor`` shows it.
"""

from __future__ import annotations

import itertools
import logging
import sys
from collections.abc import Callable
from typing import Any

import torch

REASONS: dict[str, str] = {}
"""What does not work here, by name, and what follows; empty where everything does."""

references: Callable[[Any], int] = sys.getrefcount
logger = logging.getLogger("safealloc.pool")
_logged: set[str] = set()


def log_reasons() -> None:
    """Log each reason once in a process; called when a pool is made."""
    for name, reason in REASONS.items():
        if name not in _logged:
            _logged.add(name)
            logger.warning("torch %s has no usable %s: %s", torch.__version__, name, reason)


def _use_count() -> Callable[[int], int]:
    """How many tensors and C++ holders share a storage, by its ``_cdata``: it has to count each view, and forget it."""
    try:
        count: Callable[[int], int] = torch._C._storage_Use_Count
        base = torch.empty(4, dtype=torch.uint8, device="cpu")
        storage = base.untyped_storage()
        idle = count(storage._cdata)
        view = base.data
        counted = count(storage._cdata)
        del view
        if counted != idle + 1 or count(storage._cdata) != idle:
            raise RuntimeError(f"a view took it from {idle} to {counted}")
    except Exception as error:
        REASONS["_storage_Use_Count"] = f"no buffer is handed out twice, each call makes its own: {_named(error)}"
        disagreeing = itertools.count()
        return lambda cdata: next(disagreeing)  # no two counts agree, so that no buffer can be claimed
    return count


def _dispatch_modes() -> Callable[[], int]:
    """How many dispatch modes are active; where that is not known, pools look for fake tensors at each call."""
    try:
        modes: Callable[[], int] = torch._C._len_torch_dispatch_stack
        if modes() != len(torch.utils._python_dispatch._get_current_dispatch_mode_stack()):
            raise RuntimeError("it does not count the stack")
    except Exception as error:
        REASONS["_len_torch_dispatch_stack"] = f"each acquire looks for fake tensors: {_named(error)}"
        return lambda: 1
    return modes


def _current_raw_stream() -> Callable[[int], int]:
    """The raw CUDA stream that is current on a device, by the device's index."""
    stream: Callable[[int], int] | None = getattr(torch._C, "_cuda_getCurrentRawStream", None)
    if stream is None:
        if torch.version.cuda:
            REASONS["_cuda_getCurrentRawStream"] = "the current stream is asked for by torch.cuda.current_stream"
        return lambda index: int(torch.cuda.current_stream(index).cuda_stream)
    return stream


def _standard_deleter() -> Callable[[int], bool]:
    """Whether the memory of a storage goes back to the allocator as usual; not so once another process has it too."""
    standard: Callable[[int], bool] | None = getattr(torch._C, "_has_Standard_Deleter", None)
    if standard is None:
        if torch.version.cuda:
            REASONS["_has_Standard_Deleter"] = "buffers that a holder sends to another process are not noticed"
        return bool  # true for every address
    return standard


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


use_count = _use_count()
reusable = "_storage_Use_Count" not in REASONS
"""Whether a buffer can be handed out twice."""
dispatch_modes = _dispatch_modes()
current_raw_stream = _current_raw_stream()
standard_deleter = _standard_deleter()

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""The shortest nodes of a CUDA graph, to compare others with: kernels that do next to nothing."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from safealloc.kernels.triton_layout import gdc_launch_dependents, gdc_wait


@triton.jit
def _empty(DEPENDENT: tl.constexpr):
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()


@triton.jit
def _store(out):
    program = tl.program_id(0)
    tl.store(out + program, program)


def launch_empty(**dependent: bool) -> None:
    """One program that does nothing.

    Args:
        **dependent: what :func:`safealloc.kernels.triton_layout.dependent_launch` returns: the program lets the next kernel
            launch at once and waits for the previous one. Nothing is a normal launch.
    """
    _empty[(1,)](DEPENDENT=bool(dependent), num_warps=1, **dependent)


def launch_store(out: Tensor) -> None:
    """One program per element of ``out``, int32, which stores it."""
    _store[(out.numel(),)](out, num_warps=1)

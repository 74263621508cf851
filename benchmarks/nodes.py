# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Nodes of a CUDA graph to measure others by: kernels that do next to nothing."""

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
        **dependent: what :func:`safealloc.kernels.triton_layout.dependent_launch` returns: launched so, it lets the next
            kernel launch at once and waits for the one ahead. Nothing is a normal launch.
    """
    _empty[(1,)](DEPENDENT=bool(dependent), num_warps=1, **dependent)


def launch_store(out: Tensor) -> None:
    """As many programs as ``out``, int32, has elements, each of which stores one."""
    _store[(out.numel(),)](out, num_warps=1)

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""NVFP4 quantization in one pass over ``x``; :mod:`safealloc.kernels.triton_encode` has the arithmetic.

A program takes blocks of one row. Decode is launches and latency, not bandwidth: there a lane has 4 columns, and the kernel
is launched as a programmatic dependent, so that it is on the multiprocessors when its predecessor ends. More rows are
bound by instructions where none converts to e2m1: there a lane has whole blocks, two columns in a register.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from safealloc.formats.format import BLOCK_SIZE
from safealloc.formats.layout import SfLayout
from safealloc.kernels.triton_encode import encode_blocks, load_blocks, silu_and_mul
from safealloc.kernels.triton_layout import dependent_launch, device_of, gdc_launch_dependents, gdc_wait, scale_offset
from safealloc.kernels.triton_nan import note_blocks


@triton.jit
def quantize_blocks(
    x,  # bfloat16 or float16
    global_scale,  # float32 [1]
    block,  # int64 [BLOCKS, 1], number of each block of 16 columns of x
    live,  # int1 [BLOCKS], whether it is read; else it is zeros
    HARDWARE_E2M1: tl.constexpr, HARDWARE_E4M3: tl.constexpr, WORDS: tl.constexpr,
    TRIGGER: tl.constexpr,  # let the next kernel launch once the loads are under way: its programs then share the room fairly
    up,  # number of each block that silu of the first is multiplied with, or None
    ARITHMETIC: tl.constexpr,
    site=None,  # int64, where to record what is not finite in x, or None
):  # fmt: skip
    """Data, uint8 [BLOCKS, 8], and scales, uint8 [BLOCKS], of blocks of x."""
    g = tl.load(global_scale)
    first, second = load_blocks(x, block, live, WORDS)
    if up is not None:
        factor, _ = load_blocks(x, up, live, WORDS)
    if TRIGGER:
        gdc_launch_dependents()
    BFLOAT16: tl.constexpr = x.dtype.element_ty == tl.bfloat16
    if site is not None:
        note_blocks(site, first, second, block, True, WORDS, BFLOAT16)
        if up is not None:
            note_blocks(site, factor, factor, up, True, False, BFLOAT16)
    if up is not None:
        first = silu_and_mul(first, factor, BFLOAT16, HARDWARE_E4M3, ARITHMETIC)
        second = first
    return encode_blocks(first, second, g, BFLOAT16, HARDWARE_E2M1, HARDWARE_E4M3, WORDS, ARITHMETIC)


# One binary for all batch sizes of a tiling: a new one must not compile, least of all during a graph capture.
@triton.jit(do_not_specialize=["cols", "col_tiles"])
def _quantize(
    x,  # bfloat16 or float16 [rows, 16 * cols], SILU: [rows, 32 * cols]
    global_scale,  # float32 [1]
    x_fp4,  # uint8 [rows, 8 * cols]
    scales,  # uint8 [padded_rows, padded_cols] in LAYOUT
    valid_rows,  # int32 [1] or None
    site,  # int64 of a record (triton_nan) or None
    cols, col_tiles,
    LAYOUT: tl.constexpr, HARDWARE_E2M1: tl.constexpr, HARDWARE_E4M3: tl.constexpr, BLOCKS: tl.constexpr,
    WORDS: tl.constexpr,  # whole blocks in a lane, as words of two columns
    SILU: tl.constexpr, ARITHMETIC: tl.constexpr,
    DEPENDENT: tl.constexpr,  # launched as a programmatic dependent
):  # fmt: skip
    row = tl.program_id(0)
    col = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    inside = col < cols
    block = (row.to(tl.int64) * cols + col)[:, None]
    scale_at = scales + scale_offset(row, col, col_tiles, LAYOUT)
    if DEPENDENT:
        gdc_wait()  # before the first access to memory: the predecessor may still write x, or read the results
    live = inside
    if valid_rows is not None:
        live = col < tl.where(row < tl.load(valid_rows), cols, 0)
    gate = block
    up = None
    if SILU:
        gate = block + row.to(tl.int64) * cols
        up = gate + cols
    packed, scale_code = quantize_blocks(
        x, global_scale, gate, live, HARDWARE_E2M1, HARDWARE_E4M3, WORDS, DEPENDENT, up, ARITHMETIC, site
    )
    if valid_rows is not None:  # explicitly: a global scale of NaN, say, does not make zeros of zeros
        packed = tl.where(live[:, None], packed, 0)
        scale_code = tl.where(live, scale_code, 0)
    tl.store(x_fp4 + (block * 8 + tl.arange(0, 8)[None, :]), packed, mask=inside[:, None])
    tl.store(scale_at, scale_code.to(tl.uint8), mask=inside)


def quantize(
    x: Tensor,
    global_scale: Tensor,
    x_fp4: Tensor,
    scales: Tensor,
    layout: SfLayout,
    valid_rows: Tensor | None = None,
    silu_and_mul: bool = False,
    arithmetic: str = "exact",
    *,
    nan: Tensor | None = None,
) -> None:
    """Quantize ``x`` into ``x_fp4`` and the valid scales of ``scales`` in one launch; padding is not touched.

    Nothing is allocated and nothing synchronizes: it can be captured in a CUDA graph. Arguments as
    :func:`safealloc.kernels.reference.quantize`, contiguous; fewer than ``2**31`` rows, k at most ``2**24``.
    ``nan`` is where to record what is not finite in ``x``, as :func:`safealloc.kernels.triton_nan.note` takes it.
    """
    rows, width = x.shape
    cols = width // (2 * BLOCK_SIZE) if silu_and_mul else width // BLOCK_SIZE
    words = not silu_and_mul and rows * cols > FEW_BLOCKS and takes_words(x)
    tiling = tiling_for(rows, cols, words, silu_and_mul)
    options = launch_options(x.device, layout, tiling, silu_and_mul, arithmetic)
    with device_of(x):
        _quantize[(rows, -(-cols // tiling.blocks))](
            x, global_scale, x_fp4, scales, valid_rows, nan, cols, scales.shape[-1] // layout.tile.cols, **options
        )


class Tiling(NamedTuple):
    """How a matrix is cut into programs of 4 warps."""

    blocks: int  # of 16 columns a program
    words: bool  # whole blocks in a lane, two columns in a register


@functools.cache
def launch_options(
    device: torch.device, layout: SfLayout, tiling: Tiling, silu_and_mul: bool, arithmetic: str
) -> dict[str, Any]:
    """Constants and options of a launch, put together once: an eager call waits for the host."""
    dependent = dependent_launch(device)
    on_cuda = device.type == "cuda"
    return {
        "LAYOUT": int(layout),
        "HARDWARE_E2M1": on_cuda and converts_e2m1(device.index),
        "HARDWARE_E4M3": on_cuda,
        "BLOCKS": tiling.blocks,
        "WORDS": tiling.words,
        "SILU": silu_and_mul,
        "ARITHMETIC": arithmetic,
        "DEPENDENT": bool(dependent),
        "num_warps": 4,
        "enable_fp_fusion": False,  # a product and a sum fused would round once where the reference rounds twice
        **dependent,
    }


FEW_BLOCKS = 4096


@functools.cache
def tiling_for(rows: int, cols: int, words: bool, silu_and_mul: bool = False) -> Tiling:
    """For ``rows`` of ``cols`` blocks; ``words`` is what :func:`takes_words` says. ``benchmarks/NOTES.md`` has the numbers.

    Few blocks (decode): 4 columns a lane, or 2 where a lane has a SiLU to compute for each. More: whole blocks, or 8 columns.
    """
    if rows * cols <= FEW_BLOCKS:
        return Tiling(16 if silu_and_mul else 32, words=False)
    return Tiling(128 if words else 64, words=words)


def takes_words(x: Tensor) -> bool:
    """Whether ``x`` can be read two columns at a time, on a device that needs it: without ``cvt.e2m1x2``."""
    return x.is_cuda and not converts_e2m1(x.device.index) and x.data_ptr() % 4 == 0


@functools.cache
def converts_e2m1(device_index: int) -> bool:
    """Whether the device has ``cvt.e2m1x2`` (compute capability 10.0 or more, PTX ISA 8.6)."""
    return torch.cuda.get_device_capability(device_index) >= (10, 0)

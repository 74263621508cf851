# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""MXFP8 and MXFP4 quantization in one pass over ``x``; :mod:`safealloc.kernels.reference_mx` has the arithmetic.

A program takes blocks of one row. What is not finite, and what is subnormal, is told by the bits of a float32, so that the
result does not depend on how a device treats them.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from safealloc.formats.format import ScaleFormat
from safealloc.formats.layout import SfLayout
from safealloc.kernels.triton_encode import encode_e4m3, pack_e2m1
from safealloc.kernels.triton_layout import dependent_launch, device_of, gdc_launch_dependents, gdc_wait, scale_offset
from safealloc.kernels.triton_nan import note_blocks
from safealloc.kernels.triton_quantize import converts_e2m1

_INF = tl.constexpr(0x7F800000)  # magnitudes above it are NaN
_SMALLEST_NORMAL = tl.constexpr(0x00800000)


# One binary for all batch sizes: a new one must not compile, least of all during a graph capture.
@triton.jit(do_not_specialize=["cols", "col_tiles"])
def _quantize(
    x,  # bfloat16 or float16 [rows, 32 * cols]
    data,  # uint8, MXFP4: [rows, 16 * cols], else [rows, 32 * cols]
    scales,  # uint8 [padded_rows, padded_cols] in LAYOUT
    valid_rows,  # int32 [1] or None
    site,  # int64 of a record (triton_nan) or None
    cols, col_tiles,
    LAYOUT: tl.constexpr, MXFP4: tl.constexpr, HARDWARE_E2M1: tl.constexpr, HARDWARE_E4M3: tl.constexpr,
    BLOCKS: tl.constexpr,
    DEPENDENT: tl.constexpr,  # launched as a programmatic dependent
):  # fmt: skip
    LARGEST: tl.constexpr = 6.0 if MXFP4 else 448.0
    BYTES: tl.constexpr = 16 if MXFP4 else 32  # of a block's data
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
    values = tl.load(x + (block * 32 + tl.arange(0, 32)[None, :]), mask=live[:, None], other=0)
    if DEPENDENT:
        gdc_launch_dependents()
    if site is not None:
        note_blocks(site, values, values, block, True, False, x.dtype.element_ty == tl.bfloat16, 32)

    bits = values.to(tl.float32).to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF  # ordered as the numbers are
    amax = tl.max(tl.where(magnitude > _INF, -1, magnitude), 1)  # -1: all are NaN
    scale = tl.where(amax < _SMALLEST_NORMAL, 0, amax).to(tl.float32, bitcast=True) * (1 / LARGEST)
    scale_bits = scale.to(tl.int32, bitcast=True)
    byte = tl.minimum((scale_bits + 0x7FFFFF) >> 23, 254)  # the exponent, rounded up
    byte = tl.where(scale_bits < _SMALLEST_NORMAL, 0, byte)
    byte = tl.where(amax < 0, 0xFF, byte)
    factor = tl.where((byte == 0) | (byte == 0xFF), 0, (254 - byte) << 23).to(tl.float32, bitcast=True)

    sign_alone = (magnitude < _SMALLEST_NORMAL) | (magnitude >= _INF)
    finite = tl.where(sign_alone, bits & -0x80000000, bits).to(tl.float32, bitcast=True)
    scaled = tl.where(magnitude >= _INF, LARGEST, finite * factor[:, None])
    if MXFP4:
        even, odd = tl.split(tl.reshape(scaled, (BLOCKS, 16, 2)))
        codes = pack_e2m1(even, odd, HARDWARE_E2M1, False)
    else:
        codes, _ = encode_e4m3(scaled, HARDWARE_E4M3)
    # Rows beyond valid_rows were read as zeros, whose scale and data are 0.
    tl.store(data + (block * BYTES + tl.arange(0, BYTES)[None, :]), codes, mask=inside[:, None])
    tl.store(scale_at, byte.to(tl.uint8), mask=inside)


def quantize(
    x: Tensor,
    data: Tensor,
    scales: Tensor,
    layout: SfLayout,
    format: ScaleFormat,
    valid_rows: Tensor | None = None,
    *,
    nan: Tensor | None = None,
) -> None:
    """Quantize ``x`` into ``data`` and the valid scales of ``scales`` in one launch; padding is not touched.

    Nothing is allocated and nothing synchronizes: it can be captured in a CUDA graph. Arguments as
    :func:`safealloc.kernels.reference_mx.quantize`, contiguous; fewer than ``2**31`` rows, k at most ``2**24``.
    ``nan`` is where to record what is not finite in ``x``, as :func:`safealloc.kernels.triton_nan.note` takes it.
    """
    rows, cols = x.shape[0], x.shape[1] // format.block_size
    blocks = 16 if rows * cols <= FEW_BLOCKS else 32
    options = _launch_options(x.device, layout, format, blocks)
    with device_of(x):
        _quantize[(rows, -(-cols // blocks))](
            x, data, scales, valid_rows, nan, cols, scales.shape[-1] // layout.tile.cols, **options
        )


FEW_BLOCKS = 2048
"""Up to here a lane has 4 columns, beyond 8: as many as where NVFP4's tilings change. Not measured for MX."""


@functools.cache
def _launch_options(device: torch.device, layout: SfLayout, format: ScaleFormat, blocks: int) -> dict[str, Any]:
    """Constants and options of a launch, put together once: an eager call waits for the host."""
    on_cuda = device.type == "cuda"
    dependent = dependent_launch(device)
    return {
        "LAYOUT": int(layout),
        "MXFP4": format is ScaleFormat.mxfp4,
        "HARDWARE_E2M1": on_cuda and converts_e2m1(device.index),
        "HARDWARE_E4M3": on_cuda,
        "BLOCKS": blocks,
        "DEPENDENT": bool(dependent),
        "num_warps": 4,
        "enable_fp_fusion": False,
        **dependent,
    }

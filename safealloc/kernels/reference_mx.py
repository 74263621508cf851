"""MXFP8 and MXFP4 in plain torch, on any device: what the Triton kernel must reproduce.

The arithmetic is that of FlashInfer 0.7.2's CUDA kernels (``quantization_utils.cuh``), read from their source. They are
built with ``-use_fast_math``, so that subnormal float32 numbers count as zero, operands and results alike. With
``largest`` = 448 (MXFP8) or 6 (MXFP4)::

    s     = max|x| * (1 / largest)              one per 32 columns; NaN is left out
    scale = 2 ** ceil(log2(s))                  e8m0: the byte is the exponent plus 127, at most 254
    data  = e4m3 or e2m1(x / scale)             round to nearest, ties to even, saturating; the sign of zero stays

What is not finite or too small:

- NaN in a block becomes ``+largest``. Where all 32 values are NaN, the scale byte is NaN (0xFF).
- Inf in a block: the scale byte is 254, whose reciprocal is subnormal. Inf becomes ``+largest`` whatever its sign, and
  finite values become 0.
- Where ``s`` is 0, the scale byte is 0 and so are the data.
"""

from __future__ import annotations

import torch
from torch import Tensor

from safealloc.formats.format import E2M1_MAX, E4M3_MAX, ScaleFormat
from safealloc.formats.layout import SfLayout
from safealloc.kernels.reference import encode_e2m1

LARGEST = {ScaleFormat.mxfp8: E4M3_MAX, ScaleFormat.mxfp4: E2M1_MAX}
"""The largest data value of each MX format."""

SMALLEST_NORMAL = 2.0**-126
"""The smallest normal float32."""


def quantize(
    x: Tensor, data: Tensor, scales: Tensor, layout: SfLayout, format: ScaleFormat, valid_rows: Tensor | None = None
) -> None:
    """Quantize ``x`` into ``data`` and the valid scales of ``scales``; padding is not touched.

    Args:
        x: bfloat16 or float16 ``[rows, k]``.
        data: uint8, written: MXFP8 ``[rows, k]``, MXFP4 ``[rows, k // 2]``, where the low nibble is the even column.
        scales: uint8 buffer of ``layout`` for ``[rows, k]``, or for a padded k; the valid scales are written.
        layout: order of the bytes in ``scales``.
        format: ``mxfp8`` or ``mxfp4``.
        valid_rows: int32, one element: rows at or beyond it get zero data and zero scales.
    """
    rows, k = x.shape
    codes, linear = encode(x, format)
    if valid_rows is not None:
        valid = torch.arange(rows, device=x.device)[:, None] < valid_rows.reshape(())
        codes, linear = torch.where(valid, codes, 0), torch.where(valid, linear, 0)
    data.copy_(codes)
    padded_k = scales.shape[-1] * format.block_size
    offsets = layout.offsets(rows, k, x.device, padded_k=padded_k if padded_k > k else None, format=format)
    scales.view(-1)[offsets] = linear


def encode(x: Tensor, format: ScaleFormat) -> tuple[Tensor, Tensor]:
    """Data, uint8 as :func:`quantize` writes it, and scales in matrix order, uint8 ``[rows, k // 32]``.

    Args:
        x: ``[rows, k]``.
        format: ``mxfp8`` or ``mxfp4``.
    """
    rows, k = x.shape
    largest = LARGEST[format]
    blocks = _flushed(x.reshape(rows, k // format.block_size, format.block_size).float())
    is_nan = blocks.isnan()
    s = _flushed(torch.where(is_nan, 0, blocks.abs()).amax(-1) * (1 / largest))
    mantissa, exponent = torch.frexp(s)  # s = mantissa * 2**exponent, mantissa from 1/2 up to 1: a power of two is 1/2
    byte = exponent + 127 - (mantissa == 0.5).int()
    byte = torch.where(s == 0, 0, torch.where(s.isinf(), 254, byte))
    byte = torch.where(is_nan.all(-1), 0xFF, byte)
    # 1 / scale, by its bits: exponent 254 - byte, which is zero, as a subnormal would be, where byte is 254
    factor = torch.where((byte == 0) | (byte == 0xFF), 0, (254 - byte) << 23).int().view(torch.float32)
    scaled = torch.where(blocks.isfinite(), blocks * factor[..., None], largest).view(rows, k)
    linear = byte.to(torch.uint8)
    if format is ScaleFormat.mxfp8:
        return scaled.clamp(-largest, largest).to(torch.float8_e4m3fn).view(torch.uint8), linear
    codes = encode_e2m1(scaled) | scaled.signbit().to(torch.uint8) << 3
    return codes[:, 0::2] | codes[:, 1::2] << 4, linear


def _flushed(values: Tensor) -> Tensor:
    """Subnormal numbers as zeros of their sign."""
    return torch.where(values.abs() < SMALLEST_NORMAL, values * 0.0, values)

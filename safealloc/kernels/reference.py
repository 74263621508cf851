"""NVFP4 in plain torch, on any device, and GEMMs of each format: what every kernel here must reproduce.

Quantization follows the NVFP4 recipe, in float32 and in this order (the same results, bit for bit, as ``ref_nvfp4_quant`` of
vLLM's ``nvfp4_emulation_utils``). With ``g`` the global scale and ``r(x) = 1 / x``, where ``r(0) = 1e-8``::

    scale  = e4m3(clamp(g * (max|x| * (1 / 6)), -448, 448))         one per 16 columns
    data   = e2m1(clamp(x * r(scale * r(g)), -6, 6))                round to nearest, ties to even

Not-finite input stays in its own row:

- NaN in a block of 16: its scale is NaN (0x7F) and all its values are +6 (0x7), as the hardware conversion gives, so the
  block dequantizes to NaN and the row's products are NaN.
- Inf in a block: the scale saturates at 448, Inf becomes 6 with its sign, and the block's finite values are divided by
  that scale. The row stays finite.
- -0.0 becomes +0.0; a negative value that rounds to zero keeps its sign (0x8), as the hardware conversion gives.
- A global scale of 0 beside Inf, or one so large that ``r`` overflows, makes NaN of the block in the same way.

The fused activation is ``silu(gate) * up`` in float32, rounded to the dtype of ``x`` before it is quantized, as vLLM's. No
two libraries agree on the last bit of an exponential, so the steps are spelled out: sums, products and a division in
float32, each rounded to nearest, which give the same bits everywhere::

    silu(v) = v / (1 + 2 ** t),  t = -v / ln(2) = n + f,  n whole,  2 ** f a polynomial of degree 6
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from safealloc.formats.format import BLOCK_SIZE, E2M1_MAX, E4M3_MAX, NAN_SCALE, ScaleFormat
from safealloc.formats.layout import SfLayout

MINUS_LOG2_E = -1.4426950408889634
POWER_OF_2 = (1.5403530e-4, 1.3333558e-3, 9.6181291e-3, 5.5504109e-2, 2.4022651e-1, 6.9314718e-1, 1.0)
"""``2 ** f`` for ``|f| <= 1/2``, highest power first: its Taylor series, within 2e-7."""


def quantize(
    x: Tensor,
    global_scale: Tensor,
    x_fp4: Tensor,
    scales: Tensor,
    layout: SfLayout,
    valid_rows: Tensor | None = None,
    silu_and_mul: bool = False,
    arithmetic: str = "exact",
) -> None:
    """Quantize ``x`` into ``x_fp4`` and the valid scales of ``scales``; padding is not touched.

    Args:
        x: bfloat16 or float16 ``[rows, k]``, with ``silu_and_mul`` ``[rows, 2 * k]``: gate, then up.
        global_scale: float32, one element.
        x_fp4: uint8 ``[rows, k // 2]``, written; the low nibble is the even column.
        scales: uint8 buffer of ``layout`` for ``[rows, k]``, or for a padded k; the valid scales are written.
        layout: order of the bytes in ``scales``.
        valid_rows: int32, one element: rows at or beyond it get zero data and zero scales.
        silu_and_mul: whether to quantize ``silu(gate) * up``.
        arithmetic: always ``"exact"``.
    """
    if silu_and_mul:
        x = multiply(x)
    rows, k = x.shape
    data, linear = encode(x, global_scale.reshape(()))
    if valid_rows is not None:
        valid = torch.arange(rows, device=x.device)[:, None] < valid_rows.reshape(())
        data, linear = torch.where(valid, data, 0), torch.where(valid, linear, 0)
    x_fp4.copy_(data)
    padded_k = scales.shape[-1] * BLOCK_SIZE
    offsets = layout.offsets(rows, k, x.device, padded_k=padded_k if padded_k > k else None)
    scales.view(-1)[offsets] = linear


def encode(x: Tensor, global_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Data, uint8 ``[rows, k // 2]``, and scales in matrix order, uint8 ``[rows, k // 16]``.

    Args:
        x: ``[rows, k]``.
        global_scale: float32, ``[]`` or ``[rows, 1]``.
    """
    rows, k = x.shape
    blocks = x.reshape(rows, k // BLOCK_SIZE, BLOCK_SIZE).float()
    amax = blocks.abs().amax(-1)
    scale = torch.clamp(global_scale * (amax * (1 / E2M1_MAX)), -E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    scaled = blocks * _reciprocal(scale.float() * _reciprocal(global_scale))[..., None]
    codes = encode_e2m1(scaled).view(rows, k)
    linear = torch.where(scale.isnan(), NAN_SCALE, scale.view(torch.uint8))
    return codes[:, 0::2] | codes[:, 1::2] << 4, linear


def multiply(x: Tensor) -> Tensor:
    """``silu(gate) * up`` of ``[rows, 2 * k]``, as ``[rows, k]`` of its dtype."""
    gate, up = x.float().chunk(2, -1)
    return (silu(gate) * up).to(x.dtype)


def silu(v: Tensor) -> Tensor:
    """``v / (1 + exp(-v))`` of float32."""
    t = v * MINUS_LOG2_E
    t = torch.where(t < 128, t, 128.0)  # from here on infinite; NaN too, which v brings back
    t = torch.where(t > -126, t, -126.0)
    whole = (t + 12582912.0) - 12582912.0  # 1.5 * 2**23: to the nearest integer
    f = t - whole
    power = torch.full_like(f, POWER_OF_2[0])
    for coefficient in POWER_OF_2[1:]:
        power = power * f + coefficient
    power = (power.view(torch.int32) + (whole.to(torch.int32) << 23)).view(torch.float32)
    return v / (1.0 + power)


def encode_e2m1(values: Tensor) -> Tensor:
    """Float values as e2m1 codes, uint8: nearest, ties to even, saturating at 6; NaN becomes +6."""
    magnitude = values.abs()
    code = torch.zeros_like(values, dtype=torch.uint8)
    # A tie goes to the neighbor with the even code; "not below" instead of "above" lets NaN pass every step.
    for halfway, tie_goes_up in ((0.25, 0), (0.75, 1), (1.25, 0), (1.75, 1), (2.5, 0), (3.5, 1), (5.0, 0)):
        code += ~(magnitude < halfway) if tie_goes_up else ~(magnitude <= halfway)
    return code | (values < 0).to(torch.uint8) << 3


def decode_e2m1(packed: Tensor) -> Tensor:
    """uint8 ``[..., k // 2]`` as float32 ``[..., k]``."""
    codes = torch.stack((packed & 0xF, packed >> 4), -1).flatten(-2)
    exponent, mantissa = (codes >> 1) & 3, (codes & 1) * 0.5
    # Exponent 0 is subnormal: 0 or 0.5. Arithmetic rather than a table, which a CUDA graph capture could not copy in.
    magnitude = torch.where(exponent == 0, mantissa, torch.ldexp(1 + mantissa, exponent.int() - 1))
    return torch.where(codes >= 8, -magnitude, magnitude)


def dequantize(
    data: Tensor,
    scales: Tensor,
    layout: SfLayout,
    global_scale: Tensor | float = 1.0,
    *,
    k: int | None = None,
    format: ScaleFormat = ScaleFormat.nvfp4,
) -> Tensor:
    """float32 ``[rows, k]`` that the quantized data stand for: ``data * scale / global_scale``.

    Args:
        data: uint8 ``[rows, k // 2]``, of MXFP8 ``[rows, k]``.
        scales: buffer of ``layout`` for ``[rows, k]``.
        layout: order of the bytes in ``scales``.
        global_scale: the global scale that :func:`quantize` was given.
        k: where ``data`` is narrower than the tiles, read scales up to this column and take the data there as zero.
        format: of both.
    """
    values = data.view(torch.float8_e4m3fn).float() if format is ScaleFormat.mxfp8 else decode_e2m1(data)
    rows, columns = values.shape
    k = columns if k is None else k
    blocks = F.pad(values, (0, k - columns)).view(rows, -1, format.block_size)
    scale = layout.unswizzle(scales, rows, k, format=format).view(format.dtype).float()
    return (blocks * scale[..., None]).view(rows, k) / global_scale


def mm(
    a: Tensor,
    b: Tensor,
    a_scales: Tensor,
    b_scales: Tensor,
    alpha: Tensor | None,
    out: Tensor,
    layout: SfLayout,
    *,
    enable_pdl: bool = True,
    skip_check: bool = False,
    format: ScaleFormat = ScaleFormat.nvfp4,
) -> None:
    """``out = alpha * (a @ b.T)`` in float32, rounded once to ``out.dtype``.

    Reads what a tensor core reads: every scale byte of the whole column tiles where the layout says, with zero data in
    padding columns, so that NaN in a padding column makes the row NaN (NaN * 0). Padding rows are not read.

    Args:
        a: one-byte dtype ``[m, k // 2]``, as all operands; of MXFP8 ``[m, k]``.
        b: ``[n, k // 2]`` or ``[n, k]``.
        a_scales: contiguous buffer that holds at least ``layout``'s bytes for ``[m, k]``.
        b_scales: contiguous layout_128x4 buffer for ``[n, k]``.
        alpha: float32 of one element or one per row, or ``None`` for 1.
        out: ``[m, n]``, written.
        layout: order of the bytes in ``a_scales``.
        enable_pdl, skip_check: FlashInfer's, without meaning here.
        format: of both operands.
    """
    a, b, a_scales, b_scales = (operand.view(torch.uint8) for operand in (a, b, a_scales, b_scales))
    k = a.shape[1] * format.values_per_byte
    weight = _whole_tiles(b, b_scales, SfLayout.layout_128x4, k, format)
    product = _whole_tiles(a, a_scales, layout, k, format) @ weight.T
    out.copy_(product if alpha is None else product * alpha.reshape(-1, 1))


def _whole_tiles(data: Tensor, scales: Tensor, layout: SfLayout, k: int, format: ScaleFormat) -> Tensor:
    rows = data.shape[0]
    scales = scales.view(-1)[: layout.nbytes(rows, k, format=format)]
    # In 128x4 and 8x4, k rounds up to whole tiles of 4 scale columns; b has tiles even where a is linear.
    padded_k = SfLayout.layout_128x4.padded_shape(rows, k, format=format)[1] * format.block_size
    if layout is SfLayout.layout_linear:
        return F.pad(dequantize(data, scales, layout, format=format), (0, padded_k - k))
    return dequantize(data, scales, layout, k=padded_k, format=format)


def _reciprocal(x: Tensor) -> Tensor:
    return 1.0 / (x + (x == 0) * 1e8)

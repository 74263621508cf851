"""vLLM's NVFP4 ops on a GPU that has none: our Triton kernels behind vLLM's own op names.

vLLM's Python runs as it is: ``scaled_fp4_quant`` allocates, the fusion passes match, ``CutlassNvFp4LinearKernel``
multiplies. Like a fused producer, the quantizer here writes valid scales only, and the GEMM reads padding columns, so that
the tokens depend on the padding.
"""

from __future__ import annotations

import torch
from torch import Tensor

_libraries: list[torch.library.Library] = []


class Plants:
    """NaN that a replay adds to what the gate-and-up projections return, the input of the fused quantizer that follows.

    Args:
        width: columns of that, by which the layers are told.
    """

    COLUMN, ROWS, LAYERS = 100, 32, 8

    def __init__(self, width: int) -> None:
        self.width = width
        shape = (self.LAYERS, self.ROWS, 1)
        self.elements, self.rows = (torch.zeros(shape, dtype=torch.bfloat16, device="cuda") for _ in range(2))
        self.layers: dict[int, int] = {}  # by the address of the weight, in the order of their calls

    def add(self, out: Tensor, b: Tensor) -> None:
        rows = out.shape[0]
        if out.shape[1] != self.width or rows > self.ROWS:
            return
        layer = self.layers.setdefault(b.data_ptr(), len(self.layers))
        out[:, self.COLUMN : self.COLUMN + 1] += self.elements[layer, :rows]
        out += self.rows[layer, :rows]

    def clear(self) -> None:
        self.elements.zero_()
        self.rows.zero_()


plants: Plants | None = None


def install(*, simple: bool = False, vendor: bool = False) -> None:
    """Replace the CUDA kernels of vLLM's ops.

    Args:
        simple: they do not import safealloc, and their results are meaningless.
        vendor: quantizers have the bits of vLLM's, and are slower than ours.
    """
    import vllm._custom_ops  # noqa: F401  defines the ops

    library = torch.library.Library("_C", "IMPL")
    quantize, multiply = (_simple_quantize, _simple_multiply) if simple else (_quantize, _multiply)
    if vendor:
        quantize = _vendor_quantize

    def scaled_fp4_quant(
        input: Tensor, input_scale: Tensor, is_sf_swizzled_layout: bool, *, output: Tensor, output_scale: Tensor
    ) -> None:
        assert is_sf_swizzled_layout
        quantize(input, input_scale, output, output_scale)

    def silu_and_mul_nvfp4_quant(
        result: Tensor, result_block_scale: Tensor, input: Tensor, input_global_scale: Tensor
    ) -> None:
        if vendor:
            _vendor_quantize(input, input_global_scale, result, result_block_scale, silu=True)
            return
        gate, up = input.float().chunk(2, -1)
        quantize((gate * torch.sigmoid(gate) * up).to(input.dtype), input_global_scale, result, result_block_scale)

    def cutlass_scaled_fp4_mm(
        out: Tensor, a: Tensor, b: Tensor, block_scale_a: Tensor, block_scale_b: Tensor, alpha: Tensor
    ) -> None:
        multiply(out, a, b, block_scale_a, block_scale_b, alpha)
        if plants is not None:
            plants.add(out, b)

    for name, kernel in (
        ("scaled_fp4_quant.out", scaled_fp4_quant),
        ("silu_and_mul_nvfp4_quant", silu_and_mul_nvfp4_quant),
        ("cutlass_scaled_fp4_mm", cutlass_scaled_fp4_mm),
    ):
        library.impl(name, kernel, "CUDA", allow_override=True)
    _libraries.append(library)


def _quantize(x: Tensor, global_scale: Tensor, output: Tensor, output_scale: Tensor) -> None:
    from safealloc.formats.layout import SfLayout
    from safealloc.kernels import triton_quantize

    rows, k = x.shape
    data = output if output.shape[1] * 2 == k else torch.empty((rows, k // 2), dtype=torch.uint8, device=x.device)
    scales = output_scale.view(torch.uint8)
    triton_quantize.quantize(x.contiguous(), global_scale.reshape(1), data, scales, SfLayout.layout_128x4)
    if data is not output:
        output[:, : k // 2].copy_(data)
        output[:, k // 2 :].zero_()


def _vendor_quantize(x: Tensor, global_scale: Tensor, output: Tensor, output_scale: Tensor, silu: bool = False) -> None:
    from safealloc.formats.layout import SfLayout
    from safealloc.kernels import triton_quantize

    for _ in range(4):
        output.zero_()  # takes time
    scales = output_scale.view(torch.uint8)
    k = x.shape[1] // (2 if silu else 1)
    assert output.shape[1] * 2 == k
    layout = SfLayout.layout_128x4
    triton_quantize.quantize(x.contiguous(), global_scale.reshape(1), output, scales, layout, None, silu, "vllm")


def _multiply(out: Tensor, a: Tensor, b: Tensor, block_scale_a: Tensor, block_scale_b: Tensor, alpha: Tensor) -> None:
    from safealloc.formats.layout import SfLayout
    from safealloc.kernels import triton_gemm

    scales = block_scale_a.view(torch.uint8), block_scale_b.view(torch.uint8)
    triton_gemm.mm(a, b, *scales, alpha.reshape(1), out, SfLayout.layout_128x4)


def _simple_quantize(x: Tensor, global_scale: Tensor, output: Tensor, output_scale: Tensor) -> None:
    output[:, : x.shape[1] // 2].copy_((x[:, ::2] > 0).to(torch.uint8))
    output_scale.view(torch.uint8)[:1].zero_()


def _simple_multiply(
    out: Tensor, a: Tensor, b: Tensor, block_scale_a: Tensor, block_scale_b: Tensor, alpha: Tensor
) -> None:
    out.copy_(
        (a.float().mean(1, keepdim=True) + block_scale_a.view(torch.uint8)[:1, :1].float()).to(out.dtype).expand_as(out)
    )


def fill_weights(layer: torch.nn.Module) -> None:
    """Fill in random weights that keep the size of activations; vLLM's dummy weights leave uint8 uninitialized."""
    n, half_k = layer.weight.shape
    generator = torch.Generator(device=layer.weight.device).manual_seed(n * 7919 + half_k)
    codes = torch.randint(0, 256, (n, half_k), dtype=torch.uint8, device=layer.weight.device, generator=generator)
    layer.weight.data.copy_(codes)
    layer.weight_scale.data.view(torch.uint8).fill_(0x38)  # 1.0
    layer.input_global_scale_inv.data.fill_(448 * 6 / 8.0)
    layer.alpha.data.fill_(8.0 / (448 * 6) / (2.9 * (2 * half_k) ** 0.5))

"""vLLM's CUDA ops on CPU tensors, so that vLLM's own Python runs where there is no GPU.

The ops have vLLM's names and schemas, and call ``safealloc.kernels.reference``. The quantizers write valid scales only, as
fused producers do; inside :func:`padding_is_written` they also zero the padding, as vLLM's own do since 0.30. The GEMM reads
every scale byte of the column tiles, in the layout that the flag says.

Importing this module imports vLLM. Import it before vLLM, which looks for the ops when it is imported.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from safealloc import ScalePool, ScaleSpec, SfLayout
from safealloc.integrations.startup import Steps
from safealloc.integrations.vllm.engine import Engine
from safealloc.integrations.vllm.serve import allocator
from safealloc.kernels import reference
from safealloc.pool.contents import spec_of

CPU = torch.device("cpu")
FP8 = torch.float8_e4m3fn


# --- ops of vLLM's extension, defined before vLLM looks for them ------------------------------------------------------

_library = torch.library.Library("_C", "FRAGMENT")
_writes_padding = False


@contextlib.contextmanager
def padding_is_written() -> Iterator[None]:
    """Inside, the quantizer zeroes padding, as vLLM's own kernel does since 0.30."""
    global _writes_padding
    _writes_padding = True
    try:
        yield
    finally:
        _writes_padding = False


def writes_padding() -> bool:
    """Whether :func:`padding_is_written` is in effect."""
    return _writes_padding


def quantize_rows(
    x: Tensor,
    global_scale: Tensor,
    output: Tensor,
    output_scale: Tensor,
    layout: SfLayout = SfLayout.layout_128x4,
) -> None:
    """Quantize ``x``, writing valid scales only; ``output`` may be wider than ``x``, and is zeroed beyond it."""
    k = x.shape[-1]
    scales = output_scale.view(torch.uint8)
    if writes_padding():
        scales.zero_()
    reference.quantize(x, global_scale.reshape(1), output[:, : k // 2], scales, layout)
    output[:, k // 2 :].zero_()


def silu_and_mul(x: Tensor) -> Tensor:
    """As vLLM's ``SiluAndMul.forward_native``."""
    gate, up = x.chunk(2, -1)
    return torch.nn.functional.silu(gate) * up


def _scaled_fp4_quant(
    input: Tensor, input_scale: Tensor, is_sf_swizzled_layout: bool, *, output: Tensor, output_scale: Tensor
) -> None:
    layout = SfLayout.layout_128x4 if is_sf_swizzled_layout else SfLayout.layout_linear
    quantize_rows(input, input_scale, output, output_scale, layout)


def _silu_and_mul_nvfp4_quant(
    result: Tensor, result_block_scale: Tensor, input: Tensor, input_global_scale: Tensor
) -> None:
    quantize_rows(silu_and_mul(input), input_global_scale, result, result_block_scale)


def _cutlass_scaled_fp4_mm(
    out: Tensor, a: Tensor, b: Tensor, block_scale_a: Tensor, block_scale_b: Tensor, alpha: Tensor
) -> None:
    mm_calls.append(MmCall("vllm-cutlass", False, spec_of(block_scale_a)))
    reference.mm(
        a, b, block_scale_a.view(torch.uint8), block_scale_b.view(torch.uint8), alpha, out, SfLayout.layout_128x4
    )


_QUANT = "Tensor input, Tensor input_scale, bool is_sf_swizzled_layout"
_library.define(f"scaled_fp4_quant({_QUANT}) -> (Tensor, Tensor)")
for _schema, _kernel in (
    (f"scaled_fp4_quant.out({_QUANT}, *, Tensor(a!) output, Tensor(b!) output_scale) -> ()", _scaled_fp4_quant),
    (
        "silu_and_mul_nvfp4_quant(Tensor(a!) result, Tensor(b!) result_block_scale, Tensor input, "
        "Tensor input_global_scale) -> ()",
        _silu_and_mul_nvfp4_quant,
    ),
    (
        "cutlass_scaled_fp4_mm(Tensor(a!) out, Tensor a, Tensor b, Tensor block_scale_a, Tensor block_scale_b, "
        "Tensor alpha) -> ()",
        _cutlass_scaled_fp4_mm,
    ),
    ("silu_and_mul(Tensor(a!) result, Tensor input) -> ()", lambda result, input: result.copy_(silu_and_mul(input))),
):
    _library.define(_schema)
    _name = _schema.partition("(")[0]
    _library.impl(_name, _kernel, "CPU")
    torch.library.register_fake(f"_C::{_name}", lambda *given, **named: None, lib=_library)

# Named by vLLM's fusion modules and passes; no test calls them.
for _name in (
    "dynamic_per_token_scaled_fp8_quant",
    "dynamic_scaled_fp8_quant",
    "fused_add_rms_norm",
    "fused_add_rms_norm_static_fp8_quant",
    "fused_qk_norm_rope",
    "per_token_group_fp8_quant",
    "rms_norm",
    "rms_norm_dynamic_per_token_quant",
    "rms_norm_per_block_quant",
    "rms_norm_static_fp8_quant",
    "rotary_embedding",
    "silu_and_mul_per_block_quant",
    "silu_and_mul_quant",
    "static_scaled_fp8_quant",
):
    _library.define(f"{_name}(Tensor(a!) result) -> ()")


# --- vLLM -------------------------------------------------------------------------------------------------------------


def _import_vllm() -> None:
    # vLLM defines its FlashInfer ops only where it finds FlashInfer's precompiled kernels or a compiler. None is called here.
    before = os.environ.get("VLLM_HAS_FLASHINFER_CUBIN")
    os.environ["VLLM_HAS_FLASHINFER_CUBIN"] = "1"
    try:
        flashinfer = importlib.import_module("vllm.utils.flashinfer")
        assert flashinfer.has_flashinfer()  # and remembers it
    finally:
        if before is None:
            del os.environ["VLLM_HAS_FLASHINFER_CUBIN"]
        else:
            os.environ["VLLM_HAS_FLASHINFER_CUBIN"] = before


FUSIONS = "vllm.compilation.passes.fusion"
FUSION_MODULES = (
    "rms_quant_fusion",
    "act_quant_fusion",
    "attn_quant_fusion",
    "mla_attn_quant_fusion",
    "allreduce_rms_fusion",
)
"""vLLM's modules of fusion passes that have an NVFP4 pattern."""


@contextlib.contextmanager
def as_on_cuda() -> Iterator[None]:
    """Inside, vLLM believes that its platform is CUDA, while tensors are on the CPU."""
    platform = importlib.import_module("vllm.platforms").current_platform
    cuda = importlib.import_module("vllm.platforms.interface").PlatformEnum.CUDA
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(platform), "_enum", cuda)
        patch.setattr(type(platform), "device_type", "cpu")
        yield


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of the packages that FlashInfer imports
    _import_vllm()
    import vllm._custom_ops as ops
    import vllm.utils.flashinfer as vllm_flashinfer
    from vllm.forward_context import override_forward_context
    from vllm.model_executor.kernels.linear.nvfp4.cutlass import CutlassNvFp4LinearKernel
    from vllm.model_executor.kernels.linear.nvfp4.flashinfer import (
        FlashInferB12xNvFp4LinearKernel,
        FlashInferCudnnNvFp4LinearKernel,
        FlashInferCuteDslNvFp4LinearKernel,
        FlashInferCutlassNvFp4LinearKernel,
        FlashInferTrtllmNvFp4LinearKernel,
    )
    from vllm.model_executor.layers.quantization.utils.nvfp4_utils import swizzle_blockscale

    with as_on_cuda():  # these modules look at the platform when they are imported
        fused_act_quant = importlib.import_module("vllm.model_executor.layers.fusion.fused_act_quant")
        fusions: dict[str, ModuleType] = {name: importlib.import_module(f"{FUSIONS}.{name}") for name in FUSION_MODULES}

KERNELS = {
    "trtllm": FlashInferTrtllmNvFp4LinearKernel,
    "cutlass": FlashInferCutlassNvFp4LinearKernel,
    "cudnn": FlashInferCudnnNvFp4LinearKernel,
    "cute-dsl": FlashInferCuteDslNvFp4LinearKernel,
    "b12x": FlashInferB12xNvFp4LinearKernel,
    "vllm-cutlass": CutlassNvFp4LinearKernel,
}
"""vLLM's NVFP4 W4A4 linear kernels that multiply through FlashInfer's ``mm_fp4``, and vLLM's own CUTLASS one."""


@dataclass
class MmCall:
    """What a GEMM was called with.

    Attributes:
        backend: FlashInfer's, or "vllm-cutlass".
        use_8x4_sf_layout: the flag.
        spec: of the activation's scales, if they are in a pool buffer.
        block_size: 32 for MXFP4.
    """

    backend: str
    use_8x4_sf_layout: bool
    spec: ScaleSpec | None
    block_size: int = 16


mm_calls: list[MmCall] = []
"""Calls of the GEMMs; each test starts with none."""


def _mm(
    A: Tensor,
    B: Tensor,
    A_scale: Tensor,
    B_scale: Tensor,
    g_scale: Tensor,
    dtype: torch.dtype,
    use_8x4_sf_layout: bool,
    backend: str,
    block_size: int = 16,
    use_nvfp4: bool = True,
) -> Tensor:
    mm_calls.append(MmCall(backend, use_8x4_sf_layout, spec_of(A_scale), block_size))
    out = torch.empty((A.shape[0], B.shape[1]), dtype=dtype)
    if block_size != 16 or not use_nvfp4:
        return out.zero_()  # MXFP4: tests look at the call only
    a_scale, b_scale = A_scale.view(torch.uint8), B_scale.T.view(torch.uint8)
    reference.mm(
        A, B.T, a_scale, b_scale, g_scale, out, SfLayout.layout_8x4 if use_8x4_sf_layout else SfLayout.layout_128x4
    )
    return out


def _quantize_8x4(a: Tensor, a_global_sf: Tensor) -> tuple[Tensor, Tensor]:
    """FlashInfer's quantizer, which zeroes padding."""
    rows, k = a.shape
    data, scales = (
        torch.empty(rows, k // 2, dtype=torch.uint8),
        torch.zeros(SfLayout.layout_8x4.padded_shape(rows, k), dtype=torch.uint8),
    )
    reference.quantize(a, a_global_sf.reshape(1), data, scales, SfLayout.layout_8x4)
    return data, scales


vllm_flashinfer.flashinfer_mm_fp4.register_kernel("cpu")(_mm)
vllm_flashinfer.flashinfer_nvfp4_quantize.register_kernel("cpu")(_quantize_8x4)


# --- what the tests call vLLM with ------------------------------------------------------------------------------------

GLOBAL_SCALE = torch.tensor([20.0])
ALPHA = torch.tensor([0.05])


def activation(rows: int, k: int, seed: int = 0) -> Tensor:
    """bfloat16 ``[rows, k]``."""
    return torch.randn(rows, k, generator=torch.Generator().manual_seed(1000 * rows + k + seed)).bfloat16()


def vllm_quantize(x: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """Quantize as vLLM's modules do."""
    return ops.scaled_fp4_quant(x, GLOBAL_SCALE, **options)


def linear_layer(n: int, k: int) -> nn.Module:
    """An NVFP4 layer as loaded: weight uint8 ``[n, k // 2]``, its scales ``[n, k // 16]`` not swizzled."""
    weight = torch.empty(n, k // 2, dtype=torch.uint8)
    scales = torch.empty(n, k // 16, dtype=torch.uint8)
    reference.quantize(activation(n, k, 7), torch.ones(1), weight, scales, SfLayout.layout_linear)
    layer = nn.Module()
    layer.weight = nn.Parameter(weight, requires_grad=False)
    layer.weight_scale = nn.Parameter(scales.view(FP8), requires_grad=False)
    layer.input_global_scale_inv = GLOBAL_SCALE
    layer.alpha = ALPHA
    layer.output_size_per_partition, layer.input_size_per_partition = n, k
    return layer


@functools.cache
def kernel_and_layer(name: str, n: int, k: int) -> tuple[Any, nn.Module]:
    """One of :data:`KERNELS`, and a layer that is ready for its ``apply_weights``."""
    kernel_class = KERNELS[name]
    kernel = kernel_class.__new__(kernel_class)  # __init__ asks for a Blackwell GPU
    layer = linear_layer(n, k)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "cuda", lambda tensor: tensor)
        if name == "trtllm":  # FlashInfer shuffles weights on a GPU; the GEMM here reads them unshuffled
            layer.weight_scale = nn.Parameter(swizzle_blockscale(layer.weight_scale.data), requires_grad=False)
        else:
            kernel.process_weights_after_loading(layer)
    return kernel, layer


@contextlib.contextmanager
def capturing(pool: ScalePool, most_rows: int = 1 << 20) -> Iterator[Engine]:
    """Inside, calls of up to so many rows are those of an engine's captures; it has ``pool``."""
    engine = Engine(Steps({most_rows: 1}), pool.device)
    engine.pool = pool
    with allocator.working(engine):
        yield engine


def in_forward_context() -> Any:
    """The forward context, which vLLM sets while a model runs."""
    return override_forward_context(SimpleNamespace())


def metadata(tensor: Tensor) -> tuple[Any, ...]:
    """What a tensor looks like to its users, apart from its values."""
    return tuple(tensor.shape), tensor.dtype, tensor.stride(), tensor.storage_offset(), tensor.device

"""vLLM's NVFP4 W4A4 linear layers through :func:`safealloc.nvfp4_linear`."""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from safealloc import _optional, settings
from safealloc.formats.layout import SfLayout
from safealloc.integrations.patches import Patches
from safealloc.integrations.vllm.serve import allocator
from safealloc.integrations.vllm.worker import logger
from safealloc.kernels import vendors
from safealloc.ops.backends import GEMMS, Call
from safealloc.ops.linear import nvfp4_linear


def refusal(capability: int | None) -> str | None:
    """Why the kernel cannot run on a compute capability (10 * major + minor; ``None`` is the current device's)."""
    if capability is None:
        if not torch.cuda.is_available():
            return "it needs a CUDA device"
        major, minor = torch.cuda.get_device_capability()
        capability = 10 * major + minor
    if reason := _optional.missing("triton"):
        return f"what trtllm cannot take needs Triton, and {reason}"
    if capability < 89:
        return f"float8_e4m3 needs compute capability 8.9, this is {capability / 10}"
    return None


def trtllm_refusal(device: torch.device, rows: int = vendors.TRTLLM_TILE_ROWS) -> str | None:
    """Why a weight of so many rows runs on the Triton GEMM on a device; ``None`` where it runs on trtllm."""
    reason = GEMMS["trtllm"].refusal(Call(device, SfLayout.layout_8x4, torch.bfloat16))
    if reason is None and rows % vendors.TRTLLM_TILE_ROWS:
        return f"it takes weights of a multiple of {vendors.TRTLLM_TILE_ROWS} rows, one has {rows}"
    return reason


def make(base: type) -> type:
    """The kernel's class, a subclass of vLLM's ``NvFp4LinearKernel``."""

    class SafeallocNvFp4LinearKernel(base):  # type: ignore[misc]
        """Quantize and multiply as one op, whose scales are in pool buffers.

        It runs FlashInfer's trtllm GEMM where that runs (compute capability 10.x) and takes the weight, with 8x4 scales up to
        32 rows. Elsewhere, from 8.9 on, it runs our Triton GEMM, which validates NVFP4 on GPUs without FP4 arithmetic: it is
        correct, not fast.
        """

        @classmethod
        def is_supported(cls, compute_capability: int | None = None) -> tuple[bool, str | None]:
            reason = refusal(compute_capability)
            return reason is None, reason

        @classmethod
        def can_implement(cls, config: Any) -> tuple[bool, str | None]:
            return True, None

        def process_weights_after_loading(self, layer: Any) -> None:
            self.backend = backend_for(layer.weight.device, layer.weight.shape[0])
            scales = SfLayout.layout_128x4.swizzle(layer.weight_scale.data.view(torch.uint8))
            weight = layer.weight.data.contiguous()
            if self.backend == "trtllm":
                weight, scales = vendors.shuffle_for_trtllm(weight, scales)
            layer.weight = nn.Parameter(weight, requires_grad=False)
            layer.weight_scale = nn.Parameter(scales, requires_grad=False)
            allocator.linear_ks[layer] = 2 * weight.shape[1]

        def apply_weights(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
            weight = layer.weight, layer.weight_scale, layer.input_global_scale_inv, layer.alpha
            y = nvfp4_linear(x.contiguous(), *weight, out_dtype=x.dtype, backend=self.backend)
            return y if bias is None else y + bias

    return SafeallocNvFp4LinearKernel


def backend_for(device: torch.device, rows: int) -> str:
    """The backend of a layer whose weight has so many rows; logged where it is not one to serve with."""
    if device.type != "cuda":
        return "reference"
    reason = trtllm_refusal(device, rows)
    if reason is None:
        return "trtllm"
    log_triton(reason)
    return "triton"


@functools.cache
def log_triton(reason: str) -> None:
    """Once per reason."""
    logger.info("safealloc: NVFP4 linear layers run on the Triton GEMM, for validation; trtllm cannot run: %s", reason)


def add(patches: Patches, module: ModuleType) -> None:
    """Put the kernel in vLLM's registry: first with ``SAFEALLOC_LINEAR=1``, else last, where "auto" does not reach it."""
    from vllm.platforms.interface import PlatformEnum

    kernels: list[type] = module._POSSIBLE_NVFP4_KERNELS.setdefault(PlatformEnum.CUDA, [])
    kernel = make(module.NvFp4LinearKernel)
    kernels.insert(0 if settings.linear() else len(kernels), kernel)
    patches.undo_by(lambda: kernels.remove(kernel))

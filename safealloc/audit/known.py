"""The producers and consumers that an audit knows, and why one cannot run here. One is added as a row."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from safealloc import _optional
from safealloc.audit.probing import Consumer
from safealloc.audit.producers import Producer
from safealloc.formats.format import BLOCK_SIZE
from safealloc.formats.layout import SfLayout
from safealloc.kernels import vendors
from safealloc.ops import gemm
from safealloc.ops.backends import GEMMS, QUANTIZERS, Call

_L128, _L8, _LINEAR = SfLayout.layout_128x4, SfLayout.layout_8x4, SfLayout.layout_linear
_GATE = 64.0  # SiLU(64) is 64 in float32, and dividing by it is exact


@dataclass(frozen=True, slots=True)
class KnownProducer:
    """A quantizer.

    Attributes:
        name: what the findings call it.
        layouts: the orders it writes.
        fn: as :func:`safealloc.audit.audit_producer` takes it.
        refusal: why it cannot write a layout on a device, or ``None``.
        vllm: layouts in which vLLM uses it.
        of: what it quantizes, as a function of x.
    """

    name: str
    layouts: tuple[SfLayout, ...]
    fn: Producer
    refusal: Callable[[torch.device, SfLayout], str | None]
    vllm: frozenset[SfLayout] = field(default_factory=frozenset)
    of: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True, slots=True)
class KnownConsumer:
    """A GEMM.

    Attributes:
        name: what the findings call it.
        layouts: the orders it is told to read; what it reads, the audit tells.
        fn: as :func:`safealloc.audit.audit_consumer` takes it.
        refusal: why it cannot read a layout on a device, or ``None``.
        vllm: layouts in which vLLM uses it.
    """

    name: str
    layouts: tuple[SfLayout, ...]
    fn: Consumer
    refusal: Callable[[torch.device, SfLayout], str | None]
    vllm: frozenset[SfLayout] = field(default_factory=frozenset)


# --- Refusals -------------------------------------------------------------------------------------------------------


def _quantizer_refusal(
    device: torch.device, layout: SfLayout, backend: str, attribute: tuple[str, str] | None = None
) -> str | None:
    """``attribute``: a module and what of it is called."""
    reason = QUANTIZERS[backend].refusal(Call(device, layout))
    return reason if reason is not None or attribute is None else _lacks(*attribute)


def _gemm_refusal(device: torch.device, layout: SfLayout, backend: str) -> str | None:
    return GEMMS[backend].refusal(Call(device, layout, torch.bfloat16))


def _vllm_cutlass_refusal(device: torch.device, layout: SfLayout) -> str | None:
    return _quantizer_refusal(device, layout, "vllm", ("vllm._custom_ops", "cutlass_scaled_fp4_mm"))


def _mm_fp4_refusal(device: torch.device, layout: SfLayout) -> str | None:
    return None


def _lacks(module: str, name: str) -> str | None:
    found = _optional.load(module)
    if isinstance(found, str):
        return found
    if module == "vllm._custom_ops":  # whatever Python has, the compiled op must be there
        return None if hasattr(torch.ops._C, name) else f"this vLLM has no torch.ops._C.{name}"
    return None if hasattr(found, name) else f"this {module} has no {name}"


# --- Producers ------------------------------------------------------------------------------------------------------


def _flashinfer_quantize(
    x: Tensor, global_scale: Tensor, x_fp4: Tensor, scales: Tensor, layout: SfLayout, *, backend: str
) -> tuple[Tensor, Tensor]:
    flashinfer = _optional.require("flashinfer")
    data, their_scales = flashinfer.nvfp4_quantize(
        x, global_scale, sfLayout=flashinfer.SfLayout(layout.value), do_shuffle=False, backend=backend
    )
    return data, their_scales


def _vllm_silu_and_mul(x: Tensor, global_scale: Tensor, x_fp4: Tensor, scales: Tensor, layout: SfLayout) -> None:
    """The gate is such that what is quantized is x itself."""
    gated = torch.cat((torch.full_like(x, _GATE), x / _GATE), 1)
    torch.ops._C.silu_and_mul_nvfp4_quant(x_fp4, scales.view(torch.float8_e4m3fn), gated, global_scale)


def _rms_norm(x: Tensor) -> Tensor:
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(1, keepdim=True) + 1e-6)
    return normed.to(x.dtype)


def _flashinfer_rms_norm(
    x: Tensor, global_scale: Tensor, x_fp4: Tensor, scales: Tensor, layout: SfLayout, *, add: bool
) -> None:
    """FlashInfer divides by its global scale where ours multiplies."""
    flashinfer = _optional.require("flashinfer")
    ones = torch.ones(x.shape[1], dtype=x.dtype, device=x.device)
    result = {
        "y_fp4": x_fp4.view(torch.float4_e2m1fn_x2),
        "block_scale": scales.view(torch.float8_e4m3fn),
        "global_scale": 1 / global_scale,
        "eps": 1e-6,
        "block_size": BLOCK_SIZE,
        "scale_format": "e4m3",
        "is_sf_swizzled_layout": layout is not _LINEAR,
    }
    if add:
        flashinfer.add_rmsnorm_fp4quant(x, torch.zeros_like(x), ones, **result)
    else:
        flashinfer.rmsnorm_fp4quant(x, ones, **result)


def _ours(name: str) -> KnownProducer:
    row = QUANTIZERS[name]
    return KnownProducer(
        f"safealloc {name}", tuple(SfLayout), row.run, functools.partial(_quantizer_refusal, backend=name)
    )


def _flashinfer_quantizer(backend: str, vllm: tuple[SfLayout, ...] = ()) -> KnownProducer:
    return KnownProducer(
        f"flashinfer nvfp4_quantize {backend}",
        tuple(SfLayout),
        functools.partial(_flashinfer_quantize, backend=backend),
        functools.partial(_quantizer_refusal, backend="flashinfer"),
        frozenset(vllm),
    )


def _flashinfer_norm(name: str, *, add: bool, vllm: tuple[SfLayout, ...] = ()) -> KnownProducer:
    return KnownProducer(
        f"flashinfer {name}",
        (_L128, _LINEAR),
        functools.partial(_flashinfer_rms_norm, add=add),
        functools.partial(_quantizer_refusal, backend="flashinfer", attribute=("flashinfer", name)),
        frozenset(vllm),
        _rms_norm,
    )


PRODUCERS = (
    _ours("reference"),
    _ours("triton"),
    _flashinfer_quantizer("cuda", vllm=(_L8,)),
    _flashinfer_quantizer("cute-dsl"),
    _flashinfer_norm("rmsnorm_fp4quant", add=False),
    _flashinfer_norm("add_rmsnorm_fp4quant", add=True, vllm=(_L128,)),
    KnownProducer(
        "vllm scaled_fp4_quant",
        (_L128, _LINEAR),
        vendors.vllm_quantize,
        functools.partial(_quantizer_refusal, backend="vllm", attribute=("vllm._custom_ops", "scaled_fp4_quant")),
        frozenset((_L128,)),
    ),
    KnownProducer(
        "vllm silu_and_mul_nvfp4_quant",
        (_L128,),
        _vllm_silu_and_mul,
        functools.partial(
            _quantizer_refusal, backend="vllm", attribute=("vllm._custom_ops", "silu_and_mul_nvfp4_quant")
        ),
        frozenset((_L128,)),
    ),
)
"""Every producer on one GPU. vLLM quantizes in 128x4 by its own kernel or a fused one, and in 8x4 by FlashInfer's."""


# --- Consumers ------------------------------------------------------------------------------------------------------


def _gemm(
    a: Tensor,
    b: Tensor,
    a_descale: Tensor,
    b_descale: Tensor,
    alpha: Tensor,
    layout: SfLayout,
    *,
    backend: str,
) -> Tensor:
    if backend == "trtllm":
        b, b_descale = _shuffled(b, b_descale)
    out = torch.empty((a.shape[0], b.shape[1]), dtype=torch.bfloat16, device=a.device)
    GEMMS[backend].run(a, b.T, a_descale, b_descale.T, alpha, out, layout)
    return out


def _shuffled(b: Tensor, b_descale: Tensor) -> tuple[Tensor, Tensor]:
    """As FlashInfer's trtllm takes a weight: rows shuffled for an epilogue of 128 rows (vLLM's weight preparation)."""
    flashinfer = _optional.require("flashinfer")
    n, k = b.shape[1], 2 * b.shape[0]
    linear = _L128.unswizzle(b_descale.T, n, k)
    scales = flashinfer.shuffle_matrix_sf_a(linear, 128).view(torch.uint8).reshape(b_descale.T.shape)
    return flashinfer.shuffle_matrix_a(b.T, 128).T, scales.T


def _mm_fp4(a: Tensor, b: Tensor, a_descale: Tensor, b_descale: Tensor, alpha: Tensor, layout: SfLayout) -> Tensor:
    return gemm.mm_fp4(a, b, a_descale, b_descale, alpha, use_8x4_sf_layout=layout is _L8)


def _vllm_cutlass(
    a: Tensor, b: Tensor, a_descale: Tensor, b_descale: Tensor, alpha: Tensor, layout: SfLayout
) -> Tensor:
    out = torch.empty((a.shape[0], b.shape[1]), dtype=torch.bfloat16, device=a.device)
    e4m3 = torch.float8_e4m3fn
    torch.ops._C.cutlass_scaled_fp4_mm(out, a, b.T, a_descale.view(e4m3), b_descale.T.view(e4m3), alpha)
    return out


_BY_VLLM = {
    "cute-dsl": (_L128,),
    "cutlass": (_L128,),
    "b12x": (_L128,),
    "trtllm": (_L128, _L8),
    "cudnn": (_L128,),
}
"""``mm_fp4`` backends of vLLM's linear kernels (0.32.0), and what they are told to read."""


def _backend(name: str) -> KnownConsumer:
    vendor = GEMMS[name].package is not None
    layouts = (_L128, _L8) if name == "trtllm" else (_L128,)
    title = "flashinfer mm_fp4 auto" if name == "flashinfer" else f"flashinfer mm_fp4 {name}"
    return KnownConsumer(
        title if vendor else f"safealloc {name}",
        layouts if vendor else tuple(SfLayout),
        functools.partial(_gemm, backend=name),
        functools.partial(_gemm_refusal, backend=name),
        frozenset(_BY_VLLM.get(name, ())),
    )


CONSUMERS = (
    *(_backend(name) for name in sorted(GEMMS, key=lambda name: GEMMS[name].package is not None)),
    KnownConsumer("safealloc.mm_fp4 (foreign scales)", (_L128, _L8), _mm_fp4, _mm_fp4_refusal),
    KnownConsumer("vllm cutlass_scaled_fp4_mm", (_L128,), _vllm_cutlass, _vllm_cutlass_refusal, frozenset((_L128,))),
)
"""Every consumer on one GPU; FlashInfer's as its ``mm_fp4`` backends, in the layouts that each says it reads."""

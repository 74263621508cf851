"""The producers and consumers that an audit knows, and why one cannot run here. Another one is another row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from safealloc import _optional
from safealloc.audit.consumers import audit_consumer
from safealloc.audit.findings import ConsumerFinding, ProducerFinding
from safealloc.audit.probing import for_gemm
from safealloc.audit.producers import audit_producer, scaled
from safealloc.formats.format import BLOCK_SIZE, ScaleFormat
from safealloc.formats.layout import SfLayout
from safealloc.kernels import vendors
from safealloc.ops import gemm
from safealloc.ops.backends import GEMMS, MX_QUANTIZERS, MXFP8_GEMMS, QUANTIZERS, Call, Table
from safealloc.ops.gemm_mxfp8 import mm_mxfp8

_128X4, _8X4, _LINEAR = SfLayout.layout_128x4, SfLayout.layout_8x4, SfLayout.layout_linear
_MX = ScaleFormat.mxfp8, ScaleFormat.mxfp4
_GATE = 64.0  # SiLU(64) is 64 in float32, and dividing by it is exact

Shapes = Sequence[tuple[int, int]]
Refusal = Callable[[torch.device, SfLayout], str | None]


@dataclass(frozen=True, slots=True)
class Known:
    """A quantizer or a GEMM."""

    name: str
    layouts: tuple[SfLayout, ...]  # that it writes, or is told to read
    fn: Callable[..., Any]  # as audit_producer or audit_consumer takes it
    refusal: Refusal  # why it cannot take a layout on a device, or None
    vllm: tuple[SfLayout, ...] = ()  # layouts in which vLLM uses it
    format: ScaleFormat = field(default=ScaleFormat.nvfp4, kw_only=True)  # of its scales

    def shapes(self, of_nvfp4: Shapes | None) -> Shapes | None:
        """Shapes with as many scales as these have of NVFP4."""
        return None if of_nvfp4 is None else scaled(of_nvfp4, self.format)


@dataclass(frozen=True, slots=True)
class KnownProducer(Known):
    """A quantizer."""

    of: Callable[[Tensor], Tensor] | None = None  # what it quantizes, as a function of x; None is x

    def audit(self, layout: SfLayout, shapes: Shapes | None, device: torch.device) -> list[ProducerFinding]:
        shapes = self.shapes(shapes)
        return audit_producer(
            self.fn, name=self.name, layout=layout, shapes=shapes, device=device, of=self.of, format=self.format
        )


@dataclass(frozen=True, slots=True)
class KnownConsumer(Known):
    """A GEMM."""

    def audit(self, layout: SfLayout, shapes: Shapes | None, device: torch.device) -> list[ConsumerFinding]:
        shapes = self.shapes(shapes)
        return audit_consumer(self.fn, name=self.name, layout=layout, shapes=shapes, device=device, format=self.format)


# --- Refusals -------------------------------------------------------------------------------------------------------


def _refusal(
    table: Table, backend: str, function: tuple[str, str] | None = None, format: ScaleFormat = ScaleFormat.nvfp4
) -> Refusal:
    """Why a backend of ours cannot run, or else why a function, its module first, is missing."""

    def refusal(device: torch.device, layout: SfLayout) -> str | None:
        reason = table[backend].why_not(Call(device, layout, out_dtype=torch.bfloat16, format=format))
        return reason if reason is not None or function is None else missing_function(*function)

    return refusal


def missing_function(module: str, function: str) -> str | None:
    """Why a function of a module cannot be called, or ``None``."""
    found = _optional.load(module)
    if isinstance(found, str):
        return found
    if module == "vllm._custom_ops":  # the Python function is not enough: the compiled op must be there
        return None if hasattr(torch.ops._C, function) else f"this vLLM has no torch.ops._C.{function}"
    return None if hasattr(found, function) else f"this {module} has no {function}"


# --- Producers ------------------------------------------------------------------------------------------------------


def _vllm_silu_and_mul(x: Tensor, global_scale: Tensor, x_fp4: Tensor, scales: Tensor, layout: SfLayout) -> None:
    """With a gate for which the product that is quantized is x itself."""
    gated = torch.cat((torch.full_like(x, _GATE), x / _GATE), 1)
    torch.ops._C.silu_and_mul_nvfp4_quant(x_fp4, scales.view(torch.float8_e4m3fn), gated, global_scale)


def _rms_norm(x: Tensor) -> Tensor:
    exact = x.float()
    return (exact * torch.rsqrt(exact.square().mean(1, keepdim=True) + 1e-6)).to(x.dtype)


def _safealloc_quantizer(name: str) -> KnownProducer:
    return KnownProducer(f"safealloc {name}", tuple(SfLayout), QUANTIZERS[name].run, _refusal(QUANTIZERS, name))


def _flashinfer_quantizer(backend: str, vllm: tuple[SfLayout, ...] = ()) -> KnownProducer:
    def quantize(x: Tensor, global_scale: Tensor, x_fp4: Tensor, scales: Tensor, layout: SfLayout) -> Any:
        flashinfer = _optional.require("flashinfer")
        order = flashinfer.SfLayout(layout.value)
        return flashinfer.nvfp4_quantize(x, global_scale, sfLayout=order, do_shuffle=False, backend=backend)

    refusal = _refusal(QUANTIZERS, "flashinfer")
    return KnownProducer(f"flashinfer nvfp4_quantize {backend}", tuple(SfLayout), quantize, refusal, vllm)


def _flashinfer_norm(function: str, vllm: tuple[SfLayout, ...] = ()) -> KnownProducer:
    def quantize(x: Tensor, global_scale: Tensor, x_fp4: Tensor, scales: Tensor, layout: SfLayout) -> None:
        residual = (torch.zeros_like(x),) if function == "add_rmsnorm_fp4quant" else ()
        getattr(_optional.require("flashinfer"), function)(
            x,
            *residual,
            torch.ones(x.shape[1], dtype=x.dtype, device=x.device),
            y_fp4=x_fp4.view(torch.float4_e2m1fn_x2),
            block_scale=scales.view(torch.float8_e4m3fn),
            global_scale=1 / global_scale,  # FlashInfer divides by it
            eps=1e-6,
            block_size=BLOCK_SIZE,
            scale_format="e4m3",
            is_sf_swizzled_layout=layout is not _LINEAR,
        )

    refusal = _refusal(QUANTIZERS, "flashinfer", ("flashinfer", function))
    return KnownProducer(f"flashinfer {function}", (_128X4, _LINEAR), quantize, refusal, vllm, _rms_norm)


def _safealloc_mx_quantizer(name: str, format: ScaleFormat) -> KnownProducer:
    def quantize(x: Tensor, data: Tensor, scales: Tensor, layout: SfLayout) -> None:
        MX_QUANTIZERS[name].run(x, data, scales, layout, format)

    refusal = _refusal(MX_QUANTIZERS, name, format=format)
    return KnownProducer(f"safealloc {name} {format.name}", tuple(SfLayout), quantize, refusal, format=format)


def _flashinfer_mx_quantizer(format: ScaleFormat, backend: str, vllm: tuple[SfLayout, ...] = ()) -> KnownProducer:
    function, layout_argument = f"{format.name}_quantize", _MX_LAYOUT[format]

    def quantize(x: Tensor, data: Tensor, scales: Tensor, layout: SfLayout) -> Any:
        flashinfer = _optional.require("flashinfer")
        order = {layout_argument: flashinfer.SfLayout(layout.value)}
        return getattr(flashinfer, function)(x, backend=backend, **order)

    refusal = _refusal(QUANTIZERS, "flashinfer", ("flashinfer", function))  # on the same compute capabilities
    name = f"flashinfer {function} {backend}"
    return KnownProducer(name, tuple(SfLayout), quantize, refusal, vllm, format=format)


_MX_LAYOUT = {ScaleFormat.mxfp8: "sf_swizzle_layout", ScaleFormat.mxfp4: "sfLayout"}
"""FlashInfer's names of the argument."""


def _vllm_quantizer(function: str, fn: Callable[..., None], *layouts: SfLayout) -> KnownProducer:
    refusal = _refusal(QUANTIZERS, "vllm", ("vllm._custom_ops", function))
    return KnownProducer(f"vllm {function}", layouts, fn, refusal, (_128X4,))


PRODUCERS = (
    _safealloc_quantizer("reference"),
    _safealloc_quantizer("triton"),
    _flashinfer_quantizer("cuda", vllm=(_8X4,)),
    _flashinfer_quantizer("cute-dsl"),
    _flashinfer_norm("rmsnorm_fp4quant"),
    _flashinfer_norm("add_rmsnorm_fp4quant", vllm=(_128X4,)),
    _vllm_quantizer("scaled_fp4_quant", vendors.vllm_quantize, _128X4, _LINEAR),
    _vllm_quantizer("silu_and_mul_nvfp4_quant", _vllm_silu_and_mul, _128X4),
    *(_safealloc_mx_quantizer(name, format) for format in _MX for name in ("reference", "triton")),
    _flashinfer_mx_quantizer(ScaleFormat.mxfp8, "cuda", vllm=(_128X4, _8X4)),
    _flashinfer_mx_quantizer(ScaleFormat.mxfp4, "cuda"),
    _flashinfer_mx_quantizer(ScaleFormat.mxfp4, "cute-dsl", vllm=(_128X4,)),
)
"""Every producer on one GPU. vLLM quantizes to NVFP4 in 128x4 by its own kernel or a fused one, and in 8x4 by FlashInfer's,
and to MX by FlashInfer's (0.32.0: ``model_executor/kernels/linear``)."""


# --- Consumers ------------------------------------------------------------------------------------------------------


def _mm_fp4(a: Tensor, b: Tensor, a_descale: Tensor, b_descale: Tensor, alpha: Tensor, layout: SfLayout) -> Tensor:
    return gemm.mm_fp4(a, b, a_descale, b_descale, alpha, use_8x4_sf_layout=layout is _8X4)


def _mm_mxfp4(a: Tensor, b: Tensor, a_descale: Tensor, b_descale: Tensor, layout: SfLayout) -> Tensor:
    flag = layout is _8X4
    return gemm.mm_fp4(a, b, a_descale, b_descale, block_size=32, use_nvfp4=False, use_8x4_sf_layout=flag)


def _mm_mxfp8(a: Tensor, b: Tensor, a_descale: Tensor, b_descale: Tensor, layout: SfLayout) -> Tensor:
    return mm_mxfp8(a, b, a_descale, b_descale, use_8x4_sf_layout=layout is _8X4)


def _vllm_cutlass(
    a: Tensor, b: Tensor, a_descale: Tensor, b_descale: Tensor, alpha: Tensor, layout: SfLayout
) -> Tensor:
    out = torch.empty((a.shape[0], b.shape[1]), dtype=torch.bfloat16, device=a.device)
    e4m3 = torch.float8_e4m3fn
    torch.ops._C.cutlass_scaled_fp4_mm(out, a, b.T, a_descale.view(e4m3), b_descale.T.view(e4m3), alpha)
    return out


_USED_BY_VLLM = dict.fromkeys(("cute-dsl", "cutlass", "b12x", "cudnn"), (_128X4,)) | {"trtllm": (_128X4, _8X4)}
"""``mm_fp4`` backends of vLLM's linear kernels (0.32.0), and what they are told to read."""


def _gemm(backend: str) -> KnownConsumer:
    def multiply(a: Tensor, b: Tensor, a_descale: Tensor, b_descale: Tensor, alpha: Tensor, layout: SfLayout) -> Tensor:
        weight, scales = b.T, b_descale.T
        if backend == "trtllm":
            weight, scales = vendors.shuffle_for_trtllm(weight, scales)
        out = torch.empty((a.shape[0], weight.shape[0]), dtype=torch.bfloat16, device=a.device)
        GEMMS[backend].run(a, weight, a_descale, scales, alpha, out, layout)
        return out

    refusal = _refusal(GEMMS, backend)
    if GEMMS[backend].package is None:
        return KnownConsumer(f"safealloc {backend}", tuple(SfLayout), multiply, refusal)
    layouts = (_128X4, _8X4) if backend == "trtllm" else (_128X4,)
    name = f"flashinfer mm_fp4 {'auto' if backend == 'flashinfer' else backend}"
    return KnownConsumer(name, layouts, multiply, refusal, _USED_BY_VLLM.get(backend, ()))


_MX_USED_BY_VLLM = {
    ScaleFormat.mxfp8: {"cutlass": (_128X4,), "cute-dsl": (_128X4,), "trtllm": (_8X4,)},
    ScaleFormat.mxfp4: {"cute-dsl": (_128X4,), "b12x": (_128X4,)},
}
"""The same of vLLM's linear kernels of MX."""


def _mx_gemm(backend: str, format: ScaleFormat) -> KnownConsumer:
    table = MXFP8_GEMMS if format is ScaleFormat.mxfp8 else GEMMS

    def multiply(a: Tensor, b: Tensor, a_descale: Tensor, b_descale: Tensor, layout: SfLayout) -> Tensor:
        weight, scales = b.T, for_gemm(b_descale, format)
        if backend == "trtllm":
            weight, scales = vendors.shuffle_for_trtllm(weight, scales, format)
        out = torch.empty((a.shape[0], weight.shape[0]), dtype=torch.bfloat16, device=a.device)
        table[backend].run(a, weight, a_descale, scales, None, out, layout, format=format)
        return out

    refusal = _refusal(table, backend, format=format)
    if table[backend].package is None:
        return KnownConsumer(f"safealloc {backend} {format.name}", tuple(SfLayout), multiply, refusal, format=format)
    layouts = (_128X4, _8X4) if backend == "trtllm" else (_128X4,)
    function = "mm_mxfp8" if format is ScaleFormat.mxfp8 else "mxfp4"  # which is mm_fp4's
    name = f"flashinfer {function} {'auto' if backend == 'flashinfer' else backend}"
    return KnownConsumer(name, layouts, multiply, refusal, _MX_USED_BY_VLLM[format].get(backend, ()), format=format)


def _anywhere(device: torch.device, layout: SfLayout) -> None:
    return None


_VLLM_CUTLASS = _refusal(QUANTIZERS, "vllm", ("vllm._custom_ops", "cutlass_scaled_fp4_mm"))
CONSUMERS = (
    *sorted(map(_gemm, GEMMS), key=lambda known: known.name.startswith("flashinfer")),
    KnownConsumer("safealloc.mm_fp4 (foreign scales)", (_128X4, _8X4), _mm_fp4, _anywhere),
    KnownConsumer("vllm cutlass_scaled_fp4_mm", (_128X4,), _vllm_cutlass, _VLLM_CUTLASS, (_128X4,)),
    *(_mx_gemm(name, ScaleFormat.mxfp8) for name in MXFP8_GEMMS),
    *(_mx_gemm(name, ScaleFormat.mxfp4) for name, row in GEMMS.items() if ScaleFormat.mxfp4 in row.formats),
    KnownConsumer(
        "safealloc.mm_mxfp8 (foreign scales)", (_128X4, _8X4), _mm_mxfp8, _anywhere, format=ScaleFormat.mxfp8
    ),
    KnownConsumer("safealloc.mm_fp4 (foreign mxfp4)", (_128X4, _8X4), _mm_mxfp4, _anywhere, format=ScaleFormat.mxfp4),
)
"""Every consumer on one GPU; FlashInfer's are the backends of ``mm_fp4`` and ``mm_mxfp8``, in the layouts that they are
documented to read."""

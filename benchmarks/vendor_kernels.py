"""vLLM's and FlashInfer's own quantizers as baselines, where they can run: on Blackwell, with the package installed.

They write into memory of ``torch.empty``, as in the vendors' own code, so that each call is what a user of them pays. Where
one cannot run, there is one sentence why, and our kernels stand in for it (:mod:`benchmarks.baselines`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks import optional
from safealloc.formats.layout import SfLayout
from safealloc.ops.backends import QUANTIZERS, Call

VLLM, FLASHINFER, VLLM_SILU = "vLLM's own", "FlashInfer's own", "vLLM's own, SiLU and mul"
VLLM_EXPERTS, VLLM_CLEANED = "vLLM's own", "vLLM's own, cleaned by our kernel"

Quantize = Callable[[Tensor, Tensor, SfLayout], tuple[Tensor, Tensor]]
"""x, the global scale and a layout; returns data and scales."""


class Kernel(NamedTuple):
    """A vendor's quantizer of a matrix."""

    about: str  # one sentence
    package: str
    layouts: tuple[SfLayout, ...]  # that vLLM takes it for
    op: str | None  # in ``torch.ops._C``; None: a function of the package
    overload: str  # of the op
    quantize: Quantize


def dense(device: torch.device, layout: SfLayout) -> tuple[dict[str, Quantize], dict[str, str]]:
    """Quantizers of a matrix that run on a device in a layout, by name, and why the others do not."""
    return _sorted(device, layout, {name: DENSE[name] for name in (VLLM, FLASHINFER)})


def silu(device: torch.device, layout: SfLayout) -> tuple[dict[str, Quantize], dict[str, str]]:
    """The same for ``silu(gate) * up`` of a matrix."""
    return _sorted(device, layout, {VLLM_SILU: DENSE[VLLM_SILU]})


def experts_refusal(device: torch.device, silu_and_mul: bool) -> str | None:
    """Why vLLM's quantizer of rows grouped by expert cannot run, or ``None``."""
    layout = SfLayout.layout_128x4
    if reason := QUANTIZERS["vllm"].refusal(Call(device, layout)):
        return reason
    return _missing_op(_EXPERTS[silu_and_mul], "default")


def quantize_experts(
    x: Tensor, global_scales: Tensor, scales: Tensor, offsets: tuple[Tensor, Tensor], silu_and_mul: bool
) -> Tensor:
    """Quantize rows grouped by expert with vLLM's kernel.

    Args:
        x: ``[rows, k]``, or ``[rows, 2 * k]`` of gate and up.
        global_scales: float32 ``[experts]``.
        scales: uint8 ``[scale_rows, padded_cols]`` in 128x4; what no row has is left as it is.
        offsets: ``expert_offsets`` and ``blockscale_offsets``.
        silu_and_mul: whether ``silu(gate) * up`` is quantized.

    Returns:
        The FP4 data, uint8 ``[rows, k // 2]``.
    """
    rows, width = x.shape
    data = torch.empty((rows, width // (4 if silu_and_mul else 2)), dtype=torch.uint8, device=x.device)
    getattr(torch.ops._C, _EXPERTS[silu_and_mul])(data, scales.view(torch.int32), x, global_scales, *offsets)
    return data


_EXPERTS = {False: "scaled_fp4_experts_quant", True: "silu_and_mul_scaled_fp4_experts_quant"}


def refusal(kernel: Kernel, device: torch.device, layout: SfLayout) -> str | None:
    """Why a vendor's quantizer cannot run on a device in a layout, or ``None``."""
    call = Call(device, layout, silu_and_mul=kernel is DENSE[VLLM_SILU])
    if reason := QUANTIZERS[kernel.package].refusal(call):
        return reason
    if layout not in kernel.layouts:
        return f"vLLM does not take it for {layout.name}"
    return None if kernel.op is None else _missing_op(kernel.op, kernel.overload)


def tried(call: Callable[[], object], device: torch.device) -> str | None:
    """Call once and wait: why it fails, or ``None``."""
    try:
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except Exception as error:  # a compiled package may fail in any way
        return f"it failed: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}".rstrip(": ")
    return None


def reasons(found: Iterable[Mapping[str, str]]) -> dict[str, str]:
    """Of several shapes or layouts: each reason once, by name."""
    by_name: dict[str, dict[str, None]] = {}
    for one in found:
        for name, reason in one.items():
            by_name.setdefault(name, {})[reason] = None
    return {name: "; ".join(those) for name, those in by_name.items()}


def _sorted(
    device: torch.device, layout: SfLayout, kernels: Mapping[str, Kernel]
) -> tuple[dict[str, Quantize], dict[str, str]]:
    run: dict[str, Quantize] = {}
    not_run: dict[str, str] = {}
    for name, kernel in kernels.items():
        if layout not in kernel.layouts:
            continue  # the other vendor's layout: nothing is missing
        reason = refusal(kernel, device, layout) or tried(lambda of=kernel: _once(of, device, layout), device)  # type: ignore[misc]
        if reason is None:
            run[name] = kernel.quantize
        else:
            not_run[name] = reason
    return run, not_run


def _once(kernel: Kernel, device: torch.device, layout: SfLayout) -> None:
    kernel.quantize(torch.ones(1, 256, dtype=torch.bfloat16, device=device), torch.ones(1, device=device), layout)


def _missing_op(op: str, overload: str) -> str | None:
    loaded = optional.load("vllm._custom_ops")  # registers the ops
    if isinstance(loaded, str):
        return loaded
    packet = getattr(torch.ops._C, op, None)
    if packet is None:
        return f"this vLLM has no torch.ops._C.{op}"
    return None if overload in packet.overloads() else f"torch.ops._C.{op} of this vLLM has no overload {overload}"


def _outputs(x: Tensor, k: int, layout: SfLayout) -> tuple[Tensor, Tensor]:
    rows = x.shape[0]
    data = torch.empty((rows, k // 2), dtype=torch.uint8, device=x.device)
    return data, torch.empty(layout.padded_shape(rows, k), dtype=torch.uint8, device=x.device)


def _vllm(x: Tensor, global_scale: Tensor, layout: SfLayout) -> tuple[Tensor, Tensor]:
    data, scales = _outputs(x, x.shape[1], layout)
    torch.ops._C.scaled_fp4_quant.out(x, global_scale, True, output=data, output_scale=scales.view(torch.int32))
    return data, scales


def _vllm_silu(x: Tensor, global_scale: Tensor, layout: SfLayout) -> tuple[Tensor, Tensor]:
    data, scales = _outputs(x, x.shape[1] // 2, layout)
    torch.ops._C.silu_and_mul_nvfp4_quant(data, scales.view(torch.float8_e4m3fn), x, global_scale)
    return data, scales


def _flashinfer(x: Tensor, global_scale: Tensor, layout: SfLayout) -> tuple[Tensor, Tensor]:
    flashinfer = optional.load("flashinfer")
    assert not isinstance(flashinfer, str), flashinfer
    data, scales = flashinfer.nvfp4_quantize(
        x, global_scale, sfLayout=flashinfer.SfLayout(layout.value), do_shuffle=False
    )
    return data.view(torch.uint8), scales.view(torch.uint8).reshape(layout.padded_shape(*x.shape))


_128X4, _8X4 = SfLayout.layout_128x4, SfLayout.layout_8x4
DENSE = {
    VLLM: Kernel("torch.empty, and vLLM's scaled_fp4_quant", "vllm", (_128X4,), "scaled_fp4_quant", "out", _vllm),
    FLASHINFER: Kernel(
        "FlashInfer's nvfp4_quantize, which allocates its results", "flashinfer", (_128X4, _8X4), None, "", _flashinfer
    ),
    VLLM_SILU: Kernel(
        "torch.empty, and vLLM's silu_and_mul_nvfp4_quant",
        "vllm",
        (_128X4,),
        "silu_and_mul_nvfp4_quant",
        "default",
        _vllm_silu,
    ),
}
"""Vendors' quantizers of a matrix, by name."""

ABOUT_EXPERTS = {
    VLLM_EXPERTS: "torch.empty of vLLM's size, and vLLM's expert quantizer: unsafe, it leaves what earlier steps wrote",
    VLLM_CLEANED: "a pool buffer that a launch of ours cleans, and vLLM's expert quantizer",
}

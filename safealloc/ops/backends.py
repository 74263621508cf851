"""The tables of backends: a name, a function, and one sentence why it cannot run here.

``"auto"`` takes the first row that can. A backend is added as a row.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from safealloc import _optional
from safealloc.formats.layout import SfLayout
from safealloc.kernels import reference, reference_grouped, vendors


class Call(NamedTuple):
    """What a backend's requirement looks at.

    Attributes:
        device: of all tensors.
        layout: of the activation's scales.
        out_dtype: of a GEMM's result, else ``None``.
        valid_rows: a quantization with a device-side row count.
        row_alpha: a GEMM with one alpha per row; ``None`` where its one alpha is that too, since there is one row.
    """

    device: torch.device
    layout: SfLayout
    out_dtype: torch.dtype | None = None
    valid_rows: bool = False
    row_alpha: bool | None = False


@dataclass(frozen=True, slots=True)
class Backend:
    """One row.

    Attributes:
        name: what a caller asks for.
        refusal: why it cannot run a call, in one sentence, or ``None``.
        run: the function; each table's take the arguments of its row "reference", and FlashInfer's GEMMs its own.
        automatic: whether ``"auto"`` may take it.
        flashinfer: a GEMM of FlashInfer's, which takes FlashInfer's arguments.
    """

    name: str
    refusal: Callable[[Call], str | None]
    run: Callable[..., Any]
    automatic: bool = True
    flashinfer: bool = False


_chosen: dict[tuple[Any, ...], Backend] = {}  # on CUDA devices, which stay what they are


def choose(
    table: Mapping[str, Backend],
    name: str,
    device: torch.device,
    layout: SfLayout,
    out_dtype: torch.dtype | None = None,
    valid_rows: bool = False,
    row_alpha: bool | None = False,
) -> Backend:
    """The row that ``name`` asks for.

    Args:
        table, name: as stated there.
        device, layout, out_dtype, valid_rows, row_alpha: the fields of a :class:`Call`, which is only made where
            the row is not known yet: it costs more than the rest.

    Raises:
        TypeError: ``name`` is no string.
        ValueError: no such backend, or it cannot run this call; says why.
    """
    if not isinstance(name, str):
        raise TypeError(f"backend must be a string, got {name!r}")
    key = id(table), name, device, layout, out_dtype, valid_rows, row_alpha
    row = _chosen.get(key)
    if row is None:
        row = _choose(table, name, Call(device, layout, out_dtype, valid_rows, row_alpha))
        if device.type == "cuda":
            _chosen[key] = row
    return row


def _choose(table: Mapping[str, Backend], name: str, call: Call) -> Backend:
    if name == "auto":
        return next(row for row in table.values() if row.automatic and row.refusal(call) is None)
    row = table.get(name)
    if row is None:
        raise ValueError(f"backend must be one of {', '.join(['auto', *table])}, got {name!r}")
    reason = row.refusal(call)
    if reason is not None:
        raise ValueError(f"backend {name!r} cannot run this: {reason}")
    return row


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a CUDA device."""
    return torch.cuda.get_device_capability(device)


def interpreting() -> bool:
    """Whether Triton kernels run in its interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def triton_refusal(call: Call) -> str | None:
    """Why our Triton kernels cannot run on the device of a call, or ``None``."""
    if reason := _optional.missing("triton"):
        return reason
    if call.device.type != "cuda":
        return None if interpreting() else f"Triton kernels need a CUDA device, not {call.device}"
    if capability(call.device) < (8, 9):
        return f"float8_e4m3 needs compute capability 8.9, {_has(call.device)}"
    return None


def _has(device: torch.device) -> str:
    major, minor = capability(device)
    return f"{device} has {major}.{minor}"


def _anywhere(call: Call) -> str | None:
    return None


# Compute capabilities, 10 * major + minor. FlashInfer's CUDA quantizer is built for these, and vLLM's ops accept them.
_BLACKWELL = (100, 103, 107, 110, 120, 121)


def _blackwell(call: Call, package: str, runs_on: tuple[int, ...]) -> str | None:
    if reason := _optional.missing(package):
        return reason
    if call.device.type != "cuda":
        return f"{package} needs a CUDA device, not {call.device}"
    major, minor = capability(call.device)
    if 10 * major + minor not in runs_on:
        listed = ", ".join(str(number / 10) for number in runs_on)
        per_row = " with one alpha per row" if call.row_alpha else ""
        return f"it runs{per_row} on compute capability {listed} only, {_has(call.device)}"
    return None


def _vendor_quantizer(call: Call, package: str) -> str | None:
    if call.valid_rows:
        return f"{package} takes no valid_rows"
    if package == "vllm" and call.layout is SfLayout.layout_8x4:
        return "vLLM's own quantizer writes 128x4 and linear"
    return _blackwell(call, package, _BLACKWELL)


def _flashinfer_gemm(
    call: Call,
    reads: tuple[SfLayout, ...],
    returns: tuple[torch.dtype, ...],
    runs_on: tuple[int, ...],
    row_alpha: tuple[int, ...],
) -> str | None:
    if call.layout not in reads:
        return f"it reads {' and '.join(layout.name for layout in reads)}, the scales are in {call.layout.name}"
    if call.out_dtype not in returns:
        return f"it returns {' or '.join(map(str, returns))}, not {call.out_dtype}"
    per_row = call.row_alpha or (call.row_alpha is None and not runs_on)
    runs_on = row_alpha if per_row else runs_on
    if not runs_on:
        return "it takes one alpha, not one per row" if per_row else "it takes one alpha per row, not one"
    return _blackwell(call, "flashinfer", runs_on)


# Launchers are looked up at the first call: Triton may be missing, and its import takes a second.
def _triton(module: str, function: str) -> Callable[..., Any]:
    @functools.cache
    def launcher() -> Callable[..., Any]:
        found: Callable[..., Any] = getattr(_optional.require(f"safealloc.kernels.{module}"), function)
        return found

    return lambda *arguments: launcher()(*arguments)


def _table(*rows: Backend) -> dict[str, Backend]:
    return {row.name: row for row in rows}


QUANTIZERS = _table(
    Backend("triton", triton_refusal, _triton("triton_quantize", "quantize")),
    Backend("reference", _anywhere, reference.quantize),
    Backend(
        "flashinfer",
        functools.partial(_vendor_quantizer, package="flashinfer"),
        vendors.flashinfer_quantize,
        automatic=False,
    ),
    Backend("vllm", functools.partial(_vendor_quantizer, package="vllm"), vendors.vllm_quantize, automatic=False),
)
"""Quantizers. Vendors' are there to be asked for: FlashInfer's costs a copy, and both store padding themselves."""

GROUPED_QUANTIZERS = _table(
    Backend("triton", triton_refusal, _triton("triton_grouped", "quantize")),
    Backend("reference", _anywhere, reference_grouped.quantize),
)
"""Quantizers of rows routed to experts. Vendors' do not clean; they go with a row of ``CLEANERS``."""

CLEANERS = _table(
    Backend("triton", triton_refusal, _triton("triton_grouped", "clean")),
    Backend("reference", _anywhere, reference_grouped.clean),
)
"""What clears the scales that an earlier routing left."""


def _flashinfer(
    name: str,
    runs_on: tuple[int, ...],
    *,
    reads: tuple[SfLayout, ...] = (SfLayout.layout_128x4,),
    returns: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16),
    row_alpha: tuple[int, ...] = (),
) -> Backend:
    """``runs_on``: compute capabilities with one alpha; ``row_alpha``: with one per row."""
    refusal = functools.partial(_flashinfer_gemm, reads=reads, returns=returns, runs_on=runs_on, row_alpha=row_alpha)
    asked = "auto" if name == "flashinfer" else name
    run = functools.partial(vendors.flashinfer_mm, backend=asked)
    return Backend(name, refusal, run, automatic=name == "flashinfer", flashinfer=True)


GEMMS = _table(
    _flashinfer("flashinfer", _BLACKWELL, row_alpha=(100, 103)),  # FlashInfer's own choice
    Backend("triton", triton_refusal, _triton("triton_gemm", "mm")),
    Backend("reference", _anywhere, reference.mm),
    _flashinfer("cudnn", _BLACKWELL),
    _flashinfer(
        "trtllm", (100, 103, 107), reads=(SfLayout.layout_128x4, SfLayout.layout_8x4), returns=(torch.bfloat16,)
    ),
    _flashinfer("cutlass", _BLACKWELL),
    _flashinfer("cute-dsl", (100, 103, 107, 120, 121), row_alpha=(100, 103)),
    _flashinfer("cutedsl_low_latency", (100, 103, 107)),
    _flashinfer("b12x", (120, 121)),
    _flashinfer("cake", (), row_alpha=(100, 103)),
)
"""GEMMs. What FlashInfer's run on, read and return, and where with an alpha per row: its ``mm_fp4`` requirements (0.7.2).

What depends on the shape, on CUDA's version or on another package, FlashInfer itself refuses.
"""


def zero_padding(scales: Tensor, layout: SfLayout, rows: int, k: int) -> None:
    """Zero a foreign buffer's padding in place: one Triton kernel where there is one, else up to four fills."""
    if triton_refusal(Call(scales.device, layout)) is None:
        _triton("triton_padding", "zero_padding")(scales, layout, rows, k)
    else:
        reference.zero_padding(scales.view(-1)[: layout.nbytes(rows, k)], layout, rows, k)

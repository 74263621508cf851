"""The tables of backends: a row is a name, a function, and one sentence why it cannot run here.

``"auto"`` takes the first row that can. A backend is added as a row.
"""

from __future__ import annotations

import functools
import os
from collections import UserDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from safealloc import _optional
from safealloc.formats.format import ScaleFormat
from safealloc.formats.layout import SfLayout
from safealloc.formats.spec import ScaleSpec
from safealloc.kernels import reference, reference_grouped, reference_mx, vendors
from safealloc.pool.nan import NanWatch


class Call(NamedTuple):
    """What a backend's requirement looks at."""

    device: torch.device  # of all tensors
    layout: SfLayout  # of the activation's scales
    out_dtype: torch.dtype | None = None  # of a GEMM's result
    valid_rows: bool = False  # a quantization with a device-side row count
    row_alpha: bool | None = False  # a GEMM with one alpha per row; None: there is one row, so that one alpha is both
    silu_and_mul: bool = False  # a quantization of silu(gate) * up
    arithmetic: str = "exact"  # of a quantization: a vendor's takes our Triton kernel
    format: ScaleFormat = ScaleFormat.nvfp4  # of the scales
    below_128: bool = False  # a GEMM with n or k below 128


call_for = functools.cache(Call)
"""A :class:`Call`, looked up instead of made, which takes a third of the time."""


@dataclass(frozen=True, slots=True)
class Backend:
    """One row of a table."""

    name: str  # what a caller asks for
    refusal: Callable[[Call], str | None]  # why it cannot run a call, in one sentence, or None
    run: Callable[..., None]  # all rows of a table take the same call, that of row "reference"
    automatic: bool = True  # whether "auto" may take it
    package: str | None = None  # whose kernel it is, where it is not ours
    formats: tuple[ScaleFormat, ...] = (ScaleFormat.nvfp4,)  # of scales that it reads or writes

    def why_not(self, call: Call) -> str | None:
        """Why it cannot run a call, or ``None``."""
        if call.format not in self.formats:
            return f"it does not read scales of blocks of {call.format.block_size} columns ({call.format.name})"
        return self.refusal(call)


def run_watched(
    row: Backend,
    nan: NanWatch | None,
    x: Tensor,
    global_scale: Tensor | None,
    valid_rows: Tensor | None,
    arguments: tuple[Any, ...],
    *,
    batch: int | None = None,
    by_expert: bool = False,
) -> None:
    """Run a quantizer, whose input ``x`` a pool may watch: ours tests it as it goes, beside another runs a kernel of its own.

    Args:
        row: the quantizer.
        nan: of the pool, or ``None``.
        x, global_scale: what it is handed.
        valid_rows: int32, one element; rows at or beyond it do not count where a kernel of its own tests.
        arguments: of the quantizer.
        batch, by_expert: as in :meth:`NanWatch.site`.
    """
    site = None if nan is None else nan.site(x, global_scale, batch=batch, by_expert=by_expert)
    if nan is None or site is None:
        row.run(*arguments)
    elif row.name == "triton":
        row.run(*arguments, nan=site)
    else:
        nan.note(x, site, valid_rows)
        row.run(*arguments)


class Table(UserDict[str, Backend]):
    """Backends by name, in the order in which ``"auto"`` tries them.

    Every eager call chooses, so choices on CUDA devices, whose capability does not change, are remembered until a row
    changes. On a CPU, whether Triton's interpreter runs may change.
    """

    def __init__(self, *rows: Backend) -> None:
        self._chosen: dict[tuple[str, Call], Backend] = {}
        super().__init__({row.name: row for row in rows})

    def choose(self, name: str, call: Call) -> Backend:
        """The row that ``name`` asks for.

        Raises:
            TypeError: ``name`` is no string.
            ValueError: no such backend, or it cannot run this call; says why.
        """
        if not isinstance(name, str):
            raise TypeError(f"backend must be a string, got {name!r}")
        row = self._chosen.get((name, call))
        if row is None:
            row = self._choose(name, call)
            if call.device.type == "cuda":
                self._chosen[name, call] = row
        return row

    def _choose(self, name: str, call: Call) -> Backend:
        if name == "auto":
            reasons = {row.name: row.why_not(call) for row in self.values() if row.automatic}
            for name, reason in reasons.items():
                if reason is None:
                    return self[name]
            raise ValueError(
                f"no backend can run this: {'; '.join(f'{name!r}: {why}' for name, why in reasons.items())}"
            )
        row = self.get(name)
        if row is None:
            raise ValueError(f"backend must be one of {', '.join(['auto', *self])}, got {name!r}")
        reason = row.why_not(call)
        if reason is not None:
            raise ValueError(f"backend {name!r} cannot run this: {reason}")
        return row

    def forget_choices(self) -> None:
        """Choose anew from now on: what a requirement looks at has changed."""
        self._chosen.clear()

    def __setitem__(self, name: str, row: Backend) -> None:
        super().__setitem__(name, row)
        self.forget_choices()

    def __delitem__(self, name: str) -> None:
        super().__delitem__(name)
        self.forget_choices()


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
    major, minor = capability(call.device)
    if (major, minor) < (8, 9):
        return f"float8_e4m3 needs compute capability 8.9, {call.device} has {major}.{minor}"
    return None


# Compute capabilities, 10 * major + minor. FlashInfer's CUDA quantizer is built for these, and vLLM's ops accept them.
_BLACKWELL = (100, 103, 107, 110, 120, 121)


def package_refusal(call: Call, package: str, runs_on: tuple[int, ...]) -> str | None:
    """Why a package's kernel for some compute capabilities cannot run on the device of a call, or ``None``."""
    if reason := _optional.missing(package):
        return reason
    if call.device.type != "cuda":
        return f"{package} needs a CUDA device, not {call.device}"
    major, minor = capability(call.device)
    if 10 * major + minor not in runs_on:
        listed = ", ".join(str(number / 10) for number in runs_on)
        per_row = " with one alpha per row" if call.row_alpha else ""
        return f"it runs{per_row} on compute capability {listed} only, {call.device} has {major}.{minor}"
    return None


ARITHMETIC = ("exact", "vllm", "flashinfer")


def checked_arithmetic(arithmetic: str) -> str:
    """A quantizer's ``arithmetic``, which is one of ``ARITHMETIC``; raises ValueError."""
    if arithmetic not in ARITHMETIC:
        raise ValueError(f"arithmetic must be one of {', '.join(ARITHMETIC)}, got {arithmetic!r}")
    return arithmetic


def _arithmetic_refusal(call: Call) -> str | None:
    return None if call.arithmetic == "exact" else f"arithmetic {call.arithmetic!r} is that of backend 'triton' alone"


_NVFP4, _MXFP8, _MX = (ScaleFormat.nvfp4,), (ScaleFormat.mxfp8,), (ScaleFormat.mxfp8, ScaleFormat.mxfp4)
_FP4 = (ScaleFormat.nvfp4, ScaleFormat.mxfp4)


def _reference(run: Callable[..., None], formats: tuple[ScaleFormat, ...] = _NVFP4) -> Backend:
    return Backend("reference", _arithmetic_refusal, run, formats=formats)


def _triton(module: str, function: str, formats: tuple[ScaleFormat, ...] = _NVFP4) -> Backend:
    # Looked up at the first call: Triton may be missing, and its import takes a second.
    launcher = functools.cache(lambda: getattr(_optional.require(f"safealloc.kernels.{module}"), function))
    return Backend(
        "triton", triton_refusal, lambda *arguments, **keywords: launcher()(*arguments, **keywords), formats=formats
    )


def _quantizer(package: str, run: Callable[..., None]) -> Backend:
    def refusal(call: Call) -> str | None:
        if reason := _arithmetic_refusal(call):
            return reason
        if call.valid_rows:
            return f"{package} takes no valid_rows"
        if call.silu_and_mul and (package == "flashinfer" or call.layout is not SfLayout.layout_128x4):
            return f"{package} does not quantize silu(gate) * up of a matrix in {call.layout.name}"
        if package == "vllm" and call.layout is SfLayout.layout_8x4:
            return "vLLM's own quantizer writes 128x4 and linear"
        return package_refusal(call, package, _BLACKWELL)

    return Backend(package, refusal, run, automatic=False, package=package)


QUANTIZERS = Table(
    _triton("triton_quantize", "quantize"),
    _reference(reference.quantize),
    _quantizer("flashinfer", vendors.flashinfer_quantize),
    _quantizer("vllm", vendors.vllm_quantize),
)
"""Quantizers. The vendors' run only by name: FlashInfer's costs a copy, and both write padding themselves."""

MX_QUANTIZERS = Table(_triton("triton_mx", "quantize", _MX), _reference(reference_mx.quantize, _MX))
"""Quantizers to MXFP8 and MXFP4."""

GROUPED_QUANTIZERS = Table(_triton("triton_grouped", "quantize"), _reference(reference_grouped.quantize))
"""Quantizers of rows grouped by expert (MoE). The vendors' do not clean: they need a row of ``CLEANERS`` beside them."""

CLEANERS = Table(_triton("triton_grouped", "clean"), _reference(reference_grouped.clean))
"""What clears the scales that only an earlier step wrote."""


_SWIZZLED = SfLayout.layout_128x4, SfLayout.layout_8x4


def _flashinfer(
    name: str,
    runs_on: tuple[int, ...],
    *,
    reads: tuple[SfLayout, ...] = (SfLayout.layout_128x4,),
    returns: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16),
    row_alpha: tuple[int, ...] = (),
    formats: tuple[ScaleFormat, ...] = _NVFP4,
) -> Backend:
    """``runs_on``: compute capabilities with one alpha; ``row_alpha``: with one per row; ``formats``: what it multiplies."""

    def refusal(call: Call) -> str | None:
        if call.format is ScaleFormat.mxfp8 and call.below_128:
            return "FlashInfer multiplies MXFP8 where n and k are at least 128"
        if call.layout not in reads:
            return f"it reads {' and '.join(layout.name for layout in reads)}, the scales are in {call.layout.name}"
        if call.out_dtype not in returns:
            return f"it returns {' or '.join(map(str, returns))}, not {call.out_dtype}"
        per_row = call.row_alpha or (call.row_alpha is None and not runs_on)
        capabilities = row_alpha if per_row else runs_on
        if not capabilities:
            return "it takes one alpha, not one per row" if per_row else "it takes one alpha per row, not one"
        return package_refusal(call, "flashinfer", capabilities)

    function = vendors.flashinfer_mm_mxfp8 if ScaleFormat.mxfp8 in formats else vendors.flashinfer_mm
    run = functools.partial(function, backend="auto" if name == "flashinfer" else name)
    return Backend(name, refusal, run, automatic=name == "flashinfer", package="flashinfer", formats=formats)


GEMMS = Table(
    _flashinfer("flashinfer", _BLACKWELL, row_alpha=(100, 103), formats=_FP4),  # FlashInfer's own choice
    _triton("triton_gemm", "mm"),
    _reference(reference.mm, _FP4),
    _flashinfer("cudnn", _BLACKWELL, formats=_FP4),
    _flashinfer("trtllm", (100, 103, 107), reads=_SWIZZLED, returns=(torch.bfloat16,)),
    _flashinfer("cutlass", _BLACKWELL),
    _flashinfer("cute-dsl", (100, 103, 107, 120, 121), row_alpha=(100, 103), formats=_FP4),
    _flashinfer("cutedsl_low_latency", (100, 103, 107), formats=_FP4),
    _flashinfer("b12x", (120, 121), formats=_FP4),
    _flashinfer("cake", (), row_alpha=(100, 103)),
)
"""GEMMs of FP4. What FlashInfer's run on, read and return, and where with an alpha per row: by its ``mm_fp4`` (0.7.2).

FlashInfer itself refuses what depends on the shape, on CUDA's version or on another package.
"""

MXFP8_GEMMS = Table(
    _flashinfer("flashinfer", _BLACKWELL, formats=_MXFP8),
    _reference(reference.mm, _MXFP8),
    _flashinfer("cudnn", _BLACKWELL, formats=_MXFP8),
    _flashinfer("trtllm", (100, 103, 107), reads=_SWIZZLED, returns=(torch.bfloat16,), formats=_MXFP8),
    _flashinfer("cutlass", _BLACKWELL, formats=_MXFP8),
    _flashinfer("cute-dsl", (100, 103, 107), formats=_MXFP8),
    _flashinfer("cutedsl_low_latency", (100, 103, 107), formats=_MXFP8),
    _flashinfer("b12x", (120, 121), formats=_MXFP8),
)
"""GEMMs of MXFP8, by the requirements of FlashInfer's ``mm_mxfp8`` (0.7.2)."""


def zero_padding(scales: Tensor, spec: ScaleSpec) -> None:
    """Zero the padding of scales that no pool made, in place: by one Triton kernel, or up to four fills without Triton.

    Args:
        scales: contiguous, one-byte dtype, exactly the scales of ``spec``.
        spec: what they are.
    """
    if triton_refusal(Call(scales.device, spec.layout)) is None:
        kernel = _optional.require("safealloc.kernels.triton_padding").zero_padding
        kernel(scales, spec.layout, spec.rows, spec.k, spec.padded_k, format=spec.format)
    else:
        spec.zero_padding(scales)

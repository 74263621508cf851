"""Where vLLM writes and reads block scales, and how :mod:`safealloc.integrations.vllm.contract` hears of it.

An op is hooked inside its implementation, so that compiled code is covered and traced as before; a function or method calls
the original alone while it is traced. What a vLLM does not have, or has with other parameters, is left alone.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from safealloc.errors import LayoutMismatchError
from safealloc.formats.format import ScaleFormat
from safealloc.formats.layout import SfLayout
from safealloc.integrations.patches import Patches
from safealloc.integrations.vllm.contract import Contract, Matrix, format_of
from safealloc.integrations.vllm.worker import logger
from safealloc.pool.declare import spec, traced

Call = Mapping[str, Any]
"""The arguments of a call by name."""

_SWIZZLED, _8X4, _LINEAR = SfLayout.layout_128x4, SfLayout.layout_8x4, SfLayout.layout_linear
_NVFP4, _MXFP8, _MXFP4 = ScaleFormat.nvfp4, ScaleFormat.mxfp8, ScaleFormat.mxfp4
_KEYS = ("CUDA", "CPU")


@dataclass(frozen=True)
class Point:
    """One op, function or method: what it reads before, and what it has written after the call."""

    name: str
    module: str  # once it is imported, the op or function is there
    parameters: tuple[str, ...]  # of a function, in order: positional arguments get these names
    reads: Callable[[Call], Iterator[Matrix]] | None = None
    writes: Callable[[Call, Any], Iterator[Matrix]] | None = None


def _swizzled(flag: bool) -> SfLayout:
    return _SWIZZLED if flag else _LINEAR


def _tile(use_8x4: bool) -> SfLayout:
    return _8X4 if use_8x4 else _SWIZZLED


# --- producers --------------------------------------------------------------------------------------------------------


def _fp4_quant(call: Call, result: Any) -> Iterator[Matrix]:
    x, scales, data = call["input"], call["output_scale"], call["output"]
    yield Matrix(scales, _rows(x), _swizzled(call["is_sf_swizzled_layout"]), _NVFP4, 2 * data.shape[-1])


def _silu_quant(call: Call, result: Any) -> Iterator[Matrix]:
    data = call["result"]
    yield Matrix(call["result_block_scale"], _rows(data, 2), _SWIZZLED, _NVFP4)


def _quant_8x4(call: Call, result: Any) -> Iterator[Matrix]:
    yield Matrix(result[1], _rows(call["a"]), _8X4, _NVFP4)


def _mxfp8_8x4(call: Call, result: Any) -> Iterator[Matrix]:
    yield Matrix(result[1], _rows(call["a"]), _8X4, _MXFP8)


def _mxfp4_quant(call: Call, result: Any) -> Iterator[Matrix]:
    yield Matrix(result[1], _rows(call["a"]), _SWIZZLED, _MXFP4)


def _mxfp8_quant(call: Call, result: Any) -> Iterator[Matrix]:
    x, (data, scales) = call["x"], result
    yield Matrix(scales, x.shape, _swizzled(call.get("is_sf_swizzled_layout", False)), _MXFP8, data.shape[-1])


def _flashinfer_quant(call: Call, result: Any) -> Iterator[Matrix]:
    mx = call.get("sf_vec_size", 16) == 32
    layout = _tile(call.get("is_sf_8x4_layout", False)) if call.get("is_sf_swizzled_layout", True) else _LINEAR
    yield Matrix(result[1], _rows(call["input"]), layout, _MXFP4 if mx else _NVFP4)


def _rows(x: Tensor, per_element: int = 1) -> tuple[int, int]:
    """Shape of a matrix of all rows of ``x``."""
    return x.numel() // x.shape[-1], per_element * x.shape[-1]


# --- interleaves, which read linear scales and write others -----------------------------------------------------------


def _interleave_reads(call: Call) -> Iterator[Matrix]:
    source = call["unswizzled_sf"]
    held = spec(source)
    if held is not None:
        yield Matrix(source, None, _LINEAR, held.format)


def _interleave_writes(call: Call, result: Tensor) -> Iterator[Matrix]:
    """Bytes of unknown format get no note: NVFP4 and MX scales go through the same function."""
    source = call["unswizzled_sf"]
    held = spec(source)
    if held is not None and held.layout is _LINEAR:
        shape = (held.rows, held.k) if source.ndim < 3 else (*source.shape[:-1], held.k)
        yield Matrix(result, shape, _SWIZZLED, held.format, held.padded_k)
    elif held is None and source.dtype == torch.float8_e4m3fn:
        yield Matrix(result, (*source.shape[:-1], 16 * source.shape[-1]), _SWIZZLED, _NVFP4)


def _mxfp8_interleave_reads(call: Call) -> Iterator[Matrix]:
    yield Matrix(call["sf"], None, _LINEAR, _MXFP8)


def _mxfp8_interleave_writes(call: Call, result: Tensor) -> Iterator[Matrix]:
    yield Matrix(result, (call["M"], call["K"]), _SWIZZLED, _MXFP8)


def _blockscale_reads(call: Call) -> Iterator[Matrix]:
    yield Matrix(call["scale"], None, _LINEAR, _NVFP4)


def _blockscale_writes(call: Call, result: Tensor) -> Iterator[Matrix]:
    scale = call["scale"]
    yield Matrix(result, (*scale.shape[:-1], 16 * scale.shape[-1]), _SWIZZLED, _NVFP4)


# --- consumers --------------------------------------------------------------------------------------------------------


def _cutlass_mm(call: Call) -> Iterator[Matrix]:
    yield Matrix(call["block_scale_a"], _rows(call["a"], 2), _SWIZZLED, _NVFP4)
    yield Matrix(call["block_scale_b"], None, _SWIZZLED, _NVFP4)


def _flashinfer_mm(call: Call) -> Iterator[Matrix]:
    format = _NVFP4 if call.get("block_size", 16) == 16 and call.get("use_nvfp4", True) else _MXFP4
    yield Matrix(call["A_scale"], _rows(call["A"], 2), _tile(call["use_8x4_sf_layout"]), format)
    if call["backend"] != "trtllm":  # whose weights are shuffled too
        yield Matrix(call["B_scale"].t(), None, _SWIZZLED, format)


def _flashinfer_mxfp8_mm(call: Call) -> Iterator[Matrix]:
    yield Matrix(call["A_scale"], _rows(call["A"]), _tile(call.get("use_8x4_sf_layout", False)), _MXFP8)
    if call.get("backend") != "trtllm":
        yield Matrix(call["B_scale"], None, _SWIZZLED, _MXFP8)


def _group_mm(call: Call) -> Iterator[Matrix]:
    yield Matrix(call["a_blockscale"], None, _SWIZZLED, _NVFP4)


def _cutlass_moe(call: Call) -> Iterator[Matrix]:
    yield from _moe_input(call["input"], call.get("input_sf"), _swizzled(call.get("swizzled_input_sf", True)))


def _trtllm_moe(call: Call) -> Iterator[Matrix]:
    yield from _moe_input(call["hidden_states"], call.get("hidden_states_scale"), _LINEAR)


def _moe_input(data: Tensor, scales: Tensor | None, layout: SfLayout) -> Iterator[Matrix]:
    if isinstance(scales, Tensor):
        format, k = format_of(data)
        yield Matrix(scales, (_rows(data)[0], k), layout, format)


# --- where they are ---------------------------------------------------------------------------------------------------

_OPS, _FLASHINFER, _UTILS = "vllm._custom_ops", "vllm.utils.flashinfer", "vllm.model_executor.layers.quantization.utils"
_THEIRS, _GROUP = "flashinfer.quantization.fp4_quantization", "vllm.distributed.parallel_state"
_INTERLEAVE = ("unswizzled_sf",)
_QUANT = ("input", "global_scale", "sf_vec_size", "sf_use_ue8m0", "is_sf_swizzled_layout", "is_sf_8x4_layout")

OPS = (
    Point("_C::scaled_fp4_quant.out", _OPS, (), None, _fp4_quant),
    Point("_C::silu_and_mul_nvfp4_quant", _OPS, (), None, _silu_quant),
    Point("_C::cutlass_scaled_fp4_mm", _OPS, (), _cutlass_mm),
    Point("_C::cutlass_fp4_group_mm", _OPS, (), _group_mm),
    Point("vllm::mxfp8_quantize", f"{_UTILS}.mxfp8_utils", (), None, _mxfp8_quant),
    Point("vllm::flashinfer_nvfp4_quantize", _FLASHINFER, (), None, _quant_8x4),
    Point("vllm::flashinfer_mxfp8_quantize_8x4", _FLASHINFER, (), None, _mxfp8_8x4),
    Point("vllm::flashinfer_mxfp4_quantize", _FLASHINFER, (), None, _mxfp4_quant),
    Point("vllm::flashinfer_mm_fp4", _FLASHINFER, (), _flashinfer_mm),
    Point("vllm::mm_mxfp8", _FLASHINFER, (), _flashinfer_mxfp8_mm),
)
"""Ops, hooked in their implementation."""

FUNCTIONS = (
    Point("flashinfer_fp4_quantize", _FLASHINFER, _QUANT, None, _flashinfer_quant),
    Point("nvfp4_block_scale_interleave", _FLASHINFER, _INTERLEAVE, _interleave_reads, _interleave_writes),
    Point("block_scale_interleave", _THEIRS, _INTERLEAVE, _interleave_reads, _interleave_writes),
    Point(
        "swizzle_mxfp8_scale",
        f"{_UTILS}.mxfp8_utils",
        ("sf", "M", "K"),
        _mxfp8_interleave_reads,
        _mxfp8_interleave_writes,
    ),
    Point("swizzle_blockscale", f"{_UTILS}.nvfp4_utils", ("scale",), _blockscale_reads, _blockscale_writes),
    Point("flashinfer_cutlass_fused_moe", _FLASHINFER, ("input",), _cutlass_moe),
    *(
        Point(name, "flashinfer.fused_moe", (), _trtllm_moe)
        for name in (
            "trtllm_fp4_block_scale_moe",
            "trtllm_fp4_block_scale_routed_moe",
            "trtllm_fp8_block_scale_moe",
            "trtllm_fp8_block_scale_routed_moe",
        )
    ),
)
"""Functions, replaced under every name that a module has bound them to."""

GATHERS = ("_all_gather_out_place", "all_gatherv")
"""Methods of vLLM's ``GroupCoordinator`` that gather along the first dimension."""


def install(patches: Patches, mode: str) -> None:
    """Hook all that this vLLM has; ``patches.restore`` undoes it.

    Args:
        mode: ``warn`` or ``error``.
    """
    contract = Contract(mode)
    for point in OPS:
        patches.when_imported(point.module, functools.partial(_guarded, contract, point, _hook_op, patches))
    for point in FUNCTIONS:
        patches.when_imported(point.module, functools.partial(_guarded, contract, point, _hook_function, patches))
    patches.when_imported(_GROUP, functools.partial(_hook_gathers, contract, patches))
    logger.info("safealloc: the contract of scale layouts is checked (%s)", mode)


def _guarded(contract: Contract, point: Point, hook: Callable[..., None], patches: Patches, module: ModuleType) -> None:
    try:
        hook(contract, point, patches, module)
    except Exception as error:
        contract.failed(point.name, error)


def _hook_op(contract: Contract, point: Point, patches: Patches, module: ModuleType) -> None:
    namespace, _, name = point.name.partition("::")
    packet, _, overload = name.partition(".")
    op = getattr(getattr(getattr(torch.ops, namespace), packet, None), overload or "default", None)
    if op is None:
        return
    names = [argument.name for argument in op._schema.arguments]
    kernels = getattr(getattr(module, packet, None), "_backend_fns", None)
    if kernels is not None:  # torch.library.custom_op
        for device, kernel in list(kernels.items()):
            patches.set_item(kernels, device, functools.partial(_call, contract, point, names, kernel))
        return
    library = torch.library.Library(namespace, "IMPL")
    patches.undo_by(library._destroy)
    for key in _KEYS:
        if not torch._C._dispatch_has_kernel_for_dispatch_key(point.name, key):
            continue
        boxed = torch.library.get_kernel(point.name, key)
        override = functools.partial(_override, contract, point, names, boxed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch warns of the override
            library.impl(name, override, key, with_keyset=True, allow_override=True)


def _override(
    contract: Contract, point: Point, names: Sequence[str], kernel: Any, keys: Any, *given: Any, **named: Any
) -> Any:
    return _call(contract, point, names, functools.partial(kernel.call_boxed, keys), *given, **named)


def _hook_function(contract: Contract, point: Point, patches: Patches, module: ModuleType) -> None:
    original = getattr(module, point.name, None)
    if original is None:
        return
    names = point.parameters
    if not names:
        names = tuple(inspect.signature(original).parameters)

    def noted(*given: Any, **named: Any) -> Any:
        if torch.compiler.is_compiling():
            return original(*given, **named)
        return _call(contract, point, names, original, *given, **named)

    noted.__name__ = noted.__qualname__ = point.name
    patches.rebind(original, noted)


def _call(
    contract: Contract, point: Point, names: Sequence[str], original: Callable[..., Any], *given: Any, **named: Any
) -> Any:
    call = dict(zip(names, given, strict=False)) | named
    idle = traced()
    if point.reads is not None and not idle:
        try:
            contract.reads(point.name, *point.reads(call))
        except LayoutMismatchError:
            raise
        except Exception as error:
            contract.failed(point.name, error)
    result = original(*given, **named)
    if point.writes is not None and not idle:
        try:
            contract.wrote(point.name, *point.writes(call, result))
        except Exception as error:
            contract.failed(point.name, error)
    return result


def _hook_gathers(contract: Contract, patches: Patches, module: ModuleType) -> None:
    def gather(name: str, original: Callable[..., Any], group: Any, input_: Any, *given: Any, **named: Any) -> Any:
        result = original(group, input_, *given, **named)
        dim = given[0] if given else named.get("dim", 0)
        if dim == 0 and not torch.compiler.is_compiling() and not traced():
            try:
                several = isinstance(input_, (list, tuple))
                for source, target in zip(
                    input_ if several else [input_], result if several else [result], strict=True
                ):
                    contract.gathered(f"{name} over {group.world_size} ranks", source, target, group.world_size)
            except Exception as error:
                contract.failed(name, error)
        return result

    for name in GATHERS:
        if hasattr(module.GroupCoordinator, name):
            patches.wrap(module.GroupCoordinator, name, functools.partial(gather, name))

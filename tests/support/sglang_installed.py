"""SGLang's own Python beside stand-ins for whatever it imports, on a machine without a GPU.

The wheel is installed without its dependencies. The modules in :data:`REAL` are SGLang's own, and all others that they import
are stand-ins: SGLang's other modules, FlashInfer, and packages that are not here.
"""

from __future__ import annotations

import enum
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

REAL = (
    "sglang.srt.plugins",
    "sglang.srt.plugins.hook_registry",
    "sglang.srt.environ",
    "sglang.kernels.kernel_api_logging",
    "sglang.srt.utils.common",
    "sglang.srt.utils.custom_op",
    "sglang.srt.layers.quantization.fp4_utils",
    "sglang.srt.layers.quantization.fp8_utils",
    "sglang.srt.layers.moe.flashinfer_cutedsl_moe",
    "sglang.srt.models.qwen2_moe",
    "sglang.srt.model_executor.model_runner",
    "sglang.srt.arg_groups.cuda_graph_hook",
    "sglang.srt.arg_groups.memory_hook",
)
"""Modules whose code is SGLang's own."""


def missing() -> str | None:
    """Why the tests cannot run, or ``None``."""
    found = importlib.machinery.PathFinder.find_spec("sglang")
    return None if found is not None else "sglang is not installed"


class _Meta(type):
    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything()

    def __call__(cls, *given: Any, **named: Any) -> Any:  # a decorator too
        return given[0] if len(given) == 1 and callable(given[0]) and not named else super().__call__()


class _Anything(metaclass=_Meta):
    """Stands for a class, a function, a decorator or a constant."""

    def __call__(self, *given: Any, **named: Any) -> Any:
        return given[0] if len(given) == 1 and callable(given[0]) and not named else _Anything()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything()

    def __getitem__(self, key: Any) -> Any:
        return _Anything()

    def __iter__(self) -> Iterator[Any]:
        return iter(())

    def __or__(self, other: Any) -> Any:
        return self

    __ror__ = __or__

    def __bool__(self) -> bool:
        return False


class _StandIn(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if f"{self.__name__}.{name}" in REAL:
            return importlib.import_module(f"{self.__name__}.{name}")
        return _Meta(name, (_Anything,), {})


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Stand-ins for the modules of SGLang that are not real, and for packages that only SGLang imports."""

    def __init__(self) -> None:
        self.packages = {"sglang", "sgl_kernel", "flashinfer", "transformers"}

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        top = name.partition(".")[0]
        if name in REAL:
            return importlib.machinery.PathFinder.find_spec(name, path)
        if top not in self.packages:
            return None
        spec = importlib.machinery.ModuleSpec(name, self, is_package=True)
        if top == "sglang":
            found = importlib.machinery.PathFinder.find_spec(name, path)
            if found is not None and found.submodule_search_locations:
                spec.submodule_search_locations = list(found.submodule_search_locations)
        return spec

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        if module.__name__ == "sglang.srt.runtime_context":
            platform = types.SimpleNamespace(is_sm90=False, is_sm100=False, is_sm120=False, is_blackwell=True)
            module.get_platform = lambda: platform  # type: ignore[attr-defined]
        if module.__name__ == "sglang.srt.utils":
            module.is_flashinfer_available = lambda: True  # type: ignore[attr-defined]
        if module.__name__ == "flashinfer":
            vars(module).update(FLASHINFER)


class _Last(importlib.abc.MetaPathFinder):
    """Packages that are not installed, where SGLang's own modules import them."""

    def __init__(self, finder: _Finder) -> None:
        self.finder = finder

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        frame: Any = sys._getframe(1)
        while frame is not None and "importlib" in frame.f_code.co_filename:
            frame = frame.f_back
        if frame is not None and str(frame.f_globals.get("__name__")).startswith("sglang."):
            self.finder.packages.add(name.partition(".")[0])
            return self.finder.find_spec(name, path)
        return None


def install() -> None:
    """Make SGLang importable in this process."""
    finder = _Finder()
    sys.meta_path.insert(0, finder)
    sys.meta_path.append(_Last(finder))


# --- FlashInfer -------------------------------------------------------------------------------------------------------

writes: list[str] = []
"""Which stand-in wrote, in order."""


def _padded(rows: int, cols: int) -> tuple[int, int]:
    return -(-rows // 128) * 128, -(-cols // 4) * 4


def _swizzled(rows: int, cols: int) -> Tensor:
    from safealloc import SfLayout

    return SfLayout.layout_128x4.offsets(rows, cols * 16)


def fp4_quantize(
    input: Tensor,
    global_scale: Tensor | None = None,
    sf_vec_size: int = 16,
    sf_use_ue8m0: bool = False,
    is_sf_swizzled_layout: bool = True,
    is_sf_8x4_layout: bool = False,
    enable_pdl: bool | None = None,
    backend: str = "cuda",
) -> tuple[Tensor, Tensor]:
    """Writes 1 into each valid scale and 0 into padding, as FlashInfer's kernel does."""
    writes.append("dense")
    rows, k = input.shape
    data = torch.empty((rows, k // 2), dtype=torch.uint8)
    padded = _padded(rows, k // sf_vec_size) if is_sf_swizzled_layout else (rows, k // sf_vec_size)
    scales = torch.empty((padded[0] * padded[1],), dtype=torch.uint8)
    data.zero_()
    scales.zero_()
    if is_sf_swizzled_layout:
        scales[_swizzled(rows, k // 16).flatten()] = 1
    return data, scales.reshape(padded)


def mxfp8_quantize(
    input: Tensor,
    is_sf_swizzled_layout: bool = True,
    alignment: int = 32,
    enable_pdl: bool | None = None,
    backend: str = "cuda",
    sf_swizzle_layout: int | None = None,
) -> tuple[Tensor, Tensor]:
    writes.append("mxfp8")
    rows, k = input.shape
    data = torch.empty((rows, k), dtype=torch.float8_e4m3fn)
    padded = _padded(rows, k // 32) if is_sf_swizzled_layout else (rows, k // 32)
    scales = torch.empty((padded[0] * padded[1],), dtype=torch.uint8)
    scales.zero_()
    if is_sf_swizzled_layout:
        scales[_swizzled(rows, k // 32).flatten()] = 127
    return data, scales


def _experts(input: Tensor, mask: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Valid scales of valid rows only; padding keeps what the memory held."""
    experts, rows = input.shape[:2]
    padded_rows, padded_cols = _padded(rows, k // 16)
    data = torch.empty(experts, rows, k // 2, dtype=torch.uint8)
    scales = torch.empty(experts, padded_rows, padded_cols // 4, dtype=torch.int32)
    data.zero_()
    flat = scales.view(experts, -1).view(torch.uint8)
    for expert, valid in enumerate(mask.tolist()):
        flat[expert, _swizzled(rows, k // 16)[:valid].flatten()] = 1
    tiles = scales.view(torch.float8_e4m3fn).view(experts, padded_rows // 128, padded_cols // 4, 32, 4, 4)
    return data.permute(1, 2, 0), tiles.permute(3, 4, 1, 5, 2, 0)


def silu_and_mul_scaled_nvfp4_experts_quantize(a: Tensor, mask: Tensor, a_global_sf: Tensor) -> tuple[Tensor, Tensor]:
    writes.append("silu")
    return _experts(a, mask, a.shape[2] // 2)


def scaled_fp4_grouped_quantize(a: Tensor, mask: Tensor, a_global_sf: Tensor) -> tuple[Tensor, Tensor]:
    writes.append("grouped")
    return _experts(a, mask, a.shape[2])


class _SfLayout(enum.Enum):
    """Not of integers, as FlashInfer's."""

    layout_128x4 = 0
    layout_8x4 = 1
    layout_linear = 2


FLASHINFER: dict[str, Any] = {"SfLayout": _SfLayout} | {
    one.__name__: one
    for one in (
        fp4_quantize,
        mxfp8_quantize,
        silu_and_mul_scaled_nvfp4_experts_quantize,
        scaled_fp4_grouped_quantize,
    )
}

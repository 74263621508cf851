"""NVFP4 scale buffers whose padding is zero at every CUDA graph replay, at no cost per step."""

from safealloc.capture import capture
from safealloc.default_pool import default_pool, use_pool
from safealloc.errors import (
    CaptureGrowthError,
    LayoutMismatchError,
    PaddingCorruptionError,
    PoolClosedError,
    PoolExhaustedError,
    SafeAllocError,
)
from safealloc.gemm import mm_fp4, set_foreign_scales
from safealloc.grouped import (
    clean_grouped_scales,
    nvfp4_quantize_grouped,
    silu_and_mul_nvfp4_quantize_grouped,
)
from safealloc.layout import ScaleSpec, SfLayout
from safealloc.linear import nvfp4_linear
from safealloc.pool import ScalePool
from safealloc.quantize import nvfp4_quantize
from safealloc.reports import CaptureGrowthWarning, GraphReport, PoolStats

__version__ = "0.1.0"

__all__ = [
    "CaptureGrowthError",
    "CaptureGrowthWarning",
    "GraphReport",
    "LayoutMismatchError",
    "PaddingCorruptionError",
    "PoolClosedError",
    "PoolExhaustedError",
    "PoolStats",
    "SafeAllocError",
    "ScalePool",
    "ScaleSpec",
    "SfLayout",
    "capture",
    "clean_grouped_scales",
    "default_pool",
    "mm_fp4",
    "nvfp4_linear",
    "nvfp4_quantize",
    "nvfp4_quantize_grouped",
    "set_foreign_scales",
    "silu_and_mul_nvfp4_quantize_grouped",
    "use_pool",
]

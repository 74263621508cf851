"""NVFP4 scale buffers whose padding is zero at every CUDA graph replay, at no cost per step."""

from safealloc._version import __version__
from safealloc.errors import (
    CaptureGrowthError,
    LayoutMismatchError,
    NanError,
    PaddingCorruptionError,
    PoolClosedError,
    PoolExhaustedError,
    SafeAllocError,
)
from safealloc.formats.format import ScaleFormat
from safealloc.formats.layout import SfLayout
from safealloc.formats.spec import ScaleSpec
from safealloc.ops.gemm import mm_fp4, set_foreign_scales
from safealloc.ops.gemm_mxfp8 import mm_mxfp8
from safealloc.ops.grouped import clean_grouped_scales, nvfp4_quantize_grouped, silu_and_mul_nvfp4_quantize_grouped
from safealloc.ops.linear import nvfp4_linear
from safealloc.ops.quantize import nvfp4_quantize, silu_and_mul_nvfp4_quantize
from safealloc.ops.quantize_mx import mxfp4_quantize, mxfp8_quantize
from safealloc.pool.capture import capture
from safealloc.pool.declare import check, declare, spec
from safealloc.pool.default import default_pool, use_pool
from safealloc.pool.pool import ScalePool
from safealloc.pool.reports import CaptureGrowthWarning, GraphReport, PoolStats

__all__ = [
    "CaptureGrowthError",
    "CaptureGrowthWarning",
    "GraphReport",
    "LayoutMismatchError",
    "NanError",
    "PaddingCorruptionError",
    "PoolClosedError",
    "PoolExhaustedError",
    "PoolStats",
    "SafeAllocError",
    "ScaleFormat",
    "ScalePool",
    "ScaleSpec",
    "SfLayout",
    "__version__",
    "capture",
    "check",
    "clean_grouped_scales",
    "declare",
    "default_pool",
    "mm_fp4",
    "mm_mxfp8",
    "mxfp4_quantize",
    "mxfp8_quantize",
    "nvfp4_linear",
    "nvfp4_quantize",
    "nvfp4_quantize_grouped",
    "set_foreign_scales",
    "silu_and_mul_nvfp4_quantize",
    "silu_and_mul_nvfp4_quantize_grouped",
    "spec",
    "use_pool",
]

"""Where SGLang's activations get block scales, read from 0.5.12 to 0.5.23, and what the pool changes there."""

from __future__ import annotations

from safealloc.integrations.sglang import targets
from safealloc.integrations.sites import Family, Site

_BOTH: tuple[Family, ...] = ("SM10x", "SM12x")

SITES = (
    Site("fp4_quantize", "_flashinfer_fp4_quantize_impl", "NVFP4 128x4", "kernel", targets.DENSE, _BOTH),
    Site(
        "SiLU + FP4, dense",
        "Qwen2MoeMLP._silu_fp4_quant_fused",
        "NVFP4 128x4",
        "nobody",
        targets.FUSED,
        _BOTH,
        "Qwen3.5 dense",
        targets.FUSED.since,
    ),
    Site("grouped CuTe-DSL MoE", "flashinfer_cutedsl_moe_masked", "NVFP4 128x4", "nobody", targets.GROUPED),
    Site("MXFP8 quantizer", "flashinfer_mxfp8_quantize", "MXFP8 128x4", "kernel", targets.MXFP8, _BOTH, "MXFP8 layers"),
    Site("diffusion MXFP8", "mxfp8_swizzled_triton", "MXFP8 128x4", "fill", None, (), "diffusion"),
)

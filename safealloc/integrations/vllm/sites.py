"""Where vLLM allocates block scales for activations, release by release, and what the pool changes there.

The table was read from the Python sources of vLLM 0.19.1, 0.20.2, 0.22.1, 0.25.1, 0.28.0, 0.30.0, 0.32.0 and 0.33.0, with
``tests/vllm_releases/scan_sites.py``; a release in between is taken for the one before. Default GPUs are those of 0.32.0 and
0.33.0. What kernels do is known from FlashInfer 0.7.2.post1's sources and from vLLM's comments.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from safealloc.integrations import drift, sites
from safealloc.integrations.sites import Family, Padding
from safealloc.integrations.vllm import targets

FILLS = (("0.20.0", "0.21.0"), ("0.25.0", "0.29.0"))
"""First and last release of those whose ``create_fp4_scale_tensor`` calls ``torch.zeros``."""

KERNEL_ZEROES = "0.30.0"
"""First release whose ``scaled_fp4_quant`` kernel zeroes padding, by a comment in vLLM."""


@dataclass(frozen=True, slots=True)
class Site(sites.Site):
    """One producer of vLLM's; padding ``None``: nobody zeroes it before :data:`KERNEL_ZEROES`, then the kernel."""

    since: str = targets.SUPPORTED[0]

    def zeroed_by(self, version: str) -> Padding:
        if self.where == _SHARED and self.hook is not None and fills(version):
            return "fill"
        if self.padding is None:
            return "kernel" if drift.release(version) >= drift.release(KERNEL_ZEROES) else "nobody"
        return self.padding

    def change(self, version: str) -> str:
        change = sites.Site.change(self, version)
        right_sized = self.hook in (targets.EXPERTS, targets.MX_EXPERTS)
        return f"{change}, memory" if change == "safety" and right_sized else change


def fills(version: str) -> bool:
    """Whether a release calls ``torch.zeros`` for the scales of its dense quantizer."""
    numbers = drift.release(version)
    return any(drift.release(first) <= numbers <= drift.release(last) for first, last in FILLS)


_SHARED, _TILES = "create_fp4_scale_tensor", "NVFP4 128x4"
_BOTH: tuple[Family, ...] = ("SM10x", "SM12x")
_EXPERTS = "scaled_fp4_experts_quant silu_and_mul_scaled_fp4_experts_quant"
_MXFP4_EXPERTS = "mxfp4_experts_quant silu_and_mul_mxfp4_experts_quant"
_ALL_TO_ALL = (
    "_unwrap_scale_and_prepare_for_moe flashinfer_alltoall_dispatch FlashInferNVLinkOneSidedPrepareAndFinalize.prepare"
)
_LINEAR = (
    f"{_SHARED} quantize_nvfp4_per_token_input norm_quant_trtllm_nvfp4 TrtLlmNvFp4ExpertsBase._quantize_per_token_input"
)
_MXFP8 = (
    "_mxfp8_e4m3_quantize_impl mxfp8_e4m3_quantize swizzle_mxfp8_scale flashinfer_mxfp8_quantize_8x4 "
    "TrtLlmMxfp4ExpertsModular.apply TrtLlmMxfp4ExpertsMonolithic.apply"
)
_V41 = ("fused_q_kv_rmsnorm_quant FusedWoAKernel.__call__", "DeepseekV4MegaAttnAttention._o_proj")
_V41_EXPERTS = "RoutedExpertGemm.gemm1 RoutedExpertGemm.front EngramBatch.__init__"

SITES: Sequence[Site] = (
    Site("scaled_fp4_quant", _SHARED, _TILES, None, targets.SCALES, _BOTH),
    Site("all-reduce + RMSNorm + FP4", _SHARED, _TILES, "nobody", targets.SCALES, ("SM10x",), "tensor parallel"),
    Site("SiLU + FP4, pass", _SHARED, _TILES, "nobody", targets.SCALES, _BOTH),
    Site(
        "SiLU + FP4, function",
        "_silu_and_mul_nvfp4_dynamic",
        _TILES,
        "nobody",
        targets.FUSED_ACT_QUANT,
        _BOTH,
        "",
        "0.30.0",
    ),
    Site("add + RMSNorm + FP4", _SHARED, _TILES, "nobody", targets.SCALES, (), "fuse_norm_quant", "0.30.0"),
    Site("attention + FP4", _SHARED, _TILES, "nobody", targets.ATTENTION_FUSION, (), "fuse_attn_quant"),
    Site("NVFP4 expert quantizers", _EXPERTS, _TILES, "nobody", targets.EXPERTS, (), "CUTLASS MoE"),
    Site(
        "MXFP4 expert quantizers",
        _MXFP4_EXPERTS,
        "MXFP4 128x4",
        "nobody",
        targets.MX_EXPERTS,
        (),
        "CUTLASS MoE",
        "0.20.2",
    ),
    Site("MoE input after all-to-all", _ALL_TO_ALL, _TILES, "kernel", None, ("SM12x",), "data parallel"),
    Site("CuTe-DSL batched MoE", "flashinfer_cutedsl_moe_masked", _TILES, "nobody", None, (), "batched experts"),
    Site("linear NVFP4 scales", _LINEAR, "NVFP4 linear", "no padding", None, ("SM10x",), "TRTLLM MoE"),
    Site("8x4 NVFP4", "flashinfer_nvfp4_quantize", "NVFP4 8x4", "kernel", None, (), "trtllm"),
    Site("MXFP8 quantizers", _MXFP8, "MXFP8, each layout", "kernel", None, (), "MXFP8 activations"),
    Site(
        "MXFP4 quantizer",
        "flashinfer_mxfp4_quantize",
        "MXFP4 128x4",
        "kernel",
        None,
        (),
        "MXFP4 linear layers",
        "0.22.1",
    ),
    Site("DeepSeek V4.1 query, wo_a", _V41[0], "MXFP8 128x4", "kernel", None, (), "that model", "0.30.0"),
    Site("DeepSeek V4.1 o_proj", _V41[1], "MXFP8 128x4", "nobody", None, (), "that model", "0.33.0"),
    Site(
        "DeepSeek V4.1 experts", _V41_EXPERTS, "MXFP8, 128x4 and linear", "not read", None, (), "that model", "0.33.0"
    ),
)
"""Scales in a layout of tiles, and linear ones of the same kinds; DeepGEMM's columns of FP8 scales are left out."""

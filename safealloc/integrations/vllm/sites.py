"""Where vLLM allocates scales with padding at each step, by release, and what the pool changes there.

Weights are not here, nor scales in linear layouts, which have no padding. ``tests/vllm_releases/check_releases.py`` searches
the sources of every release for such allocations, and names those that are missing here.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from safealloc.integrations.vllm import targets
from safealloc.integrations.vllm.targets import Target, release

Padding = Literal["zeros", "kernel", "nobody"]
"""Who zeroes padding: a ``torch.zeros`` at each call, the producer's kernel, or nobody that is known."""


@dataclass(frozen=True, slots=True)
class Site:
    """One function that allocates scales, or has FlashInfer allocate them."""

    name: str  # in the log and in doctor's table
    function: str  # module and qualified name, below ``vllm``
    padding: Padding | None  # ``None``: it depends on the release, :func:`dense_padding`
    hook: Target | None = None
    since: str = targets.SUPPORTED[0]
    until: str | None = None  # the first release without it


_OPS, _MOE, _V41 = "_custom_ops", "model_executor.layers.fused_moe", "models.deepseek_v41"
_DISPATCH = f"{_MOE}.prepare_finalize"
_MXFP8 = "model_executor.layers.quantization.utils.mxfp8_utils"
_CUTEDSL_MOE = "flashinfer_cutedsl_moe_masked"

SITES = (
    Site(targets.SCALES.name, f"{_OPS}.{targets.SCALES.name}", None, targets.SCALES),
    Site(
        targets.FUSED_ACT_QUANT.name,
        "model_executor.layers.fusion.fused_act_quant._silu_and_mul_nvfp4_dynamic",
        "nobody",
        targets.FUSED_ACT_QUANT,
        since="0.30.0",
    ),
    Site(targets.EXPERTS.name, f"{_OPS}.{targets.EXPERTS.name}", "nobody", targets.EXPERTS),
    Site(targets.SILU_EXPERTS.name, f"{_OPS}.{targets.SILU_EXPERTS.name}", "nobody", targets.SILU_EXPERTS),
    Site("mxfp4_experts_quant", f"{_OPS}.mxfp4_experts_quant", "nobody", since="0.20.0"),
    Site("silu_and_mul_mxfp4_experts_quant", f"{_OPS}.silu_and_mul_mxfp4_experts_quant", "nobody", since="0.20.0"),
    Site("CuTe-DSL batched experts", f"{_MOE}.experts.flashinfer_cutedsl_moe.{_CUTEDSL_MOE}", "nobody", until="0.20.0"),
    Site(
        "CuTe-DSL batched experts",
        f"{_MOE}.experts.flashinfer_cutedsl_batched_moe.{_CUTEDSL_MOE}",
        "nobody",
        since="0.20.0",
    ),
    Site("8x4 quantizer", "utils.flashinfer.flashinfer_quant_nvfp4_8x4_sf_layout", "kernel"),
    Site(
        "experts after data-parallel dispatch", f"{_DISPATCH}.naive_dp_ep._unwrap_scale_and_prepare_for_moe", "kernel"
    ),
    Site(
        "experts after one-sided NVLink dispatch",
        f"{_DISPATCH}.flashinfer_nvlink_one_sided.FlashInferNVLinkOneSidedPrepareAndFinalize.prepare",
        "kernel",
    ),
    Site(
        "experts after two-sided NVLink dispatch",
        f"{_DISPATCH}.flashinfer_nvlink_two_sided.flashinfer_alltoall_dispatch",
        "kernel",
    ),
    Site("experts after DeepEP dispatch", f"{_DISPATCH}.deepep_v2._unpack_mxfp8_scale", "zeros", since="0.29.0"),
    Site("MXFP4 quantizer", "utils.flashinfer.flashinfer_mxfp4_quantize", "kernel", since="0.22.0"),
    Site("MXFP8 quantizer", f"{_MXFP8}._mxfp8_e4m3_quantize_impl", "kernel"),
    Site("8x4 MXFP8 quantizer", "utils.flashinfer.flashinfer_mxfp8_quantize_8x4", "kernel", since="0.29.0"),
    Site("DeepSeek V4.1: q", f"{_V41}.common.ops.query_quant.fused_q_kv_rmsnorm_quant", "kernel", since="0.32.0"),
    Site("DeepSeek V4.1: engram", f"{_V41}.common.engram.EngramBatch.__init__", "kernel", since="0.32.0"),
    Site(
        "DeepSeek V4.1: all-reduce",
        f"{_V41}.nvidia.specialized_decode.boundary.boundary.empty_quantized_layer_input",
        "kernel",
        since="0.33.0",
    ),
    Site(
        "DeepSeek V4.1: o_proj",
        f"{_V41}.nvidia.flash_mla_mega_attn.DeepseekV4MegaAttnAttention._o_proj",
        "nobody",
        since="0.33.0",
    ),
)

DENSE_PADDING: tuple[tuple[str, Padding], ...] = (
    ("0.19.1", "nobody"),
    ("0.20.0", "zeros"),
    ("0.22.0", "nobody"),
    ("0.25.0", "zeros"),
    ("0.30.0", "kernel"),
)
"""Who zeroes the padding of a dense layer's scales, from a release on."""


def existing(version: str) -> list[Site]:
    """The sites of a release, in the order of the table."""
    at = release(version)
    return [one for one in SITES if release(one.since) <= at and (one.until is None or at < release(one.until))]


def dense_padding(version: str) -> Padding:
    """Who zeroes the padding of a dense layer's scales: vLLM's quantizer does from 0.30 on, the fused producers do not."""
    at = release(version)
    found = [padding for since, padding in DENSE_PADDING if release(since) <= at]
    return found[-1] if found else "nobody"


def is_hooked(site: Site, hooked: Collection[str]) -> bool:
    """Whether the pool may serve a site, where targets of these names are hooked."""
    return site.hook is not None and site.hook.name in hooked


def change(site: Site, version: str, hooked: Collection[str]) -> str:
    """What safealloc changes at a site of a release, where targets of these names are hooked."""
    padding = site.padding or dense_padding(version)
    if not is_hooked(site, hooked):
        why = {"nobody": "not hooked, and nobody zeroes its padding", "zeros": "zeroed at each call"}
        return f"nothing: {why.get(padding, 'its kernel zeroes padding')}"
    if site.hook in (targets.EXPERTS, targets.SILU_EXPERTS):
        return "memory and safety"
    return {"zeros": "time: no fill per call", "kernel": "safety behind fused producers; no time"}.get(
        padding, "safety"
    )

"""Finds functions of vLLM that allocate scales with padding, or have FlashInfer do it, in its sources."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator, Sequence

from safealloc.integrations.vllm import sites

_ALLOCATORS = {"empty", "zeros", "full", "new_empty", "new_zeros", "empty_like"}
_SCALE_SHAPED = re.compile(r"rounded_[mn]|padded_k|scale_n|// ?4|round_up|\b128\b|sf_|scale")
_SCALE_TYPED = re.compile(r"int32|uint8|e4m3|e8m0|sf|scale")
_ABOUT_BLOCKS = re.compile(r"fp4|mxfp8|blockscale|swizzl|_sf\b|sf_", re.IGNORECASE)
_PRODUCERS = {
    *("fp4_quantize", "nvfp4_quantize", "mxfp4_quantize", "_mxfp4_quantize", "mxfp8_quantize", "mxfp8_quantize_"),
    *("flashinfer_fp4_quantize", "flashinfer_nvfp4_quantize", "flashinfer_mxfp8_quantize"),
    *("block_scale_interleave", "nvfp4_block_scale_interleave", "swizzle_blockscale", "swizzle_mxfp8_scale"),
    *("scaled_fp4_grouped_quantize", "silu_and_mul_scaled_nvfp4_experts_quantize"),
}

NOT_SITES = {
    r"_fake$": "a shape for the compiler",
    r"process_weights|create_weights|_weights?(_|$)|convert_.*(weight|format)|align_|load_shared_expert$": "weights",
    r"from_modelopt|prepare_nvfp4_moe_layer|_setup_kernel_k3|_swizzled_scale_buffer$": "weights",
    r"Step5MegaMoEExperts\.__init__|\.precompile$|\.run_zeros$": "start-up",
    r"^third_party\.|qutlass_utils|deep_gemm_utils|fused_indexer_q|downcast_to_mxfp$": "another format or layout",
    r"fused_inv_rope_fp8_quant": "another format",
    r"swizzle_mxfp4_scales$|swizzle_mxfp8_scale$|swizzle_blockscale$": "called by others, which count",
    r"quantize_per_token_input$|quantize_nvfp4_per_token_input$": "linear scales",
    r"trtllm_mxfp4_moe\.": "linear scales",
    r"moe_kernel_quantize_input$|\.mxfp8_e4m3_quantize$|_mxfp8_e4m3_quantize_torch$": "a way to another site",
    r"collective_fusion\.": "gathers scales that are made already",
}
"""What is found and is no site, and why."""


def found(sources: Iterable[tuple[str, str]]) -> set[str]:
    """Functions that the scan takes for sites, by module and qualified name below ``vllm``.

    Args:
        sources: dotted names of modules, below ``vllm``, and their text.
    """
    functions = set()
    for module, text in sources:
        if not _ABOUT_BLOCKS.search(text):
            continue
        for name, node in _functions(ast.parse(text).body):
            if _is_site(node):
                functions.add(f"{module}.{name}")
    return {name for name in functions if not any(re.search(pattern, name) for pattern in NOT_SITES)}


def differences(version: str, functions: set[str]) -> tuple[list[str], list[str]]:
    """What the scan of a release found that the table does not have, and the other way round."""
    table = {site.function for site in sites.existing(version)}
    return sorted(functions - table), sorted(table - functions)


def _functions(body: Sequence[ast.stmt], prefix: str = "") -> Iterator[tuple[str, ast.FunctionDef]]:
    for node in body:
        if isinstance(node, ast.FunctionDef):
            yield f"{prefix}{node.name}", node
        elif isinstance(node, ast.ClassDef):
            yield from _functions(node.body, f"{prefix}{node.name}.")
        elif isinstance(node, (ast.If, ast.Try, ast.With)):
            yield from _functions(node.body, prefix)
            yield from _functions(getattr(node, "orelse", []), prefix)


def _is_site(function: ast.FunctionDef) -> bool:
    calls = [node for node in ast.walk(function) if isinstance(node, ast.Call)]
    names = [getattr(call.func, "attr", getattr(call.func, "id", "")) for call in calls]
    if _PRODUCERS.intersection(names):
        return True
    shaped = [ast.unparse(call) for call, name in zip(calls, names, strict=True) if name in _ALLOCATORS]
    shaped = [text for text in shaped if _SCALE_SHAPED.search(text) and _SCALE_TYPED.search(text)]
    return bool(shaped) and _ABOUT_BLOCKS.search(ast.unparse(function)) is not None

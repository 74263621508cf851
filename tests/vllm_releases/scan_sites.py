"""Finds where vLLM allocates block scales, by its sources; nothing is imported.

python tests/vllm_releases/scan_sites.py PATH [PATH ...]

PATH is the package directory of an installed vLLM, or a wheel. Two kinds of code are found: an allocation by torch in a dtype
that holds block scales, under a name that says so, and a call of a function of FlashInfer that allocates scales itself. Not
found: a tensor of scales with another name, or one allocated in C++. ``LEFT_OUT`` says why the others are no sites.

Printed are the places that ``safealloc/integrations/vllm/sites.py`` lacks; the exit code is 1 if there are any.
"""

from __future__ import annotations

import argparse
import ast
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from safealloc.integrations.vllm import sites

ALLOCATIONS = {"empty", "zeros", "ones", "full", "empty_strided", "new_empty", "new_zeros", "empty_like", "zeros_like"}
SCALE_TYPES = {"int32", "uint8", "float8_e4m3fn", "float8_e8m0fnu"}
QUANTIZERS = {
    *("nvfp4_quantize", "nvfp4_quantize_", "fp4_quantize", "flashinfer_fp4_quantize", "nvfp4_batched_quantize"),
    *("mxfp8_quantize", "mxfp8_quantize_", "flashinfer_mxfp8_quantize", "mxfp8_grouped_quantize", "_mxfp4_quantize"),
    *("nvfp4_block_scale_interleave", "block_scale_interleave", "scaled_fp4_grouped_quantize"),
    *("silu_and_mul_scaled_nvfp4_experts_quantize", "nvfp4_quantize_cute_dsl", "mxfp8_quantize_cute_dsl"),
}
"""Functions of FlashInfer, by the names under which vLLM imports them."""

LEFT_OUT = {
    r"(^|/)(amd|rocm|xpu)[/_.]|_aiter_ops|quark|flydsl|gfx942|_mxfp8_e4m3_quantize_triton": "another platform than CUDA",
    r"\.create_weights|\.process_weights|/oracle/mxfp4\.py:convert_|prepare_static_weights|_shuffle_mxfp8_moe_weights"
    r"|_register_weight|DeepseekV4MegaMoEExperts\.__init__|lm_head\.py|_swizzled_scale_buffer|downcast_to_mxfp"
    r"|_quantize_mxfp4_moe_weight|allspark_repack_weight": "weights",
    r"\.get_inputs$|\.precompile$|_quantize_fake$": "an example for tracing or compiling, which no GEMM of a step reads",
    r"^third_party/": "code of others that vLLM carries: Triton's MoE kernels, a test",
    r":run_cutlass_moe_(mx)?fp4$": "offsets of scales, no scales",
    r"FusedAddRMSNormNvfp4QuantPattern\.register\.replacement$": "a dummy that FlashInfer's checks of arguments want",
    r"fused_moe/utils\.py:moe_kernel_quantize_input$": "vLLM's own emulation, which has no scales",
    r":_padded_cutlass$": "FP8 with scales of blocks of 128, in float32",
    r"deep_gemm_utils\.py|silu_mul_quant_fp8_packed|rope_quant_attn_out|alloc_mega_attn_output"
    r"|fused_inv_rope_fp8_quant": "DeepGEMM's columns",
    r"fused_indexer_q\.py": "linear scales of the indexer's queries, which no GEMM with tiles reads",
}
"""Places by regular expression, and why they are no sites."""

_MAY_ALLOCATE = re.compile(f"{'|'.join(sorted(SCALE_TYPES | QUANTIZERS))}|_DTYPE|(scale|sf)\\w*\\.dtype")
_SCALE_NAME = re.compile(r"scale|(^|_)sf(_|s?$)", re.IGNORECASE)


def missing(sources: Mapping[str, str]) -> list[str]:
    """Places, as file:function, whose function is not in the table of sites, and that are not left out."""
    known = {place for site in sites.SITES for place in site.where.split()}
    return [place for place in scan(sources) if place.partition(":")[2] not in known and left_out(place) is None]


def left_out(place: str) -> str | None:
    """Why a place is no site, or ``None``."""
    return next((why for pattern, why in LEFT_OUT.items() if re.search(pattern, place)), None)


def scan(sources: Mapping[str, str]) -> list[str]:
    """Every place in some sources, which are given by their path below ``vllm/``."""
    found = set()
    for path, text in sources.items():
        if not _MAY_ALLOCATE.search(text):
            continue
        for function, call, names in _calls(ast.parse(text)):
            name = _name(call.func)
            allocates = name in ALLOCATIONS and any(map(_SCALE_NAME.search, names)) and _holds_scales(call)
            if name in QUANTIZERS or allocates:
                found.add(f"{path}:{function}")
    return sorted(found)


def _holds_scales(call: ast.Call) -> bool:
    """Whether the dtype is one of ``SCALE_TYPES``, that of another scale tensor, or a constant of vLLM's."""
    for named in call.keywords:
        if named.arg == "dtype":
            value, name = named.value, _name(named.value)
            same = name == "dtype" and isinstance(value, ast.Attribute) and _SCALE_NAME.search(_name(value.value))
            return name in SCALE_TYPES or bool(same) or re.search(r"(FP8|SCALE)_DTYPE", name) is not None
    return any(_name(argument) in SCALE_TYPES for argument in call.args)


def _name(node: ast.AST) -> str:
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def _calls(
    node: ast.AST, function: str = "", names: Sequence[str] = ()
) -> Iterator[tuple[str, ast.Call, Sequence[str]]]:
    """Calls, with the function that they are in, and the names that the statement assigns to or returns from."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        function = f"{function}.{node.name}".lstrip(".")
    if isinstance(node, (ast.Assign, ast.AnnAssign)):
        assigned = node.targets if isinstance(node, ast.Assign) else [node.target]
        names = [_name(part) for target in assigned for part in ast.walk(target)]
    elif isinstance(node, ast.Return):
        names = [function.rpartition(".")[2]]
    elif isinstance(node, ast.stmt):
        names = ()
    if isinstance(node, ast.Call):
        yield function, node, names
    for child in ast.iter_child_nodes(node):
        yield from _calls(child, function, names)


def read(path: Path) -> dict[str, str]:
    """The Python sources of an installed package or a wheel."""
    if path.is_dir():
        return {file.relative_to(path).as_posix(): file.read_text(encoding="utf-8") for file in path.rglob("*.py")}
    with zipfile.ZipFile(path) as wheel:
        files = [name for name in wheel.namelist() if name.startswith("vllm/") and name.endswith(".py")]
        return {name.removeprefix("vllm/"): wheel.read(name).decode() for name in files}


def main(arguments: Sequence[str] | None = None) -> int:
    """Print what the table lacks."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="an installed package vllm, or a wheel")
    found = [(path, place) for path in parser.parse_args(arguments).paths for place in missing(read(path))]
    for path, place in found:
        print(path, place)
    return int(bool(found))


if __name__ == "__main__":
    raise SystemExit(main())

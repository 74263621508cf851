"""Finds where vLLM allocates block scales, by its sources; nothing is imported.

python tests/vllm_releases/scan_sites.py [VLLM_DIRECTORY_OR_WHEEL ...]

Two kinds of code are found: an allocation of torch in a dtype that holds block scales, assigned to a name that says so, and a
call of a function of FlashInfer that allocates scales itself. Weights at load time, KV caches and backends of other platforms
than CUDA are left out, by the paths and names in this file.
"""

from __future__ import annotations

import ast
import re
import sys
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

ALLOCATIONS = frozenset({"empty", "zeros", "ones", "full", "empty_strided", "new_empty", "new_zeros", "empty_like"})
SCALE_TYPES = frozenset({"int32", "uint8", "float8_e4m3fn", "float8_e8m0fnu"})
QUANTIZERS = frozenset(
    {
        "nvfp4_quantize",
        "nvfp4_quantize_",
        "fp4_quantize",
        "flashinfer_fp4_quantize",
        "mxfp8_quantize",
        "mxfp8_quantize_",
        "flashinfer_mxfp8_quantize",
        "_mxfp4_quantize",
        "_mxfp8_quantize",
        "nvfp4_block_scale_interleave",
        "block_scale_interleave",
        "silu_and_mul_scaled_nvfp4_experts_quantize",
        "scaled_fp4_grouped_quantize",
        "add_rmsnorm_fp4quant",
        "rmsnorm_fp4quant",
        "_FLASHINFER_ADD_RMSNORM_FP4QUANT",
    }
)
_SCALE_NAME = re.compile(r"scale|(^|_)sf(_|$|s$)", re.IGNORECASE)


def scan(sources: Mapping[str, str]) -> list[str]:
    found = set()
    for path, text in sources.items():
        for where, call, names in _calls(ast.parse(text)):
            name = _name(call.func)
            if name in QUANTIZERS:
                found.add(f"{path}:{where}:{name}")
            elif name in ALLOCATIONS and any(map(_SCALE_NAME.search, names)):
                types = {node.attr for node in ast.walk(call) if isinstance(node, ast.Attribute)} & SCALE_TYPES
                if types:
                    found.add(f"{path}:{where}:{name} {' '.join(sorted(types))}")
    return sorted(found)


def _name(node):
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def _calls(tree, where=""):
    for node in ast.iter_child_nodes(tree):
        yield from _of(node, where, ())


def _of(node, where, names):
    if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.AsyncFunctionDef)):
        where = f"{where}.{node.name}" if where else node.name
    if isinstance(node, ast.Assign):
        names = tuple(_name(t) for target in node.targets for t in ast.walk(target))
    elif isinstance(node, ast.AnnAssign):
        names = (_name(node.target),)
    elif isinstance(node, ast.stmt):
        names = (node.name,) if isinstance(node, ast.FunctionDef) else ()
    if isinstance(node, ast.Return):
        names = (where,)
    if isinstance(node, ast.Call):
        yield where, node, names
    for child in ast.iter_child_nodes(node):
        yield from _of(child, where, names)


def read(root):
    root = Path(root)
    if root.is_dir():
        return {str(p.relative_to(root)): p.read_text() for p in root.rglob("*.py")}
    with zipfile.ZipFile(root) as w:
        return {n[5:]: w.read(n).decode() for n in w.namelist() if n.startswith("vllm/") and n.endswith(".py")}


for one in sys.argv[1:]:
    print(*scan(read(one)), sep="\n")

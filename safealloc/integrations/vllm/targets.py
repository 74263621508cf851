"""What is hooked in vLLM, and whether a given vLLM has it: its sources are read, not imported.

The plugin, ``safealloc doctor`` and the check of every supported release use this table. A function is not hooked if its
signature is not in the table, if the hook replaces its body and that has changed, if what it relies on has changed, or if
another plugin has replaced it first.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import importlib.util
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Literal

SUPPORTED = ("0.19.1", "0.33.0")
"""The oldest and the newest vLLM whose sources the table was checked against."""

Source = Callable[[str], str | None]
"""The source of a module by its dotted name, or ``None``."""


@dataclass(frozen=True, slots=True)
class Target:
    """One function, method or class of vLLM."""

    name: str  # in the log and in doctor's table
    module: str  # where it is defined, by dotted name
    attributes: tuple[str, ...]  # its name there, Class.method for a method; of several the first that exists counts
    parameters: tuple[tuple[str, ...], ...] = ()  # the lists of names that the hook accepts; empty for a class
    since: str = SUPPORTED[0]  # the first release that has it
    bodies: tuple[str, ...] = ()  # digests of those that the hook replaces; empty where it calls the original
    group: str = ""  # targets of one module that are hooked together or not at all


def _function(
    module: str,
    name: str,
    *parameters: tuple[str, ...],
    since: str = SUPPORTED[0],
    bodies: tuple[str, ...] = (),
    group: str = "",
) -> Target:
    """A function that the log calls by its name."""
    return Target(name, module, (name,), parameters, since, bodies, group)


_CUSTOM_OPS, _FLASHINFER, _WORKER = "vllm._custom_ops", "vllm.utils.flashinfer", "vllm.v1.worker.gpu_worker"
_FUSION, _LINEAR = "vllm.compilation.passes.fusion", "vllm.model_executor.kernels.linear"
_OUTPUTS = ("m", "n", "device", "is_sf_swizzled_layout")
_QUANTIZE = ("input", "input_global_scale", "is_sf_swizzled_layout", "backend")
_MM = ("a", "b", "block_scale_a", "block_scale_b", "alpha", "out_dtype", "backend")
_MM_OP = ("A", "B", "A_scale", "B_scale", "g_scale", "dtype", "use_8x4_sf_layout", "backend")
_MXFP4 = ("block_size", "use_nvfp4")
_EXPERTS = ("input_tensor", "input_global_scale", "expert_offsets", "blockscale_offsets", "topk")
_MX_EXPERTS = ("input_tensor", "expert_offsets", "blockscale_offsets", "n_experts", "topk")

QUANTIZE = _function(
    _CUSTOM_OPS,
    "scaled_fp4_quant",
    _QUANTIZE,
    (*_QUANTIZE, "padded_n"),
    bodies=("69f20afb5c", "b76cbf35ed"),
    group="dense",
)
"""Not replaced: it decides which layout goes where, and the hooks rely on its rule."""
SCALES = _function(
    _CUSTOM_OPS,
    "create_fp4_scale_tensor",
    _OUTPUTS,
    bodies=("7a7d45fbe9", "9f7ebc2976", "a3a0f59e97"),
    group="dense",
)
OUTPUTS = _function(
    _CUSTOM_OPS,
    "create_fp4_output_tensors",
    _OUTPUTS,
    (*_OUTPUTS, "padded_n"),
    bodies=("5dba6d0e8a", "11093bc733"),
    group="dense",
)
MM = _function(_FLASHINFER, "flashinfer_scaled_fp4_mm", _MM, (*_MM, *_MXFP4), bodies=("c7f1c4880c", "641eb47b16"))
MM_OP = Target("vllm::flashinfer_mm_fp4", _FLASHINFER, ("flashinfer_mm_fp4",), (_MM_OP, (*_MM_OP, *_MXFP4)))
FUSED_ACT_QUANT = Target(
    "fused_act_quant",
    "vllm.model_executor.layers.fusion.fused_act_quant",
    ("_silu_and_mul_nvfp4_dynamic",),
    (("x", "linear"),),
    since="0.30.0",
    bodies=("9d01b31984", "342effc3cf"),
)
EXPERTS = _function(_CUSTOM_OPS, "scaled_fp4_experts_quant", _EXPERTS, bodies=("9f7ccc8ec5",))
SILU_EXPERTS = _function(_CUSTOM_OPS, "silu_and_mul_scaled_fp4_experts_quant", _EXPERTS, bodies=("115df44c84",))
MX_EXPERTS = _function(_CUSTOM_OPS, "mxfp4_experts_quant", _MX_EXPERTS, since="0.20.0", bodies=("d71f9aceaf",))
MX_SILU_EXPERTS = _function(
    _CUSTOM_OPS, "silu_and_mul_mxfp4_experts_quant", _MX_EXPERTS, since="0.20.0", bodies=("c87e4c7371",)
)
ATTENTION_FUSION = Target("attention fusion", f"{_FUSION}.attn_quant_fusion", ("AttnQuantFusionPass", "AttnFusionPass"))
MLA_FUSION = Target("MLA fusion", f"{_FUSION}.mla_attn_quant_fusion", ("MLAAttnQuantFusionPass",), since="0.20.0")
PROFILE = Target("memory profiling", _WORKER, ("Worker.determine_available_memory",), (("self",),))
WARM_UP = Target("warm-up and capture", _WORKER, ("Worker.compile_or_warm_up_model",), (("self",),))
STEP = Target("safe point at each step", _WORKER, ("Worker.execute_model",), (("self", "scheduler_output"),))
"""Hooked with ``SAFEALLOC_VERIFY`` only."""
SHUTDOWN = Target("end of a worker", _WORKER, ("Worker.shutdown",), (("self",),))
PASSES = Target(
    "pass manager", "vllm.compilation.passes.pass_manager", ("PostGradPassManager.__call__",), (("self", "graph"),)
)
CACHE_KEY = Target("compile-cache key", "vllm.config.vllm", ("VllmConfig.compute_hash",))
START = Target("start of a worker", _WORKER, ("Worker.load_model",))
"""Where the plugin learns which model a process runs, and hooks the rest."""
LINEAR = Target("linear kernel", _LINEAR, ("_POSSIBLE_NVFP4_KERNELS",), since="0.20.0")

TARGETS = tuple(value for value in globals().values() if isinstance(value, Target))
"""All of the above, in their order."""

Status = Literal["hooked", "as known", "changed", "missing", "not yet there"]


@dataclass(frozen=True, slots=True)
class Finding:
    """Whether a vLLM has a target."""

    target: Target
    # "hooked" if the hook fits, "as known" if nothing is replaced and hooks may rely on it, "changed" or "missing" if vLLM's
    # own code is left alone, "not yet there" in a release older than the target
    status: Status
    attribute: str = ""  # the name that was found
    detail: str = ""  # why it is not hooked


def installed() -> tuple[str, Source] | None:
    """Version and sources of the installed vLLM, or ``None``; imports nothing."""
    try:
        version = importlib.metadata.version("vllm")
        spec = importlib.util.find_spec("vllm")
    except (importlib.metadata.PackageNotFoundError, ImportError, ValueError):
        return None
    if spec is None or not spec.submodule_search_locations:
        return None
    root = Path(spec.submodule_search_locations[0]).parent

    def source(module: str) -> str | None:
        path = root.joinpath(*module.split("."))
        for file in (path.with_suffix(".py"), path / "__init__.py"):
            if file.is_file():
                return file.read_text(encoding="utf-8")
        return None

    return version, source


def check(version: str, source: Source) -> list[Finding]:
    """One finding per target."""
    trees = {module: _parsed(source, module) for module in {target.module for target in TARGETS}}
    found = [_check(target, version, trees[target.module]) for target in TARGETS]
    unfit = {
        one.target.group: one.target for one in found if one.target.group and one.status not in ("hooked", "as known")
    }
    for index, one in enumerate(found):
        other = unfit.get(one.target.group)
        if other is not None and one.status == "hooked":
            detail = f"it goes with {other.name}, which is not as it is known"
            found[index] = Finding(one.target, "changed", one.attribute, detail)
    return found


def replaced_by(finding: Finding, module: ModuleType) -> str | None:
    """Who has replaced a function that has to be vLLM's own, or one of its group; ``None`` where nobody has.

    The live function is vLLM's own if its code is from the file of its module and has its name.
    """
    group = [target for target in TARGETS if target.group and target.group == finding.target.group]
    for target in group or [finding.target]:
        for name in target.attributes if target.bodies else ():
            live = getattr(module, name, None)
            code = getattr(live, "__code__", None)
            own = code is not None and (code.co_filename, code.co_qualname) == (module.__file__, name)
            if live is not None and not own:
                where = getattr(live, "__module__", None) or type(live).__module__
                return f"{where}.{getattr(live, '__qualname__', type(live).__qualname__)} instead of {name}"
    return None


def version() -> str:
    """Version of the installed vLLM, or ``"?"``."""
    found = installed()
    return "?" if found is None else found[0]


def own_allocation(source: Source) -> str | None:
    """What vLLM's ``create_fp4_scale_tensor`` allocates with, ``"zeros"`` or ``"empty"``; ``None`` if it is not found."""
    node = _find(_parsed(source, SCALES.module), SCALES.name)
    if node is None:
        return None
    called = {call.func.attr for call in ast.walk(node) if isinstance(call, ast.Call) and hasattr(call.func, "attr")}
    return "zeros" if "zeros" in called else "empty"


def kernel_zeroes_padding(source: Source) -> bool | None:
    """Whether a comment in ``create_fp4_scale_tensor`` states that the quantization kernel zeroes padding (vLLM's PR 53568).

    The kernel itself is compiled. ``None`` if the function is not found.
    """
    node = _find(_parsed(source, SCALES.module), SCALES.name)
    if node is None:
        return None
    text = ast.get_source_segment(source(SCALES.module) or "", node) or ""
    words = re.sub(r"[\s#]+", " ", text)
    return re.search(r"kernel (explicitly )?zeroes (every|all|the) padd", words) is not None


def release(version: str) -> tuple[int, ...]:
    """The numbers of a version."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:3])


def _parsed(source: Source, module: str) -> ast.Module | str | None:
    """The tree of a module, or why there is none; ``None`` where vLLM has no such module."""
    try:
        text = source(module)
        return None if text is None else ast.parse(text)
    except (OSError, SyntaxError, ValueError) as error:  # ValueError: it is not UTF-8
        return f"the source of {module} cannot be read: {type(error).__name__}: {error}"


def _check(target: Target, version: str, tree: ast.Module | str | None) -> Finding:
    if isinstance(tree, str):
        return Finding(target, "changed", detail=tree)
    found = [(name, node) for name in target.attributes if (node := _find(tree, name)) is not None]
    if not found:
        if release(version) < release(target.since):
            return Finding(target, "not yet there", detail=f"vLLM has it since {target.since}")
        return Finding(target, "missing", detail=f"{target.module} has no {' or '.join(target.attributes)}")
    attribute, node = found[0]
    if target.parameters:
        if not isinstance(node, ast.FunctionDef):
            return Finding(target, "changed", attribute, "it is not a function")
        given = _parameters(node.args)
        if given not in target.parameters:
            return Finding(target, "changed", attribute, f"its parameters are ({', '.join(given)})")
    if target.bodies and digest(node) not in target.bodies:
        return Finding(target, "changed", attribute, f"its body is not one that is known ({digest(node)})")
    return Finding(target, "as known" if target is QUANTIZE else "hooked", attribute)


def _parameters(given: ast.arguments) -> tuple[str, ...]:
    """Names, with a ``*`` before keyword-only ones."""
    names = [argument.arg for argument in (*given.posonlyargs, *given.args)]
    if given.vararg or given.kwonlyargs:
        names.append(f"*{given.vararg.arg if given.vararg else ''}")
    names += [argument.arg for argument in given.kwonlyargs]
    return (*names, f"**{given.kwarg.arg}") if given.kwarg else tuple(names)


def digest(node: ast.AST) -> str:
    """Digest of a function's body without its docstring and comments; the same in every version of Python."""
    body = list(getattr(node, "body", []))
    if body and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
        body = body[1:]
    text = "\n".join(_structure(statement) for statement in body)
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def _structure(value: object) -> str:
    """A syntax tree as text; the output of ``ast.unparse`` and ``ast.dump`` depends on Python's version.

    Empty fields are left out, since a newer Python may have added them, and so are fields without meaning for the code.
    Python 3.12 splits the text of an f-string differently from 3.11.
    """
    if isinstance(value, list):
        return f"[{', '.join(map(_structure, value))}]"
    if not isinstance(value, ast.AST):
        return repr(value)
    fields = {name: field for name, field in ast.iter_fields(value) if name not in ("ctx", "kind", "type_comment")}
    if isinstance(value, ast.JoinedStr):
        fields["values"] = _joined(value.values)
    given = (f"{name}={_structure(field)}" for name, field in fields.items() if field is not None and field != [])
    none = "value=None" if isinstance(value, ast.Constant) and value.value is None else ""
    return f"{type(value).__name__}({', '.join(given)}{none})"


def _joined(parts: list[ast.expr]) -> list[str | ast.expr]:
    joined: list[str | ast.expr] = []
    for part in parts:
        text = str(part.value) if isinstance(part, ast.Constant) else None
        if text is None:
            joined.append(part)
        elif joined and isinstance(joined[-1], str):
            joined[-1] += text
        elif text:
            joined.append(text)
    return joined


def _find(tree: ast.Module | str | None, name: str) -> ast.stmt | None:
    """The definition of ``name`` or ``Class.method``, also below an ``if``, but not inside another function or class."""
    if not isinstance(tree, ast.Module):
        return None
    first, _, rest = name.partition(".")
    for node in _statements(tree.body):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name == first:
            return _find(ast.Module(node.body, []), rest) if rest else node
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if not rest and any(isinstance(assigned, ast.Name) and assigned.id == first for assigned in targets):
            return node
    return None


def _statements(body: Sequence[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements of a module or class, including those below ``if``, ``try`` and ``with``."""
    for node in body:
        yield node
        if isinstance(node, (ast.If, ast.Try, ast.With)):
            yield from _statements(node.body)
        if isinstance(node, ast.Try):
            yield from _statements([statement for handler in node.handlers for statement in handler.body])
        if isinstance(node, (ast.If, ast.Try)):
            yield from _statements(node.orelse)

"""What is hooked in vLLM, as a table for :mod:`safealloc.integrations.drift`, and what vLLM's own allocation does."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from types import ModuleType

from safealloc.integrations import drift
from safealloc.integrations.drift import Finding, Source

SUPPORTED = ("0.19.1", "0.33.0")
"""The oldest and the newest vLLM whose sources the table was checked against."""


@dataclass(frozen=True, slots=True)
class Target(drift.Target):
    """One function, method or class of vLLM."""

    since: str = SUPPORTED[0]


def _function(
    module: str,
    name: str,
    *parameters: tuple[str, ...],
    since: str = SUPPORTED[0],
    bodies: tuple[str, ...] = (),
    group: str = "",
    replaced: bool = True,
) -> Target:
    """A function that the log calls by its name."""
    return Target(name, module, (name,), parameters, since, bodies, group, replaced)


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
    replaced=False,
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


def installed() -> tuple[str, Source] | None:
    """Version and sources of the installed vLLM, or ``None``; imports nothing."""
    return drift.installed("vllm")


def check(version: str, source: Source) -> list[Finding]:
    """One finding per target."""
    return drift.check("vLLM", TARGETS, version, source)


def replaced_by(finding: Finding, module: ModuleType) -> str | None:
    """Who has replaced a function that has to be vLLM's own, or one of its group; ``None`` where nobody has."""
    return drift.replaced_by(TARGETS, finding, module)


def version() -> str:
    """Version of the installed vLLM, or ``"?"``."""
    found = installed()
    return "?" if found is None else found[0]


def own_allocation(source: Source) -> str | None:
    """What vLLM's ``create_fp4_scale_tensor`` allocates with, ``"zeros"`` or ``"empty"``; ``None`` if it is not found."""
    node = drift.find(drift.parsed(source, SCALES.module), SCALES.name)
    if node is None:
        return None
    called = {call.func.attr for call in ast.walk(node) if isinstance(call, ast.Call) and hasattr(call.func, "attr")}
    return "zeros" if "zeros" in called else "empty"


def kernel_zeroes_padding(source: Source) -> bool | None:
    """Whether a comment in ``create_fp4_scale_tensor`` states that the quantization kernel zeroes padding (vLLM's PR 53568).

    The kernel itself is compiled. ``None`` if the function is not found.
    """
    node = drift.find(drift.parsed(source, SCALES.module), SCALES.name)
    if node is None:
        return None
    text = ast.get_source_segment(source(SCALES.module) or "", node) or ""
    words = re.sub(r"[\s#]+", " ", text)
    return re.search(r"kernel (explicitly )?zeroes (every|all|the) padd", words) is not None

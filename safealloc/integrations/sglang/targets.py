"""What is hooked in SGLang, as a table for :mod:`safealloc.integrations.drift`.

The quantizers are FlashInfer's: a hook replaces the name that a function of SGLang calls, and relies on how it calls it.
"""

from __future__ import annotations

from dataclasses import dataclass

from safealloc.integrations import drift
from safealloc.integrations.drift import Finding, Source

SUPPORTED = ("0.5.12", "0.5.23")
"""The oldest and the newest SGLang whose sources the table was checked against."""


@dataclass(frozen=True, slots=True)
class Target(drift.Target):
    """One function or method of SGLang."""

    since: str = SUPPORTED[0]
    hooked: str = ""  # the dotted name that is hooked, where it is not the target itself

    def path(self, attribute: str) -> str:
        """What SGLang's hook registry is given."""
        return self.hooked or f"{self.module}.{attribute}"


_RUNNER = "sglang.srt.model_executor.model_runner"
_FP4, _FP8 = "sglang.srt.layers.quantization.fp4_utils", "sglang.srt.layers.quantization.fp8_utils"
_QUANTIZE = ("input", "global_scale", "sf_vec_size", "sf_use_ue8m0", "is_sf_swizzled_layout", "is_sf_8x4_layout")

DENSE = Target(
    "NVFP4 quantizer",
    _FP4,
    ("_flashinfer_fp4_quantize_impl",),
    ((*_QUANTIZE, "enable_pdl"),),
    bodies=("399284bd26",),
    hooked=f"{_FP4}._flashinfer_fp4_quantize",
)
FUSED = Target(
    "SiLU + NVFP4",
    "sglang.srt.models.qwen2_moe",
    ("Qwen2MoeMLP._silu_fp4_quant_fused",),
    (("self", "gate_up"),),
    since="0.5.19",
    bodies=("5b05292866",),
    hooked="flashinfer.silu_and_mul_scaled_nvfp4_experts_quantize",
)
GROUPED = Target(
    "grouped NVFP4",
    "sglang.srt.layers.moe.flashinfer_cutedsl_moe",
    ("flashinfer_cutedsl_moe_masked",),
    bodies=("285897f0ad", "8bd07aec4b"),
    hooked="flashinfer.scaled_fp4_grouped_quantize",
)
MXFP8 = Target(
    "MXFP8 quantizer",
    _FP8,
    ("flashinfer_mxfp8_quantize",),
    (
        ("input", "is_sf_swizzled_layout", "alignment"),
        ("input", "is_sf_swizzled_layout", "alignment", "backend"),
    ),
    bodies=("36a07acba2", "dad90c8baf"),
    hooked=f"{_FP8}._raw_flashinfer_mxfp8_quantize",
)
LOAD = Target("start of a runner", _RUNNER, ("ModelRunner.load_model",), (("self",),))
CAPTURE = Target("captures", _RUNNER, ("ModelRunner.init_cuda_graphs", "ModelRunner.init_device_graphs"))

TARGETS = (DENSE, FUSED, GROUPED, MXFP8, LOAD, CAPTURE)
QUANTIZERS = (DENSE, FUSED, GROUPED, MXFP8)


def installed() -> tuple[str, Source] | None:
    """Version and sources of the installed SGLang, or ``None``; imports nothing."""
    return drift.installed("sglang")


def check(version: str, source: Source) -> list[Finding]:
    """One finding per target."""
    return drift.check("SGLang", TARGETS, version, source)


def version() -> str:
    """Version of the installed SGLang, or ``"?"``."""
    found = installed()
    return "?" if found is None else found[0]

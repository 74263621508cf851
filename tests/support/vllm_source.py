"""The sources of a small vLLM that every hook fits, for tests that read vLLM's sources and do not import it."""

from __future__ import annotations

import textwrap

from safealloc.integrations.vllm import targets

VERSION = "0.28.0"
"""The release of the stand-in, which is older than ``fused_act_quant``: with that its whole body would have to be here."""

_SCALES = """
    def create_fp4_scale_tensor(m: int, n: int, device: torch.device, is_sf_swizzled_layout: bool) -> torch.Tensor:
        if is_sf_swizzled_layout:
            # Must be zero-initialized: the kernel does not write every padded element.
            return torch.zeros((128, 4), device=device, dtype=torch.int32)
        return torch.empty((m, n // 16), device=device, dtype=torch.uint8)
"""
_OUTPUTS = """
    def create_fp4_output_tensors(m, n, device, is_sf_swizzled_layout, padded_n=None):
        '''A docstring.'''
        physical_n = padded_n if padded_n is not None else n
        output = torch.empty((m, physical_n // 2), device=device, dtype=torch.uint8)
        # A comment.
        output_scale = create_fp4_scale_tensor(m, physical_n, device, is_sf_swizzled_layout)
        return output, output_scale
"""
_EXPERTS = """
    def scaled_fp4_experts_quant(input_tensor, input_global_scale, expert_offsets, blockscale_offsets, topk):
        assert not current_platform.is_rocm()
        assert input_tensor.ndim == 2, f"input.ndim needs to be == 2, but got {input_tensor.ndim}."
        MAX_TOKENS_PER_EXPERT = envs.VLLM_MAX_TOKENS_PER_EXPERT_FP4_MOE
        m_numtopk, k = input_tensor.shape
        assert m_numtopk <= MAX_TOKENS_PER_EXPERT * topk, (
            f"m_numtopk must be less than MAX_TOKENS_PER_EXPERT("
            f"{MAX_TOKENS_PER_EXPERT})"
            f" for cutlass_moe_fp4, observed m_numtopk = {m_numtopk}. Use"
            f" VLLM_MAX_TOKENS_PER_EXPERT_FP4_MOE to set this value."
        )
        scales_k = k // 16
        padded_k = (scales_k + (4 - 1)) // 4
        output = torch.empty(m_numtopk, k // 2, device=input_tensor.device, dtype=torch.uint8)
        output_scales = torch.empty(
            MAX_TOKENS_PER_EXPERT * topk, padded_k, dtype=torch.int32, device=input_tensor.device
        )
        torch.ops._C.scaled_fp4_experts_quant(
            output, output_scales, input_tensor, input_global_scale, expert_offsets, blockscale_offsets
        )
        output_scales = output_scales.view(torch.float8_e4m3fn)
        return output, output_scales
"""
_SILU_EXPERTS = _EXPERTS.replace("scaled_fp4", "silu_and_mul_scaled_fp4").replace(
    "m_numtopk, k = input_tensor.shape",
    """m_numtopk, k_times_2 = input_tensor.shape
        assert k_times_2 % 2 == 0, "input width must be even (gate || up layout)"
        k = k_times_2 // 2""",
)
_FLASHINFER = """
    if has_flashinfer():
        @torch.library.custom_op("vllm::flashinfer_mm_fp4", mutates_args=[], device_types="cuda")
        def flashinfer_mm_fp4(A, B, A_scale, B_scale, g_scale, dtype, use_8x4_sf_layout, backend):
            from flashinfer import mm_fp4

    def flashinfer_quant_nvfp4_8x4_sf_layout(a, a_global_sf):
        return flashinfer_nvfp4_quantize(a, a_global_sf)

    def flashinfer_scaled_fp4_mm(a, b, block_scale_a, block_scale_b, alpha, out_dtype, backend):
        return flashinfer_mm_fp4(a, b.t())
"""
_WORKER = """
    class Other:
        def determine_available_memory(self, much): ...

    class Worker(Base):
        @torch.inference_mode()
        def determine_available_memory(self): ...

        def compile_or_warm_up_model(self): ...

        @torch.inference_mode()
        def execute_model(self, scheduler_output: "SchedulerOutput") -> "ModelRunnerOutput | None": ...

        def shutdown(self) -> None: ...
"""


def stand_in() -> dict[str, str]:
    """The sources of a small vLLM that every hook fits, by module."""
    sources = {
        targets.SCALES.module: "".join(map(textwrap.dedent, (_SCALES, _OUTPUTS, _EXPERTS, _SILU_EXPERTS))),
        targets.MM.module: textwrap.dedent(_FLASHINFER),
        targets.ATTENTION_FUSION.module: "class AttnQuantFusionPass(VllmPatternMatcherPass): ...\n",
        targets.MLA_FUSION.module: "class MLAAttnQuantFusionPass(VllmPatternMatcherPass): ...\n",
        targets.PROFILE.module: textwrap.dedent(_WORKER),
        targets.PASSES.module: "class PostGradPassManager:\n    def __call__(self, graph): ...\n",
        targets.CACHE_KEY.module: "environment_variables: dict[str, Callable] = {}\n",
        targets.LINEAR.module: "_POSSIBLE_NVFP4_KERNELS = {}\n",
    }
    assert {target.module for target in targets.TARGETS} - set(sources) == {targets.FUSED_ACT_QUANT.module}
    return sources

"""The sources of a small vLLM that every hook fits, for tests that read vLLM's sources and do not import it."""

from __future__ import annotations

import functools
import re
import textwrap

from safealloc.integrations.vllm import targets

VERSION = "0.28.0"
"""The release of the stand-in, which is older than ``fused_act_quant``: with that its whole body would have to be here."""

_SCALES = """
    def create_fp4_scale_tensor(m: int, n: int, device: torch.device, is_sf_swizzled_layout: bool) -> torch.Tensor:
        from vllm.utils.math_utils import round_up

        block_size = 16
        if is_sf_swizzled_layout:
            rounded_m = round_up(m, 128)
            scale_n = n // block_size
            rounded_n = round_up(scale_n, 4)
            # Must be zero-initialized: the kernel does not write every padded element.
            return torch.zeros((rounded_m, rounded_n // 4), device=device, dtype=torch.int32)
        else:
            return torch.empty((m, n // block_size), device=device, dtype=torch.uint8)
"""
_QUANTIZE = """
    def scaled_fp4_quant(input, input_global_scale, is_sf_swizzled_layout=True, backend="none", padded_n=None):
        assert not current_platform.is_rocm()
        assert input.ndim >= 1, f"input.ndim needs to be >= 1, but got {input.ndim}."
        other_dims = 1 if input.ndim == 1 else -1
        input = input.reshape(other_dims, input.shape[-1])
        m, n = input.shape
        block_size = 16

        assert n % block_size == 0, f"last dim has to be multiple of 16, but got {n}."
        assert input.dtype in (torch.float16, torch.bfloat16), (
            f"input.dtype needs to be fp16 or bf16 but got {input.dtype}."
        )
        if padded_n is not None:
            assert padded_n >= n, f"padded_n must be >= n, got padded_n={padded_n}, n={n}."
            assert padded_n % block_size == 0, (
                f"padded_n has to be a multiple of {block_size}, but got {padded_n}."
            )

        use_8x4_sf_layout = True if "trtllm" in backend and m <= 32 else False
        if use_8x4_sf_layout and padded_n is not None and padded_n != n:
            raise ValueError("padded_n is not supported with TRTLLM 8x4 scale layout.")
        if use_8x4_sf_layout:
            output, output_scale = flashinfer_quant_nvfp4_8x4_sf_layout(input, input_global_scale)
        else:
            output, output_scale = create_fp4_output_tensors(
                m, n, input.device, is_sf_swizzled_layout, padded_n=padded_n
            )
            torch.ops._C.scaled_fp4_quant.out(
                input, input_global_scale, is_sf_swizzled_layout, output=output, output_scale=output_scale
            )

        output_scale = output_scale.view(torch.float8_e4m3fn)
        return output, output_scale
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
_MX = {
    "scaled_fp4": "mxfp4",
    "moe_fp4": "moe_mxfp4",
    "input_global_scale, expert_offsets, blockscale_offsets": "expert_offsets, blockscale_offsets, n_experts",
    ', f"input.ndim needs to be == 2, but got {input_tensor.ndim}."': "",
    "k // 16": "k // 32",
    "float8_e4m3fn": "uint8",
}
_MX_EXPERTS, _MX_SILU_EXPERTS = (
    functools.reduce(lambda source, old: source.replace(old, _MX[old]), _MX, source)
    for source in (_EXPERTS, _SILU_EXPERTS)
)
_MX_SILU_EXPERTS = re.sub(r"( \* topk), \(\n.*?\n +\)\n", r"\1\n", _MX_SILU_EXPERTS, count=1, flags=re.DOTALL)
_FLASHINFER = """
    if has_flashinfer():
        @torch.library.custom_op("vllm::flashinfer_mm_fp4", mutates_args=[], device_types="cuda")
        def flashinfer_mm_fp4(A, B, A_scale, B_scale, g_scale, dtype, use_8x4_sf_layout, backend):
            from flashinfer import mm_fp4

    def flashinfer_quant_nvfp4_8x4_sf_layout(a, a_global_sf):
        return flashinfer_nvfp4_quantize(a, a_global_sf)

    def flashinfer_scaled_fp4_mm(a, b, block_scale_a, block_scale_b, alpha, out_dtype, backend):
        assert a.ndim == 2 and b.ndim == 2
        assert block_scale_a.ndim == 2 and block_scale_b.ndim == 2
        assert a.stride(-1) == 1 and b.stride(-1) == 1
        assert a.shape[1] == b.shape[1]

        if backend in ("cutlass", "cudnn"):
            block_scale_a = block_scale_a.view(torch.uint8)
            block_scale_b = block_scale_b.view(torch.uint8)

        use_8x4_sf_layout = True if backend == "trtllm" and a.shape[0] <= 32 else False

        return flashinfer_mm_fp4(
            a,
            b.t(),
            block_scale_a,
            block_scale_b.t(),
            alpha,
            out_dtype,
            use_8x4_sf_layout=use_8x4_sf_layout,
            backend=backend,
        )
"""
_WORKER = """
    class Other:
        def determine_available_memory(self, much): ...

    class Worker(Base):
        @torch.inference_mode()
        def determine_available_memory(self): ...

        def load_model(self, *, load_dummy_weights=False): ...

        def compile_or_warm_up_model(self): ...

        @torch.inference_mode()
        def execute_model(self, scheduler_output: "SchedulerOutput") -> "ModelRunnerOutput | None": ...

        def shutdown(self) -> None: ...
"""
_CUSTOM_OPS = _QUANTIZE, _SCALES, _OUTPUTS, _EXPERTS, _SILU_EXPERTS, _MX_EXPERTS, _MX_SILU_EXPERTS


def stand_in() -> dict[str, str]:
    """The sources of a small vLLM that every hook fits, by module."""
    sources = {
        targets.SCALES.module: "".join(map(textwrap.dedent, _CUSTOM_OPS)),
        targets.MM.module: textwrap.dedent(_FLASHINFER),
        targets.ATTENTION_FUSION.module: "class AttnQuantFusionPass(VllmPatternMatcherPass): ...\n",
        targets.MLA_FUSION.module: "class MLAAttnQuantFusionPass(VllmPatternMatcherPass): ...\n",
        targets.PROFILE.module: textwrap.dedent(_WORKER),
        targets.PASSES.module: "class PostGradPassManager:\n    def __call__(self, graph): ...\n",
        targets.CACHE_KEY.module: "class VllmConfig:\n    def compute_hash(self, include_version=True): ...\n",
        targets.LINEAR.module: "_POSSIBLE_NVFP4_KERNELS = {}\n",
    }
    assert {target.module for target in targets.TARGETS} - set(sources) == {targets.FUSED_ACT_QUANT.module}
    return sources

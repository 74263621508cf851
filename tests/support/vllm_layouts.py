"""Paths of block scales through vLLM's own Python on CPU tensors: from a quantizer, over ranks, to what reads them.

The functions of FlashInfer are stand-ins; of two ranks, both hold the same tensors. Importing this module imports vLLM.
"""

from __future__ import annotations

import importlib
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import vllm.model_executor.layers.quantization.utils.mxfp8_utils as mxfp8_utils
from support.vllm_cpu_ops import ALPHA, FP8, activation, ops, vllm_flashinfer
from torch import Tensor
from vllm.distributed import parallel_state
from vllm.distributed.device_communicators.all2all import AgRsAll2AllManager
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import FusedMoEQuantConfig, FusedMoEQuantDesc
from vllm.model_executor.layers.fused_moe.experts import flashinfer_cutlass_moe
from vllm.model_executor.layers.fused_moe.prepare_finalize import naive_dp_ep

from safealloc import ScaleFormat, ScaleSpec, SfLayout, mxfp8_quantize, spec
from safealloc.integrations.vllm.contract import Contract, Matrix
from safealloc.kernels import reference

with pytest.MonkeyPatch.context() as _patch:
    _patch.setitem(sys.modules, "deep_ep", SimpleNamespace(ElasticBuffer=object, EPHandle=object, EventOverlap=object))
    deepep_v2 = importlib.import_module("vllm.model_executor.layers.fused_moe.prepare_finalize.deepep_v2")

RANKS = 2
K = 256


class Group(parallel_state.GroupCoordinator):
    """A group of ranks that hold the same, and vLLM's dispatch by all-gathers over it."""

    def __init__(self) -> None:
        self.world_size, self.rank_in_group = RANKS, 0
        self.use_custom_op_call = False
        self.device_communicator: Any = SimpleNamespace(
            all_gather=lambda x, dim: torch.cat([x] * RANKS, dim),
            all_gatherv=self._gatherv,
            dispatch=self._dispatch,
        )

    def __del__(self) -> None:
        pass

    @staticmethod
    def _gatherv(x: Any, dim: int, sizes: list[int] | None) -> Any:
        """Of different sizes, this rank has the most rows."""
        if isinstance(x, list):
            return [Group._gatherv(one, dim, sizes) for one in x]
        return torch.cat([x[:size] for size in sizes or [x.shape[0]] * RANKS])

    sizes: list[int] | None = None

    def _dispatch(self, *given: Any) -> Any:
        manager = SimpleNamespace(
            _get_comm_group=lambda sequence_parallel: self,
            _get_sizes=lambda tokens, group: self.sizes or [tokens] * RANKS,
        )
        return AgRsAll2AllManager.dispatch(manager, *given)  # type: ignore[arg-type]


def _fused_moe(**call: Any) -> None:
    """FlashInfer's fused MoE; tests look at the call only."""


def _interleave(unswizzled_sf: Tensor) -> Tensor:
    return SfLayout.layout_128x4.swizzle(unswizzled_sf)


def _mm_mxfp8(A: Tensor, B: Tensor, *given: Any, **named: Any) -> Tensor:
    return torch.zeros(A.shape[0], B.shape[1])


def _mxfp8_8x4(a: Tensor) -> tuple[Tensor, Tensor]:
    data, scales = mxfp8_quantize(a, layout=SfLayout.layout_8x4, backend="reference")
    return data.clone(), scales.clone().view(torch.uint8).flatten()


def _mxfp4(a: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    rows, k = a.shape
    layout = SfLayout.layout_128x4.padded_shape(rows, k, format=ScaleFormat.mxfp4)
    return torch.zeros(rows, k // 2, dtype=torch.uint8), torch.zeros(layout, dtype=torch.uint8)


def stand_in(patch: pytest.MonkeyPatch) -> list[tuple[str, ScaleSpec | None]]:
    """Put the stand-ins in, before the plugin is registered; returns what consumers then read, and what is known of it."""
    patch.setattr(vllm_flashinfer, "flashinfer_cutlass_fused_moe", _fused_moe)
    patch.setattr(flashinfer_cutlass_moe, "flashinfer_cutlass_fused_moe", _fused_moe)
    patch.setattr(vllm_flashinfer, "nvfp4_block_scale_interleave", _interleave)
    patch.setattr(naive_dp_ep, "nvfp4_block_scale_interleave", _interleave)
    patch.setattr(Tensor, "cuda", lambda tensor: tensor)
    for name, kernel in (
        ("mm_mxfp8", _mm_mxfp8),
        ("flashinfer_mxfp8_quantize_8x4", _mxfp8_8x4),
        ("flashinfer_mxfp4_quantize", _mxfp4),
    ):
        op = getattr(vllm_flashinfer, name)
        if "cpu" not in op._backend_fns:
            op.register_kernel("cpu")(kernel)
    read: list[tuple[str, ScaleSpec | None]] = []
    reads = Contract.reads

    def noted(contract: Contract, consumer: str, *given: Matrix) -> None:
        read.extend((consumer, spec(one.scales)) for one in given)
        reads(contract, consumer, *given)

    patch.setattr(Contract, "reads", noted)
    return read


def moe_config(quant: str, swizzled: bool) -> FusedMoEQuantConfig:
    """Of NVFP4 experts, or of MXFP4 ones whose inputs are MXFP8."""
    weight = FusedMoEQuantDesc("nvfp4" if quant == "nvfp4" else "mxfp4")
    gscale = torch.tensor([20.0])
    inputs = FusedMoEQuantDesc(quant, alpha_or_gscale=gscale if quant == "nvfp4" else None)
    return FusedMoEQuantConfig(_a1=inputs, _a2=inputs, _w1=weight, _w2=weight, is_scale_swizzled=swizzled)


def prepare(patch: pytest.MonkeyPatch, rows: int, config: FusedMoEQuantConfig, sizes: list[int] | None = None) -> Any:
    """VLLM quantizes and dispatches to two ranks; data and scales of the tokens of both."""
    group = Group()
    group.sizes = sizes
    patch.setattr(naive_dp_ep, "get_ep_group", lambda: group)
    x = activation(rows, K)
    ids, weights = torch.zeros(rows, 1, dtype=torch.int32), torch.ones(rows, 1)
    prepared = naive_dp_ep.MoEPrepareAndFinalizeNaiveDPEPModular(num_dispatchers=RANKS)
    return prepared.prepare(x, weights, ids, 4, None, False, config)[:2]


def experts(data: Tensor, scales: Tensor, quant: str = "mxfp8") -> None:
    """VLLM's experts on FlashInfer's CUTLASS kernel, which reads 128x4."""
    one, weight = torch.ones(1), torch.zeros(4, 32, 64, dtype=torch.uint8)
    fake = SimpleNamespace(
        **dict.fromkeys(("gemm1_clamp_limit", "gemm1_alpha", "gemm1_beta", "w1_bias", "w2_bias"), None),
        **dict.fromkeys(("a1_gscale", "a2_gscale", "g1_alphas", "g2_alphas", "fake_input_scale"), one),
        **dict.fromkeys(("tp_size", "ep_size"), 1),
        **dict.fromkeys(("tp_rank", "ep_rank"), 0),
        w1_scale=weight,
        w2_scale=weight,
        quant_dtype=quant,
        weight_quant_dtype="nvfp4" if quant == "nvfp4" else "mxfp4",
        use_deepseek_fp8_block_scale=False,
        out_dtype=torch.bfloat16,
    )
    rows = data.shape[0]
    flashinfer_cutlass_moe.FlashInferExperts.apply(
        fake,  # type: ignore[arg-type]
        *(torch.empty(rows, K), data, weight, weight, torch.ones(rows, 1), torch.zeros(rows, 1, dtype=torch.int32)),
        *(MoEActivation.SILU, 4, None, scales, None, None, None, None, False),
    )


def nvfp4_mm(data: Tensor, scales: Tensor, n: int = 24) -> Tensor:
    """VLLM's CUTLASS GEMM by a weight whose scales vLLM swizzles."""
    k = 2 * data.shape[1]
    weight, linear = torch.empty(n, k // 2, dtype=torch.uint8), torch.empty(n, k // 16, dtype=torch.uint8)
    reference.quantize(activation(n, k, 7), torch.ones(1), weight, linear, SfLayout.layout_linear)
    from vllm.model_executor.layers.quantization.utils import nvfp4_utils

    swizzled = nvfp4_utils.swizzle_blockscale(linear.view(FP8))
    return ops.cutlass_scaled_fp4_mm(data, weight, scales, swizzled, ALPHA, torch.bfloat16)


def mxfp8_mm(data: Tensor, scales: Tensor, use_8x4: bool = False) -> Tensor:
    weight = torch.zeros(128, data.shape[1], dtype=torch.float8_e4m3fn)
    scale = torch.zeros(128 * data.shape[1] // 32, dtype=torch.uint8)
    backend = "trtllm" if use_8x4 else "cutlass"
    return vllm_flashinfer.mm_mxfp8(data, weight.t(), scales, scale, torch.bfloat16, backend, use_8x4)


def mxfp8(rows: int, swizzled: bool) -> tuple[Tensor, Tensor]:
    return mxfp8_utils.mxfp8_e4m3_quantize(activation(rows, K), swizzled)


def deepep(data: Tensor, scales: Tensor) -> Tensor:
    """Scales as DeepEP sends and receives them, swizzled afterwards."""
    received = deepep_v2._pack_mxfp8_scale(scales).clone()
    return deepep_v2._unpack_mxfp8_scale(received, data.shape[1], True)

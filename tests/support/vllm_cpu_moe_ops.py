"""vLLM's CUDA ops of its NVFP4 and MXFP4 mixtures of experts on CPU tensors, beside those of :mod:`support.vllm_cpu_ops`.

They have vLLM's names and schemas. The position of a scale byte is computed here independently of
``safealloc.formats.layout``. Like vLLM's kernels, the quantizers write valid scales only, into any number of rows; inside
:func:`support.vllm_cpu_ops.padding_is_written` they zero all other bytes first. The GEMM reads whole tiles, and counts the
bytes that are neither scales nor zero.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from support import vllm_cpu_ops
from torch import Tensor
from vllm.model_executor.layers.fused_moe.experts import cutlass_moe

from safealloc import ScaleFormat, ScaleSpec
from safealloc.kernels import reference, reference_mx
from safealloc.pool.contents import spec_of

TILE = 128

quantized: list[ScaleSpec | None] = []
"""The pool buffers that the quantizers wrote to; ``None`` for other memory. Tests clear it first."""

stale: list[int] = []
"""For each GEMM, how many bytes it read that are neither scales nor zero."""

_fails = False


@contextlib.contextmanager
def quantizers_fail() -> Iterator[None]:
    """Inside, they raise after they have written everything."""
    global _fails
    _fails = True
    try:
        yield
    finally:
        _fails = False


def scale_bytes(scale_rows: Tensor, k: int, block: int = 16) -> Tensor:
    """Offsets of the scales of some scale rows in 128x4, int64 ``[rows, k // block]``."""
    r, c = scale_rows.long()[:, None], torch.arange(k // block)
    col_tiles = -(-k // (4 * block))
    return (r // TILE * col_tiles + c // 4) * 512 + r % 32 * 16 + r % TILE // 32 * 4 + c % 4


def grouped(rows: int, expert_offsets: Tensor, blockscale_offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Expert and scale row of each row; as in vLLM's kernel, expert 0 and its first scale row for rows of no expert."""
    expert, scale_row = torch.zeros(rows, dtype=torch.long), torch.zeros(rows, dtype=torch.long)
    for e, (first, end) in enumerate(zip(expert_offsets.tolist(), expert_offsets.tolist()[1:], strict=False)):
        expert[first:end] = e
        scale_row[first:end] = int(blockscale_offsets[e]) + torch.arange(end - first)
    return expert, scale_row


def _quantize(
    output: Tensor, output_scale: Tensor, x: Tensor, global_scales: Tensor, expert_offsets: Tensor, offsets: Tensor
) -> None:
    assert global_scales.shape == (len(expert_offsets) - 1,)

    def encode(expert: Tensor) -> tuple[Tensor, Tensor]:
        return reference.encode(x, global_scales[expert][:, None])

    _write(output, output_scale, x, encode, expert_offsets, offsets, 16)


def _write(
    output: Tensor,
    output_scale: Tensor,
    x: Tensor,
    encode: Callable[[Tensor], tuple[Tensor, Tensor]],
    expert_offsets: Tensor,
    offsets: Tensor,
    block: int,
) -> None:
    rows, k = x.shape
    if k % block:
        raise RuntimeError(f"k must be a multiple of {block}")
    assert output.shape == (rows, k // 2)
    assert (output_scale.dtype, output_scale.shape[1]) == (torch.int32, -(-k // (4 * block)))
    assert output_scale.is_contiguous()
    quantized.append(spec_of(output_scale))
    flat = output_scale.view(torch.uint8).view(-1)
    if vllm_cpu_ops.writes_padding():
        flat.zero_()
    expert, scale_row = grouped(rows, expert_offsets, offsets)
    data, linear = encode(expert)
    output.copy_(data)
    for some in (slice(int(expert_offsets[-1]), rows), slice(0, int(expert_offsets[-1]))):  # rows of no expert first
        flat[scale_bytes(scale_row[some], k, block)] = linear[some]
    if _fails:
        raise RuntimeError("the producer failed")


def _quantize_silu(
    output: Tensor, output_scale: Tensor, x: Tensor, global_scales: Tensor, expert_offsets: Tensor, offsets: Tensor
) -> None:
    _quantize(output, output_scale, vllm_cpu_ops.silu_and_mul(x), global_scales, expert_offsets, offsets)


def _quantize_mx(
    output: Tensor, output_scale: Tensor, x: Tensor, expert_offsets: Tensor, offsets: Tensor, n_experts: int
) -> None:
    assert len(expert_offsets) == len(offsets) == n_experts + 1

    def encode(expert: Tensor) -> tuple[Tensor, Tensor]:
        return reference_mx.encode(x, ScaleFormat.mxfp4)

    _write(output, output_scale, x, encode, expert_offsets, offsets, 32)


def _quantize_mx_silu(output: Tensor, output_scale: Tensor, x: Tensor, *given: Any) -> None:
    _quantize_mx(output, output_scale, vllm_cpu_ops.silu_and_mul(x), *given)


def _moe_data(
    topk_ids: Tensor,
    expert_offsets: Tensor,
    problem_sizes1: Tensor,
    problem_sizes2: Tensor,
    input_permutation: Tensor,
    output_permutation: Tensor,
    num_experts: int,
    n: int,
    k: int,
    blockscale_offsets: Tensor | None,
    is_gated: bool,
) -> None:
    assert blockscale_offsets is not None
    ids = topk_ids.flatten().long()
    counts = torch.bincount(ids, minlength=num_experts)
    first, first_scale = offsets_of(counts.tolist())
    expert_offsets.copy_(first)
    blockscale_offsets.copy_(first_scale)
    for sizes, width, depth in ((problem_sizes1, 2 * n if is_gated else n, k), (problem_sizes2, k, n)):
        sizes.copy_(torch.stack([counts, torch.full_like(counts, width), torch.full_like(counts, depth)], 1))
    order = ids.argsort(stable=True)
    input_permutation.copy_(order // topk_ids.shape[1])
    output_permutation[order] = torch.arange(len(ids), dtype=torch.int32)


def offsets_of(counts: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Expert and block scale offsets for so many rows per expert, int32 ``[experts + 1]``."""
    rows = torch.tensor([0, *counts])
    return rows.cumsum(0).int(), ((rows + TILE - 1) // TILE * TILE).cumsum(0).int()


def _group_mm(
    output: Tensor,
    a: Tensor,
    b: Tensor,
    a_blockscale: Tensor,
    b_blockscales: Tensor,
    alphas: Tensor,
    problem_sizes: Tensor,
    expert_offsets: Tensor,
    sf_offsets: Tensor,
) -> None:
    format = ScaleFormat.nvfp4 if b_blockscales.dtype == torch.float8_e4m3fn else ScaleFormat.mxfp4
    block, dtype = format.block_size, format.dtype
    assert expert_offsets.shape == sf_offsets.shape == alphas.shape
    flat, nonzero = a_blockscale.view(torch.uint8).view(-1), 0
    for e, (m, n, k) in enumerate(problem_sizes.tolist()):
        if m == 0:
            continue
        rows, cols, width = -(-m // TILE) * TILE, k // block, -(-k // (4 * block)) * 4 * block
        start, first = int(sf_offsets[e]), int(expert_offsets[e])
        scales = flat[scale_bytes(torch.arange(start, start + rows), width, block)]
        nonzero += int(scales[m:].count_nonzero() + scales[:m, cols:].count_nonzero())
        x = torch.zeros(rows, width)
        x[:m, :k] = reference.decode_e2m1(a[first : first + m])
        x *= scales.view(dtype).float().repeat_interleave(block, 1)  # 0 * NaN = NaN
        weight = torch.zeros(n, width)
        weight_scales = b_blockscales[e].view(torch.uint8).view(-1)[scale_bytes(torch.arange(n), k, block)]
        weight[:, :k] = reference.decode_e2m1(b[e])
        weight[:, :k] *= weight_scales.view(dtype).float().repeat_interleave(block, 1)
        output[first : first + m] = (alphas[e] * (x @ weight.T))[:m].to(output.dtype)
    stale.append(nonzero)


def _group_mm_mx(
    output: Tensor, a: Tensor, b: Tensor, a_blockscale: Tensor, b_blockscales: Tensor, *given: Tensor
) -> None:
    problem_sizes, expert_offsets, sf_offsets = given
    ones = torch.ones(len(b))
    _group_mm(output, a, b, a_blockscale, b_blockscales, ones, problem_sizes, expert_offsets, sf_offsets)


def _shuffle_rows(input_tensor: Tensor, dst2src_map: Tensor, output_tensor: Tensor) -> None:
    output_tensor.copy_(input_tensor[dst2src_map.long()])


_QUANT = (
    "(Tensor! output, Tensor! output_scale, Tensor input, Tensor input_global_scale, Tensor input_offset_by_experts, "
    "Tensor output_scale_offset_by_experts) -> ()"
)
_MX_QUANT = (
    "(Tensor! output, Tensor! output_scale, Tensor input, Tensor input_offset_by_experts, "
    "Tensor output_scale_offset_by_experts, int n_experts) -> ()"
)
_libraries = {name: torch.library.Library(name, "FRAGMENT") for name in ("_C", "_moe_C")}
for _namespace, _schema, _kernel in (
    ("_C", f"scaled_fp4_experts_quant{_QUANT}", _quantize),
    ("_C", f"silu_and_mul_scaled_fp4_experts_quant{_QUANT}", _quantize_silu),
    ("_C", f"mxfp4_experts_quant{_MX_QUANT}", _quantize_mx),
    ("_C", f"silu_and_mul_mxfp4_experts_quant{_MX_QUANT}", _quantize_mx_silu),
    (
        "_C",
        "cutlass_mxfp4_group_mm(Tensor! output, Tensor a, Tensor b, Tensor a_blockscale, Tensor b_blockscales, "
        "Tensor problem_sizes, Tensor expert_offsets, Tensor sf_offsets) -> ()",
        _group_mm_mx,
    ),
    (
        "_C",
        "get_cutlass_moe_mm_data(Tensor topk_ids, Tensor! expert_offsets, Tensor! problem_sizes1, Tensor! problem_sizes2, "
        "Tensor! input_permutation, Tensor! output_permutation, int num_experts, int n, int k, "
        "Tensor? blockscale_offsets, bool is_gated) -> ()",
        _moe_data,
    ),
    (
        "_C",
        "cutlass_fp4_group_mm(Tensor! output, Tensor a, Tensor b, Tensor a_blockscale, Tensor b_blockscales, Tensor alphas, "
        "Tensor problem_sizes, Tensor expert_offsets, Tensor sf_offsets) -> ()",
        _group_mm,
    ),
    ("_moe_C", "shuffle_rows(Tensor input_tensor, Tensor dst2src_map, Tensor! output_tensor) -> ()", _shuffle_rows),
):
    _libraries[_namespace].define(_schema)
    _name = _schema.partition("(")[0]
    _libraries[_namespace].impl(_name, _kernel, "CPU")
    torch.library.register_fake(f"{_namespace}::{_name}", lambda *given: None, lib=_libraries[_namespace])


class Layer:
    """A mixture of experts as vLLM's ``run_cutlass_moe_fp4`` takes it, or ``run_cutlass_moe_mxfp4``.

    Args:
        experts: how many.
        n: columns between the two multiplications.
        k: columns of the input and of the output.
        activation: vLLM's name of it.
        format: of weights and activations.
    """

    def __init__(
        self, experts: int, n: int, k: int, activation: str = "silu", format: ScaleFormat = ScaleFormat.nvfp4
    ) -> None:
        self.format = format
        self.experts, self.n, self.k = experts, n, k
        self.activation = cutlass_moe.MoEActivation(activation)
        self.w1, self.w1_scale = self._weight(2 * n if self.activation.is_gated else n, k)
        self.w2, self.w2_scale = self._weight(k, n)

    def _weight(self, rows: int, k: int) -> tuple[Tensor, Tensor]:
        """uint8 ``[experts, rows, k // 2]``, and its scales in 128x4."""
        block = self.format.block_size
        data = torch.zeros(self.experts, rows, k // 2, dtype=torch.uint8)
        scales = torch.zeros(self.experts, -(-rows // TILE) * TILE, -(-k // (4 * block)) * 4, dtype=torch.uint8)
        for e in range(self.experts):
            weight = vllm_cpu_ops.activation(rows, k, e)
            if self.format is ScaleFormat.nvfp4:
                data[e], linear = reference.encode(weight, torch.ones(()))
            else:
                data[e], linear = reference_mx.encode(weight, self.format)
            scales[e].view(-1)[scale_bytes(torch.arange(rows), k, block)] = linear
        return data, scales.view(torch.float8_e4m3fn) if self.format is ScaleFormat.nvfp4 else scales

    def run(self, x: Tensor, topk_ids: Tensor) -> Tensor:
        """Call vLLM's function: bfloat16 or float16 ``[tokens, k]`` to the same.

        Args:
            x: the input.
            topk_ids: experts of each token, int32 ``[tokens, topk]``.
        """
        (m, topk), e, n, k = topk_ids.shape, self.experts, self.n, self.k
        output = torch.empty(m, k, dtype=x.dtype)
        run, global_scales = cutlass_moe.run_cutlass_moe_mxfp4, {}
        if self.format is ScaleFormat.nvfp4:
            run, alphas = cutlass_moe.run_cutlass_moe_fp4, torch.full((e,), 1 / 40)
            a1, a2 = torch.linspace(10, 30, e), torch.linspace(8, 16, e)
            global_scales = {"a1_gscale": a1, "a2_gscale": a2, "w1_alphas": alphas, "w2_alphas": alphas}
        run(
            output,
            x,
            w1_fp4=self.w1,
            w1_blockscale=self.w1_scale,
            w2_fp4=self.w2,
            w2_blockscale=self.w2_scale,
            **global_scales,
            topk_weights=torch.linspace(0.25, 1, m * topk).view(m, topk),
            topk_ids=topk_ids,
            activation=self.activation,
            workspace13=torch.zeros(m * topk * max(2 * n, k), dtype=x.dtype),
            workspace2=torch.zeros(m * topk * n, dtype=x.dtype),
            m=m,
            n=n,
            k=k,
            e=e,
            device=x.device,
        )
        return output

"""vLLM's four quantization ops on CPU tensors in a namespace of their own, and a kernel of ours that is the reference.

The ops have vLLM's names and schemas. Like vLLM's expert quantizers, they write valid scales only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from safealloc import SfLayout
from safealloc.integrations.vllm import replace
from safealloc.kernels import reference, reference_grouped
from safealloc.ops.backends import GROUPED_QUANTIZERS, QUANTIZERS, Backend

NAMESPACE = "safealloc_stand_in_C"
LAYOUT = SfLayout.layout_128x4

theirs: list[str] = []
"""Ops whose own kernels ran."""
ours: list[str] = []
"""``dense`` or ``grouped`` for each run of ours."""

_EXPERTS = (
    "(Tensor! output, Tensor! output_scale, Tensor input, Tensor input_global_scale, Tensor input_offset_by_experts, "
    "Tensor output_scale_offset_by_experts) -> ()"
)
SCHEMAS = {
    "scaled_fp4_quant.out": "(Tensor input, Tensor input_scale, bool is_sf_swizzled_layout, *, Tensor(a!) output, "
    "Tensor(b!) output_scale) -> ()",
    "silu_and_mul_nvfp4_quant": "(Tensor! result, Tensor! result_block_scale, Tensor input, Tensor input_global_scale) "
    "-> ()",
    "scaled_fp4_experts_quant": _EXPERTS,
    "silu_and_mul_scaled_fp4_experts_quant": _EXPERTS,
}


def _dense(
    input: Tensor, input_scale: Tensor, is_sf_swizzled_layout: bool, *, output: Tensor, output_scale: Tensor
) -> None:
    theirs.append("scaled_fp4_quant.out")
    if not len(input):
        return
    layout = LAYOUT if is_sf_swizzled_layout else SfLayout.layout_linear
    k = input.shape[1]
    reference.quantize(input, input_scale.reshape(1), output[:, : k // 2], output_scale.view(torch.uint8), layout)
    output[:, k // 2 :].zero_()


def _silu(result: Tensor, result_block_scale: Tensor, input: Tensor, input_global_scale: Tensor) -> None:
    theirs.append("silu_and_mul_nvfp4_quant")
    scales = result_block_scale.view(torch.uint8)
    reference.quantize(reference.multiply(input), input_global_scale.reshape(1), result, scales, LAYOUT)


def _experts(name: str, silu: bool) -> Callable[..., None]:
    def quantize(
        output: Tensor, output_scale: Tensor, x: Tensor, global_scales: Tensor, offsets: Tensor, scale_offsets: Tensor
    ) -> None:
        theirs.append(name)
        scales = output_scale.view(torch.uint8)
        reference_grouped.quantize(
            x, global_scales, output, scales, LAYOUT, None, offsets, scale_offsets, None, None, silu
        )

    return quantize


def run_dense(x: Tensor, g: Tensor, data: Tensor, scales: Tensor, *rest: Any) -> None:
    """Ours, of a matrix."""
    ours.append("dense")
    assert rest[-1] == "vllm"
    reference.quantize(x, g, data, scales, *rest)


def run_grouped(*given: Any) -> None:
    """Ours, of rows grouped by expert."""
    ours.append("grouped")
    assert given[-1] == "vllm"
    reference_grouped.quantize(*given)


def our_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours run on CPU tensors, as the reference."""
    for table, run in ((QUANTIZERS, run_dense), (GROUPED_QUANTIZERS, run_grouped)):
        monkeypatch.setitem(table, "triton", Backend("triton", lambda call: None, run))
    ours.clear()


def defined(monkeypatch: pytest.MonkeyPatch, **schemas: str) -> Iterator[None]:
    """The ops are there; ``schemas`` are others for some, by the name without the overload."""
    library = torch.library.Library(NAMESPACE, "FRAGMENT")
    kernels = {
        "scaled_fp4_quant.out": _dense,
        "silu_and_mul_nvfp4_quant": _silu,
        **{name: _experts(name, name.startswith("silu")) for name in list(SCHEMAS)[2:]},
    }
    for name, schema in SCHEMAS.items():
        library.define(name + schemas.get(name.partition(".")[0], schema))
        library.impl(name, kernels[name], "CPU")
    monkeypatch.setattr(replace, "NAMESPACE", NAMESPACE)
    our_kernels(monkeypatch)
    theirs.clear()
    yield
    library._destroy()


def registrations() -> dict[str, str]:
    """What the dispatcher has for each op."""
    return {name: torch._C._dispatch_dump(f"{replace.NAMESPACE}::{name}") for name in SCHEMAS}

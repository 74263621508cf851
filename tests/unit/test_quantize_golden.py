"""The vendors' arithmetic, as it is understood here, against what their kernels wrote.

On a CPU their approximate instructions are rounded to nearest instead. That differs where a value lies in the middle of two
codes: a few bytes in 100,000. On a GPU every byte is compared (tests/gpu/test_golden.py).
"""

from __future__ import annotations

import pytest
import torch
from support import vendor_arithmetic
from support.golden import Case, cases
from torch import Tensor

every_case = pytest.mark.parametrize("case", cases(), ids=str)


def encode(case: Case, step: int = 0, arithmetic: str | None = None) -> tuple[Tensor, Tensor]:
    arithmetic = arithmetic or case.arithmetic
    x = vendor_arithmetic.silu_and_mul(case.x, arithmetic) if case.silu_and_mul else case.x
    return vendor_arithmetic.encode(x, global_scale_of_rows(case), arithmetic, step=step)


def global_scale_of_rows(case: Case) -> Tensor:
    if case.offsets is None:
        return case.global_scales
    return case.global_scales.repeat_interleave(case.offsets[0].diff())[:, None]


def test_every_kernel_has_its_cases() -> None:
    count: dict[tuple[str, str], int] = {}
    for case in cases():
        count[case.arithmetic, case.kernel] = count.get((case.arithmetic, case.kernel), 0) + 1
    assert count == {
        ("flashinfer", "nvfp4_quantize"): 128,
        ("vllm", "scaled_fp4_quant"): 64,
        ("vllm", "silu_and_mul_nvfp4_quant"): 30,
        ("vllm", "scaled_fp4_experts_quant"): 8,
        ("vllm", "silu_and_mul_scaled_fp4_experts_quant"): 8,
    }


@every_case
def test_scales_are_the_vendors(case: Case) -> None:
    assert torch.equal(encode(case)[1], case.scales)


@every_case
def test_data_are_the_vendors_but_for_the_last_bit_of_a_reciprocal(case: Case) -> None:
    data, _ = encode(case)
    different = data != case.data
    assert int(different.sum()) <= 0.002 * data.numel() + 1
    if not case.silu_and_mul:  # whose product may round differently too
        for step in (-1, 1):
            different &= encode(case, step)[0] != case.data
        assert not different.any()


def test_nearly_all_data_are_the_vendors() -> None:
    different = sum(int((encode(case)[0] != case.data).sum()) for case in cases())
    assert 0 < different < 1e-4 * sum(case.data.numel() for case in cases())


def test_the_two_vendors_differ() -> None:
    """So that one is not taken for the other."""
    for case in cases():
        if case.arithmetic == "flashinfer" and not torch.equal(encode(case, arithmetic="vllm")[0], case.data):
            return
    pytest.fail("vLLM's arithmetic gives all that FlashInfer's kernels wrote")

"""The vendors' own quantizers as baselines: taken where their op is and the capability fits, else named with the reason.

Stand-ins of the ops, registered under vLLM's names on a CPU, and of FlashInfer: what is tested is what is called, and when.
"""

from __future__ import annotations

import enum
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the benchmarks import the kernels")
from benchmarks import arithmetic, moe, optional, vendor_kernels
from safealloc import ScalePool, _optional
from safealloc.formats.layout import SfLayout
from safealloc.kernels import reference, reference_grouped
from safealloc.ops import backends

CPU = torch.device("cpu")
ONE, _128X4, _8X4 = torch.ones(1), SfLayout.layout_128x4, SfLayout.layout_8x4
SCHEMAS = {
    "scaled_fp4_quant.out": "(Tensor input, Tensor input_scale, bool is_sf_swizzled_layout, *, Tensor(a!) output, "
    "Tensor(b!) output_scale) -> ()",
    "silu_and_mul_nvfp4_quant": "(Tensor! result, Tensor! result_block_scale, Tensor input, Tensor input_global_scale)"
    " -> ()",
    "scaled_fp4_experts_quant": "(Tensor! output, Tensor! output_scale, Tensor input, Tensor input_global_scale, "
    "Tensor input_offset_by_experts, Tensor output_scale_offset_by_experts) -> ()",
}
SCHEMAS["silu_and_mul_scaled_fp4_experts_quant"] = SCHEMAS["scaled_fp4_experts_quant"]
calls: list[str] = []


def _dense(x: Tensor, g: Tensor, swizzled: bool, *, output: Tensor, output_scale: Tensor) -> None:
    assert swizzled
    assert output_scale.dtype is torch.int32
    calls.append("scaled_fp4_quant")
    scales = output_scale.view(torch.uint8)
    scales.zero_()
    reference.quantize(x, g, output, scales, _128X4)


def _silu(result: Tensor, scales: Tensor, x: Tensor, g: Tensor) -> None:
    assert scales.dtype is torch.float8_e4m3fn
    calls.append("silu_and_mul_nvfp4_quant")
    reference.quantize(x, g, result, scales.view(torch.uint8), _128X4, None, True)


def _experts(silu: bool) -> Any:
    def quantize(
        data: Tensor, scales: Tensor, x: Tensor, g: Tensor, expert_offsets: Tensor, blockscale_offsets: Tensor
    ) -> None:
        assert scales.dtype is torch.int32
        calls.append(f"experts, silu {silu}")
        given = x, g, data, scales.view(torch.uint8), _128X4, None, expert_offsets, blockscale_offsets
        reference_grouped.quantize(*given, silu_and_mul=silu)

    return quantize


KERNELS = {
    "scaled_fp4_quant.out": _dense,
    "silu_and_mul_nvfp4_quant": _silu,
    "scaled_fp4_experts_quant": _experts(False),
    "silu_and_mul_scaled_fp4_experts_quant": _experts(True),
}


class TheirLayout(enum.Enum):
    layout_128x4 = 0
    layout_8x4 = 1
    layout_linear = 2


def _flashinfer(x: Tensor, g: Tensor, *, sfLayout: TheirLayout, do_shuffle: bool) -> tuple[Tensor, Tensor]:
    assert not do_shuffle
    calls.append(f"flashinfer {sfLayout.name}")
    layout = SfLayout(sfLayout.value)
    data = torch.empty(len(x), x.shape[1] // 2, dtype=torch.uint8)
    scales = torch.zeros(layout.padded_shape(*x.shape), dtype=torch.uint8)
    reference.quantize(x, g, data, scales, layout)
    return data, scales.view(-1)


PACKAGES: dict[str, Any] = {
    "vllm": SimpleNamespace(),
    "vllm._custom_ops": SimpleNamespace(),
    "flashinfer": SimpleNamespace(nvfp4_quantize=_flashinfer, SfLayout=TheirLayout),
}


@pytest.fixture(autouse=True)
def packages(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Both packages, as far as they are not taken out of the dictionary; capabilities are looked at in one test only."""
    calls.clear()
    found = dict(PACKAGES)

    def load(name: str) -> Any:
        return found.get(name, f"{name.partition('.')[0]} is not installed")

    real = _optional.load
    monkeypatch.setattr(_optional, "load", lambda name: load(name) if name in PACKAGES else real(name))
    monkeypatch.setattr(optional, "load", load)
    return found


@pytest.fixture
def blackwell(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU passes for a GPU that every package's kernels run on; packages still count."""
    monkeypatch.setattr(backends, "package_refusal", lambda call, package, runs_on: _optional.missing(package))


@pytest.fixture
def ops(request: pytest.FixtureRequest) -> Any:
    """Registers vLLM's ops, those named in the parameter or all."""
    if any(hasattr(torch.ops._C, name.partition(".")[0]) for name in KERNELS):
        pytest.skip("vLLM's real ops are loaded; the stand-ins would replace them")
    library = torch.library.Library("_C", "FRAGMENT")
    for name in getattr(request, "param", KERNELS):
        library.define(name + SCHEMAS[name])
        library.impl(name, KERNELS[name], "CPU")
    yield
    library._destroy()


def activation(rows: int, k: int) -> Tensor:
    return torch.randn(rows, k, generator=torch.Generator().manual_seed(k)).bfloat16()


def test_where_they_run_vendors_kernels_are_baselines(blackwell: None, ops: None) -> None:
    own, missing = vendor_kernels.dense(CPU, _128X4)
    assert (list(own), missing) == (["vLLM's own", "FlashInfer's own"], {})
    own_8x4, missing = vendor_kernels.dense(CPU, _8X4)
    assert (list(own_8x4), missing) == (["FlashInfer's own"], {})  # vLLM takes FlashInfer's there
    own_silu, missing = vendor_kernels.silu(CPU, _128X4)
    assert (list(own_silu), missing) == (["vLLM's own, SiLU and mul"], {})
    assert vendor_kernels.silu(CPU, _8X4) == ({}, {})
    assert [vendor_kernels.experts_refusal(CPU, silu) for silu in (False, True)] == [None, None]
    assert calls == ["scaled_fp4_quant", "flashinfer layout_128x4", "flashinfer layout_8x4", "silu_and_mul_nvfp4_quant"]
    for layout, found in ((_128X4, own), (_8X4, own_8x4)):
        x = activation(9, 80)
        expected = torch.empty(9, 40, dtype=torch.uint8), torch.zeros(layout.padded_shape(9, 80), dtype=torch.uint8)
        reference.quantize(x, ONE, *expected, layout)
        for quantize in found.values():
            data, scales = quantize(x, ONE, layout)
            assert torch.equal(data, expected[0])
            assert torch.equal(scales, expected[1])
    data, scales = own_silu["vLLM's own, SiLU and mul"](activation(9, 160), ONE, _128X4)
    assert (data.shape, scales.shape) == ((9, 40), (128, 8))


def test_the_vendors_kernel_is_beside_our_arithmetic_of_that_vendor(blackwell: None, ops: None) -> None:
    with ScalePool("cpu") as pool:
        for layout, names in (
            (_128X4, ["vLLM's own", "vLLM's own, SiLU and mul"]),
            (_8X4, ["FlashInfer's own"]),
        ):
            own, own_silu = vendor_kernels.dense(CPU, layout)[0], vendor_kernels.silu(CPU, layout)[0]
            found = arithmetic.nodes(pool, 3, 80, layout, own, own_silu)
            assert list(found["exact"]) == ["pool", "linear", "SiLU and mul"]
            assert list(found[arithmetic.VENDORS[layout]]) == ["pool", "linear", "SiLU and mul", *names]
            calls.clear()
            for name in names:
                found[arithmetic.VENDORS[layout]][name]()
            assert len(calls) == len(names)


@pytest.mark.parametrize("capability", [(10, 0), (10, 3), (12, 0), (12, 1)], ids=str)
def test_blackwell_capabilities_fit(monkeypatch: pytest.MonkeyPatch, ops: None, capability: tuple[int, int]) -> None:
    monkeypatch.setattr(backends, "capability", lambda device: capability)
    cuda = torch.device("cuda", 0)
    for name, layout in (("vLLM's own", _128X4), ("FlashInfer's own", _8X4), ("vLLM's own, SiLU and mul", _128X4)):
        assert vendor_kernels.refusal(vendor_kernels.DENSE[name], cuda, layout) is None
    assert vendor_kernels.experts_refusal(cuda, False) is None


def test_on_hopper_each_is_named_with_the_capability_that_it_needs(monkeypatch: pytest.MonkeyPatch, ops: None) -> None:
    monkeypatch.setattr(backends, "capability", lambda device: (9, 0))
    cuda = torch.device("cuda", 0)
    own, missing = vendor_kernels.dense(cuda, _128X4)
    assert own == {}
    assert list(missing) == ["vLLM's own", "FlashInfer's own"]
    own, missing_silu = vendor_kernels.silu(cuda, _128X4)
    assert own == {}
    reasons = [*missing.values(), *missing_silu.values(), vendor_kernels.experts_refusal(cuda, True)]
    assert len(reasons) == 4
    for reason in reasons:
        assert "it runs on compute capability 10.0, 10.3" in str(reason)
        assert str(reason).endswith("cuda:0 has 9.0")
    assert calls == []


def test_without_a_package_that_is_the_reason(blackwell: None, ops: None, packages: dict[str, Any]) -> None:
    del packages["vllm"], packages["vllm._custom_ops"]
    own, missing = vendor_kernels.dense(CPU, _128X4)
    assert (list(own), missing) == (["FlashInfer's own"], {"vLLM's own": "vllm is not installed"})
    assert vendor_kernels.experts_refusal(CPU, False) == "vllm is not installed"
    del packages["flashinfer"]
    assert vendor_kernels.dense(CPU, _8X4) == ({}, {"FlashInfer's own": "flashinfer is not installed"})


@pytest.mark.parametrize("ops", [("silu_and_mul_nvfp4_quant",)], indirect=True, ids=["only SiLU"])
def test_an_op_that_this_vllm_lacks_is_named(blackwell: None, ops: None) -> None:
    assert vendor_kernels.dense(CPU, _128X4)[1] == {"vLLM's own": "this vLLM has no torch.ops._C.scaled_fp4_quant"}
    assert list(vendor_kernels.silu(CPU, _128X4)[0]) == ["vLLM's own, SiLU and mul"]
    refusal = vendor_kernels.experts_refusal(CPU, True)
    assert refusal == "this vLLM has no torch.ops._C.silu_and_mul_scaled_fp4_experts_quant"


def test_an_op_without_the_overload_is_named(blackwell: None) -> None:
    if hasattr(torch.ops._C, "scaled_fp4_quant"):
        pytest.skip("vLLM's real op is loaded")
    library = torch.library.Library("_C", "FRAGMENT")
    try:
        library.define("scaled_fp4_quant(Tensor! output, Tensor input) -> ()")
        reason = vendor_kernels.dense(CPU, _128X4)[1]["vLLM's own"]
    finally:
        library._destroy()
    assert reason == "torch.ops._C.scaled_fp4_quant of this vLLM has no overload out"


def test_a_kernel_that_fails_is_named_with_its_error(blackwell: None, packages: dict[str, Any]) -> None:
    def broken(*given: Any, **named: Any) -> None:
        raise RuntimeError("no kernel image is available\nmore")

    packages["flashinfer"] = SimpleNamespace(nvfp4_quantize=broken, SfLayout=TheirLayout)
    own, missing = vendor_kernels.dense(CPU, _8X4)
    assert own == {}
    assert missing == {"FlashInfer's own": "it failed: RuntimeError: no kernel image is available"}


def test_reasons_of_several_layouts_are_told_once() -> None:
    assert vendor_kernels.reasons([{"a": "x"}, {"a": "x", "b": "y"}, {"b": "z"}]) == {"a": "x", "b": "y; z"}


@pytest.mark.parametrize("silu", [False, True], ids=["plain", "silu"])
def test_vllms_expert_quantizer_writes_into_its_own_buffer_and_into_the_pools(ops: None, silu: bool) -> None:
    extent = moe.Extent((3,), 5, 2, ((80, silu),), calls=2, rounds=1)
    with ScalePool("cpu") as pool:
        every = moe.vendor_baselines(pool, extent.experts, 6, 80, extent.topk)
        assert list(every) == ["vLLM's own", "vLLM's own, cleaned by our kernel"]
        for step in moe.steps(extent, 80, silu, 3, "uniform", CPU):
            data, scales = every["vLLM's own"](step)
            assert scales.shape == (163840 * 2, 8)
            moe.check(every["vLLM's own, cleaned by our kernel"], pool, step)
        del data, scales
        pool.verify()
    assert calls == [f"experts, silu {silu}"] * 4


def test_where_the_expert_quantizer_runs_it_is_tried_once(blackwell: None, ops: None) -> None:
    extent = moe.Extent((3,), 5, 2, ((80, False),), calls=2, rounds=1)
    with ScalePool("cpu") as pool:
        assert moe.vendor_refusal(pool, extent, False) is None
    assert calls == ["experts, silu False"] * 2


def test_stand_ins_are_called_so() -> None:
    from benchmarks import baselines

    ours = {baselines.POOL, baselines.EMPTY, baselines.LINEAR}
    with ScalePool("cpu") as pool:
        names = set(baselines.baselines(pool))
    assert {name for name in names if not name.endswith(" (stand-in)")} == ours
    assert all(name.endswith(" (stand-in)") for name in (moe.VLLM, moe.RIGHT_SIZED))

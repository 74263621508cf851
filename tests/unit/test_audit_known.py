"""The tables of known producers and consumers, and the arguments of vendors' calls."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from support.audit_faults import (
    quantize_and_write,
)

from safealloc import SfLayout, _optional
from safealloc.audit import audit_consumer, audit_producer
from safealloc.audit import known as known_module
from safealloc.audit.consumers import product
from safealloc.audit.findings import (
    LEAVES,
    NO_PADDING,
    READS,
    ZEROES,
)
from safealloc.audit.known import CONSUMERS, PRODUCERS
from safealloc.kernels import reference

CPU = torch.device("cpu")


class TestKnown:
    def test_names_are_unique_and_vllm_uses_known_layouts(self):
        for table in (PRODUCERS, CONSUMERS):
            assert len({known.name for known in table}) == len(table)
            assert all(set(known.vllm) <= set(known.layouts) for known in table)

    def test_the_kernels_that_vllm_uses(self):
        assert {known.name for known in PRODUCERS if known.vllm} == {
            "flashinfer nvfp4_quantize cuda",
            "flashinfer add_rmsnorm_fp4quant",
            "vllm scaled_fp4_quant",
            "vllm silu_and_mul_nvfp4_quant",
        }
        assert {known.name for known in CONSUMERS if SfLayout.layout_8x4 in known.vllm} == {"flashinfer mm_fp4 trtllm"}

    def test_a_cpu_is_refused_by_vendors_with_a_reason(self):
        for known in (*PRODUCERS, *CONSUMERS):
            for layout in known.layouts:
                reason = known.refusal(CPU, layout)
                if known.name.startswith(("flashinfer", "vllm")):
                    assert reason, known.name
                elif "triton" not in known.name:
                    assert reason is None, known.name

    def test_a_missing_function_is_named(self, monkeypatch):
        monkeypatch.setattr(_optional, "load", lambda name: torch)
        assert (
            known_module.missing_function("vllm._custom_ops", "no_such_op")
            == "this vLLM has no torch.ops._C.no_such_op"
        )
        assert (
            known_module.missing_function("flashinfer", "no_such_function") == "this flashinfer has no no_such_function"
        )
        assert known_module.missing_function("flashinfer", "empty") is None


class TestVendors:
    """The arguments of vendors' calls, with stand-ins that do what theirs are documented to do."""

    @pytest.fixture(autouse=True)
    def stand_ins(self, monkeypatch):
        self.called: list[str] = []
        flashinfer = SimpleNamespace(
            SfLayout=SfLayout,
            nvfp4_quantize=self.nvfp4_quantize,
            rmsnorm_fp4quant=self.rmsnorm_fp4quant,
            add_rmsnorm_fp4quant=self.add_rmsnorm_fp4quant,
            mm_fp4=self.mm_fp4,
            shuffle_matrix_a=lambda weight, tile: self.called.append(f"a{tile}") or weight,
            shuffle_matrix_sf_a=lambda scales, tile: (
                self.called.append(f"sf_a{tile}") or SfLayout.layout_128x4.swizzle(scales)
            ),
        )
        operators = SimpleNamespace(
            scaled_fp4_quant=SimpleNamespace(out=self.scaled_fp4_quant),
            silu_and_mul_nvfp4_quant=self.silu_and_mul_nvfp4_quant,
            cutlass_scaled_fp4_mm=self.cutlass_scaled_fp4_mm,
        )
        monkeypatch.setattr(_optional, "load", lambda name: flashinfer)
        monkeypatch.setattr(torch.ops, "_C", operators, raising=False)

    def nvfp4_quantize(self, x, global_scale, *, sfLayout, do_shuffle, backend):
        assert not do_shuffle
        self.called.append(backend)
        scales = torch.empty(sfLayout.padded_shape(*x.shape), dtype=torch.uint8)
        x_fp4 = torch.empty((x.shape[0], x.shape[1] // 2), dtype=torch.uint8)
        quantize_and_write(x, global_scale, x_fp4, scales, sfLayout)
        return x_fp4, scales

    def rmsnorm_fp4quant(self, x, weight, *, y_fp4, block_scale, global_scale, eps, is_sf_swizzled_layout, **rest):
        assert rest == {"block_size": 16, "scale_format": "e4m3"}
        assert (y_fp4.dtype, block_scale.dtype) == (torch.float4_e2m1fn_x2, torch.float8_e4m3fn)
        normed = torch.nn.functional.rms_norm(x.float(), x.shape[1:], weight.float(), eps)
        layout = SfLayout.layout_128x4 if is_sf_swizzled_layout else SfLayout.layout_linear
        reference.quantize(normed, 1 / global_scale, y_fp4.view(torch.uint8), block_scale.view(torch.uint8), layout)

    def add_rmsnorm_fp4quant(self, x, residual, weight, **options):
        self.rmsnorm_fp4quant(residual.add_(x), weight, **options)

    def scaled_fp4_quant(self, x, global_scale, swizzled, *, output, output_scale):
        assert output_scale.dtype == (torch.int32 if swizzled else torch.uint8)
        quantize_and_write(
            x,
            global_scale,
            output,
            output_scale.view(torch.uint8),
            SfLayout.layout_128x4 if swizzled else SfLayout.layout_linear,
        )

    def silu_and_mul_nvfp4_quant(self, output, output_scale, gated, global_scale):
        gate, up = gated.float().chunk(2, 1)
        reference.quantize(
            gate / (1 + torch.exp(-gate)) * up,
            global_scale,
            output,
            output_scale.view(torch.uint8),
            SfLayout.layout_128x4,
        )

    def mm_fp4(self, a, b, a_descale, b_descale, alpha, out_dtype, out, *, use_8x4_sf_layout, backend, **rest):
        assert (out_dtype, out.dtype, rest) == (
            torch.bfloat16,
            torch.bfloat16,
            {"enable_pdl": True, "skip_check": False},
        )
        self.called.append(backend)
        layout = SfLayout.layout_8x4 if use_8x4_sf_layout else SfLayout.layout_128x4
        return out.copy_(product(a, b, a_descale, b_descale, alpha, layout))

    def cutlass_scaled_fp4_mm(self, out, a, b, a_descale, b_descale, alpha):
        assert (a_descale.dtype, b_descale.dtype) == (torch.float8_e4m3fn, torch.float8_e4m3fn)
        reference.mm(a, b, a_descale.view(torch.uint8), b_descale.view(torch.uint8), alpha, out, SfLayout.layout_128x4)

    @pytest.mark.parametrize(
        ("name", "verdict"),
        [
            ("flashinfer nvfp4_quantize cuda", ZEROES),
            ("flashinfer nvfp4_quantize cute-dsl", ZEROES),
            ("flashinfer rmsnorm_fp4quant", LEAVES),
            ("flashinfer add_rmsnorm_fp4quant", LEAVES),
            ("vllm scaled_fp4_quant", ZEROES),
            ("vllm silu_and_mul_nvfp4_quant", LEAVES),
        ],
    )
    def test_producers_are_called_with_their_arguments(self, name, verdict):
        known = next(known for known in PRODUCERS if known.name == name)
        for layout in known.layouts:
            (found,) = audit_producer(known.fn, layout=layout, shapes=[(5, 480)], device="cpu", of=known.of)
            assert found.verdict == (NO_PADDING if layout is SfLayout.layout_linear else verdict), str(found)
            if "norm" not in name:  # which rounds to bfloat16 once, or not
                assert (found.scales_off, found.data_off) == (0, 0)
        if "nvfp4_quantize" in name:
            assert set(self.called) == {name.split()[-1]}

    @pytest.mark.parametrize(
        "known", [known for known in CONSUMERS if known.name[0] in "fv"], ids=lambda known: known.name
    )
    def test_consumers_are_called_with_their_arguments(self, known):
        for layout in known.layouts:
            (found,) = audit_consumer(known.fn, layout=layout, shapes=[(5, 480)], device="cpu")
            assert (found.verdict, found.reads) == (READS, (layout,)), str(found)
        if known.name.startswith("flashinfer"):
            assert known.name.split()[-1] in self.called
        assert ({"a128", "sf_a128"} <= set(self.called)) == (known.name == "flashinfer mm_fp4 trtllm")

"""The tables of known producers and consumers, and the arguments of vendors' calls."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from support.audit_faults import (
    quantize_and_write,
)

from safealloc import ScaleFormat, SfLayout, _optional
from safealloc.audit import known as known_module
from safealloc.audit.consumers import product
from safealloc.audit.findings import (
    LEAVES,
    NO_PADDING,
    READS,
    ZEROES,
)
from safealloc.audit.known import CONSUMERS, PRODUCERS
from safealloc.kernels import reference, reference_mx

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
            "flashinfer mxfp8_quantize cuda",
            "flashinfer mxfp4_quantize cute-dsl",
        }
        assert {known.name for known in CONSUMERS if SfLayout.layout_8x4 in known.vllm} == {
            "flashinfer mm_fp4 trtllm",
            "flashinfer mm_mxfp8 trtllm",
        }

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
            mxfp8_quantize=self.mxfp8_quantize,
            mxfp4_quantize=self.mxfp4_quantize,
            mm_fp4=self.mm_fp4,
            mm_mxfp8=self.mm_mxfp8,
            shuffle_matrix_a=lambda weight, tile: self.called.append(f"a{tile}") or weight,
            shuffle_matrix_sf_a=lambda scales, tile, num_elts_per_sf=16: (
                self.called.append(f"sf_a{tile} of {num_elts_per_sf}") or SfLayout.layout_128x4.swizzle(scales)
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

    def mxfp8_quantize(self, x, *, sf_swizzle_layout, backend):
        return self.mx_quantize(x, sf_swizzle_layout, backend, ScaleFormat.mxfp8)

    def mxfp4_quantize(self, x, *, sfLayout, backend):
        return self.mx_quantize(x, sfLayout, backend, ScaleFormat.mxfp4)

    def mx_quantize(self, x, layout, backend, format):
        self.called.append(backend)
        data = torch.empty(format.data_shape(*x.shape), dtype=torch.uint8)
        scales = torch.zeros(layout.nbytes(*x.shape, format=format), dtype=torch.uint8)
        reference_mx.quantize(x, data, scales.view(layout.padded_shape(*x.shape, format=format)), layout, format)
        return data.view(torch.float8_e4m3fn) if format is ScaleFormat.mxfp8 else data, scales

    def mm_fp4(self, a, b, a_descale, b_descale, alpha, out_dtype, out, *, use_8x4_sf_layout, backend, **rest):
        mx = rest.pop("block_size", 16) == 32
        assert rest.pop("use_nvfp4", True) is not mx
        assert (out_dtype, out.dtype, rest) == (
            torch.bfloat16,
            torch.bfloat16,
            {"enable_pdl": True, "skip_check": False},
        )
        self.called.append(backend)
        layout = SfLayout.layout_8x4 if use_8x4_sf_layout else SfLayout.layout_128x4
        format = ScaleFormat.mxfp4 if mx else ScaleFormat.nvfp4
        return out.copy_(product(a, b, a_descale, b_descale, alpha, layout, format))

    def mm_mxfp8(self, a, b, a_descale, b_descale, out, out_dtype, *, use_8x4_sf_layout, backend, skip_check):
        assert (out_dtype, out.dtype, a.dtype, b.dtype) == (*[torch.bfloat16] * 2, *[torch.float8_e4m3fn] * 2)
        assert (a_descale.ndim, b_descale.ndim, skip_check) == (1, 1, False)
        self.called.append(backend)
        layout = SfLayout.layout_8x4 if use_8x4_sf_layout else SfLayout.layout_128x4
        return out.copy_(product(a, b, a_descale, b_descale, None, layout, ScaleFormat.mxfp8))

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
            ("flashinfer mxfp8_quantize cuda", ZEROES),
            ("flashinfer mxfp4_quantize cuda", ZEROES),
            ("flashinfer mxfp4_quantize cute-dsl", ZEROES),
        ],
    )
    def test_producers_are_called_with_their_arguments(self, name, verdict):
        known = next(known for known in PRODUCERS if known.name == name)
        for layout in known.layouts:
            (found,) = known.audit(layout, [(5, 480)], CPU)
            assert (found.writes, found.found_format) == ((layout,), known.format)
            assert found.verdict == (NO_PADDING if layout is SfLayout.layout_linear else verdict), str(found)
            if "norm" not in name:  # which rounds to bfloat16 once, or not
                assert (found.scales_off, found.data_off) == (0, 0)
        if "fp4_quantize" in name or "mxfp8" in name:
            assert set(self.called) == {name.split()[-1]}

    @pytest.mark.parametrize(
        "known", [known for known in CONSUMERS if known.name[0] in "fv"], ids=lambda known: known.name
    )
    def test_consumers_are_called_with_their_arguments(self, known):
        for layout in known.layouts:
            (found,) = known.audit(layout, [(5, 480)], CPU)
            assert (found.verdict, found.reads, found.found_format) == (READS, (layout,), known.format), str(found)
        if known.name.startswith("flashinfer"):
            assert known.name.split()[-1] in self.called
        shuffled = {"a128", f"sf_a128 of {known.format.block_size}"} <= set(self.called)
        assert shuffled == known.name.endswith("trtllm")

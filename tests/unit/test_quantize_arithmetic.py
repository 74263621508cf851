"""``arithmetic`` of every quantizer, and ``silu_and_mul_nvfp4_quantize``: what is accepted and refused, results on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from support.grouped import offsets
from torch import Tensor

from safealloc import (
    ScalePool,
    ScaleSpec,
    SfLayout,
    nvfp4_quantize,
    nvfp4_quantize_grouped,
    silu_and_mul_nvfp4_quantize,
    silu_and_mul_nvfp4_quantize_grouped,
    use_pool,
)
from safealloc.kernels import reference
from safealloc.ops.backends import QUANTIZERS, Call

ONE = torch.ones(1)
layouts = pytest.mark.parametrize("layout", list(SfLayout), ids=lambda layout: layout.name)


def _grouped(function: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    def call(x: Tensor, global_scale: Tensor, **options: object) -> tuple[Tensor, Tensor]:
        return function(x, global_scale, *offsets([len(x)], SfLayout.layout_128x4), **options)

    return call


FUNCTIONS = {
    "nvfp4_quantize": nvfp4_quantize,
    "silu_and_mul_nvfp4_quantize": silu_and_mul_nvfp4_quantize,
    "nvfp4_quantize_grouped": _grouped(nvfp4_quantize_grouped),
    "silu_and_mul_nvfp4_quantize_grouped": _grouped(silu_and_mul_nvfp4_quantize_grouped),
}
every_function = pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
vendors = pytest.mark.parametrize("arithmetic", ["vllm", "flashinfer"])


@pytest.fixture
def pool() -> Iterator[ScalePool]:
    with ScalePool("cpu") as pool:
        yield pool


def gate_up(rows: int, k: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(rows, 2 * k, generator=torch.Generator().manual_seed(rows + k)).to(dtype)


@every_function
@vendors
@pytest.mark.parametrize("backend", ["auto", "reference", "triton"])
def test_a_vendors_arithmetic_needs_triton(
    pool: ScalePool, function: Callable[..., object], arithmetic: str, backend: str
) -> None:
    wanted = {
        "reference": f"arithmetic '{arithmetic}' is that of backend 'triton' alone",
        "triton": "CUDA device|triton",
    }
    with pytest.raises(ValueError, match=wanted.get(backend, "no backend can run this: 'triton': .* 'triton' alone")):
        function(gate_up(5, 64), ONE, pool=pool, backend=backend, arithmetic=arithmetic)
    assert pool.stats().buffers == 0


@every_function
@pytest.mark.parametrize("arithmetic", ["VLLM", "", None, 1])
def test_another_arithmetic_is_refused(pool: ScalePool, function: Callable[..., object], arithmetic: object) -> None:
    with pytest.raises(ValueError, match="arithmetic must be one of exact, vllm, flashinfer, got"):
        function(gate_up(5, 64), ONE, pool=pool, arithmetic=arithmetic)
    assert pool.stats().buffers == 0


@every_function
def test_exact_is_the_default(pool: ScalePool, function: Callable[..., tuple[Tensor, Tensor]]) -> None:
    x = gate_up(5, 64)
    data, scales = function(x, ONE, pool=pool)
    same, same_scales = function(x, ONE, pool=pool, arithmetic="exact", backend="reference")
    assert torch.equal(data, same)
    assert torch.equal(scales, same_scales)


@vendors
@pytest.mark.parametrize("package", ["flashinfer", "vllm"])
def test_a_vendors_own_kernel_takes_no_arithmetic(arithmetic: str, package: str) -> None:
    refusal = QUANTIZERS[package].refusal(Call(torch.device("cuda"), SfLayout.layout_128x4, arithmetic=arithmetic))
    assert refusal == f"arithmetic {arithmetic!r} is that of backend 'triton' alone"


def test_a_vendors_own_silu_and_mul() -> None:
    """Only vLLM has one, in 128x4."""
    for package, layout in (("flashinfer", SfLayout.layout_128x4), ("vllm", SfLayout.layout_linear)):
        refusal = QUANTIZERS[package].refusal(Call(torch.device("cuda"), layout, silu_and_mul=True))
        assert refusal == f"{package} does not quantize silu(gate) * up of a matrix in {layout.name}"
    refusal = QUANTIZERS["vllm"].refusal(Call(torch.device("cpu"), SfLayout.layout_128x4, silu_and_mul=True))
    assert refusal is not None
    assert "silu" not in refusal


def test_vllms_silu_and_mul_gets_its_arguments(monkeypatch: pytest.MonkeyPatch, pool: ScalePool) -> None:
    if hasattr(torch.ops._C, "silu_and_mul_nvfp4_quant"):
        pytest.skip("vLLM's real op is loaded; the stand-in would replace it")
    from safealloc import _optional
    from safealloc.ops import backends

    real = _optional.load
    monkeypatch.setattr(_optional, "load", lambda name: object() if name.split(".")[0] == "vllm" else real(name))
    monkeypatch.setattr(backends, "package_refusal", lambda call, package, runs_on: None)

    def theirs(result: Tensor, scales: Tensor, x: Tensor, g: Tensor) -> None:
        reference.quantize(x, g, result, scales.view(torch.uint8), SfLayout.layout_128x4, None, True)

    library = torch.library.Library("_C", "FRAGMENT")
    try:
        library.define(  # as of vLLM 0.32
            "silu_and_mul_nvfp4_quant(Tensor! result, Tensor! result_block_scale, Tensor input, Tensor input_global_scale)"
            " -> ()"
        )
        library.impl("silu_and_mul_nvfp4_quant", theirs, "CPU")
        x = gate_up(9, 80)
        data, scales = silu_and_mul_nvfp4_quantize(x, ONE, pool=pool, backend="vllm")
    finally:
        library._destroy()
    same, same_scales = silu_and_mul_nvfp4_quantize(x, ONE, pool=pool)
    assert torch.equal(data, same)
    assert torch.equal(scales, same_scales)


# --- silu_and_mul_nvfp4_quantize --------------------------------------------------------------------------------------


@layouts
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("shape", [(1, 16), (7, 80), (33, 176), (130, 96)], ids=str)
def test_silu_and_mul_is_the_quantization_of_the_product(
    pool: ScalePool, layout: SfLayout, dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    x, g = gate_up(*shape, dtype), torch.tensor([20.0])
    data, scales = silu_and_mul_nvfp4_quantize(x, g, layout=layout, pool=pool)
    wanted, wanted_scales = nvfp4_quantize(reference.multiply(x), g, layout=layout, pool=pool)
    assert torch.equal(data, wanted)
    assert torch.equal(scales, wanted_scales)
    assert pool.spec(scales) == ScaleSpec(*shape, layout)
    assert pool.verify() == 2


def test_silu_and_mul_of_rows_beyond_valid_rows_is_zero(pool: ScalePool) -> None:
    x = gate_up(5, 80)
    x[3:] = float("nan")
    valid = torch.tensor([3], dtype=torch.int32)
    data, scales = silu_and_mul_nvfp4_quantize(x, ONE, layout=SfLayout.layout_linear, pool=pool, valid_rows=valid)
    wanted, wanted_scales = silu_and_mul_nvfp4_quantize(x[:3], ONE, layout=SfLayout.layout_linear, pool=pool)
    assert torch.equal(data[:3], wanted)
    assert torch.equal(scales[:3], wanted_scales)
    assert not data[3:].any()
    assert not scales[3:].any()


@pytest.mark.parametrize("width", [0, 16, 48, 40])
def test_silu_and_mul_needs_two_halves(pool: ScalePool, width: int) -> None:
    with pytest.raises(ValueError, match=r"x must be \[rows, 2 \* k\] with at least 1 row and k a multiple of 16"):
        silu_and_mul_nvfp4_quantize(torch.ones(3, width).bfloat16(), ONE, pool=pool)
    assert pool.stats().buffers == 0


def test_compiled_code_multiplies_and_quantizes_any_number_of_rows(pool: ScalePool) -> None:
    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def compiled(x: Tensor) -> tuple[Tensor, Tensor]:
        data, scales = silu_and_mul_nvfp4_quantize(x, ONE, layout=SfLayout.layout_8x4)
        return data, scales.to(torch.int32)

    with use_pool(pool):
        for rows in (3, 9, 40):
            data, scales = compiled(gate_up(rows, 80))
            wanted, wanted_scales = silu_and_mul_nvfp4_quantize(gate_up(rows, 80), ONE, layout=SfLayout.layout_8x4)
            assert torch.equal(data, wanted)
            assert torch.equal(scales.to(torch.uint8), wanted_scales)


def test_compiled_code_with_a_vendors_arithmetic_says_what_is_missing(pool: ScalePool) -> None:
    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(x: Tensor) -> Tensor:
        return nvfp4_quantize(x, ONE, arithmetic="vllm")[0]

    with use_pool(pool), pytest.raises(ValueError, match="no backend can run this"):
        compiled(gate_up(3, 80))


def test_the_op_of_silu_and_mul_matches_its_schema_and_fake(pool: ScalePool) -> None:
    given = (gate_up(9, 80), ONE, int(SfLayout.layout_8x4), "auto", None, True, "exact")
    with use_pool(pool):
        torch.library.opcheck(
            torch.ops.safealloc.nvfp4_quantize.default, given, test_utils=("test_schema", "test_faketensor")
        )

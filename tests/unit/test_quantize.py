"""``nvfp4_quantize``: pools, layouts, backends, bad input."""

from __future__ import annotations

import enum
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from safealloc import PoolClosedError, ScalePool, ScaleSpec, SfLayout, _optional, default_pool, nvfp4_quantize, use_pool
from safealloc.kernels import reference
from safealloc.ops import backends

layouts = pytest.mark.parametrize("layout", list(SfLayout), ids=lambda layout: layout.name)
ONE = torch.ones(1)


@pytest.fixture
def pool() -> Iterator[ScalePool]:
    with ScalePool("cpu") as pool:
        yield pool


def expected(x: Tensor, layout: SfLayout, global_scale: Tensor = ONE) -> tuple[Tensor, Tensor]:
    rows, k = x.shape
    x_fp4 = torch.empty(rows, k // 2, dtype=torch.uint8)
    scales = torch.zeros(layout.padded_shape(rows, k), dtype=torch.uint8)
    reference.quantize(x, global_scale, x_fp4, scales, layout)
    return x_fp4, scales


@layouts
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("shape", [(1, 16), (7, 80), (8, 64), (33, 176), (130, 96)], ids=str)
def test_result_is_the_reference_in_a_pool_buffer(
    pool: ScalePool, layout: SfLayout, dtype: torch.dtype, backend: str, shape: tuple[int, int]
) -> None:
    x = torch.randn(shape).to(dtype)
    g = torch.tensor([20.0])
    x_fp4, scales = nvfp4_quantize(x, g, layout=layout, pool=pool, backend=backend)
    expected_fp4, expected_scales = expected(x, layout, g)
    assert x_fp4.dtype == scales.dtype == torch.uint8
    assert scales.shape == layout.padded_shape(*shape)
    assert torch.equal(x_fp4, expected_fp4)
    assert torch.equal(scales, expected_scales)
    assert pool.spec(scales) == ScaleSpec(*shape, layout)
    assert pool.verify() == 1


def test_layout_defaults_to_128x4(pool: ScalePool) -> None:
    _, scales = nvfp4_quantize(torch.ones(5, 64).bfloat16(), ONE, pool=pool)
    assert pool.spec(scales) == ScaleSpec(5, 64, SfLayout.layout_128x4)


def test_the_buffer_is_reused_once_it_is_dropped(pool: ScalePool) -> None:
    x = torch.randn(5, 80).bfloat16()
    _, first = nvfp4_quantize(x, ONE, pool=pool)
    address = first.data_ptr()
    _, second = nvfp4_quantize(x, ONE, pool=pool)
    assert second.data_ptr() != address
    del first
    third = nvfp4_quantize(-x, ONE, pool=pool)[1]
    assert third.data_ptr() == address
    assert torch.equal(third, second)
    assert pool.stats().buffers == 2


def test_flashinfers_enum_of_layouts_is_accepted(pool: ScalePool) -> None:
    class Layout(enum.Enum):
        layout_8x4 = 1

    _, scales = nvfp4_quantize(torch.ones(5, 64).bfloat16(), ONE, layout=Layout.layout_8x4, pool=pool)  # type: ignore[arg-type]
    assert pool.spec(scales) == ScaleSpec(5, 64, SfLayout.layout_8x4)


@layouts
@pytest.mark.parametrize("valid", [0, 1, 4, 5, 6])
def test_rows_beyond_valid_rows_are_zero(pool: ScalePool, layout: SfLayout, valid: int) -> None:
    x = torch.randn(5, 80).bfloat16()
    x[valid:] = float("nan")
    x_fp4, scales = nvfp4_quantize(
        x, ONE, layout=layout, pool=pool, valid_rows=torch.tensor([valid], dtype=torch.int32)
    )
    clean = x.clone()
    clean[valid:] = 0
    expected_fp4, expected_scales = expected(clean, layout)
    assert torch.equal(x_fp4, expected_fp4)
    assert torch.equal(scales, expected_scales)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
def test_scalars_may_have_any_shape(pool: ScalePool, shape: tuple[int, ...]) -> None:
    x = torch.randn(5, 80).bfloat16()
    valid = torch.full(shape, 3, dtype=torch.int32)
    x_fp4, _ = nvfp4_quantize(x, torch.full(shape, 2.0), pool=pool, valid_rows=valid)
    clean = torch.cat((x[:3], torch.zeros(2, 80).bfloat16()))
    assert torch.equal(x_fp4, expected(clean, SfLayout.layout_128x4, torch.tensor([2.0]))[0])


def test_input_may_require_grad(pool: ScalePool) -> None:
    x = torch.randn(5, 80).bfloat16().requires_grad_()
    x_fp4, scales = nvfp4_quantize(x, ONE, pool=pool)
    assert not x_fp4.requires_grad
    assert not scales.requires_grad
    assert torch.equal(x_fp4, expected(x.detach(), SfLayout.layout_128x4)[0])


def test_inference_mode_is_supported(pool: ScalePool) -> None:
    x = torch.randn(5, 80).bfloat16()
    with torch.inference_mode():
        _, scales = nvfp4_quantize(x, ONE, pool=pool)
    assert torch.equal(scales, expected(x, SfLayout.layout_128x4)[1])
    del scales
    nvfp4_quantize(x, ONE, pool=pool)
    assert pool.verify() == pool.stats().buffers == 1


# --- which pool -------------------------------------------------------------------------------------------------------


def test_there_is_one_default_pool_per_device() -> None:
    assert default_pool("cpu") is default_pool(torch.device("cpu"))
    x = torch.randn(3, 48).bfloat16()
    _, scales = nvfp4_quantize(x, ONE)
    assert default_pool("cpu").spec(scales) == ScaleSpec(3, 48, SfLayout.layout_128x4)


def test_use_pool_replaces_the_default_pool(pool: ScalePool) -> None:
    x = torch.randn(3, 48).bfloat16()
    process_wide = default_pool("cpu")
    with ScalePool("cpu") as inner:
        with use_pool(pool) as used:
            assert used is pool
            assert default_pool("cpu") is pool
            with use_pool(inner):
                assert inner.spec(nvfp4_quantize(x, ONE)[1]) is not None
            assert pool.spec(nvfp4_quantize(x, ONE)[1]) is not None
            assert inner.spec(nvfp4_quantize(x, ONE, pool=inner)[1]) is not None  # an argument wins
            in_thread: list[ScalePool] = []
            thread = threading.Thread(target=lambda: in_thread.append(default_pool("cpu")))
            thread.start()
            thread.join()
            assert in_thread == [process_wide]
        assert default_pool("cpu") is process_wide
        assert inner.stats().misses == pool.stats().misses == 1


def test_use_pool_ends_on_an_error(pool: ScalePool) -> None:
    with pytest.raises(KeyError), use_pool(pool):
        raise KeyError
    assert default_pool("cpu") is not pool


def test_use_pool_replaces_the_pool_of_its_device_only(pool: ScalePool) -> None:
    """A replacement counts for its own device only."""
    process_wide = default_pool("cpu")
    pool.device = torch.device("cuda", 0)
    with use_pool(pool):
        assert default_pool("cpu") is process_wide
    pool.device = torch.device("cpu")


@pytest.mark.parametrize("device", ["meta", "no such device", torch.device("meta")], ids=str)
def test_default_pool_refuses_a_missing_device(device: Any) -> None:
    with pytest.raises(ValueError, match="device"):
        default_pool(device)


def test_use_pool_refuses_wrong_arguments() -> None:
    with pytest.raises(TypeError, match="expected a ScalePool, got str"), use_pool("cpu"):  # type: ignore[arg-type]
        pass
    closed = ScalePool("cpu")
    closed.close()
    with pytest.raises(PoolClosedError), use_pool(closed):
        pass
    pool = ScalePool("cpu")
    with use_pool(pool):
        pool.close()
        with pytest.raises(PoolClosedError):
            nvfp4_quantize(torch.ones(1, 16).bfloat16(), ONE)


# --- bad input --------------------------------------------------------------------------------------------------------


X = torch.ones(4, 64, dtype=torch.bfloat16)
COUNT = torch.tensor([2], dtype=torch.int32)
NO_TRITON = pytest.mark.skipif(backends.interpreting(), reason="Triton's interpreter runs on a CPU")

BAD = {
    "x is a list": ({"x": [[1.0] * 16]}, TypeError, r"x must be a tensor \[rows, k\], got list"),
    "x float32": ({"x": X.float()}, TypeError, r"x must be torch.bfloat16 or torch.float16, got torch.float32"),
    "x uint8": ({"x": X.to(torch.uint8)}, TypeError, "x must be"),
    "x 1-D": ({"x": X[0]}, ValueError, r"x must be \[rows, k\], got shape \(64,\)"),
    "x 3-D": ({"x": X[None]}, ValueError, r"x must be \[rows, k\]"),
    "no rows": ({"x": X[:0]}, ValueError, "at least 1 row"),
    "no columns": ({"x": X[:, :0].contiguous()}, ValueError, "multiple of 16"),
    "k 8": ({"x": X[:, :8].contiguous()}, ValueError, "multiple of 16"),
    "k 56": ({"x": X[:, :56].contiguous()}, ValueError, "multiple of 16"),
    "column slice": ({"x": X[:, :32]}, ValueError, r"contiguous, got shape \(4, 32\) with strides \(64, 1\)"),
    "transposed": ({"x": torch.ones(64, 4, dtype=torch.bfloat16).T}, ValueError, "contiguous"),
    "x on meta": ({"x": X.to("meta")}, ValueError, "meta"),
    "x and global_scale on meta": ({"x": X.to("meta"), "global_scale": ONE.to("meta")}, ValueError, "meta"),
    "global_scale a number": ({"global_scale": 1.0}, TypeError, "global_scale must be a torch.float32 tensor"),
    "global_scale float64": ({"global_scale": ONE.double()}, TypeError, "global_scale must be torch.float32"),
    "global_scale of two": ({"global_scale": torch.ones(2)}, ValueError, "global_scale must have one element"),
    "global_scale of none": ({"global_scale": torch.ones(0)}, ValueError, "global_scale must have one element"),
    "global_scale on meta": ({"global_scale": ONE.to("meta")}, ValueError, "global_scale is on meta"),
    "valid_rows a number": ({"valid_rows": 2}, TypeError, "valid_rows must be a torch.int32 tensor"),
    "valid_rows int64": ({"valid_rows": COUNT.long()}, TypeError, "valid_rows must be torch.int32"),
    "valid_rows of two": ({"valid_rows": COUNT.repeat(2)}, ValueError, "valid_rows must have one element"),
    "valid_rows on meta": ({"valid_rows": COUNT.to("meta")}, ValueError, "valid_rows is on meta"),
    "layout 3": ({"layout": 3}, ValueError, "layout must be one of"),
    "layout a string": ({"layout": "128x4"}, TypeError, "layout must be an SfLayout"),
    "unknown backend": ({"backend": "cublas"}, ValueError, "backend must be one of auto, triton, reference"),
    "backend None": ({"backend": None}, TypeError, "backend must be a string"),
    "triton on a CPU": pytest.param(
        {"backend": "triton"}, ValueError, "backend 'triton' cannot run this", marks=NO_TRITON
    ),
    "flashinfer on a CPU": ({"backend": "flashinfer"}, ValueError, "backend 'flashinfer' cannot run this"),
    "vllm on a CPU": ({"backend": "vllm"}, ValueError, "backend 'vllm' cannot run this"),
    "pool a string": ({"pool": "cpu"}, TypeError, "expected a ScalePool, got str"),
    "pool a class": ({"pool": ScalePool}, TypeError, "expected a ScalePool, got type"),
}  # fmt: skip


def _parameters() -> list[Any]:
    return [
        pytest.param(*case.values, id=name, marks=case.marks)
        if hasattr(case, "marks")
        else pytest.param(*case, id=name)
        for name, case in BAD.items()
    ]


@pytest.mark.parametrize(("changes", "error", "message"), _parameters())
def test_wrong_arguments_are_refused(
    pool: ScalePool, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    held = nvfp4_quantize(X, ONE, pool=pool)
    before, bytes_before = pool.stats(), held[1].clone()
    arguments: dict[str, Any] = {"x": X, "global_scale": ONE, "layout": SfLayout.layout_128x4, "pool": pool} | changes
    with pytest.raises(error, match=message):
        nvfp4_quantize(arguments.pop("x"), arguments.pop("global_scale"), **arguments)
    with use_pool(pool), pytest.raises(error, match=message):
        arguments = {"x": X, "global_scale": ONE} | changes
        nvfp4_quantize(arguments.pop("x"), arguments.pop("global_scale"), **arguments)
    assert pool.stats() == before
    assert torch.equal(held[1], bytes_before)


def test_a_closed_pool_is_refused() -> None:
    pool = ScalePool("cpu")
    _, scales = nvfp4_quantize(X, ONE, pool=pool)
    pool.close()
    with pytest.raises(PoolClosedError, match="closed"):
        nvfp4_quantize(X, ONE, pool=pool)
    assert torch.equal(scales, expected(X, SfLayout.layout_128x4)[1])


def test_a_pool_on_another_device_is_refused(pool: ScalePool) -> None:
    before = pool.stats()
    pool.device = torch.device("cuda", 0)
    with pytest.raises(ValueError, match="x is on cpu, the pool on cuda:0"):
        nvfp4_quantize(X, ONE, pool=pool)
    pool.device = torch.device("cpu")
    assert pool.stats() == before


# --- vendors, with stand-ins for their packages -----------------------------------------------------------------------


def _provide(monkeypatch: pytest.MonkeyPatch, name: str, module: object) -> None:
    """Let ``optional`` find ``module``, and pretend that the device can run it."""
    real = _optional.load
    monkeypatch.setattr(_optional, "load", lambda wanted: module if wanted.split(".")[0] == name else real(wanted))
    monkeypatch.setattr(backends, "package_refusal", lambda call, package, runs_on: _optional.missing(package))


@layouts
def test_flashinfer_gets_its_arguments(monkeypatch: pytest.MonkeyPatch, pool: ScalePool, layout: SfLayout) -> None:
    calls: list[tuple[Any, ...]] = []

    class TheirLayout(enum.Enum):
        layout_128x4 = 0
        layout_8x4 = 1
        layout_linear = 2

    def their_quantize(
        a: Tensor, a_global_sf: Tensor, sfLayout: TheirLayout = TheirLayout.layout_128x4, do_shuffle: bool = False
    ) -> tuple[Tensor, Tensor]:
        calls.append((a, a_global_sf, sfLayout, do_shuffle))
        x_fp4, scales = expected(a, SfLayout(sfLayout.value), a_global_sf)
        scales.view(-1)[layout.padding_mask(*a.shape)] = 0x7F  # whatever theirs leaves there
        return x_fp4, scales.view(-1)

    _provide(monkeypatch, "flashinfer", SimpleNamespace(nvfp4_quantize=their_quantize, SfLayout=TheirLayout))
    x, g = torch.randn(9, 80).bfloat16(), torch.tensor([3.0])
    x_fp4, scales = nvfp4_quantize(x, g, layout=layout, pool=pool, backend="flashinfer")
    assert calls == [(x, g, TheirLayout(layout.value), False)]
    expected_fp4, expected_scales = expected(x, layout, g)
    assert torch.equal(x_fp4, expected_fp4)
    assert torch.equal(scales, expected_scales)
    assert pool.spec(scales) == ScaleSpec(9, 80, layout)
    pool.verify()
    with pytest.raises(ValueError, match="flashinfer takes no valid_rows"):
        nvfp4_quantize(x, g, pool=pool, backend="flashinfer", valid_rows=COUNT)


@pytest.mark.parametrize("layout", [SfLayout.layout_128x4, SfLayout.layout_linear], ids=lambda layout: layout.name)
def test_vllm_gets_its_arguments(monkeypatch: pytest.MonkeyPatch, pool: ScalePool, layout: SfLayout) -> None:
    if hasattr(torch.ops._C, "scaled_fp4_quant"):
        pytest.skip("vLLM's real op is loaded; the stand-in would replace it")
    calls: list[tuple[Any, ...]] = []

    def their_quantize(x: Tensor, scale: Tensor, swizzled: bool, *, output: Tensor, output_scale: Tensor) -> None:
        calls.append((swizzled, output.dtype, tuple(output.shape), output_scale.dtype, tuple(output_scale.shape)))
        x_fp4, scales = expected(x, layout, scale)
        output.copy_(x_fp4)
        output_scale.view(torch.uint8).copy_(scales)

    library = torch.library.Library("_C", "FRAGMENT")
    try:
        library.define(
            "scaled_fp4_quant.out(Tensor input, Tensor input_scale, bool is_sf_swizzled_layout, *, Tensor(a!) output, "
            "Tensor(b!) output_scale) -> ()"
        )
        library.impl("scaled_fp4_quant.out", their_quantize, "CPU")
        _provide(monkeypatch, "vllm", SimpleNamespace())
        x, g = torch.randn(9, 80).bfloat16(), torch.tensor([3.0])
        x_fp4, scales = nvfp4_quantize(x, g, layout=layout, pool=pool, backend="vllm")
    finally:
        library._destroy()
    # as vLLM's create_fp4_output_tensors makes them: swizzled scales as int32, four to a word
    swizzled = layout is SfLayout.layout_128x4
    scale_tensor = (torch.int32, (128, 2)) if swizzled else (torch.uint8, (9, 5))
    assert calls == [(swizzled, torch.uint8, (9, 40), *scale_tensor)]
    expected_fp4, expected_scales = expected(x, layout, g)
    assert torch.equal(x_fp4, expected_fp4)
    assert torch.equal(scales, expected_scales)
    with pytest.raises(ValueError, match="writes 128x4 and linear"):
        nvfp4_quantize(x, g, layout=SfLayout.layout_8x4, pool=pool, backend="vllm")
    with pytest.raises(ValueError, match="vllm takes no valid_rows"):
        nvfp4_quantize(x, g, pool=pool, backend="vllm", valid_rows=COUNT)


def test_auto_never_takes_a_vendor(monkeypatch: pytest.MonkeyPatch, pool: ScalePool) -> None:
    _provide(monkeypatch, "flashinfer", SimpleNamespace())  # has no function that could be called
    nvfp4_quantize(X, ONE, pool=pool)

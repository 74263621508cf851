"""torch.compile on a CPU: opaque ops, dynamic rows, and a compiler that leaves pool buffers alone.

Inductor gives the output of an op to the next temporary of equal size and dtype. On a CPU that shows where no tensor comes
into the graph, since inputs count as unaligned there: hence the graphs below that make their inputs themselves.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._dynamo as dynamo
import torch._inductor.lowering as lowering
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor import config
from torch._inductor.scheduler import BaseSchedulerNode
from torch._inductor.utils import run_and_get_code
from torch._subclasses.fake_tensor import FakeTensorMode

import safealloc
from safealloc import (
    LayoutMismatchError,
    PaddingCorruptionError,
    SafeAllocError,
    ScalePool,
    ScaleSpec,
    SfLayout,
    mm_fp4,
    nvfp4_linear,
    nvfp4_quantize,
    use_pool,
)
from safealloc.kernels import reference
from safealloc.ops.inductor import forbid_reuse

CPU = torch.device("cpu")
N, K = 24, 80
ONE = torch.ones(1)
ALPHA = torch.tensor([0.5])
NAN = 0x7F
ROWS = (5, 9, 2, 32, 33, 128, 140)
ops = torch.ops.safealloc

layouts = pytest.mark.parametrize("layout", list(SfLayout), ids=lambda layout: layout.name)
pytestmark = pytest.mark.filterwarnings("ignore:dynamo_pgo force disabled")


def _weight() -> tuple[Tensor, Tensor]:
    w = torch.randn(N, K, generator=torch.Generator().manual_seed(1)).bfloat16()
    fp4, scales = (
        torch.empty(N, K // 2, dtype=torch.uint8),
        torch.zeros(SfLayout.layout_128x4.padded_shape(N, K), dtype=torch.uint8),
    )
    reference.quantize(w, ONE, fp4, scales, SfLayout.layout_128x4)
    return fp4, scales


W_FP4, W_SCALES = _weight()

library = torch.library.Library("safealloc_tests", "FRAGMENT")
library.define("total(Tensor t) -> Tensor")  # opaque: its argument has to be in memory
library.impl("total", lambda t: t.float().sum().reshape(1), "CPU")
torch.library.register_fake("safealloc_tests::total", lambda t: t.new_empty((1,), dtype=torch.float32), lib=library)
library.define("produce(Tensor x, Tensor(a!) scales) -> ()")  # a fused producer: writes real scales and nothing else


def _produce(x: Tensor, scales: Tensor) -> None:
    spec = safealloc.default_pool("cpu").spec(scales)
    produced.append(spec)
    if spec is not None:
        scales.view(-1)[spec.layout.offsets(spec.rows, spec.k, padded_k=spec.padded_k)] = 0x38


produced: list[ScaleSpec | None] = []
library.impl("produce", _produce, "CPU")
torch.library.register_fake("safealloc_tests::produce", lambda x, scales: None, lib=library)
library.define("same_memory(Tensor a, Tensor b) -> Tensor")
library.impl("same_memory", lambda a, b: torch.tensor([float(a.data_ptr() == b.data_ptr())]), "CPU")
torch.library.register_fake(
    "safealloc_tests::same_memory", lambda a, b: a.new_empty((1,), dtype=torch.float32), lib=library
)
total = torch.ops.safealloc_tests.total


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Nothing compiled before or after, in memory or on disk."""
    produced.clear()
    dynamo.reset()
    with config.patch({"force_disable_caches": True, "fx_graph_cache": False}):
        yield
    dynamo.reset()


@pytest.fixture
def pool() -> Iterator[ScalePool]:
    with ScalePool("cpu") as pool, use_pool(pool):
        yield pool


def activation(rows: int, k: int = K) -> Tensor:
    return torch.randn(rows, k, generator=torch.Generator().manual_seed(rows)).bfloat16()


def compiled_code(function: Callable[..., Any], *arguments: Any) -> tuple[Any, str]:
    """The result and the body of the generated wrapper."""
    result, sources = run_and_get_code(torch.compile(function, fullgraph=True), *arguments)
    (source,) = sources
    return result, source[source.index("def call(") : source.index("runner = Runner")]


# --- dynamic rows -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["dynamic", "mark_dynamic"])
def test_linear_with_dynamic_rows(pool: ScalePool, how: str) -> None:
    """One compilation, although 8x4 becomes 128x4 beyond 32 rows: that is decided inside the op."""

    def model(x: Tensor) -> Tensor:
        return nvfp4_linear(x * 2, W_FP4, W_SCALES, ONE, ALPHA) + 1

    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True if how == "dynamic" else None)
    for rows in ROWS:
        x = activation(rows)
        if how == "mark_dynamic":
            dynamo.mark_dynamic(x, 0)
        assert torch.equal(compiled(x), model(x))
    assert counter.frame_count == 1
    assert torch.equal(compiled(activation(1)), model(activation(1)))  # 0 and 1 may be specialized on
    assert pool.verify() == pool.stats().buffers
    assert pool.stats().live == 0


@layouts
def test_quantize_and_mm_with_dynamic_rows(pool: ScalePool, layout: SfLayout) -> None:
    def model(x: Tensor) -> Tensor:
        x_fp4, scales = nvfp4_quantize(x * 2, ONE, layout=layout)
        return mm_fp4(x_fp4, W_FP4.T, scales, W_SCALES.T, ALPHA)

    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    for rows in ROWS:
        assert torch.equal(compiled(activation(rows)), model(activation(rows)))
    assert counter.frame_count == 1
    assert pool.verify() == pool.stats().buffers
    assert pool.stats().live == 0


@pytest.mark.parametrize("padded_k", [None, 128, 192])
@pytest.mark.parametrize("layout", [SfLayout.layout_128x4, SfLayout.layout_8x4], ids=lambda layout: layout.name)
def test_acquire_with_symbolic_numbers(pool: ScalePool, layout: SfLayout, padded_k: int | None) -> None:
    """A fused producer that mutates the buffer writes the pool's memory, not a copy of Inductor's."""

    def model(x: Tensor) -> tuple[Tensor, int, int]:
        rows, k = x.shape
        wider = None if padded_k is None else k + (padded_k - K)
        scales = ops.acquire(rows, k, int(layout), CPU, wider)
        torch.ops.safealloc_tests.produce(x, scales)
        return total(scales), scales.shape[0], scales.shape[1]

    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    for rows, k in ((5, 80), (9, 80), (130, 80), (33, 48)):
        wider = None if padded_k is None else k + padded_k - K
        assert compiled(activation(rows, k)) == (
            torch.tensor([0x38 * rows * k / 16]),
            *layout.padded_shape(rows, k, padded_k=wider),
        )
        assert produced.pop() == ScaleSpec(rows, k, layout, wider)
    assert counter.frame_count == 1
    assert pool.verify() == 4


def test_valid_rows(pool: ScalePool) -> None:
    def model(x: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        x_fp4, scales = nvfp4_quantize(x, ONE, layout=SfLayout.layout_8x4, valid_rows=valid)
        return x_fp4, scales

    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    for rows, valid in ((9, 4), (9, 9), (17, 0)):
        count = torch.tensor([valid], dtype=torch.int32)
        for got, expected in zip(compiled(activation(rows), count), model(activation(rows), count), strict=True):
            assert torch.equal(got, expected)


def test_the_pool_is_chosen_at_the_call() -> None:
    compiled = torch.compile(
        lambda x: nvfp4_linear(x, W_FP4, W_SCALES, ONE, None), backend="aot_eager", fullgraph=True, dynamic=False
    )
    for _ in range(2):
        with ScalePool("cpu") as pool, use_pool(pool):
            compiled(activation(9))
            assert pool.stats().misses == 1


def test_a_pool_argument_is_refused(pool: ScalePool) -> None:
    compiled = torch.compile(lambda x: nvfp4_quantize(x, ONE, pool=pool), backend="aot_eager", fullgraph=True)
    with pytest.raises(Exception, match="leave pool out, and choose it by use_pool"):
        compiled(activation(9))


def test_out_is_written(pool: ScalePool) -> None:
    def model(x: Tensor, out: Tensor) -> Tensor:
        x_fp4, scales = nvfp4_quantize(x, ONE)
        return mm_fp4(x_fp4, W_FP4.T, scales, W_SCALES.T, None, torch.bfloat16, out)

    out, expected = torch.zeros(9, N, dtype=torch.bfloat16), torch.zeros(9, N, dtype=torch.bfloat16)
    model(activation(9), expected)
    result = torch.compile(model, fullgraph=True)(activation(9), out)
    assert torch.equal(out, expected)
    assert torch.equal(result, expected)


def test_wrong_arguments_raise_at_the_call(pool: ScalePool) -> None:
    weight, scales = torch.zeros(N, 36, dtype=torch.uint8), torch.zeros(128, 8, dtype=torch.uint8)
    compiled = torch.compile(lambda x: nvfp4_linear(x, weight, scales, ONE, None), backend="aot_eager", fullgraph=True)
    with pytest.raises(ValueError, match="multiple of 16"):
        compiled(activation(9, 72))
    assert pool.stats().misses == 0


def test_a_contradicting_flag_raises_at_the_call(pool: ScalePool) -> None:
    def model(x: Tensor) -> Tensor:
        x_fp4, scales = nvfp4_quantize(x, ONE, layout=SfLayout.layout_8x4)
        return mm_fp4(x_fp4, W_FP4.T, scales, W_SCALES.T, use_8x4_sf_layout=False)

    with pytest.raises(LayoutMismatchError, match="written in layout_8x4"):
        torch.compile(model, fullgraph=True)(activation(128))


# --- mm_fp4 declares that it may write a_descale ----------------------------------------------------------------------


def test_foreign_scales_are_zeroed_in_place(pool: ScalePool) -> None:
    def model(a: Tensor, scales: Tensor) -> Tensor:
        return mm_fp4(a, W_FP4.T, scales, W_SCALES.T)

    a, scales = nvfp4_quantize(activation(9), ONE)
    dirty = scales.clone()
    dirty.view(-1)[SfLayout.layout_128x4.padding_mask(9, K)] = NAN
    assert torch.equal(torch.compile(model, fullgraph=True)(a, dirty), model(a, scales))
    assert torch.equal(dirty, scales)


def _read_before(x_fp4: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    checksum = scales.float().sum()
    return mm_fp4(x_fp4, W_FP4.T, scales, W_SCALES.T), checksum


def _read_after(x_fp4: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    product = mm_fp4(x_fp4, W_FP4.T, scales, W_SCALES.T)
    return product, scales.float().sum()


def _two_products(x_fp4: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    product = mm_fp4(x_fp4, W_FP4.T, scales, W_SCALES.T)
    return product, mm_fp4(x_fp4, W_FP4.T, scales.view(torch.float8_e4m3fn), W_SCALES.T, ALPHA)


def _read_between(x_fp4: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    product = mm_fp4(x_fp4, W_FP4.T, scales, W_SCALES.T)
    return product + scales.float().sum(), mm_fp4(x_fp4, W_FP4.T, scales, W_SCALES.T, ALPHA)


@pytest.mark.parametrize("use", [_read_before, _read_after, _two_products, _read_between])
@pytest.mark.parametrize("rows", [5, 128])
@pytest.mark.parametrize("backend", ["inductor", "aot_eager"])
def test_the_gemm_gets_the_pool_buffer_itself(
    pool: ScalePool, use: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], rows: int, backend: str
) -> None:
    """A copy that a compiler makes, for the sake of another reader, is no pool buffer and knows no layout.

    128 rows take as many bytes in both layouts, so that a wrong one shows in the numbers only.
    """

    def model(x: Tensor) -> tuple[Tensor, Tensor]:
        return use(*nvfp4_quantize(x, ONE, layout=SfLayout.layout_8x4))

    got = torch.compile(model, backend=backend, fullgraph=True)(activation(rows))
    for result, expected in zip(got, model(activation(rows)), strict=True):
        torch.testing.assert_close(result, expected)


# --- the ops ----------------------------------------------------------------------------------------------------------


def check_op(op: Any, *arguments: Any) -> None:
    torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))


@layouts
@pytest.mark.parametrize("padded_k", [None, 80, 128, 192])
def test_opcheck_acquire(pool: ScalePool, layout: SfLayout, padded_k: int | None) -> None:
    check_op(ops.acquire.default, 9, K, int(layout), CPU, padded_k)


@layouts
@pytest.mark.parametrize("valid", [None, 4])
def test_opcheck_quantize(pool: ScalePool, layout: SfLayout, valid: int | None) -> None:
    count = None if valid is None else torch.tensor([valid], dtype=torch.int32)
    check_op(ops.nvfp4_quantize.default, activation(9), ONE, int(layout), "auto", count)


@pytest.mark.parametrize("layout", [SfLayout.layout_128x4, SfLayout.layout_8x4], ids=lambda layout: layout.name)
def test_opcheck_mm(pool: ScalePool, layout: SfLayout) -> None:
    """With the layout in the flag: opcheck calls the op on copies, which are of no pool."""
    a, scales = nvfp4_quantize(activation(9), ONE, layout=layout)
    for a_descale in (scales, scales.clone()):
        for out_dtype, alpha in ((torch.bfloat16, None), (torch.float32, ALPHA), (torch.float16, torch.ones(9))):
            rest = (alpha, out_dtype, layout is SfLayout.layout_8x4, "reference", True, False)
            check_op(ops.mm_fp4.default, a, W_FP4.T, a_descale, W_SCALES.T, *rest, a_descale)


@pytest.mark.parametrize("shape", [(9, K), (K,), (2, 3, K), (40, K)], ids=str)
def test_opcheck_linear(pool: ScalePool, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape).bfloat16()
    for layout, out_dtype, alpha in (
        (None, torch.bfloat16, None),
        (0, torch.float16, ALPHA),
        (1, torch.float32, ALPHA),
    ):
        check_op(ops.nvfp4_linear.default, x, W_FP4, W_SCALES, ONE, alpha, layout, out_dtype, "auto")


@layouts
@pytest.mark.parametrize("rows", [1, 9, 130])
def test_fake_outputs_are_shaped_like_real_ones(pool: ScalePool, layout: SfLayout, rows: int) -> None:
    real = [
        ops.acquire(rows, K, int(layout), CPU),
        ops.acquire(rows, K, int(layout), CPU, 192),
        *ops.nvfp4_quantize(activation(rows), ONE, int(layout), "auto", None),
        nvfp4_linear(activation(rows), W_FP4, W_SCALES, ONE, None, out_dtype=torch.float16),
    ]
    with FakeTensorMode() as mode:
        x, one, w, w_scales = (mode.from_tensor(tensor) for tensor in (activation(rows), ONE, W_FP4, W_SCALES))
        x_fp4, scales = ops.nvfp4_quantize(x, one, int(layout), "auto", None)
        fake = [
            ops.acquire(rows, K, int(layout), CPU),
            ops.acquire(rows, K, int(layout), CPU, 192),
            x_fp4,
            scales,
            ops.nvfp4_linear(x, w, w_scales, one, None, None, torch.float16, "auto"),
        ]
        product = ops.mm_fp4(x_fp4, w.T, scales, w_scales.T, None, torch.float32, None, "auto", True, False, scales)
    for got, expected in zip(fake, real, strict=True):
        assert (got.shape, got.dtype, got.device) == (expected.shape, expected.dtype, expected.device)
        assert (got.stride(), got.storage_offset()) == (expected.stride(), expected.storage_offset())
    assert (product.shape, product.dtype) == ((rows, N), torch.float32)
    assert pool.stats().live == 3  # those of ``real``: a fake call asks no pool


@pytest.mark.parametrize("warm", [False, True], ids=["a buffer to make", "a buffer at hand"])
def test_a_pool_under_fake_tensors(warm: bool) -> None:
    """Says what to call instead, whether or not there is a buffer that could be handed out."""
    with ScalePool("cpu") as pool:
        if warm:
            pool.acquire(9, K, SfLayout.layout_8x4)
        with FakeTensorMode(), pytest.raises(SafeAllocError, match=r"torch\.ops\.safealloc\.acquire"):
            pool.acquire(9, K, SfLayout.layout_8x4)
        with FakeTensorMode(), pytest.raises(SafeAllocError, match="fake tensors"):
            pool.reserve(9, K, SfLayout.layout_8x4)
        assert pool.stats().buffers == int(warm)
        assert pool.acquire(9, K, SfLayout.layout_8x4).shape == (16, 8)


def test_two_equal_acquires_stay_two(pool: ScalePool) -> None:
    def model(x: Tensor) -> Tensor:
        first, second = ops.acquire(5, 64, 0, CPU), ops.acquire(5, 64, 0, CPU)
        return torch.ops.safealloc_tests.same_memory(first, second) + x

    result, code = compiled_code(model, torch.zeros(1))
    assert result.tolist() == [0.0]
    assert code.count("torch.ops.safealloc.acquire.default(") == 2
    assert pool.stats().buffers == 2


def test_an_unused_acquire_is_harmless(pool: ScalePool) -> None:
    def model(x: Tensor) -> Tensor:
        ops.acquire(5, 64, 0, CPU)
        return x + 1

    result, _ = compiled_code(model, torch.zeros(1))
    assert result.tolist() == [1.0]
    assert pool.stats().live == 0
    assert pool.verify() == pool.stats().buffers


# --- Inductor's reuse of memory ---------------------------------------------------------------------------------------


def temporary_after(first: Tensor) -> Tensor:
    """A temporary of 512 bytes, full of NaN, that cannot be made before ``first``."""
    return torch.full((128, 4), NAN, dtype=torch.uint8) + (first > 1e30).to(torch.uint8)


def acquire_then_temporary() -> tuple[Tensor, Tensor]:
    """The last use of a pool buffer, then a temporary of its size and dtype."""
    first = total(ops.acquire(5, 64, 0, CPU))
    return first, total(temporary_after(first))


def quantize_then_temporary() -> tuple[Tensor, Tensor]:
    x = torch.full((5, 64), 1.5, dtype=torch.bfloat16)
    _, scales = nvfp4_quantize(x, torch.ones(1), backend="reference")
    first = total(scales)
    return first, total(temporary_after(first))


def acquire_then_write_in_place() -> tuple[Tensor, Tensor]:
    """The last use of a pool buffer is a pointwise kernel, whose result fits over it."""
    first = ops.acquire(5, 64, 0, CPU)
    seen = total(first)
    return seen, total(first * 0 + NAN + (seen > 1e30).to(torch.uint8))


CONSUMERS = [
    pytest.param(acquire_then_write_in_place, ops.acquire.default, "safealloc.pool.default", id="in place"),
    pytest.param(acquire_then_temporary, ops.acquire.default, "safealloc.pool.default", id="acquire"),
    pytest.param(quantize_then_temporary, ops.nvfp4_quantize.default, "safealloc.ops.quantize", id="nvfp4_quantize"),
]
FILLED = torch.tensor([float(NAN * 512)])


@pytest.mark.parametrize(("consumer", "op", "module"), CONSUMERS)
def test_without_the_lowering_inductor_reuses_the_buffer(
    monkeypatch: pytest.MonkeyPatch, pool: ScalePool, consumer: Callable[[], Tensor], op: Any, module: str
) -> None:
    """What the lowering is for; if this ever passes untouched, the next test proves nothing."""
    forbid_reuse(op)
    monkeypatch.delitem(lowering.lowerings, op)
    monkeypatch.setattr(sys.modules[module], "forbid_reuse", lambda op: None)
    (_, result), code = compiled_code(consumer)
    assert torch.equal(result, FILLED)
    assert f"{buffer_of(code)}  # reuse" in code
    with pytest.raises(PaddingCorruptionError, match="first 0x7F"):
        pool.verify()


@pytest.mark.parametrize(("consumer", "op", "module"), CONSUMERS)
def test_with_the_lowering_it_does_not(pool: ScalePool, consumer: Callable[[], Tensor], op: Any, module: str) -> None:
    (_, result), code = compiled_code(consumer)
    assert torch.equal(result, FILLED)
    assert f"{buffer_of(code)}  # reuse" not in code
    assert "empty_strided_cpu((128, 4)" in code
    assert pool.verify() == 1
    compiled = torch.compile(consumer, fullgraph=True)
    for _ in range(3):
        assert torch.equal(compiled()[1], FILLED)
    assert pool.verify() == 1


def test_a_buffer_is_free_after_its_last_use(pool: ScalePool) -> None:
    """Four sites of one shape in one compiled graph, as layers of a model, take one buffer in turn."""

    def model(x: Tensor) -> Tensor:
        for _ in range(4):
            _, scales = nvfp4_quantize(x.to(torch.bfloat16), torch.ones(1), backend="reference")
            x = x + total(scales)
        return x

    torch.compile(model, fullgraph=True)(torch.ones(5, 64))
    assert pool.stats().buffers == 1


def buffer_of(code: str) -> str:
    """``del bufN;`` of the pool buffer, which is what ``total`` takes first."""
    return "del " + code.split("safealloc_tests.total.default(")[1].split(")")[0]


def test_the_real_model_keeps_padding_zero(pool: ScalePool) -> None:
    """nvfp4_linear's scales never leave the op: no temporary can meet them, of whatever size."""

    def model() -> Tensor:
        x = torch.full((5, 64), 1.5, dtype=torch.bfloat16)
        weight, scales = torch.zeros(128, 32, dtype=torch.uint8), torch.zeros(128, 4, dtype=torch.uint8)
        y = nvfp4_linear(x, weight, scales, torch.ones(1), None, layout=SfLayout.layout_128x4)
        return total(temporary_after(y.float().sum()))

    assert torch.equal(torch.compile(model, fullgraph=True)(), FILLED)
    assert pool.verify() == 1


# --- CUDA graphs cannot return a pool buffer --------------------------------------------------------------------------


def _escapes(x: Tensor) -> Tensor:
    return ops.acquire(x.shape[0], K, 0, CPU)


def _view_escapes(x: Tensor) -> tuple[Tensor, Tensor]:
    return x + 1, ops.acquire(x.shape[0], K, 0, CPU).view(torch.float8_e4m3fn)[:5].view(-1)


def _scales_escape(x: Tensor) -> tuple[Tensor, Tensor]:
    return nvfp4_quantize(x, ONE)


def _view_of_scales_escapes(x: Tensor) -> Tensor:
    return nvfp4_quantize(x, ONE)[1].view(torch.float8_e4m3fn)


def _scales_escape_behind_the_gemm(x: Tensor) -> tuple[Tensor, Tensor]:
    x_fp4, scales = nvfp4_quantize(x, ONE)
    return mm_fp4(x_fp4, W_FP4.T, scales, W_SCALES.T), scales


@pytest.mark.parametrize(
    "model", [_escapes, _view_escapes, _scales_escape, _view_of_scales_escapes, _scales_escape_behind_the_gemm]
)
def test_reduce_overhead_refuses_a_buffer_that_leaves(pool: ScalePool, model: Callable[[Tensor], Any]) -> None:
    with (
        config.patch({"triton.cudagraphs": True}),
        pytest.raises(Exception, match=r"SafeAllocError[\s\S]*is an output of a graph[\s\S]*nvfp4_linear"),
    ):
        torch.compile(model, fullgraph=True)(activation(5))
    model(activation(5))
    torch.compile(model, fullgraph=True)(activation(5))  # without CUDA graphs it may


def _consumed(x: Tensor) -> Tensor:
    return total(ops.acquire(x.shape[0], K, 0, CPU).view(-1)[512:])


def _read(x: Tensor) -> tuple[Tensor, Tensor]:
    x_fp4, scales = nvfp4_quantize(x, ONE)
    return x_fp4, scales.float() + 1


def _multiplied(x: Tensor) -> Tensor:
    x_fp4, scales = nvfp4_quantize(x, ONE)
    return mm_fp4(x_fp4, W_FP4.T, scales, W_SCALES.T)


@pytest.mark.parametrize("model", [_consumed, _read, _multiplied])
def test_reduce_overhead_takes_a_buffer_that_stays(pool: ScalePool, model: Callable[[Tensor], Any]) -> None:
    """Its data may leave, or what was computed from it."""
    with config.patch({"triton.cudagraphs": True}):
        got = torch.compile(model, fullgraph=True)(activation(5))
    torch.testing.assert_close(got, model(activation(5)))
    pool.verify()


# --- a PyTorch without the private API --------------------------------------------------------------------------------


@pytest.fixture
def forgotten() -> Iterator[None]:
    """``forbid_reuse`` looks again, now and afterwards."""
    forbid_reuse.cache_clear()
    yield
    forbid_reuse.cache_clear()


@pytest.mark.parametrize("missing", ["fallback_handler", "register_lowering", "get_inputs_that_alias_output"])
@pytest.mark.parametrize("model", [_escapes, _scales_escape], ids=["acquire", "nvfp4_quantize"])
def test_without_the_private_api_tracing_is_an_error(
    monkeypatch: pytest.MonkeyPatch, forgotten: None, pool: ScalePool, missing: str, model: Callable[[Tensor], Any]
) -> None:
    if missing == "get_inputs_that_alias_output":
        monkeypatch.setattr(BaseSchedulerNode, "decide_inplace_update", lambda self: None)
    else:
        monkeypatch.delattr(lowering, missing)
    message = r"cannot be told to leave a pool buffer alone[\s\S]*safealloc.nvfp4_linear"
    with pytest.raises(Exception, match=message):
        torch.compile(model, backend="eager", fullgraph=True)(activation(5))
    with FakeTensorMode(), pytest.raises(SafeAllocError, match=message):
        ops.acquire(5, K, 0, CPU)
    assert pool.stats().misses == 0
    model(activation(5))  # eager code needs none of it


def test_linear_needs_no_private_api(monkeypatch: pytest.MonkeyPatch, forgotten: None, pool: ScalePool) -> None:
    monkeypatch.delattr(lowering, "register_lowering")
    x = activation(5)
    compiled = torch.compile(lambda x: nvfp4_linear(x, W_FP4, W_SCALES, ONE, None), backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), nvfp4_linear(x, W_FP4, W_SCALES, ONE, None))


def test_importing_safealloc_does_not_import_inductor() -> None:
    """The lowering is registered at the first tracing, never before."""
    import subprocess

    program = "import sys, safealloc; sys.exit('torch._inductor.lowering' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=safealloc.__path__[0] + "/..")

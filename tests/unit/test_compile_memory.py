"""Inductor does not reuse the memory of pool buffers, and CUDA graphs do not return them.

Inductor gives the output of an op to the next temporary of equal size and dtype. On a CPU that shows only where no tensor is
an input of the graph, since inputs count as unaligned there: hence the graphs below make their inputs themselves.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._inductor.lowering as lowering
from support.compiled import CPU, ONE, W_FP4, W_SCALES, K, activation, compiled_code, fresh, ops, pool, total  # noqa: F401
from torch import Tensor
from torch._inductor import config
from torch._inductor.scheduler import BaseSchedulerNode
from torch._subclasses.fake_tensor import FakeTensorMode

import safealloc
from safealloc import (
    PaddingCorruptionError,
    SafeAllocError,
    ScalePool,
    SfLayout,
    mm_fp4,
    nvfp4_linear,
    nvfp4_quantize,
)
from safealloc.formats.format import NAN_SCALE
from safealloc.ops.inductor import forbid_reuse

pytestmark = pytest.mark.filterwarnings("ignore:dynamo_pgo force disabled")


# --- Inductor's reuse of memory ----------------------------------------------------------------------------------------


def temporary_after(first: Tensor) -> Tensor:
    """A temporary of 512 bytes, full of NaN, that cannot be made before ``first``."""
    return torch.full((128, 4), NAN_SCALE, dtype=torch.uint8) + (first > 1e30).to(torch.uint8)


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
    return seen, total(first * 0 + NAN_SCALE + (seen > 1e30).to(torch.uint8))


CONSUMERS = [
    pytest.param(acquire_then_write_in_place, ops.acquire.default, "safealloc.ops.acquire", id="in place"),
    pytest.param(acquire_then_temporary, ops.acquire.default, "safealloc.ops.acquire", id="acquire"),
    pytest.param(quantize_then_temporary, ops.nvfp4_quantize.default, "safealloc.ops.quantize", id="nvfp4_quantize"),
]
FILLED = torch.tensor([float(NAN_SCALE * 512)])


@pytest.mark.parametrize(("consumer", "op", "module"), CONSUMERS)
def test_without_the_lowering_inductor_reuses_the_buffer(
    monkeypatch: pytest.MonkeyPatch, pool: ScalePool, consumer: Callable[[], Tensor], op: Any, module: str
) -> None:
    """Why there is a lowering: if Inductor did not reuse the buffer here, the next test would prove nothing."""
    forbid_reuse(op)
    monkeypatch.delitem(lowering.lowerings, op)
    monkeypatch.setattr(sys.modules[module], "forbid_reuse", lambda op: None)
    (_, result), code = compiled_code(consumer)
    assert torch.equal(result, FILLED)
    assert f"{buffer_of(code)}  # reuse" in code
    with pytest.raises(PaddingCorruptionError, match="first 0x7F"):
        pool.verify()


@pytest.mark.parametrize(("consumer", "op", "module"), CONSUMERS)
def test_with_the_lowering_inductor_does_not_reuse_the_buffer(
    pool: ScalePool, consumer: Callable[[], Tensor], op: Any, module: str
) -> None:
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
    """nvfp4_linear's scales never leave the op, so no temporary can reuse their memory."""

    def model() -> Tensor:
        x = torch.full((5, 64), 1.5, dtype=torch.bfloat16)
        weight, scales = torch.zeros(128, 32, dtype=torch.uint8), torch.zeros(128, 4, dtype=torch.uint8)
        y = nvfp4_linear(x, weight, scales, torch.ones(1), None, layout=SfLayout.layout_128x4)
        return total(temporary_after(y.float().sum()))

    assert torch.equal(torch.compile(model, fullgraph=True)(), FILLED)
    assert pool.verify() == 1


# --- CUDA graphs cannot return a pool buffer ---------------------------------------------------------------------------


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


# --- a PyTorch without the private API ---------------------------------------------------------------------------------


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
    message = r"cannot be kept from reusing a pool buffer[\s\S]*safealloc.nvfp4_linear"
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

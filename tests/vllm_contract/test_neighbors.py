"""Other plugins in the same process: what they patched first is left alone, what they put on top works after we are gone."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import vllm._custom_ops as ops
import vllm.utils.flashinfer as vllm_flashinfer
from support.vllm_cpu_ops import GLOBAL_SCALE, activation
from vllm.v1.worker.gpu_worker import Worker

from safealloc import ScalePool
from safealloc.integrations import vllm as integration
from safealloc.integrations.vllm import plugin, targets

REPLACED = ["create_fp4_scale_tensor", "create_fp4_output_tensors", "scaled_fp4_experts_quant", "scaled_fp4_quant"]


@pytest.fixture
def theirs() -> Iterator[Callable[[str], list[str]]]:
    """Puts another plugin's wrapper around a function of ``vllm._custom_ops``; returns where its calls are noted."""
    own = {name: getattr(ops, name) for name in REPLACED}

    def wrap(name: str) -> list[str]:
        original: Callable[..., Any] = getattr(ops, name)
        calls: list[str] = []

        def their_function(*given: Any, **named: Any) -> Any:
            calls.append(name)
            return original(*given, **named)

        setattr(ops, name, their_function)
        return calls

    yield wrap
    integration.unregister()
    for name, function in own.items():
        setattr(ops, name, function)


@pytest.mark.parametrize("name", REPLACED)
def test_a_function_that_another_plugin_has_replaced_is_left_alone_and_the_plugin_named(
    theirs: Callable[[str], list[str]], pool: ScalePool, log: list[logging.LogRecord], name: str
) -> None:
    theirs(name)
    left = getattr(ops, name)
    integration.register()
    assert getattr(ops, name) is left
    registered = plugin.registered() or ()
    assert name not in registered
    assert targets.SILU_EXPERTS.name in registered
    warnings = [record.getMessage() for record in log if record.levelno >= logging.WARNING]
    where = f"another plugin has {__name__}.theirs.<locals>.wrap.<locals>.their_function instead of {name}"
    dense = (targets.SCALES.name, targets.OUTPUTS.name)  # together or not at all
    for left_alone in (name,) if "experts" in name else dense:
        assert left_alone not in registered
        assert f"safealloc: {left_alone} is not hooked: {where}" in warnings
    integration.unregister()
    assert getattr(ops, name) is left


@pytest.mark.parametrize("name", REPLACED)
def test_vllm_still_calls_what_another_plugin_has_replaced(
    theirs: Callable[[str], list[str]], pool: ScalePool, name: str
) -> None:
    calls = theirs(name)
    integration.register()
    if "experts" in name:
        with pytest.raises(AssertionError):  # vLLM refuses a vector
            ops.scaled_fp4_experts_quant(torch.zeros(16), GLOBAL_SCALE, torch.zeros(2), torch.zeros(2), 1)
    else:
        ops.scaled_fp4_quant(activation(5, 64), GLOBAL_SCALE)
    assert calls == [name]


def test_a_wrapper_on_top_of_a_function_stays_and_works_after_unregistering(
    theirs: Callable[[str], list[str]], pool: ScalePool
) -> None:
    integration.register()
    x = activation(5, 64)
    calls = theirs("create_fp4_output_tensors")
    on_top = ops.create_fp4_output_tensors
    _, served = ops.scaled_fp4_quant(x, GLOBAL_SCALE)
    assert pool.spec(served) is not None
    integration.unregister()
    assert ops.create_fp4_output_tensors is on_top
    _, scales = ops.scaled_fp4_quant(x, GLOBAL_SCALE)
    assert pool.spec(scales) is None
    assert torch.equal(scales.view(torch.uint8), served.view(torch.uint8))
    assert len(calls) == 2


def test_a_wrapper_on_top_of_a_worker_stays_and_works_after_unregistering(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Worker, "compile_or_warm_up_model", lambda self: 1.5)
    integration.register()
    ours = Worker.compile_or_warm_up_model
    on_top: Any = lambda self: 2 * ours(self)  # noqa: E731
    monkeypatch.setattr(Worker, "compile_or_warm_up_model", on_top)
    integration.unregister()
    assert Worker.compile_or_warm_up_model is on_top
    assert Worker.compile_or_warm_up_model(object()) == 3.0


def test_a_kernel_that_another_plugin_put_into_an_op_stays(pool: ScalePool, monkeypatch: pytest.MonkeyPatch) -> None:
    table = vllm_flashinfer.flashinfer_mm_fp4._backend_fns
    monkeypatch.setitem(table, "cpu", table["cpu"])  # put back in the end
    integration.register()
    table["cpu"] = on_top = object()
    integration.unregister()
    assert table["cpu"] is on_top


def test_without_flashinfers_op_its_hook_is_not_said_to_be_there(
    pool: ScalePool, monkeypatch: pytest.MonkeyPatch, log: list[logging.LogRecord]
) -> None:
    monkeypatch.delattr(vllm_flashinfer, "flashinfer_mm_fp4")
    integration.register()
    assert targets.MM_OP.name not in (plugin.registered() or ())
    assert targets.MM_OP.name not in log[0].getMessage()
    assert targets.MM.name in log[0].getMessage()
    assert [record for record in log if record.levelno > logging.INFO] == []


def test_registering_again_below_a_wrapper_leaves_it_alone(theirs: Callable[[str], list[str]], pool: ScalePool) -> None:
    integration.register()
    theirs("create_fp4_output_tensors")
    on_top, scales = ops.create_fp4_output_tensors, ops.create_fp4_scale_tensor
    integration.unregister()
    own = ops.create_fp4_scale_tensor
    assert own is not scales
    integration.register()
    assert ops.create_fp4_output_tensors is on_top
    assert ops.create_fp4_scale_tensor is own
    assert targets.FUSED_ACT_QUANT.name in (plugin.registered() or ())

"""``SAFEALLOC_CONTRACT``: scales that vLLM reads in another layout than they were written in are named, others pass."""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import vllm.model_executor.layers.quantization.utils.mxfp8_utils as mxfp8_utils
from support import vllm_layouts as layouts
from support.vllm_cpu_ops import GLOBAL_SCALE, activation, kernel_and_layer, ops, vllm_flashinfer, vllm_quantize
from support.vllm_registration import differences, state
from torch import Tensor

from safealloc import LayoutMismatchError, ScaleFormat, ScaleSpec, SfLayout, spec
from safealloc.integrations import vllm as integration
from safealloc.integrations.vllm import contract, plugin

K = layouts.K
Read = list[tuple[str, ScaleSpec | None]]
Log = list[logging.LogRecord]


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Read:
    return layouts.stand_in(monkeypatch)


@pytest.fixture
def warns(monkeypatch: pytest.MonkeyPatch, read: Read, log: Log) -> Log:
    monkeypatch.setenv("SAFEALLOC_CONTRACT", "warn")
    integration.register()
    log[:] = []
    return log


@pytest.fixture
def raises(monkeypatch: pytest.MonkeyPatch, read: Read) -> None:
    monkeypatch.setenv("SAFEALLOC_CONTRACT", "error")
    integration.register()


def alarms(log: Log) -> list[str]:
    return [record.getMessage() for record in log if record.levelno >= logging.WARNING]


def gathered(rows: int) -> tuple[Tensor, Tensor]:
    """Each of two ranks quantizes its rows to 128x4, and the tensors are gathered one behind the other."""
    group = layouts.Group()
    data, scales = vllm_quantize(activation(rows, K))
    return group.all_gather(data, 0), group.all_gather(scales.view(torch.uint8), 0).view(scales.dtype)


# --- correct paths ----------------------------------------------------------------------------------------------------


def linear(backend: str, rows: int, k: int = K) -> Callable[[Any], object]:
    def path(patch: Any) -> object:
        kernel, layer = kernel_and_layer(backend, 24, k)
        return kernel.apply_weights(layer, activation(rows, k))

    return path


def fused_silu(patch: Any) -> object:
    data, scales = ops.create_fp4_output_tensors(5, K, torch.device("cpu"), True)
    torch.ops._C.silu_and_mul_nvfp4_quant(data, scales, activation(5, 2 * K), GLOBAL_SCALE)
    return layouts.nvfp4_mm(data, scales)


def first_rows(patch: Any) -> object:
    data, scales = vllm_quantize(activation(140, K))
    return layouts.nvfp4_mm(data[:100], scales)


def row_tile(patch: Any) -> object:
    data, scales = vllm_quantize(activation(256, K))
    return layouts.nvfp4_mm(data[128:], scales[128:])


def mxfp4(patch: Any) -> object:
    data, scales = vllm_flashinfer.flashinfer_mxfp4_quantize(activation(5, K), "cutlass")
    weight, weight_scale = vllm_flashinfer.flashinfer_mxfp4_quantize(activation(24, K), "cutlass")
    given = data, weight.t(), scales, weight_scale.t(), torch.ones(1), torch.bfloat16, False, "cutlass", 32, False
    return vllm_flashinfer.flashinfer_mm_fp4(*given)


def mxfp8_8x4(patch: Any) -> object:
    return layouts.mxfp8_mm(*vllm_flashinfer.flashinfer_mxfp8_quantize_8x4(activation(5, K)), use_8x4=True)


def deepep(patch: Any) -> None:
    data, scales = layouts.mxfp8(5, False)
    layouts.experts(data, layouts.deepep(data, scales))


def dispatched_then_swizzled(patch: Any) -> None:
    """What vLLM 49335 adds: the swizzle behind the dispatch."""
    data, scales = layouts.prepare(patch, 5, layouts.moe_config("mxfp8", True))
    layouts.experts(data, mxfp8_utils.swizzle_mxfp8_scale(scales, data.shape[0], K))


def dispatched_nvfp4(patch: Any, sizes: list[int] | None = None) -> None:
    layouts.experts(*layouts.prepare(patch, 5, layouts.moe_config("nvfp4", True), sizes), "nvfp4")


CORRECT: dict[str, tuple[Callable[[Any], object], str]] = {
    "FlashInfer CUTLASS": (linear("cutlass", 5), "vllm::flashinfer_mm_fp4"),
    "FlashInfer CUTLASS, padded k": (linear("cutlass", 5, 80), "vllm::flashinfer_mm_fp4"),
    "FlashInfer cuDNN": (linear("cudnn", 140), "vllm::flashinfer_mm_fp4"),
    "FlashInfer CuTe DSL": (linear("cute-dsl", 5), "vllm::flashinfer_mm_fp4"),
    "FlashInfer b12x": (linear("b12x", 33), "vllm::flashinfer_mm_fp4"),
    "trtllm, few rows in 8x4": (linear("trtllm", 5), "vllm::flashinfer_mm_fp4"),
    "trtllm, many rows in 128x4": (linear("trtllm", 140), "vllm::flashinfer_mm_fp4"),
    "vLLM's CUTLASS": (linear("vllm-cutlass", 5), "_C::cutlass_scaled_fp4_mm"),
    "SiLU, mul and quantize": (fused_silu, "_C::cutlass_scaled_fp4_mm"),
    "first rows of a matrix": (first_rows, "_C::cutlass_scaled_fp4_mm"),
    "second row tile": (row_tile, "_C::cutlass_scaled_fp4_mm"),
    "ranks with whole row tiles": (lambda patch: layouts.nvfp4_mm(*gathered(256)), "_C::cutlass_scaled_fp4_mm"),
    "MXFP4": (mxfp4, "vllm::flashinfer_mm_fp4"),
    "MXFP8": (lambda patch: layouts.mxfp8_mm(*layouts.mxfp8(140, True)), "vllm::mm_mxfp8"),
    "MXFP8 in 8x4": (mxfp8_8x4, "vllm::mm_mxfp8"),
    "MXFP8 experts on one rank": (
        lambda patch: layouts.experts(*layouts.mxfp8(5, True)),
        "flashinfer_cutlass_fused_moe",
    ),
    "MXFP8 experts behind DeepEP": (deepep, "flashinfer_cutlass_fused_moe"),
    "MXFP8 experts, swizzled behind the dispatch": (dispatched_then_swizzled, "flashinfer_cutlass_fused_moe"),
    "NVFP4 experts behind the dispatch": (dispatched_nvfp4, "flashinfer_cutlass_fused_moe"),
    "NVFP4 experts of ranks with 5 and 3 rows": (
        lambda patch: dispatched_nvfp4(patch, [5, 3]),
        "flashinfer_cutlass_fused_moe",
    ),
}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("path", CORRECT)
def test_a_correct_path_is_silent(
    monkeypatch: pytest.MonkeyPatch, warns: Log, read: Read, path: str, mode: Any
) -> None:
    """And its consumer knew what it read, so that the silence means something."""
    run, consumer = CORRECT[path]
    with mode():
        run(monkeypatch)
    assert alarms(warns) == []
    assert any(name == consumer and held is not None for name, held in read), read


# --- alarms -----------------------------------------------------------------------------------------------------------


def test_vllm_42118_is_named(monkeypatch: pytest.MonkeyPatch, warns: Log) -> None:
    """Linear MXFP8 scales are dispatched, and the experts' kernel reads them as 128x4."""
    for _ in range(2):  # and once
        layouts.experts(*layouts.prepare(monkeypatch, 5, layouts.moe_config("mxfp8", True)))
    (alarm,) = alarms(warns)
    assert alarm == (
        "safealloc: scale layout: flashinfer_cutlass_fused_moe does not read what all_gatherv over 2 ranks of "
        "vllm::mxfp8_quantize wrote: scales in layout_linear (rows=10, k=256, layout_linear, mxfp8) are read in "
        "layout_128x4, as scales of rows=10, k=256, layout_128x4 of MXFP8"
    )
    layouts.experts(*layouts.prepare(monkeypatch, 6, layouts.moe_config("mxfp8", True)))
    assert len(alarms(warns)) == 2  # another shape


def test_in_error_mode_vllm_42118_raises_at_the_consumer(monkeypatch: pytest.MonkeyPatch, raises: None) -> None:
    given = layouts.prepare(monkeypatch, 5, layouts.moe_config("mxfp8", True))
    for _ in range(2):
        with pytest.raises(LayoutMismatchError, match=r"flashinfer_cutlass_fused_moe .* layout_linear .* layout_128x4"):
            layouts.experts(*given)


@pytest.mark.parametrize("rows", [5, 100, 130])
def test_tiles_of_two_ranks_read_as_one_matrix_are_named(warns: Log, rows: int) -> None:
    """As in vLLM 41882 and pytorch 182915: each rank's rows are padded to whole tiles of their own."""
    data, scales = gathered(rows)
    part = scales.shape[0] // 2
    layouts.nvfp4_mm(data, scales)
    (alarm,) = alarms(warns)
    assert "_C::cutlass_scaled_fp4_mm does not read what _all_gather_out_place over 2 ranks of " in alarm
    assert f"a tensor that holds 2 matrices one behind the other, each rows={rows}, k=256, layout_128x4" in alarm
    assert f"is read as scales of rows={2 * rows}, k=256" in alarm
    layouts.nvfp4_mm(data[rows:], scales[part:])  # one rank's part alone is a matrix
    assert len(alarms(warns)) == 1


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda: layouts.nvfp4_mm(*vllm_quantize(activation(128, K), is_sf_swizzled_layout=False)), "layout_linear"),
        (lambda: layouts.mxfp8_mm(*layouts.mxfp8(128, False)), "layout_linear"),
        (lambda: layouts.mxfp8_mm(*vllm_flashinfer.flashinfer_mxfp8_quantize_8x4(activation(128, K))), "layout_8x4"),
        (
            lambda: layouts.nvfp4_mm(
                *vllm_quantize(activation(128, K), backend="none")[:1], layouts.mxfp8(128, True)[1]
            ),
            "MXFP8",
        ),
        (lambda: mxfp8_utils.swizzle_mxfp8_scale(layouts.mxfp8(128, True)[1].view(128, 8), 128, K), "layout_128x4"),
    ],
)
def test_other_mismatches_raise_in_error_mode(raises: None, wrong: Callable[[], object], words: str) -> None:
    with pytest.raises(LayoutMismatchError, match=words):
        wrong()


# --- compiled code ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_swizzled", [True, False])
def test_compiled_code_is_covered(warns: Log, read: Read, is_swizzled: bool) -> None:
    """Traced whole, and nothing is noted while it is."""
    torch._dynamo.reset()

    @torch.compile(fullgraph=True)
    def step(x: Tensor) -> Tensor:
        data, scales = torch.ops.vllm.mxfp8_quantize(x, is_swizzled, 0)
        if not is_swizzled:
            scales = scales.flatten()
        weight = torch.zeros(128, K, dtype=torch.float8_e4m3fn)
        return torch.ops.vllm.mm_mxfp8(data, weight.t(), scales, x.new_zeros(1024).to(torch.uint8), torch.bfloat16)

    with torch.inference_mode():
        for _ in range(2):
            step(activation(128, K))
    assert [name for name, held in read if held is not None] == ["vllm::mm_mxfp8"] * 2
    assert len(alarms(warns)) == (0 if is_swizzled else 1)


def test_replaced_functions_are_traced_as_vllm_has_them(warns: Log) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda sf: mxfp8_utils.swizzle_mxfp8_scale(sf, 5, K), backend="eager", fullgraph=True)
    sf = torch.arange(40, dtype=torch.uint8).view(5, 8)
    assert torch.equal(compiled(sf), mxfp8_utils.swizzle_mxfp8_scale(sf, 5, K))
    assert spec(compiled(sf)) is None
    assert spec(mxfp8_utils.swizzle_mxfp8_scale(sf, 5, K)) == ScaleSpec(
        5, K, SfLayout.layout_128x4, None, ScaleFormat.mxfp8
    )


# --- where it is on ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [None, "", "off", "loud"])
def test_off_hooks_nothing(monkeypatch: pytest.MonkeyPatch, log: Log, value: str | None) -> None:
    kernel = kernels()
    integration.register()
    plain = state()
    integration.unregister()
    if value is not None:
        monkeypatch.setenv("SAFEALLOC_CONTRACT", value)
    monkeypatch.setattr(contract, "Contract", None)  # whose use would fail
    integration.register()
    assert {
        key for key in differences(plain, state()) if key[0].startswith("vllm.model_executor.layers.quant")
    } == set()
    assert kernels() == kernel
    assert spec(layouts.mxfp8(5, True)[1]) is None
    warnings = [one for one in alarms(log) if "SAFEALLOC_CONTRACT" in one]
    assert len(warnings) == (value == "loud")


def kernels() -> list[str]:
    """What PyTorch's dispatcher has behind the ops."""
    names = "_C::scaled_fp4_quant.out", "_C::cutlass_scaled_fp4_mm", "vllm::mxfp8_quantize"
    return [torch._C._dispatch_dump(name) for name in names]


def test_unregistering_puts_everything_back(monkeypatch: pytest.MonkeyPatch, read: Read, log: Log) -> None:
    monkeypatch.setenv("SAFEALLOC_CONTRACT", "warn")
    before, kernel = state(), kernels()
    integration.register()
    assert kernels() != kernel
    assert [one.getMessage() for one in log if "contract" in one.getMessage()] == [
        "safealloc: the contract of scale layouts is checked (warn)"
    ]
    integration.register()
    integration.unregister()
    assert differences(before, state()) == set()
    assert kernels() == kernel
    assert spec(layouts.mxfp8(5, True)[1]) is None


@pytest.mark.parametrize(
    ("quantization", "written", "is_on"),
    [
        ("modelopt_mxfp8", None, True),
        ("mxfp8", None, True),
        ("compressed-tensors", {"weights": {"num_bits": 8, "type": "float", "group_size": 32}}, True),
        ("compressed-tensors", {"weights": {"num_bits": 8, "type": "float", "group_size": 128}}, False),
        ("fp8", {"quant_method": "fp8"}, False),
        (None, None, False),
    ],
)
def test_a_model_with_mxfp8_layers_alone_gets_the_contract_and_no_pool(
    monkeypatch: pytest.MonkeyPatch, read: Read, quantization: str | None, written: object, is_on: bool
) -> None:
    from vllm.v1.worker.gpu_worker import Worker

    monkeypatch.setenv("SAFEALLOC_CONTRACT", "warn")
    monkeypatch.setattr(Worker, "load_model", lambda worker: None)
    model = SimpleNamespace(quantization=quantization, hf_config=SimpleNamespace(quantization_config=written))
    worker = SimpleNamespace(device=torch.device("cuda"), vllm_config=SimpleNamespace(model_config=model))
    plugin.load()
    Worker.load_model(worker)
    assert plugin.registered() is None
    assert (spec(layouts.mxfp8(5, True)[1]) is not None) is is_on


# --- its own failures, and what gets no note --------------------------------------------------------------------------


def test_a_failure_of_ours_is_logged_once_and_vllm_goes_on(monkeypatch: pytest.MonkeyPatch, warns: Log) -> None:
    def fails(*given: object) -> None:
        raise RuntimeError("ours")

    monkeypatch.setattr(contract.Contract, "wrote", fails)
    monkeypatch.setattr(contract.Contract, "reads", fails)
    for _ in range(2):
        assert layouts.mxfp8_mm(*layouts.mxfp8(5, True)).shape == (5, 128)
    assert [one for one in alarms(warns) if "mxfp8_quantize" in one] == [
        "safealloc: the contract of vllm::mxfp8_quantize cannot be checked; logged once: RuntimeError: ours"
    ]
    assert len([one for one in alarms(warns) if "mm_mxfp8" in one]) == 1


def test_a_view_of_a_larger_storage_gets_no_note_and_ends_the_one_there(warns: Log) -> None:
    """A workspace serves many things."""
    workspace = torch.zeros(2, 128, 16, dtype=torch.uint8)
    data = torch.zeros(128, K // 2, dtype=torch.uint8)
    torch.ops._C.scaled_fp4_quant.out(activation(128, K), GLOBAL_SCALE, True, output=data, output_scale=workspace[0])
    assert spec(workspace[0]) is None
    alone = torch.zeros(128, 16, dtype=torch.uint8)
    for is_swizzled in (True, False):
        with torch.inference_mode():
            torch.ops._C.scaled_fp4_quant.out(
                activation(128, K), GLOBAL_SCALE, is_swizzled, output=data, output_scale=alone
            )
    assert spec(alone) == ScaleSpec(128, K, SfLayout.layout_linear)  # the last writer counts

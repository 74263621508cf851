"""SGLang's own hook registry and quantization modules, over stand-ins for FlashInfer."""

from __future__ import annotations

import contextlib
import logging
import tomllib
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import flashinfer
import pytest
import torch
from sglang.srt.layers.moe import flashinfer_cutedsl_moe
from sglang.srt.layers.quantization import fp4_utils, fp8_utils
from sglang.srt.model_executor.model_runner import ModelRunner
from sglang.srt.models.qwen2_moe import Qwen2MoeMLP
from sglang.srt.plugins import hook_registry
from torch import Tensor

from safealloc import SfLayout, settings
from safealloc.formats.format import ScaleFormat
from safealloc.integrations import sglang as integration
from safealloc.integrations import startup
from safealloc.integrations.serve import engine_of
from safealloc.integrations.sglang import hooks, plugin, runner, serve, targets
from safealloc.integrations.sglang.serve import allocator
from safealloc.integrations.startup import Engine, Site, Steps
from safealloc.pool.contents import spec_of

CPU = torch.device("cpu")
LAYOUT = SfLayout.layout_128x4
ROWS, K = 5, 80  # padding rows, and 3 padding columns
ONE = torch.ones(1)
_CPU_KERNELS = torch.library.Library("sglang", "FRAGMENT")
# SGLang registers its op for CUDA alone.
_CPU_KERNELS.impl("flashinfer_fp4_quantize", fp4_utils._flashinfer_fp4_quantize_impl, "CPU")


def padding(scales: Tensor, rows: int = ROWS, k: int = K, format: ScaleFormat = ScaleFormat.nvfp4) -> Tensor:
    return scales.contiguous().view(torch.uint8).flatten()[LAYOUT.padding_mask(rows, k, format=format)]


def fused(x: Tensor) -> tuple[Tensor, Tensor]:
    """SGLang's own method."""
    layer = SimpleNamespace(
        _down_input_scale_inv_1d=None, down_proj=SimpleNamespace(input_scale_inv=ONE), _masked_m_cache={}
    )
    result: tuple[Tensor, Tensor] = Qwen2MoeMLP._silu_fp4_quant_fused(layer, x)
    return result


def dense(x: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    result: tuple[Tensor, Tensor] = fp4_utils.fp4_quantize(x, ONE, **options)
    return result


def mxfp8(x: Tensor, swizzled: bool = True) -> tuple[Tensor, Tensor]:
    """What SGLang's op runs."""
    result: tuple[Tensor, Tensor] = fp8_utils.flashinfer_mxfp8_quantize.__wrapped__(x, swizzled)
    return result


def x(rows: int = ROWS, k: int = K) -> Tensor:
    return torch.ones(rows, k, dtype=torch.bfloat16)


@contextlib.contextmanager
def capturing(*rows: int, sites: tuple[Site, ...] = (Site(K, LAYOUT, None),)) -> Iterator[Engine]:
    """The plugin is registered, and an engine's captures are under way."""
    integration.register()
    engine = Engine(Steps(dict.fromkeys(rows or (ROWS,), 1)), CPU)
    for site in sites:
        engine.expect(site)
    engine.reserve()
    assert engine.pool is not None
    with allocator.working(engine):
        yield engine
    engine.close()


def test_every_target_of_this_release_is_hooked() -> None:
    integration.register()
    names = tuple(target.name for target in targets.TARGETS if target is not targets.LOAD)
    assert plugin.registered() == names
    assert not torch.cuda.is_initialized()


def test_sglang_leaves_padding_of_the_fused_producer_stale(stale: None) -> None:
    data, scales = fused(x(k=2 * K))
    assert data.shape == (ROWS, K // 2)
    assert padding(scales).all()


def test_the_fused_producer_gets_clean_padding_in_eager_code(stale: None) -> None:
    integration.register()
    _, scales = fused(x(k=2 * K))
    assert not padding(scales).any()
    assert scales.view(torch.uint8).flatten()[LAYOUT.offsets(ROWS, K).flatten()].eq(1).all()


def test_the_fused_producer_writes_into_a_pool_buffer_in_a_capture(stale: None) -> None:
    with capturing() as engine:
        _, scales = fused(x(k=2 * K))
        spec = spec_of(scales)
        assert spec is not None
        assert (spec.rows, spec.k, spec.layout) == (ROWS, K, LAYOUT)
        assert not padding(scales).any()
        assert engine.pool is not None
        assert engine.pool.stats().hits == 1


def test_the_dense_quantizer_writes_into_a_pool_buffer_through_sglangs_op(stale: None) -> None:
    with capturing():
        data, scales = dense(x())
        spec = spec_of(scales)
        assert spec is not None
        assert (spec.rows, spec.k, spec.layout) == (ROWS, K, LAYOUT)
        assert data.untyped_storage().data_ptr() != scales.untyped_storage().data_ptr()
        other = dense(x())[1]
        assert other.data_ptr() != scales.data_ptr()


@pytest.mark.parametrize("k", [64, 80, 128, 1024])
def test_data_is_not_taken_for_scales(k: int) -> None:
    """At 16 rows the data is as large as the scales."""
    with capturing(16, sites=(Site(k, LAYOUT, None),)):
        data, scales = dense(x(16, k))
        assert spec_of(data) is None
        assert spec_of(scales) is not None
        assert not data.any()


def test_mxfp8_writes_into_a_pool_buffer(stale: None) -> None:
    k = 96
    with capturing(sites=(Site(k, LAYOUT, None, ScaleFormat.mxfp8),)):
        scales = mxfp8(x(k=k))[1]
        spec = spec_of(scales)
        assert spec is not None
        assert (spec.rows, spec.k, spec.format) == (ROWS, k, ScaleFormat.mxfp8)
        assert not padding(scales, k=k, format=ScaleFormat.mxfp8).any()
        linear = mxfp8(x(k=k), False)[1]
        assert spec_of(linear) is None


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("silu", [False, True])
def test_grouped_producers_get_clean_padding_columns(stale: None, silu: bool, captured: bool) -> None:
    experts, rows = 2, 9
    mask = torch.tensor([4, 9], dtype=torch.int32)
    given = torch.ones(experts, rows, K * (2 if silu else 1), dtype=torch.bfloat16), mask, torch.ones(experts)
    name = "silu_and_mul_scaled_nvfp4_experts_quantize" if silu else "scaled_fp4_grouped_quantize"
    with capturing() if captured else contextlib.nullcontext():
        integration.register()
        scales = getattr(flashinfer_cutedsl_moe, name)(*given)[1]
        flat = scales.view(torch.uint8).permute(5, 2, 4, 0, 1, 3).flatten()
        assert not flat[LAYOUT.padding_mask(experts * 128, K)].any()
        assert (spec_of(flat) is not None) == captured


@pytest.mark.parametrize(
    "options",
    [{"sf_vec_size": 32}, {"sf_use_ue8m0": True}, {"is_sf_swizzled_layout": False}, {"is_sf_8x4_layout": True}],
    ids=str,
)
def test_other_formats_and_layouts_are_left_to_flashinfer(options: dict[str, Any]) -> None:
    with capturing() as engine:
        if options.get("sf_vec_size") == 32:
            given = torch.ones(ROWS, K, dtype=torch.bfloat16)
            hooks.HOOKS[targets.DENSE](lambda *args, **named: None, input=given, **options)
        else:
            assert spec_of(dense(x(), **options)[1]) is None
        assert engine.pool is not None
        assert engine.pool.stats().live == 0


@pytest.mark.parametrize("rows", [4, 6, 300])
def test_rows_that_no_graph_has_are_left_to_flashinfer(rows: int) -> None:
    with capturing():
        assert spec_of(dense(x(rows))[1]) is None


def test_weight_loading_and_eager_calls_are_left_to_flashinfer() -> None:
    integration.register()
    assert spec_of(dense(x())[1]) is None


def test_importers_of_a_function_before_and_after_get_the_hook(stale: None) -> None:
    before = flashinfer_cutedsl_moe.silu_and_mul_scaled_nvfp4_experts_quantize
    integration.register()
    after = flashinfer_cutedsl_moe.silu_and_mul_scaled_nvfp4_experts_quantize
    assert after is not before
    assert after is flashinfer.silu_and_mul_scaled_nvfp4_experts_quantize
    assert after.__wrapped__ is before


def test_unregister_puts_every_name_back_and_register_can_come_again(stale: None) -> None:
    def names() -> list[Any]:
        return [
            fp4_utils._flashinfer_fp4_quantize,
            flashinfer.fp4_quantize,
            flashinfer.silu_and_mul_scaled_nvfp4_experts_quantize,
            flashinfer_cutedsl_moe.silu_and_mul_scaled_nvfp4_experts_quantize,
            fp8_utils._raw_flashinfer_mxfp8_quantize,
            vars(ModelRunner).get("init_cuda_graphs"),
        ]

    originals = names()
    for _ in range(2):
        integration.register()
        hooked = names()
        assert not any(one is other for one, other in zip(originals, hooked, strict=True))
        integration.register()
        assert names() == hooked
        integration.unregister()
        assert names() == originals
        assert plugin.registered() is None
    assert padding(fused(x(k=2 * K))[1]).all()


def test_a_name_that_another_plugin_has_hooked_is_left_to_it(caplog: pytest.LogCaptureFixture) -> None:
    path = targets.DENSE.path("")
    original = fp4_utils._flashinfer_fp4_quantize
    registry = hook_registry.HookRegistry
    registry.register(path, lambda call, *given, **named: call(*given, **named), hook_registry.HookType.AROUND)
    registry.apply_hooks()
    try:
        with caplog.at_level(logging.WARNING, "sglang.safealloc"):
            integration.register()
        assert "another plugin has hooked it" in caplog.text
        assert targets.DENSE.name not in (plugin.registered() or ())
    finally:
        theirs = fp4_utils._flashinfer_fp4_quantize
        registry._hooks.pop(path)
        registry._patched.discard(path)
        plugin._patches.rebind(theirs, original)


def test_compiled_code_gets_clean_padding_too(stale: None) -> None:
    def model(gate_up: Tensor) -> Tensor:
        call = flashinfer.silu_and_mul_scaled_nvfp4_experts_quantize
        scales: Tensor = call(gate_up.unsqueeze(0), torch.full((1,), ROWS, dtype=torch.int32), torch.ones(1))[1]
        return scales.view(torch.uint8).permute(2, 4, 0, 1, 3, 5).reshape(128, -1) + 0

    integration.register()
    eager = model(x(k=2 * K))
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x(k=2 * K)), eager)
    assert not padding(eager).any()
    with capturing():
        assert torch.equal(compiled(x(k=2 * K)), eager)


def test_an_allocation_that_is_not_seen_is_logged_and_counted(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with capturing() as engine:
        monkeypatch.setattr(startup, "capturing", lambda: True)
        allocator.quantize(lambda: (None, torch.zeros(128, 8)), serve.Call(ROWS, K))
        assert "no allocation of 1024 bytes was seen" in caplog.text
        assert dict(engine.captured().bypassed) == {serve.NOT_SEEN: 1}


def test_an_error_of_the_pool_does_not_reach_sglang(monkeypatch: pytest.MonkeyPatch) -> None:
    with capturing() as engine:
        assert engine.pool is not None
        engine.pool.close()
        assert spec_of(dense(x())[1]) is None
        monkeypatch.setenv(settings.STRICT, "1")
        with pytest.raises(RuntimeError):
            dense(x())


# --- a runner's life --------------------------------------------------------------------------------------------------


class ModelOptFp4LinearMethod:
    pass


class Linear(torch.nn.Module):
    def __init__(self, k: int, method: object) -> None:
        super().__init__()
        self.input_size_per_partition, self.quant_method = k, method


def made_runner(**arguments: Any) -> Any:
    """Attributes of a model runner whose model has one layer of each format."""
    mxfp8 = SimpleNamespace(use_mxfp8=True)
    model = torch.nn.Sequential(Linear(K, ModelOptFp4LinearMethod()), Linear(96, mxfp8), Linear(64, object()))
    decode = SimpleNamespace(bs=[1, 5, 8])
    given = {"cuda_graph_config": SimpleNamespace(decode=decode), **arguments}
    config = SimpleNamespace(quantization="modelopt_fp4", hf_config=SimpleNamespace(quantization_config=None))
    made = ModelRunner.__new__(ModelRunner)
    vars(made).update(
        device="cpu", gpu_id=0, tp_rank=0, model=model, server_args=SimpleNamespace(**given), model_config=config
    )
    return made


def test_memory_is_reserved_after_the_load_and_what_no_graph_took_is_given_back(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    integration.register()
    model_runner = made_runner()
    engine = hooks.begin(model_runner)
    assert engine is not None
    assert engine.pool is not None
    assert engine.pool.stats().buffers == 6
    kept = []

    def capture(self: Any, flag: bool = True) -> None:
        kept.append(dense(x()))

    with caplog.at_level(logging.INFO, "sglang.safealloc"):
        hooks.HOOKS[targets.CAPTURE](capture, model_runner)
    assert spec_of(kept[0][1]) is not None
    assert "safealloc: rank 0: serves 0 of 0" in caplog.text  # no CUDA graph here
    assert engine.pool.stats().buffers < 6
    integration.unregister()
    assert engine.pool is None


@pytest.mark.parametrize(
    ("arguments", "rows"),
    [
        ({}, [1, 5, 8]),
        ({"speculative_algorithm": "EAGLE", "speculative_num_draft_tokens": 4}, [4, 20, 32]),
        ({"disable_cuda_graph": True}, []),
        ({"cuda_graph_config": None, "cuda_graph_bs": [2]}, [2]),
        ({"cuda_graph_config": {"decode": {"bs": [3]}}}, [3]),
        ({"cuda_graph_config": None}, []),
    ],
    ids=str,
)
def test_rows_are_requests_times_the_rows_of_a_request(arguments: dict[str, Any], rows: list[int]) -> None:
    assert list(runner.steps(made_runner(**arguments)).copies) == rows


@pytest.mark.parametrize(
    ("method", "written", "wanted"),
    [
        (None, None, False),
        ("fp8", {"quant_method": "fp8"}, False),
        ("awq", {"quant_method": "awq"}, False),
        ("modelopt_fp4", None, True),
        ("mxfp8", None, True),
        ("compressed-tensors", {"format": "nvfp4-pack-quantized"}, True),
        ("modelopt", {}, True),
    ],
)
def test_models_without_such_layers_are_left_alone(method: str | None, written: Any, wanted: bool) -> None:
    config = SimpleNamespace(quantization=method, hf_config=SimpleNamespace(quantization_config=written))
    assert runner.may_have_blocks(SimpleNamespace(model_config=config)) is wanted


def test_sglangs_loader_hooks_the_start_of_a_runner_only(monkeypatch: pytest.MonkeyPatch) -> None:
    original = ModelRunner.load_model
    plugin.load()
    assert ModelRunner.load_model is not original
    assert plugin.registered() is None
    assert fp4_utils._flashinfer_fp4_quantize is flashinfer.fp4_quantize
    assert not hasattr(fp4_utils._flashinfer_fp4_quantize, "__wrapped__")
    loaded = []
    model_runner = made_runner()
    model_runner.device = "cuda"
    monkeypatch.setattr(hooks, "begin", loaded.append)
    plugin._load_model(lambda self: None, model_runner)
    assert plugin.registered() is not None
    assert loaded == [model_runner]
    integration.unregister()
    assert ModelRunner.load_model is original


def test_the_switch_keeps_it_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(settings.ENABLED, "0")
    original = ModelRunner.load_model
    plugin.load()
    assert ModelRunner.load_model is original
    assert engine_of(SimpleNamespace()) is None


def test_the_entry_point_is_of_sglangs_group() -> None:
    from sglang.srt.plugins import GENERAL_PLUGINS_GROUP

    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    found = EntryPoint("safealloc", project["entry-points"][GENERAL_PLUGINS_GROUP]["safealloc"], GENERAL_PLUGINS_GROUP)
    assert found.load() is plugin.load

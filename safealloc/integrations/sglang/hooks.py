"""What stands around SGLang's functions, in the form of its ``HookType.AROUND``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from safealloc.errors import SafeAllocError
from safealloc.formats.format import BLOCK_SIZE, ScaleFormat
from safealloc.formats.layout import SfLayout
from safealloc.integrations import drift, report, startup
from safealloc.integrations.serve import engine_of
from safealloc.integrations.sglang import runner, sites, targets
from safealloc.integrations.sglang.serve import Call, allocator
from safealloc.integrations.startup import Engine
from safealloc.ops.inductor import forbid_reuse
from safealloc.ops.library import library

Hook = Callable[..., Any]
_LAYOUT = SfLayout.layout_128x4
_MX_BLOCK = ScaleFormat.mxfp8.block_size


def _dense(original: Callable[..., Any], *given: Any, **named: Any) -> Any:
    """NVFP4 in 128x4 of a matrix; other block sizes, layouts and shapes are left alone."""
    x: Any = named.get("input", given[0] if given else None)
    served = (
        len(given) <= 1
        and isinstance(x, Tensor)
        and x.ndim == 2
        and x.is_contiguous()
        and x.shape[1] % BLOCK_SIZE == 0
        and named.get("sf_vec_size", BLOCK_SIZE) == BLOCK_SIZE
        and not named.get("sf_use_ue8m0", False)
        and named.get("is_sf_swizzled_layout", True)
        and not named.get("is_sf_8x4_layout", False)
    )
    if not served or torch.compiler.is_compiling():
        return original(*given, **named)
    return allocator.quantize(lambda: original(*given, **named), Call(x.shape[0], x.shape[1]))


def _mxfp8(original: Callable[..., Any], *given: Any, **named: Any) -> Any:
    x: Any = named.get("input", given[0] if given else None)
    alignment = named.get("alignment", _MX_BLOCK)
    served = (
        len(given) <= 1
        and isinstance(x, Tensor)
        and x.ndim == 2
        and x.is_contiguous()
        and named.get("is_sf_swizzled_layout", True)
        and getattr(named.get("sf_swizzle_layout"), "value", 0) == _LAYOUT.value
        and x.shape[1] % max(alignment, _MX_BLOCK) == 0
    )
    if not served or torch.compiler.is_compiling():
        return original(*given, **named)
    call = Call(x.shape[0], x.shape[1], format=ScaleFormat.mxfp8)
    return allocator.quantize(lambda: original(*given, **named), call)


def _experts(halves: int) -> Hook:
    """Masked quantizers ``(x [experts, rows, halves * k], mask, global_scale)``; with one expert the dense fused producer."""

    def experts(original: Callable[..., Any], *given: Any, **named: Any) -> Any:
        x = given[0] if given else None
        if len(given) != 3 or named or not isinstance(x, Tensor) or x.ndim != 3 or x.shape[2] % (halves * BLOCK_SIZE):
            return original(*given, **named)
        if torch.compiler.is_compiling():
            if halves == 1:
                return original(*given)
            data, scales = torch.ops.safealloc.sglang_silu_quantize(*given)
            rows, cols = scales.shape[1] // 128, scales.shape[2] // 4
            tiles = scales.view(torch.float8_e4m3fn).view(-1, rows, cols, 32, 4, 4)
            return data.permute(1, 2, 0), tiles.permute(3, 4, 1, 5, 2, 0)
        return allocator.quantize(lambda: original(*given), _call(x, halves))

    if halves == 2:

        def remembering(original: Callable[..., Any], *given: Any, **named: Any) -> Any:
            allocator.silu_original = original
            return experts(original, *given, **named)

        return remembering
    return experts


def _call(x: Tensor, halves: int) -> Call:
    experts, rows, width = x.shape
    if experts == 1:
        return Call(rows, width // halves, startup.FUSED)
    return Call(experts * _LAYOUT.round_up(rows, 1)[0], width // halves, startup.GROUPED)


def _silu_quantize(x: Tensor, mask: Tensor, global_scale: Tensor) -> tuple[Tensor, Tensor]:
    original = allocator.silu_original
    if original is None:
        raise SafeAllocError("FlashInfer's quantizer is not known: call safealloc.integrations.sglang.register() first")
    try:
        forbid_reuse(torch.ops.safealloc.sglang_silu_quantize.default)
        bypassed = None
    except SafeAllocError:
        bypassed = startup.INDUCTOR
    data, tiles = allocator.quantize(lambda: original(x, mask, global_scale), _call(x, 2), bypassed)
    scales = tiles.view(torch.uint8).permute(5, 2, 4, 0, 1, 3)
    experts, rows, cols = scales.shape[:3]
    return data.view(torch.uint8).permute(2, 0, 1), scales.reshape(experts, rows * 128, cols * 4)


def _silu_quantize_fake(x: Tensor, mask: Tensor, global_scale: Tensor) -> tuple[Tensor, Tensor]:
    experts, rows, width = x.shape
    padded = (rows + 127) // 128 * 128, (width // 2 // BLOCK_SIZE + 3) // 4 * 4
    return (
        x.new_empty((experts, rows, width // 4), dtype=torch.uint8),
        x.new_empty((experts, *padded), dtype=torch.uint8),
    )


library.define(
    "sglang_silu_quantize(Tensor x, Tensor mask, Tensor global_scale) -> (Tensor, Tensor)",
    tags=(torch.Tag.nondeterministic_seeded, torch.Tag.pt2_compliant_tag),
)
library.impl("sglang_silu_quantize", _silu_quantize, "CompositeExplicitAutograd")
torch.library.register_fake("safealloc::sglang_silu_quantize", _silu_quantize_fake, lib=library)


def begin(model_runner: Any) -> Engine | None:
    """After the weights are loaded and before memory is sized: reserve what decode graphs may need."""
    allocator.end(model_runner)
    steps, found = runner.steps(model_runner), runner.sites(model_runner.model)
    if not allocator.enabled or not steps.copies or not found:
        return None
    engine = Engine(steps, runner.device(model_runner))
    for site in found:
        engine.expect(site)
    allocator.begun(model_runner, engine)
    engine.reserve()
    return engine


def _capture(original: Callable[..., Any], model_runner: Any, *given: Any, **named: Any) -> Any:
    engine = engine_of(model_runner)
    if engine is None or engine.pool is None:
        return original(model_runner, *given, **named)
    with allocator.working(engine):
        result = original(model_runner, *given, **named)
    try:
        allocator.logger.info("safealloc: rank %s: %s", getattr(model_runner, "tp_rank", 0), ready(engine))
    except Exception as error:
        allocator.log_error(error, "SGLang goes on without it")
    return result


def ready(engine: Engine) -> str:
    """The line after the captures; gives back what no graph took."""
    captured = engine.captured()
    held = None if engine.pool is None else engine.pool.stats()
    version, unwritten = targets.version(), captured.fused + captured.grouped
    gives = "Changes nothing here"
    if captured.served:
        gives = "Gives no time, and no safety that FlashInfer's quantizer lacks"
    if unwritten:
        gives = f"Gives safety behind {report.count(unwritten, 'producer')} that leaves padding unwritten, no time"
    left = report.left("SGLang", version, sites.SITES, allocator.hooked)
    return f"{report.served(captured, held)}. {gives}. {left}"


HOOKS: dict[drift.Target, Hook] = {
    targets.DENSE: _dense,
    targets.FUSED: _experts(2),
    targets.GROUPED: _experts(1),
    targets.MXFP8: _mxfp8,
    targets.CAPTURE: _capture,
}
"""By target; the plugin adds the start of a runner itself."""

"""What replaces vLLM's functions: one hook per target of :mod:`safealloc.integrations.vllm.targets`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, fx

from safealloc.errors import LayoutMismatchError
from safealloc.formats.format import BLOCK_SIZE, ScaleFormat
from safealloc.formats.layout import MAX_ROWS_8X4, SfLayout
from safealloc.formats.spec import ScaleSpec
from safealloc.integrations import drift
from safealloc.integrations.host import around, capability
from safealloc.integrations.patches import Patches
from safealloc.integrations.serve import engine_of
from safealloc.integrations.vllm import kernel, nan, proof, replace, report, targets
from safealloc.integrations.vllm.engine import Engine
from safealloc.integrations.vllm.ops import grouped_scales, scales
from safealloc.integrations.vllm.serve import allocator
from safealloc.integrations.vllm.worker import logger
from safealloc.ops.gemm import check_agrees
from safealloc.pool.contents import pool_spec_of

Hook = Callable[[Patches, ModuleType, str], None]
"""Replaces an attribute of a module by its name; ``Patches.restore`` undoes it."""


def _scale_tensor(patches: Patches, module: ModuleType, name: str) -> None:
    original: Callable[..., Tensor] = getattr(module, name)

    def create_fp4_scale_tensor(m: int, n: int, device: torch.device, is_sf_swizzled_layout: bool) -> Tensor:
        return scales(m, n, device, None) if is_sf_swizzled_layout else original(m, n, device, is_sf_swizzled_layout)

    patches.set(allocator, "vllm_scale_tensor", original)
    patches.rebind(original, create_fp4_scale_tensor)


def _output_tensors(patches: Patches, module: ModuleType, name: str) -> None:
    original: Callable[..., tuple[Tensor, Tensor]] = getattr(module, name)

    def create_fp4_output_tensors(
        m: int, n: int, device: torch.device, is_sf_swizzled_layout: bool, padded_n: int | None = None
    ) -> tuple[Tensor, Tensor]:
        if not is_sf_swizzled_layout:
            padding = () if padded_n is None else (padded_n,)
            return original(m, n, device, is_sf_swizzled_layout, *padding)
        # The buffer has to know the true n: what lies beyond it is padding, which a fused producer never writes.
        output = torch.empty((m, (n if padded_n is None else padded_n) // 2), device=device, dtype=torch.uint8)
        return output, scales(m, n, device, padded_n)

    patches.rebind(original, create_fp4_output_tensors)


def _mm(patches: Patches, module: ModuleType, name: str) -> None:
    original: Callable[..., Tensor] = getattr(module, name)

    def flashinfer_scaled_fp4_mm(
        a: Tensor,
        b: Tensor,
        block_scale_a: Tensor,
        block_scale_b: Tensor,
        alpha: Tensor | None,
        out_dtype: torch.dtype,
        backend: str,
        block_size: int = BLOCK_SIZE,
        use_nvfp4: bool = True,
    ) -> Tensor:
        mxfp4 = () if block_size == BLOCK_SIZE and use_nvfp4 else (block_size, use_nvfp4)
        spec = None if mxfp4 or torch.compiler.is_compiling() else pool_spec_of(block_scale_a)
        vllm_says_8x4 = backend == "trtllm" and a.shape[0] <= MAX_ROWS_8X4  # by the rows alone
        if spec is None or vllm_says_8x4 == (spec.layout is SfLayout.layout_8x4):
            return original(a, b, block_scale_a, block_scale_b, alpha, out_dtype, backend, *mxfp4)
        is_8x4 = spec.layout is SfLayout.layout_8x4
        check_operands(spec, a, is_8x4, backend)
        if alpha is None:
            alpha = torch.ones(1, dtype=torch.float32, device=a.device)
        if backend in ("cutlass", "cudnn"):
            block_scale_a, block_scale_b = block_scale_a.view(torch.uint8), block_scale_b.view(torch.uint8)
        given = (a, b.t(), block_scale_a, block_scale_b.t(), alpha, out_dtype)
        op: Callable[..., Tensor] = module.flashinfer_mm_fp4
        return op(*given, use_8x4_sf_layout=is_8x4, backend=backend)

    patches.rebind(original, flashinfer_scaled_fp4_mm)


def _mm_op(patches: Patches, module: ModuleType, name: str) -> None:
    """At run time, also in compiled code: vLLM's own op stays in the graph, where its passes look for it."""
    op = getattr(module, name)
    replace.keep_from_reuse()

    def checked(original: Callable[..., Tensor], *given: Any, **named: Any) -> Tensor:
        call = dict(zip(targets.MM_OP.parameters[-1], given, strict=False)) | named
        if allocator.engine is not None:
            allocator.note(replace.note_trtllm, call["A"], call["dtype"], call["backend"])
        spec = pool_spec_of(call["A_scale"])
        if spec is not None and call.get("block_size", BLOCK_SIZE) == BLOCK_SIZE and call.get("use_nvfp4", True):
            check_operands(spec, call["A"], call["use_8x4_sf_layout"], call["backend"])
        return original(*given, **named)

    for device, original in list(op._backend_fns.items()):
        patches.set_item(op._backend_fns, device, functools.partial(checked, original))


def check_operands(spec: ScaleSpec, a: Tensor, use_8x4_sf_layout: bool, backend: str) -> None:
    """Refuse a GEMM that would read a pool buffer differently from how it was written.

    k of ``a``, uint8 ``[m, k // 2]``, may be padded up to the columns of the buffer.

    Raises:
        LayoutMismatchError: rows, columns or layout differ from the buffer's, or the backend cannot read the layout.
    """
    layout = SfLayout.layout_8x4 if use_8x4_sf_layout else SfLayout.layout_128x4
    check_agrees(spec, a.shape[0], 2 * a.shape[1], layout)
    if layout is SfLayout.layout_8x4 and backend != "trtllm":
        raise LayoutMismatchError(f"the scales are in layout_8x4, which backend {backend!r} does not read ({spec})")


def _fused_act_quant(patches: Patches, module: ModuleType, name: str) -> None:
    original = getattr(module, name)

    def _silu_and_mul_nvfp4_dynamic(x: Tensor, linear: Any) -> Any:
        out_shape = x.shape[:-1] + (x.shape[-1] // 2,)  # noqa: RUF005  a torch.Size, as vLLM's
        x_rows = x.reshape(-1, x.shape[-1])
        rows, k = x_rows.shape[0], out_shape[-1]
        data = torch.empty((rows, k // 2), dtype=torch.uint8, device=x.device)
        block_scale = scales(rows, k, x.device, None, fused=True).view(torch.float8_e4m3fn)
        torch.ops._C.silu_and_mul_nvfp4_quant(data, block_scale, x_rows, linear.input_global_scale_inv)
        return module.QuantizedActivation(
            data=data.view(*out_shape[:-1], k // 2),
            scale=block_scale,
            orig_dtype=x.dtype,
            orig_shape=out_shape,
            quant_key=module.kNvfp4Dynamic,
        )

    for key, producer in list(module._FUSED_ACT_QUANT.items()):
        if producer is original:
            patches.set_item(module._FUSED_ACT_QUANT, key, _silu_and_mul_nvfp4_dynamic)
    patches.rebind(original, _silu_and_mul_nvfp4_dynamic)


def _experts_quant(patches: Patches, module: ModuleType, name: str) -> None:
    """Both NVFP4 expert quantizers: one takes ``[rows, k]``, the other gate and up, ``[rows, 2 * k]``."""
    original: Callable[..., tuple[Tensor, Tensor]] = getattr(module, name)
    halves = 2 if name in targets.SILU_EXPERTS.attributes else 1

    def experts_quant(
        input_tensor: Tensor, input_global_scale: Tensor, expert_offsets: Tensor, blockscale_offsets: Tensor, topk: int
    ) -> tuple[Tensor, Tensor]:
        offsets = expert_offsets, blockscale_offsets
        given = _experts_outputs(input_tensor, halves, topk, offsets, ScaleFormat.nvfp4)
        if given is None:
            return original(input_tensor, input_global_scale, *offsets, topk)
        output, block_scale = given
        getattr(torch.ops._C, name)(output, block_scale, input_tensor, input_global_scale, *offsets)
        return output, block_scale.view(torch.float8_e4m3fn)

    experts_quant.__name__ = experts_quant.__qualname__ = name
    patches.rebind(original, experts_quant)


def _mx_experts_quant(patches: Patches, module: ModuleType, name: str) -> None:
    """Both MXFP4 expert quantizers, which have no global scales."""
    original: Callable[..., tuple[Tensor, Tensor]] = getattr(module, name)
    halves = 2 if name in targets.MX_SILU_EXPERTS.attributes else 1

    def experts_quant(
        input_tensor: Tensor, expert_offsets: Tensor, blockscale_offsets: Tensor, n_experts: int, topk: int
    ) -> tuple[Tensor, Tensor]:
        offsets = expert_offsets, blockscale_offsets
        given = None
        if len(expert_offsets) == n_experts + 1:  # else vLLM refuses it
            given = _experts_outputs(input_tensor, halves, topk, offsets, ScaleFormat.mxfp4)
        if given is None:
            return original(input_tensor, *offsets, n_experts, topk)
        output, block_scale = given
        if allocator.engine is not None:
            nan.note(allocator.engine, input_tensor, None, expert_offsets[n_experts:])
        getattr(torch.ops._C, name)(output, block_scale, input_tensor, *offsets, n_experts)
        return output, block_scale.view(torch.uint8)

    experts_quant.__name__ = experts_quant.__qualname__ = name
    patches.rebind(original, experts_quant)


def _experts_outputs(
    x: Tensor, halves: int, topk: int, offsets: tuple[Tensor, Tensor], format: ScaleFormat
) -> tuple[Tensor, Tensor] | None:
    """Data and scales for an expert quantizer of ``[rows, halves * k]``; ``None`` where vLLM allocates, or refuses it.

    vLLM's limit of rows protects its worst-case allocation, which is not made here.
    """
    if x.ndim != 2 or x.shape[1] % (halves * format.block_size):
        return None
    rows, k = x.shape[0], x.shape[1] // halves
    block_scale = grouped_scales(rows, k, topk, *offsets, format)
    if block_scale is None:
        return None
    return torch.empty(rows, k // 2, device=x.device, dtype=torch.uint8), block_scale


def _attention_fusion(original: Callable[..., None], fusion: Any, graph: fx.Graph) -> None:
    original(fusion, graph)
    zero_for_attention(graph)


def zero_for_attention(graph: fx.Graph) -> int:
    """Give attention that writes NVFP4 itself scales that are zeroed per step; returns how many.

    It writes only rows that hold a token. A captured batch has other rows too, which in a pool buffer would keep the scales
    of an earlier step.
    """
    changed = 0
    for node in graph.nodes:
        source = node.kwargs.get("output_block_scale")
        while isinstance(source, fx.Node) and source.target is torch.ops.aten.view.dtype:
            source = source.args[0]
        if isinstance(source, fx.Node) and source.target is torch.ops.safealloc.vllm_scales.default:
            source.target = torch.ops.safealloc.vllm_zero_scales.default
            changed += 1
    return changed


def zero_for_fused(graph: fx.Graph) -> int:
    """Let what allocates for a fused producer see to its padding, which such a producer does not write; returns how many.

    The node stays where it is, with another op of the same signature. A producer is an op that writes the scales; the plain
    quantizer zeroes padding itself, where vLLM relies on that.
    """
    changed = 0
    for node in graph.nodes:
        if node.target is torch.ops.safealloc.vllm_scales.default and any(map(_is_fused_producer, *_uses(node))):
            node.target = torch.ops.safealloc.vllm_fused_scales.default
            changed += 1
    return changed


def _uses(node: fx.Node) -> tuple[list[fx.Node], list[fx.Node]]:
    """Nodes that use the output of a node or a view of it, and by their side what they use."""
    users, used, aliases = [], [], [node]
    for alias in aliases:
        for user in alias.users:
            users.append(user)
            used.append(alias)
            returns = getattr(getattr(user.target, "_schema", None), "returns", ())
            if any(one.alias_info is not None and not one.alias_info.is_write for one in returns):
                aliases.append(user)
    return users, used


def _is_fused_producer(user: fx.Node, scales: fx.Node) -> bool:
    op: Any = user.target
    given = user.args
    if not isinstance(op, torch._ops.OpOverload):  # auto_functionalized, whose first argument is the op
        op, given = (given[0] if given else None), ()
    if not isinstance(op, torch._ops.OpOverload) or op._schema.name == "_C::scaled_fp4_quant":
        return False
    return any(
        argument.alias_info is not None
        and argument.alias_info.is_write
        and (user.kwargs.get(argument.name) is scales or (index < len(given) and given[index] is scales))
        for index, argument in enumerate(op._schema.arguments)
    )


def _passes(original: Callable[..., None], manager: Any, graph: fx.Graph) -> None:
    original(manager, graph)
    log_errors(zero_for_fused, graph)


def _profile(original: Callable[..., Any], worker: Any) -> Any:
    log_errors(allocator.begin, worker)
    engine = engine_of(worker)
    if engine is None:
        return original(worker)

    def profile_run(method: Callable[..., Any], *given: Any, **named: Any) -> Any:
        with allocator.working(engine), replace.observed(engine):
            result = method(*given, **named)
        log_errors(engine.reserve)
        log_errors(proof.prove_for, engine)
        return result

    with around(worker.model_runner, "profile_run", profile_run):
        return original(worker)


def _warm_up(original: Callable[..., Any], worker: Any) -> Any:
    engine = engine_of(worker)
    if engine is None or engine.pool is None:  # nothing of NVFP4 was seen
        return original(worker)

    def capture_model(method: Callable[..., Any], *given: Any, **named: Any) -> Any:
        log_errors(nan.name_layers, engine, worker.model_runner)
        with allocator.working(engine), replace.served(engine):
            return method(*given, **named)

    with around(worker.model_runner, "capture_model", capture_model):
        result = original(worker)
    log_errors(nan.forget, engine)
    log_errors(_log_sites, worker, engine)
    return result


def _step(original: Callable[..., Any], worker: Any, scheduler_output: Any) -> Any:
    """A safe point before each step, which is counted then; after a step its replay may still be running."""
    engine = engine_of(worker)
    if engine is not None and engine.pool is not None:
        log_errors(engine.pool.safe_point)
        log_errors(nan.begin_step, engine, scheduler_output)
    result = original(worker, scheduler_output)
    if engine is not None:
        log_errors(nan.end_step, engine)
    return result


def _shutdown(original: Callable[..., Any], worker: Any) -> Any:
    try:
        return original(worker)
    finally:
        log_errors(allocator.end, worker)


def _log_sites(worker: Any, engine: Engine) -> None:
    sites = engine.captured()
    held = None if engine.pool is None else engine.pool.stats()
    line = report.ready(targets.version(), capability(engine.device), sites, held, allocator.hooked)
    logger.info("safealloc: rank %s: %s", getattr(worker, "rank", 0), line)


def _method(replacement: Callable[..., Any], method: str = "") -> Hook:
    """A hook for a target that is a method, or for this method of a target that is a class.

    Calls become ``replacement(original, self, ...)``.
    """

    def hook(patches: Patches, module: ModuleType, name: str) -> None:
        class_name, _, named = name.partition(".")
        patches.wrap(getattr(module, class_name), method or named, replacement)

    return hook


def log_errors(function: Callable[..., object], *given: Any) -> None:
    """Call a function; its errors are logged once per kind, so that a worker starts, unless they are to be raised."""
    try:
        function(*given)
    except Exception as error:
        allocator.log_error(error, "vLLM goes on without it")


HOOKS: dict[drift.Target, Hook] = {
    targets.SCALES: _scale_tensor,
    targets.OUTPUTS: _output_tensors,
    targets.MM: _mm,
    targets.MM_OP: _mm_op,
    targets.FUSED_ACT_QUANT: _fused_act_quant,
    targets.EXPERTS: _experts_quant,
    targets.SILU_EXPERTS: _experts_quant,
    targets.MX_EXPERTS: _mx_experts_quant,
    targets.MX_SILU_EXPERTS: _mx_experts_quant,
    targets.ATTENTION_FUSION: _method(_attention_fusion, "__call__"),
    targets.MLA_FUSION: _method(_attention_fusion, "__call__"),
    targets.PROFILE: _method(_profile),
    targets.WARM_UP: _method(_warm_up),
    targets.STEP: _method(_step),
    targets.SHUTDOWN: _method(_shutdown),
    targets.PASSES: _method(_passes),
    targets.LINEAR: lambda patches, module, name: kernel.add(patches, module),
}
"""By target; the plugin adds the compile-cache key itself."""

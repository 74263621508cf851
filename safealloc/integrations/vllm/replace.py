"""Our kernels behind vLLM's quantization ops, through PyTorch's dispatcher, while graphs are captured.

The ops stay in every graph, so that vLLM's fusion passes match as before. Replays need no override, and eager calls never
meet one: it is installed when the captures begin and gone after the last one.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from safealloc import settings
from safealloc.formats.layout import SfLayout
from safealloc.integrations import startup
from safealloc.integrations.startup import Engine, Launch
from safealloc.integrations.vllm import nan
from safealloc.integrations.vllm.serve import allocator
from safealloc.integrations.vllm.worker import logger
from safealloc.ops.backends import GROUPED_QUANTIZERS, QUANTIZERS, call_for, run_watched
from safealloc.ops.grouped import clean_grouped_scales, whole_buffer
from safealloc.ops.inductor import forbid_reuse
from safealloc.pool.contents import pool_spec_of
from safealloc.pool.nan import NanWatch

NAMESPACE = "_C"
"""Of the ops."""

_LAYOUT = SfLayout.layout_128x4
_INPUTS = ("Tensor input", "Tensor input_global_scale")
_OFFSETS = ("Tensor input_offset_by_experts", "Tensor output_scale_offset_by_experts")


class Op(NamedTuple):
    """An op of vLLM that quantizes to NVFP4."""

    name: str  # with its overload
    arguments: tuple[str, ...]  # of the known schema, which returns nothing; ``!``: written, ``*``: by keyword only
    silu: bool = False  # whether the input is gate and up, ``[rows, 2 * k]``
    grouped: bool = False  # whether rows are grouped by expert
    layout: SfLayout = _LAYOUT  # 8x4: of FlashInfer's op, which returns what it writes

    @property
    def arithmetic(self) -> str:
        return "vllm" if self.layout is _LAYOUT else "flashinfer"

    def overload(self) -> Any:
        """What is called; ``None`` where this vLLM has no such op."""
        packet, _, overload = self.name.partition(".")
        return getattr(getattr(getattr(torch.ops, NAMESPACE), packet, None), overload or "default", None)

    def changed(self) -> str | None:
        """The schema of an op that is there and not as it is known."""
        found = self.overload()
        if found is None:
            return None
        arguments = tuple(
            f"{'*' if one.kwarg_only else ''}{one.type}{'!' if one.is_write else ''} {one.name}"
            for one in found._schema.arguments
        )
        return str(found._schema) if arguments != self.arguments or found._schema.returns else None


DENSE = Op(
    "scaled_fp4_quant.out",
    ("Tensor input", "Tensor input_scale", "bool is_sf_swizzled_layout", "*Tensor! output", "*Tensor! output_scale"),
)
SILU = Op("silu_and_mul_nvfp4_quant", ("Tensor! result", "Tensor! result_block_scale", *_INPUTS), silu=True)
_EXPERTS = ("Tensor! output", "Tensor! output_scale", *_INPUTS, *_OFFSETS)
EXPERTS = Op("scaled_fp4_experts_quant", _EXPERTS, grouped=True)
SILU_EXPERTS = Op("silu_and_mul_scaled_fp4_experts_quant", _EXPERTS, silu=True, grouped=True)
OPS = (DENSE, SILU, EXPERTS, SILU_EXPERTS)
"""The ops that are replaced."""
TRTLLM = Op(startup.TRTLLM, ("Tensor a", "Tensor a_global_sf"), layout=SfLayout.layout_8x4)
"""vLLM's op around FlashInfer's quantizer, for up to 32 rows with the trtllm backend."""


class Call(NamedTuple):
    """One call of an op."""

    op: Op
    x: Tensor  # bfloat16 or float16 [rows, k], silu: [rows, 2 * k]
    global_scale: Tensor  # float32, one element, grouped: [experts]
    data: Tensor  # uint8 [rows, k // 2]
    scales: Tensor  # the whole buffer, in the dtype that vLLM gives it
    offsets: tuple[Tensor, ...] = ()  # grouped: int32 [experts + 1] twice, of rows and of scale rows
    swizzled: bool = True

    @classmethod
    def of(cls, op: Op, given: tuple[Any, ...], named: dict[str, Any]) -> Call:
        """From what an op was called with."""
        names = [argument.rpartition(" ")[2] for argument in op.arguments]
        call = dict(zip(names, given, strict=False)) | named
        values = [call[name] for name in names]
        if op is DENSE:
            x, global_scale, swizzled, data, scales = values
            return cls(op, x, global_scale, data, scales, (), swizzled)
        data, scales, x, global_scale, *offsets = values
        return cls(op, x, global_scale, data, scales, tuple(offsets))

    @property
    def launch(self) -> Launch:
        k = self.x.shape[-1] // (2 if self.op.silu else 1)
        return Launch(self.op.name, k, self.x.dtype, self.offsets[0].shape[0] - 1 if self.offsets else 0)

    @property
    def ours(self) -> bool:
        """Whether our kernel can run it: into a whole buffer of a pool that was made for just this matrix."""
        x, spec = self.x, pool_spec_of(self.scales)
        if spec is None or spec.layout is not self.op.layout or not self.swizzled or x.ndim != 2:
            return False
        rows, k = x.shape[0], self.launch.k
        fits = rows <= spec.rows if self.op.grouped else rows == spec.rows
        tensors = (x, self.global_scale, self.data, *self.offsets)
        return (
            fits
            and spec.k == k
            and (spec.experts or 0) == self.launch.experts
            and x.dtype in (torch.bfloat16, torch.float16)
            and self.data.shape == (rows, k // 2)
            and self.global_scale.dtype is torch.float32
            and self.global_scale.numel() == max(1, self.launch.experts)
            and all(offsets.dtype is torch.int32 for offsets in self.offsets)
            # Aligned, since Triton compiles anew for what is not.
            and all(one.is_contiguous() and one.device == x.device and one.data_ptr() % 16 == 0 for one in tensors)
        )

    def run(self, watch: NanWatch | None = None, batch: int | None = None) -> None:
        """Run our kernel, with the arithmetic of the original; its input is watched, if at all, as it goes.

        ``batch`` is as in :meth:`NanWatch.site`.
        """
        scales, global_scale = self.scales.view(torch.uint8), self.global_scale.reshape(-1)
        call = call_for(self.x.device, self.op.layout, silu_and_mul=self.op.silu, arithmetic=self.op.arithmetic)
        further = (None, self.op.silu, self.op.arithmetic)
        if not self.op.grouped:
            row = QUANTIZERS.choose("triton", call)
            arguments: tuple[Any, ...] = (self.x, global_scale, self.data, scales, self.op.layout, *further)
            run_watched(row, watch, self.x, self.global_scale, None, arguments, batch=batch)
            return
        spec = pool_spec_of(scales)
        assert spec is not None
        buffer, record = whole_buffer(spec, scales)
        row = GROUPED_QUANTIZERS.choose("triton", call)
        arguments = (self.x, global_scale, self.data, buffer, _LAYOUT, record, *self.offsets, None, *further)
        given = (self.x, self.global_scale, self.live_rows, arguments)
        run_watched(row, watch, *given, batch=batch, by_expert=True)

    @property
    def live_rows(self) -> Tensor | None:
        """How many rows belong to an expert, int32, one element; ``None`` where rows are not grouped."""
        return self.offsets[0][self.launch.experts :] if self.op.grouped else None

    def run_original(self) -> tuple[Tensor, Tensor] | None:
        """Run the op, after the cleaning that it needs beside it; data and scales, where the op returns them."""
        if self.op is TRTLLM:
            returned: tuple[Tensor, Tensor] = trtllm_op()(self.x, self.global_scale)
            return returned
        self.clean()
        op = self.op.overload()
        if self.op is DENSE:
            op(self.x, self.global_scale, self.swizzled, output=self.data, output_scale=self.scales)
        else:
            op(self.data, self.scales, self.x, self.global_scale, *self.offsets)
        return None

    def clean(self) -> None:
        """Clear the scales that only the previous step wrote, in a buffer of experts of a pool."""
        spec = pool_spec_of(self.scales)
        if self.op.grouped and spec is not None and spec.experts is not None:
            expert_offsets, blockscale_offsets = self.offsets
            clean_grouped_scales(self.scales, expert_offsets, blockscale_offsets, self.x.shape[0])


Answer = Callable[[Call], bool]
"""What an override asks; it returns whether it has done the call. Where it has not, the original kernel runs."""


@contextlib.contextmanager
def overridden(device: torch.device, answer: Answer) -> Iterator[tuple[Op, ...]]:
    """Inside, calls of the ops on a device are given to ``answer``; yields the ops of which that is so.

    An op with a schema that is not known, or without a kernel for the device, is left alone.
    """
    key = device.type.upper()
    library = torch.library.Library(NAMESPACE, "IMPL")
    replaced = []
    try:
        for op in OPS:
            if op.overload() is None or op.changed():
                continue
            try:
                original = torch.library.get_kernel(f"{NAMESPACE}::{op.name}", key)  # torch 2.9 has no such function
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # PyTorch warns of the override
                    override = functools.partial(_override, op, original, answer)
                    library.impl(op.name, override, key, with_keyset=True, allow_override=True)
                replaced.append(op)
            except Exception as error:
                allocator.log_error(error, f"{op.name} is not replaced")
        yield tuple(replaced)
    finally:
        library._destroy()


def _override(op: Op, original: Any, answer: Answer, keys: torch._C.DispatchKeySet, *given: Any, **named: Any) -> None:
    if not answer(Call.of(op, given, named)):
        original.call_boxed(keys, *given, **named)


@contextlib.contextmanager
def observed(engine: Engine) -> Iterator[None]:
    """Inside, an engine's profile run, note which launches of the ops it makes."""
    with contextlib.ExitStack() as stack:
        if is_asked_for():
            for op in OPS:
                if schema := op.changed():
                    logger.warning(
                        "safealloc: vLLM's own kernel stays behind an op that is not as it is known: %s", schema
                    )

            def note(call: Call) -> bool:
                if call.x.ndim == 2 and call.swizzled and 2 * call.data.shape[-1] == call.launch.k:
                    engine.launches.add(call.launch)
                return False

            stack.enter_context(overridden(engine.device, note))
        yield


@contextlib.contextmanager
def served(engine: Engine) -> Iterator[None]:
    """Inside, an engine's captures and their warm-ups, our kernel runs where the engine has it measured as faster.

    With ``SAFEALLOC_NAN=1``, what watches a quantizer's input is captured beside vLLM's.
    """
    if not engine.launches and nan.of(engine) is None:
        yield
        return
    with _trtllm_overridden(engine), overridden(engine.device, functools.partial(_serve, engine)) as replaced:
        engine.op_cleans = {EXPERTS, SILU_EXPERTS} <= set(replaced)
        try:
            yield
        finally:
            engine.op_cleans = False


def trtllm_op() -> Any:
    """The definition of :data:`TRTLLM` in vLLM; ``None`` where it has none, or one with another schema."""
    op = getattr(sys.modules.get("vllm.utils.flashinfer"), TRTLLM.name, None)
    schema = getattr(getattr(op, "_opoverload", None), "_schema", None)
    known = (
        schema is not None and str(schema).partition("(")[2] == f"{', '.join(TRTLLM.arguments)}) -> (Tensor, Tensor)"
    )
    return op if known else None


def keep_from_reuse() -> bool:
    """Where our kernels are asked for, before code is compiled: keep Inductor from reusing what :data:`TRTLLM` returns."""
    op = trtllm_op()
    if op is None or not is_asked_for():
        return False
    try:
        _keep_from_reuse(op._opoverload)
    except Exception as error:
        allocator.log_error(error, "FlashInfer's 8x4 quantizer stays")
        return False
    return True


@functools.cache
def _keep_from_reuse(op: torch._ops.OpOverload) -> None:
    from torch._inductor import lowering

    forbid_reuse(op)
    lowering.add_layout_constraint(op, lowering.constrain_to_fx_strides)  # as a fallback's


def note_trtllm(a: Tensor, out_dtype: torch.dtype, backend: str) -> None:
    """In a profile run, note from a GEMM which quantizer its layer calls for few rows; ``a`` is uint8 ``[m, k // 2]``."""
    engine = allocator.engine
    if engine is None or engine.pool is not None or backend != "trtllm" or not is_asked_for():
        return
    if keep_from_reuse():
        engine.launches.add(Launch(TRTLLM.name, 2 * a.shape[1], out_dtype))


@contextlib.contextmanager
def _trtllm_overridden(engine: Engine) -> Iterator[None]:
    functions = getattr(trtllm_op(), "_backend_fns", {})
    original = functions.get(engine.device.type)
    asked = nan.of(engine) is not None or any(launch.op == TRTLLM.name for launch in engine.launches)
    if original is None or not asked:
        yield
        return
    functions[engine.device.type] = functools.partial(_quantize_8x4, engine, original)
    try:
        yield
    finally:
        functions[engine.device.type] = original


def _quantize_8x4(engine: Engine, original: Callable[..., Any], a: Tensor, a_global_sf: Tensor) -> Any:
    launch = Launch(TRTLLM.name, a.shape[-1], a.dtype)
    if allocator.engine is not engine or engine.pool is None or a.ndim != 2:
        return original(a, a_global_sf)
    rows, k = a.shape
    if engine.saved(launch, rows) is None:
        nan.note(engine, a, a_global_sf)
        if engine.launches:
            allocator.note(engine.count, startup.THEIRS)
        return original(a, a_global_sf)
    try:
        data = torch.empty((rows, k // 2), dtype=torch.uint8, device=a.device)
        scales = engine.pool.acquire(rows, k, TRTLLM.layout)
    except Exception as error:
        allocator.log_error(error, "FlashInfer's kernel quantizes instead")
        nan.note(engine, a, a_global_sf)
        return original(a, a_global_sf)
    return (data, scales) if _serve(engine, Call(TRTLLM, a, a_global_sf, data, scales)) else original(a, a_global_sf)


def _serve(engine: Engine, call: Call) -> bool:
    if allocator.engine is not engine:
        return False
    saved = engine.saved(call.launch, call.x.shape[0]) if call.ours else None
    if saved is not None:
        try:
            call.run(nan.of(engine), nan.batch(engine, call.x.shape[0]))
        except Exception as error:
            allocator.log_error(error, "vLLM's kernel quantizes instead")
            saved = None
    if saved is None:
        if engine.op_cleans:
            call.clean()
        nan.note(engine, call.x, call.global_scale, call.live_rows)
        if engine.launches:
            allocator.note(engine.count, startup.THEIRS)
        return False
    allocator.note(engine.count, startup.OURS)
    allocator.note(engine.count, startup.SAVED, round(1000 * saved))
    return True


def is_asked_for() -> bool:
    """Whether ``SAFEALLOC_QUANTIZER`` asks for our kernels; a value that it cannot have is logged."""
    try:
        return settings.quantizer()
    except ValueError as error:
        allocator.log_error(error, "vLLM's quantizers stay")
        return False

"""``SAFEALLOC_NAN=1``: the layers, batches and steps of vLLM, for what tells the first NaN (:mod:`safealloc.pool.nan`).

Eager calls of vLLM's quantizers, as of long prompts, are not watched: its ops are overridden while graphs are captured only.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from safealloc.integrations.startup import Engine
from safealloc.integrations.vllm.serve import allocator
from safealloc.integrations.vllm.worker import forward_context
from safealloc.pool.nan import NanWatch

_DEPTH = (
    4  # from a module to the global scales of its experts: the kernel, its experts, their quantization's description
)


def of(engine: Engine) -> NanWatch | None:
    """What watches the quantizers of an engine."""
    return None if engine.pool is None else engine.pool.nan


def batch(engine: Engine, rows: int) -> int | None:
    """Tokens of the batch that is captured, padding included; ``None`` outside of vLLM's language model.

    Model runner V2 does not tell while it captures a graph of a whole step: there, rows as many as a captured batch has
    tokens are its tokens.
    """
    descriptor = getattr(forward_context(), "batch_descriptor", None)
    tokens = getattr(descriptor, "num_tokens", None)
    if isinstance(tokens, int):
        return tokens
    return rows if rows in engine.steps.copies else None


def note(engine: Engine, x: Tensor, global_scale: Tensor | None, live_rows: Tensor | None = None) -> None:
    """Capture what watches the input of a quantizer that is about to run; with ``live_rows`` it is sorted by expert."""
    watch = of(engine)
    if watch is None:
        return
    try:
        site = watch.site(x, global_scale, batch=batch(engine, x.shape[0]), by_expert=live_rows is not None)
        if site is not None:
            watch.note(x, site, live_rows)
    except Exception as error:
        allocator.log_error(error, "a quantizer's input is not watched")


def begin_step(engine: Engine, scheduler_output: Any) -> None:
    """Count a step of vLLM, and how many tokens it has."""
    watch = of(engine)
    if watch is not None:
        watch.begin_step(getattr(scheduler_output, "total_num_scheduled_tokens", None))


def end_step(engine: Engine) -> None:
    """After a step: what follows, as dummy batches of data parallelism and a drafter's passes, has rows of its own."""
    watch = of(engine)
    if watch is not None:
        watch.end_step()


def forget(engine: Engine) -> None:
    """Forget what the dummy batches of captures and warm-ups held."""
    watch = of(engine)
    if watch is not None:
        watch.forget()
        watch.end_step()


def name_layers(engine: Engine, runner: Any) -> None:
    """Tell the layers of a model runner's models by the addresses of their tensors of float32."""
    watch = of(engine)
    if watch is None:
        return
    names: dict[int, str] = {}
    drafter = getattr(runner, "drafter", None) or getattr(runner, "speculator", None)
    for prefix, model in (("", getattr(runner, "model", None)), ("drafter.", getattr(drafter, "model", None))):
        if model is not None and hasattr(type(model), "unwrap"):  # of vLLM's wrapper around graphs
            model = model.unwrap()
        if isinstance(model, torch.nn.Module):
            for name, module in model.named_modules():
                for tensor in _tensors(module, _DEPTH, set()):
                    names.setdefault(tensor.data_ptr(), f"{prefix}{name}")
    watch.name_layers(names)


def _tensors(thing: Any, depth: int, seen: set[int]) -> Iterator[Tensor]:
    """The global scales, perhaps, that an object of vLLM holds, but not those of modules inside a module."""
    seen.add(id(thing))
    held = [*vars(thing).values()]
    if isinstance(thing, torch.nn.Module):
        held += [*thing._parameters.values(), *thing._buffers.values()]
    for one in held:
        if isinstance(one, Tensor):
            if one.dtype is torch.float32 and one.numel():
                yield one
        elif (
            depth
            and id(one) not in seen
            and not isinstance(one, (torch.nn.Module, type))
            and type(one).__module__.startswith("vllm.")
            and hasattr(one, "__dict__")
        ):
            yield from _tensors(one, depth - 1, seen)

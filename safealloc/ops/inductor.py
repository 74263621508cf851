"""Keeps Inductor from reusing the memory of a pool buffer.

Inductor plans the memory of a compiled graph itself: after the last use of an op's output it gives that memory to the next
temporary of equal size and dtype, or writes a temporary over it. In a pool buffer that leaves stray bytes in padding, which
must stay zero. Inductor does not reuse memory that aliases something, and still frees it after its last use. So a lowering
lets the output alias itself. (``never_reuse_buffers`` would keep it until the compiled code returns, and the pool would need
a buffer for each site instead of one for all.) All this is private to PyTorch (seen in 2.9 to 2.14), so the lowering is only
registered where its parts exist; elsewhere, tracing such an op is an error that names the op to use instead.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from safealloc.errors import SafeAllocError

_INSTEAD = "safealloc.nvfp4_linear, whose scales never leave one op"


@functools.cache
def forbid_reuse(op: torch._ops.OpOverload) -> None:
    """Register the lowering for ``op``; called from its fake implementation, so at the first tracing and never before.

    Raises:
        SafeAllocError: this PyTorch lacks what it needs.
    """
    try:
        from torch._inductor import config, lowering
        from torch._inductor.codegen.wrapper import FreeIfNotReusedLine
        from torch._inductor.ir import FallbackKernel
        from torch._inductor.scheduler import BaseSchedulerNode
        from torch._inductor.virtualized import V

        fallback = lowering.fallback_handler(op)
        register = lowering.register_lowering(op, type_promotion_kind=None)
        for function in (FreeIfNotReusedLine.plan, BaseSchedulerNode.decide_inplace_update):
            if "get_inputs_that_alias_output" not in function.__code__.co_names:
                raise AttributeError(f"{function.__qualname__} does not check for aliases")
    except Exception as error:
        raise SafeAllocError(
            f"Inductor of torch {torch.__version__} cannot be kept from reusing a pool buffer ({error}): use {_INSTEAD}"
        ) from error

    def lower(*args: Any, **kwargs: Any) -> Any:
        if config.triton.cudagraphs and _reaches_output(V.graph.current_node):
            raise SafeAllocError(
                f"a scale buffer of {op} is an output of a graph compiled with CUDA graphs (mode='reduce-overhead'), which "
                f"only return memory of their own: keep producer and consumer in one compiled region, or use {_INSTEAD}"
            )
        outputs = fallback(*args, **kwargs)
        for output in outputs if isinstance(outputs, (tuple, list)) else (outputs,):
            kernel = output.data.data
            kernel = kernel if isinstance(kernel, FallbackKernel) else kernel.inputs[0]
            if kernel.get_name() not in kernel.alias_names:
                kernel.alias_names.append(kernel.get_name())
        return outputs

    register(lower)


def _reaches_output(node: torch.fx.Node) -> bool:
    """Whether a scale tensor of ``node`` or a view of it leaves the graph."""
    graph_output = next(iter(reversed(node.graph.nodes)))
    aliases = {node}
    for user in node.graph.nodes:
        aliased = [argument for argument in user.all_input_nodes if argument in aliases]
        if user is graph_output:
            return any(_is_scales(argument) for argument in aliased)
        if aliased and _returns_alias(user):
            aliases.add(user)
    return False


def _returns_alias(node: torch.fx.Node) -> bool:
    if not isinstance(node.target, torch._ops.OpOverload):
        return getattr(node.target, "__name__", "") == "getitem"
    return any(returned.alias_info is not None for returned in node.target._schema.returns)


def _is_scales(node: torch.fx.Node) -> bool:
    """Of the two outputs of a quantization op, the second; of an allocation op, its output and every view."""
    while node.target is not None and node.op == "call_function":
        if getattr(node.target, "__name__", "") == "getitem":
            return bool(node.args[1] == 1)
        if not node.all_input_nodes or not _returns_alias(node):
            return True
        node = node.all_input_nodes[0]
    return True

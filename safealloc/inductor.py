"""Keeps Inductor from handing a pool buffer to somebody else.

Inductor plans the memory of a compiled graph itself: after the last use of an op's output it gives that memory to the next
temporary of equal size and dtype, which for a pool buffer means stray bytes in padding that has to stay zero. A lowering
that adds the output to ``never_reuse_buffers`` forbids it. Both are private to PyTorch (seen in 2.9 to 2.13), so the
lowering is only there if they are; where they are not, tracing such an op is an error that names the op to use instead.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from safealloc.errors import SafeAllocError

_INSTEAD = "safealloc.nvfp4_linear, whose scales never leave one op, needs none of this"


@functools.cache
def forbid_reuse(op: torch._ops.OpOverload) -> None:
    """Register the lowering for ``op``; called from its fake implementation, so at the first tracing and never before.

    Raises:
        SafeAllocError: this PyTorch lacks what it needs.
    """
    try:
        from torch._inductor import config, lowering
        from torch._inductor.graph import GraphLowering
        from torch._inductor.virtualized import V

        fallback = lowering.fallback_handler(op)
        register = lowering.register_lowering(op, type_promotion_kind=None)
        if "never_reuse_buffers" not in GraphLowering.__init__.__code__.co_names:
            raise AttributeError("GraphLowering has no never_reuse_buffers")
    except Exception as error:
        raise SafeAllocError(
            f"Inductor of torch {torch.__version__} cannot be told to leave a pool buffer alone ({error}): {_INSTEAD}"
        ) from error

    def lower(*args: Any, **kwargs: Any) -> Any:
        if config.triton.cudagraphs and _reaches_output(V.graph.current_node):
            raise SafeAllocError(
                f"a scale buffer of {op} is an output of a graph compiled with CUDA graphs (mode='reduce-overhead'), which "
                f"only return memory of their own: keep producer and consumer in one compiled region, or use {_INSTEAD}"
            )
        outputs = fallback(*args, **kwargs)
        for output in outputs if isinstance(outputs, (tuple, list)) else (outputs,):
            V.graph.never_reuse_buffers.add(output.get_name())
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
    """Of the two outputs of a quantisation op, the second; of an allocation op, its output and every view."""
    while node.target is not None and node.op == "call_function":
        if getattr(node.target, "__name__", "") == "getitem":
            return bool(node.args[1] == 1)
        if not node.all_input_nodes or not _returns_alias(node):
            return True
        node = node.all_input_nodes[0]
    return True

"""What is known of declared scales on a GPU, where memory comes back in graphs and in compiled code."""

from __future__ import annotations

import gc
import random

import pytest
import torch
from torch import Tensor

from safealloc import LayoutMismatchError, ScaleFormat, ScaleSpec, SfLayout, check, declare, spec

pytestmark = pytest.mark.gpu

SPECS = [
    ScaleSpec(300, 64, SfLayout.layout_128x4),
    ScaleSpec(384, 64, SfLayout.layout_8x4),
    ScaleSpec(300, 128, SfLayout.layout_128x4, format=ScaleFormat.mxfp8),  # as many bytes as the first
    ScaleSpec(17, 128, SfLayout.layout_linear),
]
NBYTES = 2048  # of each storage, so that memory is reused

_library = torch.library.Library("test_declare_cuda", "FRAGMENT")
_library.define("produce(Tensor x, int which) -> Tensor")


def _produce(x: Tensor, which: int) -> Tensor:
    """Scales in new memory, declared where they are written."""
    scales = torch.empty(SPECS[which].scale_bytes, dtype=torch.uint8, device=x.device)
    scales.copy_(x.view(torch.uint8).view(-1)[: scales.numel()])
    return _declared(scales, which)


_library.impl("produce", _produce, "CUDA")
torch.library.register_fake(
    "test_declare_cuda::produce",
    lambda x, which: x.new_empty(SPECS[which].scale_bytes, dtype=torch.uint8),
    lib=_library,
)


def _declared(tensor: Tensor, which: int) -> Tensor:
    held = SPECS[which]
    return declare(tensor, held.rows, held.k, held.layout, format=held.format)


def agrees(tensor: Tensor, which: int | None) -> None:
    """What is known is what was said last: no more, no less, and no false alarm."""
    if which is None:
        assert spec(tensor) is None
        assert check(tensor, 7, 64, SfLayout.layout_8x4) is None
        return
    held = SPECS[which]
    assert spec(tensor) == held
    assert check(tensor, held.rows, held.k, held.layout, format=held.format) == held
    with pytest.raises(LayoutMismatchError):
        check(tensor, held.rows, held.k, SfLayout((held.layout + 1) % 3), format=held.format)


@pytest.mark.parametrize("seed", range(4))
def test_a_random_walk_over_memory_and_graphs(seed: int) -> None:
    """Tensors and graphs come and go in one graph memory pool, so that addresses come back with other contents."""
    draw = random.Random(seed)
    handle = torch.cuda.graph_pool_handle()
    source = torch.arange(NBYTES, device="cuda").to(torch.uint8)
    tensors: list[tuple[Tensor, int | None]] = []
    graphs: list[tuple[torch.cuda.CUDAGraph, Tensor, int]] = []
    addresses: list[int] = []
    for _ in range(300):
        action = draw.choice(["make", "make", "declare", "write", "drop", "capture", "replay", "destroy"])
        which = draw.randrange(len(SPECS))
        if action == "make":
            tensors.append((torch.empty(SPECS[which].scale_bytes, dtype=torch.uint8, device="cuda"), None))
            addresses.append(tensors[-1][0].data_ptr())
        elif action == "declare" and tensors:
            index = draw.randrange(len(tensors))
            tensor = tensors[index][0]
            fitting = [number for number, one in enumerate(SPECS) if one.scale_bytes == tensor.numel()]
            tensors[index] = _declared(tensor, draw.choice(fitting)), fitting[-1]
            tensors[index] = _declared(tensor, fitting[-1]), fitting[-1]
        elif action == "write" and tensors:
            index = draw.randrange(len(tensors))
            tensors[index][0][draw.randrange(8) :].fill_(3)
            tensors[index] = tensors[index][0], None
        elif action == "drop" and tensors:
            tensors.pop(draw.randrange(len(tensors)))
        elif action == "capture" and len(graphs) < 4:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=handle):
                scales = torch.ops.test_declare_cuda.produce(source, which)
                agrees(scales, which)  # a consumer in the same capture
            graphs.append((graph, scales, which))
            addresses.append(scales.data_ptr())
        elif action == "replay" and graphs:
            draw.choice(graphs)[0].replay()
        elif action == "destroy" and graphs:
            graphs.pop(draw.randrange(len(graphs)))
            scales = None
            gc.collect()
        for tensor, known in tensors:
            agrees(tensor, known)
        for _, scales, known in graphs:  # a replay writes what was captured: the same scales
            agrees(scales, known)
        del action
    torch.cuda.synchronize()
    assert len(set(addresses)) < len(addresses)  # memory did come back


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_code_declares_where_its_op_runs(mode: str) -> None:
    """Each call makes scales anew, whatever its memory held before."""
    source = torch.arange(NBYTES, device="cuda").to(torch.uint8)

    def step(x: Tensor, which: int) -> Tensor:
        return torch.ops.test_declare_cuda.produce(x + 1, which) + 0

    compiled = torch.compile(step, mode=None if mode == "default" else mode, dynamic=False)
    for _ in range(4):
        for which, held in enumerate(SPECS):
            torch.compiler.cudagraph_mark_step_begin()
            result = compiled(source, which)
            assert torch.equal(result, (source + 1)[: held.scale_bytes])
            agrees(result.clone(), None)  # it is computed from scales, and is none


def test_memory_that_another_owner_got_is_unknown() -> None:
    tensor = _declared(torch.empty(SPECS[0].scale_bytes, dtype=torch.uint8, device="cuda"), 0)
    address = tensor.data_ptr()
    del tensor
    again = torch.empty(SPECS[0].scale_bytes, dtype=torch.uint8, device="cuda")
    assert again.data_ptr() == address
    agrees(again, None)

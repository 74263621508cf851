"""A process of its own with other memory: ``life`` under an allocator's settings, ``shared`` memory of two processes.

Prints ``OK``, or ``REFUSED`` and why no pool was made.
"""

from __future__ import annotations

import gc
import logging
import os
import sys
import time
from typing import Any

import torch
import torch.multiprocessing as multiprocessing

from safealloc import SafeAllocError, ScalePool, SfLayout, capture, nvfp4_quantize

LAYOUT = SfLayout.layout_128x4


def dirty_free_memory() -> None:
    blocks = [torch.full((1 << 20,), 0x7F, dtype=torch.uint8, device="cuda") for _ in range(8)]
    del blocks


def life(pool: ScalePool) -> None:
    """Everything that a buffer goes through: padding is zero at each step, and all of it comes back."""
    mask = LAYOUT.padding_mask(5, 1008, "cuda")
    x, one = torch.randn(5, 1008, device="cuda").bfloat16(), torch.ones(1, device="cuda")
    dirty_free_memory()
    pool.reserve(5, 1008, LAYOUT, copies=2)

    def quantize() -> torch.Tensor:
        return nvfp4_quantize(x, one, pool=pool)[1]

    expected = quantize().clone()
    assert not expected.view(-1)[mask].any()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        assert torch.equal(quantize(), expected)
    large = pool.acquire(1 << 15, 4096, LAYOUT)
    pool.record_stream(large, side)
    del large
    for rows in range(1, 400):
        pool.acquire(rows, 1008, LAYOUT)
    assert pool.stats().evictions > 0
    if "PYTORCH_NO_CUDA_MEMORY_CACHING" not in os.environ:  # PyTorch allocates in no capture then
        in_graphs(pool, quantize, expected)
    assert pool.verify() > 0
    pool.trim()
    assert torch.equal(quantize(), expected)


def in_graphs(pool: ScalePool, quantize: Any, expected: torch.Tensor) -> None:
    out = torch.empty_like(expected)
    with capture(pool=pool) as graph:
        out.copy_(quantize())
    with capture(pool=pool) as grown:  # nothing is there: zeros in the graph
        zeros = pool.acquire(7, 1040, LAYOUT).clone()
    dirty_free_memory()
    for _ in range(20):
        out.fill_(0x7F)
        graph.replay()
        grown.replay()
    assert torch.equal(out, expected)
    assert not zeros.any()
    del graph, grown, zeros
    gc.collect()
    end = time.monotonic() + 20
    while pool.stats().captured:  # destructors run on a thread of the driver
        assert time.monotonic() < end
        torch.cuda.synchronize()


# --- another process ------------------------------------------------------------------------------------------------------


def receiver(tensors: Any, told: Any, answers: Any) -> None:
    """Write a tensor of another process each time it is told a number, until that is 0."""
    tensor = tensors.get(timeout=120)
    answers.put("has it")
    while value := told.get(timeout=120):
        tensor.fill_(value)
        torch.cuda.synchronize()
        answers.put("wrote it")
    del tensor
    torch.cuda.ipc_collect()


def shared(pool: ScalePool) -> None:
    """A tensor that was sent to another process is noticed: its memory is handed out to nobody while that may write it."""
    context = multiprocessing.get_context("spawn")
    tensors, told, answers = context.Queue(), context.Queue(), context.Queue()
    process = context.Process(target=receiver, args=(tensors, told, answers))
    process.start()
    pool.reserve(128, 64, LAYOUT, copies=2)
    sent = pool.acquire(128, 64, LAYOUT)
    address = sent.data_ptr()
    sent.fill_(1)
    torch.cuda.synchronize()
    tensors.put(sent)
    assert answers.get(timeout=120) == "has it"
    told.put(2)
    assert answers.get(timeout=120) == "wrote it"
    assert bool((sent == 2).all()), "the other process has other memory: this says nothing"
    del sent
    gc.collect()
    held = [pool.acquire(128, 64, LAYOUT).fill_(5) for _ in range(8)]
    with torch.cuda.stream(torch.cuda.Stream()):
        held += [pool.acquire(128, 64, LAYOUT).fill_(5) for _ in range(2)]
    assert address not in {tensor.data_ptr() for tensor in held}
    torch.cuda.synchronize()
    told.put(9)
    assert answers.get(timeout=120) == "wrote it"
    assert all(bool((tensor == 5).all()) for tensor in held)
    with capture(pool=pool) as graph:
        assert pool.acquire(128, 64, LAYOUT).fill_(3).data_ptr() != address
    told.put(0)
    process.join(120)
    assert process.exitcode == 0
    del graph
    pool.verify()
    pool.trim()


def sent_to_nobody(pool: ScalePool) -> None:
    """What counts is that it was made ready to be sent: a buffer of eager work, and one that a graph has."""
    from torch.multiprocessing.reductions import reduce_tensor

    pool.reserve(128, 64, LAYOUT, copies=2)
    eager = pool.acquire(128, 64, LAYOUT)
    with capture(pool=pool) as graph:
        captured = pool.acquire(128, 64, LAYOUT).fill_(3)
    addresses = {eager.data_ptr(), captured.data_ptr()}
    kept = [reduce_tensor(eager.view(torch.float8_e4m3fn)), reduce_tensor(captured)]
    graph.replay()
    torch.cuda.synchronize()
    assert bool((captured == 3).all())
    del eager, captured
    held = [pool.acquire(128, 64, LAYOUT) for _ in range(4)]
    assert addresses.isdisjoint(tensor.data_ptr() for tensor in held)
    with capture(pool=pool, graph_pool=graph.pool()):
        assert pool.acquire(128, 64, LAYOUT).fill_(3).data_ptr() not in addresses
    graph.replay()
    torch.cuda.synchronize()
    pool.verify()
    pool.trim()
    del graph
    gc.collect()
    torch.cuda.synchronize()
    pool.take_back()
    held += [pool.acquire(128, 64, LAYOUT) for _ in range(4)]
    assert addresses.isdisjoint(tensor.data_ptr() for tensor in held)
    del kept


def main(part: str) -> None:
    logging.basicConfig(level=logging.WARNING)
    if part == "pluggable":  # never called: a pool is refused before anything is allocated
        torch.cuda.memory.change_current_allocator(
            torch.cuda.memory.CUDAPluggableAllocator("libc.so.6", "malloc", "free")
        )
    try:
        pool = ScalePool("cuda", cache_bytes=1 << 20)
    except SafeAllocError as error:
        print("REFUSED", error)
        return
    with pool:
        {"shared": shared, "sent_to_nobody": sent_to_nobody}.get(part, life)(pool)
    gc.collect()
    torch.cuda.empty_cache()
    print("OK")


if __name__ == "__main__":
    main(sys.argv[1])

"""Calls that have to work: eager, reserved, padded, compiled, in threads and on two streams."""

from __future__ import annotations

import dataclasses
import threading
from typing import Any

import torch
from support.internals import buffers_of
from support.soak.oracle import NAN, NotApplicableError, check, offsets, valid_bytes
from support.soak.registry import action
from support.soak.walk import POOLS, Soak
from support.soak.work import KS, ROWS, SWIZZLED, Dense, Work
from torch import Tensor

from safealloc import ScaleSpec, SfLayout, mm_fp4, nvfp4_linear, nvfp4_quantize, use_pool
from safealloc.kernels import reference


@action()
def eager(soak: Soak) -> None:
    """A few calls, one after the other, with nothing in between."""
    works = [soak.work(soak.pool()) for _ in range(soak.numbers.randint(1, 6))]
    for work in works:
        work.run()
    soak.check_results(works)


@action()
def hold(soak: Soak) -> None:
    """Tensors of one shape that are held at once share no memory, however they are held, and are not evicted."""
    pool = soak.pool("plain", "strict", "repairing")
    rows, k = soak.numbers.choice(ROWS), soak.numbers.choice(KS)
    held = [pool.acquire(rows, k, SfLayout.layout_8x4) for _ in range(5)]
    views = [tensor.view(torch.int8)[:, :1] for tensor in held]
    for number, tensor in enumerate(held):
        tensor.view(-1)[:1] = number
    del tensor, held
    pool.acquire(rows, k, SfLayout.layout_8x4).view(-1)[:1] = 99
    if soak.numbers.random() < 0.5:
        pool.trim()
    for other in range(512, 512 + 64 * soak.numbers.choice((0, 16)), 64):  # more than a small cache has room for
        pool.acquire(other, 512, SfLayout.layout_128x4)
    there = {buffer.address for buffer in buffers_of(pool)}
    check({view.data_ptr() for view in views} <= there, "the pool gave up a buffer that somebody holds")
    check([int(view[0, 0]) for view in views] == list(range(5)), "two tensors that are alive share memory")


def serves(spec: ScaleSpec, asked: ScaleSpec) -> bool:
    """Whether a buffer of one shape is handed out for another: a grouped one for more rows is."""
    if asked.experts is None:
        return spec == asked
    return spec.rows >= asked.rows and dataclasses.replace(spec, rows=asked.rows) == asked


@action()
def reserve(soak: Soak) -> None:
    """Reserved buffers are there, unused and clean, poisoned where that was asked for, and no trim takes them."""
    name = soak.numbers.choice(tuple(POOLS))
    pool = soak.pools[name]
    rows, k, copies = soak.numbers.choice(ROWS), soak.numbers.choice(KS), soak.numbers.randint(1, 3)
    more: dict[str, int] = soak.numbers.choice(({}, {"padded_k": k + 48}, {"experts": 4}))
    layout = SfLayout.layout_128x4 if "experts" in more else soak.numbers.choice(SWIZZLED)
    if "experts" in more:
        spec = ScaleSpec.grouped(rows, k, layout, more["experts"])
    else:
        spec = ScaleSpec.checked(rows, k, layout, more.get("padded_k"))
    if pool.stats().bytes > POOLS[name].get("max_bytes", 1 << 62) // 2:
        raise NotApplicableError("what is reserved stays: graphs need the rest")
    before = {buffer.address for buffer in buffers_of(pool)}
    pool.reserve(rows, k, layout, copies, **more)
    pool.trim()
    found = [one for one in buffers_of(pool) if serves(one.spec, spec) and one.owner == "stock" and not one.held()]
    check(len(found) >= copies, f"{copies} buffers of {spec} were reserved, {len(found)} are there")
    for buffer in found:
        if buffer.address not in before and not buffer.spec.record and name in soak.poisoned:
            wrong = int((buffer.base.view(-1)[valid_bytes(buffer)] != NAN).sum())
            check(wrong == 0, f"{wrong} scales of a new buffer are not poisoned: {spec}")


@action()
def padded_columns(soak: Soak) -> None:
    """A GEMM whose k is more than what was quantized: columns beyond are padding too."""
    pool = soak.pool("plain", "strict", "raising", "repairing")
    at = soak.numbers.randrange(len(KS) - 1)
    rows, k, padded_k, layout = soak.numbers.choice(ROWS), KS[at], KS[at + 1], soak.numbers.choice(SWIZZLED)
    tiles, padded_tiles = -(-k // 64), -(-padded_k // 64)
    data, scales = nvfp4_quantize(soak.random(rows, k), soak.global_scale, layout=layout, pool=pool)
    linear = scales.view(-1)[offsets(rows, k // 16, tiles, layout, soak.device)]
    padded = torch.zeros(rows, padded_k // 2, dtype=torch.uint8, device=soak.device)
    padded[:, : k // 2] = data
    padded_scales = pool.acquire(rows, k, layout, padded_k=padded_k)
    clean = torch.zeros_like(padded_scales)
    for one in (padded_scales, clean):
        one.view(-1)[offsets(rows, k // 16, padded_tiles, layout, soak.device)] = linear
    check(
        torch.equal(padded_scales, clean),
        f"padding of [{rows}, {k}] in {layout.name}, padded to {padded_k}, is not zero",
    )
    weight, weight_scale = soak.weights[padded_k]
    expected = torch.empty(rows, weight.shape[0], dtype=torch.bfloat16, device=soak.device)
    reference.mm(padded, weight, clean, weight_scale, soak.alpha, expected, layout)
    y = mm_fp4(padded, weight.T, padded_scales, weight_scale.T, soak.alpha)
    close = torch.allclose(y, expected, rtol=2**-7, atol=1e-3 * float(expected.abs().max()))
    check(close, f"the GEMM of [{rows}, {k}] in {layout.name}, padded to {padded_k}")


@action()
def threads(soak: Soak) -> None:
    """Several threads at once, each on a stream of its own."""
    shared = soak.pool("plain", "raising")
    batches = [[soak.work(shared) for _ in range(4)] for _ in range(4)]
    soak.synchronize()
    errors: list[BaseException] = []

    def run(works: list[Work]) -> None:
        try:
            stream = torch.cuda.Stream(soak.device) if soak.on_cuda else None
            with torch.cuda.stream(stream):
                for work in works:
                    work.run()
        except BaseException as error:
            errors.append(error)

    running = [threading.Thread(target=run, args=(works,)) for works in batches]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    if errors:
        raise errors[0]
    soak.check_results([work for works in batches for work in works])


@action(cuda=True)
def compiled(soak: Soak) -> None:
    """``torch.compile`` over the opaque op."""
    if soak.compiled is None:
        linear = torch.compile(nvfp4_linear, dynamic=True)

        def call(*given: Any) -> Tensor:
            return linear(*given)

        soak.compiled = call
    pool = soak.pool("plain", "strict", "raising")
    work = Dense(soak, pool)
    work.run()
    weight, weight_scale = soak.weights[work.k]
    with use_pool(pool):
        y = soak.compiled(work.x, weight, weight_scale, soak.global_scale, soak.alpha)
    soak.check_results([work])
    valid = work.rows if work.valid is None else int(work.valid)
    near = torch.allclose(y[:valid], work.y[:valid], rtol=2**-6, atol=2e-3 * float(work.y.abs().max()))
    check(near, "a compiled call's result")


@action(cuda=True)
def two_streams(soak: Soak) -> None:
    """Calls on two streams at once, with one pool and the same shapes; one stream reads what the other was given."""
    pool = soak.pool("plain", "strict")
    pairs = [(soak.work(pool), soak.numbers.choice(soak.streams)) for _ in range(8)]
    written = offsets(5, 208 // 16, 4, SfLayout.layout_128x4, soak.device).flatten()
    for stream in soak.streams:
        stream.wait_stream(soak.main_stream())
    read = []
    for work, stream in pairs:
        with torch.cuda.stream(stream):
            work.run()
            scales = pool.acquire(5, 208, SfLayout.layout_128x4)
            scales.fill_(0)
            other = soak.streams[stream is soak.streams[0]]
            other.wait_stream(stream)
            pool.record_stream(scales, other)
            with torch.cuda.stream(other):
                torch.cuda._sleep(1_000_000)  # cycles: what comes next is launched long before the read
                read.append(scales.count_nonzero())
            del scales
            pool.acquire(5, 208, SfLayout.layout_128x4).view(-1).index_fill_(0, written, NAN)
    for stream in soak.streams:
        soak.main_stream().wait_stream(stream)
    soak.check_results([work for work, _ in pairs])
    check(not any(bool(one) for one in read), "a buffer was handed out while another stream read it")

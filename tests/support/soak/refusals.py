"""Limits, calls that are refused, and scales that no pool made."""

from __future__ import annotations

import contextlib

import torch
from support.soak.limits import device_memory_limit, memory_limit
from support.soak.oracle import NAN, LossError, NotApplicableError, check, offsets
from support.soak.registry import action
from support.soak.walk import POOLS, Soak
from support.soak.work import Dense
from torch import Tensor

from safealloc import (
    LayoutMismatchError,
    PaddingCorruptionError,
    PoolExhaustedError,
    SafeAllocError,
    SfLayout,
    mm_fp4,
    nvfp4_quantize,
    set_foreign_scales,
)


@action()
def beyond_the_cache(soak: Soak) -> None:
    """Buffers for one call: clean, within ``max_bytes``, seen by ``verify``, and gone when nobody holds them."""
    pool, rows, k = soak.pools["strict"], 4 * 1024 + 5, 1008
    limit, nbytes = POOLS["strict"]["max_bytes"], SfLayout.layout_128x4.nbytes(rows, k)
    held: list[Tensor] = []
    with contextlib.suppress(PoolExhaustedError):
        while len(held) * nbytes <= limit:
            held.append(pool.acquire(rows, k, SfLayout.layout_128x4))
    check(len(held) * nbytes <= limit, f"{len(held)} buffers of {nbytes} bytes for one call, the limit is {limit}")
    if not held:
        raise NotApplicableError("the pool is full")
    padding = torch.ones(nbytes, dtype=torch.bool, device=soak.device)
    padding[offsets(rows, k // 16, -(-k // 64), SfLayout.layout_128x4, soak.device)] = False
    one = soak.numbers.choice(held)
    for tensor in held:
        stale = int(tensor.view(-1)[padding].count_nonzero())
        check(stale == 0, f"{stale} bytes of padding are not zero in a buffer for one call")
    one.view(-1)[padding.nonzero()[-1]] = NAN
    try:
        pool.verify()
    except PaddingCorruptionError as error:
        check([found.address for found in error.corruptions] == [one.data_ptr()], f"named {error}")
    else:
        raise LossError("verify did not find a buffer for one call")
    pool.verify(repair=True)
    check(not bool(one.view(-1)[padding].any()), "a buffer for one call was not repaired")


@action()
def beyond_max_bytes(soak: Soak) -> None:
    """A reserve that fails half-way by ``max_bytes``."""
    pool = soak.pool("strict")
    with soak.unchanged(pool):
        try:
            pool.reserve((8, 1 << 14), (64, 1 << 13))
        except PoolExhaustedError:
            return
        raise LossError("a reserve went beyond max_bytes")


@action()
def out_of_memory(soak: Soak) -> None:
    """A reserve that fails half-way since the machine has no more memory."""
    pool = soak.pool("plain")
    rows, copies = (1 << 18, 6) if soak.on_cuda else (1 << 26, 2)  # 256 MiB or 64 GiB each
    limit = device_memory_limit(1 << 30) if soak.on_cuda else memory_limit(1 << 30)
    with soak.unchanged(pool, cache=False), limit:
        try:
            pool.reserve((1, rows), 1 << 14, copies=copies)
        except (torch.OutOfMemoryError, RuntimeError, MemoryError, OSError) as error:
            soak.counts[f"out of memory: {type(error).__name__}"] += 1
        else:
            raise LossError("a reserve of all memory went through")
    if soak.on_cuda:
        torch.cuda.empty_cache()


@action()
def wrong_calls(soak: Soak) -> None:
    """Calls that are refused before anything is launched."""
    pool = soak.pool("plain", "strict")
    work = Dense(soak, pool)
    x_fp4, scales = nvfp4_quantize(work.x, soak.global_scale, layout=work.layout, pool=pool)
    weight, weight_scale = soak.weights[work.k]
    before = scales.clone()
    one_row_more = torch.cat([x_fp4, x_fp4[:1]])
    with soak.unchanged(pool):
        for error, call in (
            (
                LayoutMismatchError,
                lambda: mm_fp4(
                    x_fp4,
                    weight.T,
                    scales,
                    weight_scale.T,
                    soak.alpha,
                    use_8x4_sf_layout=work.layout is not SfLayout.layout_8x4,
                ),
            ),
            (LayoutMismatchError, lambda: mm_fp4(one_row_more, weight.T, scales, weight_scale.T, soak.alpha)),
            (ValueError, lambda: pool.acquire(0, 64, SfLayout.layout_128x4)),
            (ValueError, lambda: pool.reserve(4, 63)),
            (TypeError, lambda: nvfp4_quantize([1.0], soak.global_scale, pool=pool)),
        ):
            try:
                call()
            except error:
                continue
            raise LossError(f"a call that has to be a {error.__name__} went through")
    check(torch.equal(scales, before), "a refused call wrote the scales")


@action()
def foreign(soak: Soak) -> None:
    """Scales that no pool made, with NaN in their padding: refused, or repaired in place, with the result of clean ones."""
    work = Dense(soak, soak.pool())
    work.run()
    if work.layout.nbytes(work.rows, work.k) == work.rows * work.k // 16:
        raise NotApplicableError("no padding")
    places = offsets(work.rows, work.k // 16, work.scales.shape[1] // 4, work.layout, soak.device)
    poisoned = torch.full_like(work.scales, NAN)
    poisoned.view(-1)[places] = work.scales.view(-1)[places]
    weight, weight_scale = soak.weights[work.k]
    work.y.fill_(NAN)

    def multiply() -> None:
        given = (work.data, weight.T, poisoned, weight_scale.T, soak.alpha)
        mm_fp4(*given, out=work.y, use_8x4_sf_layout=work.layout is SfLayout.layout_8x4)

    mode, before = set_foreign_scales("error"), poisoned.clone()
    try:
        multiply()
    except SafeAllocError:
        check(torch.equal(poisoned, before), "refused foreign scales were written")
    else:
        raise LossError("foreign scales were taken where they are an error")
    finally:
        set_foreign_scales(mode)
    multiply()
    soak.check_results([work])
    check(torch.equal(poisoned, work.scales), "padding of foreign scales was not zeroed in place")

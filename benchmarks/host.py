"""``safealloc bench``: what one call costs the host, without a wait for the device.

Batches of calls in turn, so that drift meets all, with the garbage collector off in a batch and the device idle before it.
Kernels are small enough that the device keeps up with the host, which else would wait for its queue.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import time
import timeit
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from benchmarks import timing
from benchmarks.summary import at_most, summary
from safealloc import _optional
from safealloc.formats.format import BLOCK_SIZE
from safealloc.formats.layout import SfLayout, short
from safealloc.integrations.vllm.ops import scales as vllm_scales
from safealloc.integrations.vllm.serve import allocator
from safealloc.integrations.vllm.startup import Steps
from safealloc.ops.backends import Call, triton_refusal
from safealloc.ops.linear import nvfp4_linear
from safealloc.ops.quantize import nvfp4_quantize
from safealloc.pool.default import default_pool
from safealloc.pool.pool import ScalePool

Progress = Callable[[str, float], None]
"""Told what is measured next, and which share of all is done."""

ROWS, K, LAYOUT = 8, 4096, SfLayout.layout_128x4
"""Of every scale buffer; only a fill's device time depends on them."""

LINEAR_N, LINEAR_K = 128, 512  # so few that the device is done before the host comes again

EMPTY, ZEROS, ACQUIRE, SIDE_STREAM, OP, HOOK = (
    "torch.empty",
    "torch.zeros",
    "pool.acquire",
    "pool.acquire, side stream",
    "torch.ops.safealloc.acquire",
    "hook in vLLM",
)
LAUNCH, LAUNCHER, QUANTIZE, QUANTIZE_DEFAULT, LINEAR = (
    "bare Triton launch",
    "triton_quantize.quantize",
    "nvfp4_quantize",
    "nvfp4_quantize, default pool",
    "nvfp4_linear",
)
_CONTEXT = "vllm.forward_context"


@dataclass(frozen=True, slots=True)
class Candidate:
    """One call.

    Attributes:
        name: in tables, JSON and pictures.
        call: the call.
        stream: that is current meanwhile; ``None``: the default one.
    """

    name: str
    call: Callable[[], object]
    stream: torch.cuda.Stream | None = None


def run(device: torch.device, quick: bool, progress: Progress) -> dict[str, Any]:
    """Measure everything.

    Args:
        device: a CUDA device; on a CPU what launches kernels is left out.
        quick: fewer and smaller batches.
        progress: told before each batch.

    Returns:
        What was measured, as the JSON has it: ``calls`` by name, ``not_measured`` and ``targets``.
    """
    batches, calls = (5, 500) if quick else (15, 2000)
    not_measured: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        if device.type == "cuda":
            stack.enter_context(torch.cuda.device(device))
        pool = stack.enter_context(ScalePool(device))
        every = [*_allocations(device, pool), *_launches(device, pool, not_measured)]
        stack.enter_context(vllm_step(device))  # not before: what imports vLLM must see all of it
        times = alternate(every, batches, calls, device, progress)
    return {
        "rows": ROWS,
        "k": K,
        "layout": short(LAYOUT),
        "batches": batches,
        "calls_a_batch": calls,
        "calls": {name: summary(samples) for name, samples in times.items()},
        "not_measured": not_measured,
        "targets": targets(times),
    }


def alternate(
    every: Sequence[Candidate], batches: int, calls: int, device: torch.device, progress: Progress
) -> dict[str, list[float]]:
    """Microseconds a call of each candidate in each batch."""
    timers = {one.name: timeit.Timer(one.call, timer=time.perf_counter_ns) for one in every}  # switches the gc off
    times: dict[str, list[float]] = {one.name: [] for one in every}
    for batch in range(-1, batches):  # the first, short, compiles and fills caches
        progress("warm-up" if batch < 0 else f"batch {batch + 1} of {batches}", max(batch, 0) / batches)
        for one in every:
            with torch.cuda.stream(one.stream):
                _synchronize(device)
                taken = timers[one.name].timeit(20 if batch < 0 else calls)
                if batch >= 0:
                    times[one.name].append(taken / calls / 1e3)
    _synchronize(device)
    progress("done", 1.0)
    return times


def targets(times: Mapping[str, Sequence[float]]) -> list[dict[str, Any]]:
    """What the numbers have to reach; ratios are of one batch.

    Args:
        times: microseconds a call in each batch, by name.
    """

    def ratio(ours: str, theirs: str) -> list[float]:
        return [timing.ratio(times[ours], times[theirs])] if ours in times and theirs in times else []

    return [
        at_most("pool.acquire, a hit: microseconds", 1.0, [timing.median(times[ACQUIRE])]),
        at_most("pool.acquire against torch.empty: times", round(1 / 3, 4), ratio(ACQUIRE, EMPTY)),
        at_most("hook in vLLM against torch.empty: times", 2.0, ratio(HOOK, EMPTY)),
        at_most("nvfp4_quantize against a bare Triton launch: times", 2.0, ratio(QUANTIZE, LAUNCH)),
    ]


@contextlib.contextmanager
def vllm_step(device: torch.device) -> Iterator[None]:
    """The allocator as a worker of vLLM has it while its model runs; afterwards as it was before."""
    before, context = dict(vars(allocator)), sys.modules.get(_CONTEXT)
    allocator.enabled = True
    allocator.steps = Steps(rows=(ROWS,), max_rows=ROWS)
    allocator.pool = default_pool(device)  # known already, so that it is not told that captures share a handle
    allocator.max_rows, allocator.start_up, allocator.logs_growth, allocator.loading = ROWS, None, False, 0
    running = ModuleType(_CONTEXT)
    running._forward_context = object()  # type: ignore[attr-defined]
    sys.modules[_CONTEXT] = running
    try:
        yield
    finally:
        vars(allocator).update(before)
        del sys.modules[_CONTEXT]
        if context is not None:
            sys.modules[_CONTEXT] = context


def _allocations(device: torch.device, pool: ScalePool) -> list[Candidate]:
    shape = LAYOUT.padded_shape(ROWS, K)
    acquire = functools.partial(pool.acquire, ROWS, K, LAYOUT)
    every = [
        Candidate(EMPTY, functools.partial(torch.empty, shape, dtype=torch.uint8, device=device)),
        Candidate(ZEROS, functools.partial(torch.zeros, shape, dtype=torch.uint8, device=device)),
        Candidate(ACQUIRE, acquire),
    ]
    if device.type == "cuda":
        every.append(Candidate(SIDE_STREAM, acquire, torch.cuda.Stream(device)))
    every.append(Candidate(OP, functools.partial(torch.ops.safealloc.acquire, ROWS, K, int(LAYOUT), device)))
    every.append(Candidate(HOOK, functools.partial(vllm_scales, ROWS, K, device, None)))
    return every + [Candidate(name, functools.partial(call, ROWS, K, device, True)) for name, call in _vllms_own()]


def _vllms_own() -> list[tuple[str, Callable[[int, int, torch.device, bool], Tensor]]]:
    """What vLLM calls by itself: its function where vLLM is installed, else stand-ins for both that its releases have."""
    custom_ops = _optional.load("vllm._custom_ops")
    if not isinstance(custom_ops, str):
        version = getattr(_optional.load("vllm"), "__version__", "of unknown version")
        return [(f"vLLM {version}'s own", custom_ops.create_fp4_scale_tensor)]
    return [
        ("torch.empty as vLLM calls it (stand-in)", functools.partial(_create_fp4_scale_tensor, torch.empty)),
        ("torch.zeros as vLLM calls it (stand-in)", functools.partial(_create_fp4_scale_tensor, torch.zeros)),
    ]


def _create_fp4_scale_tensor(
    allocate: Callable[..., Tensor], m: int, n: int, device: torch.device, is_sf_swizzled_layout: bool
) -> Tensor:
    """The arithmetic of vLLM's (0.32.0)."""
    if not is_sf_swizzled_layout:
        return torch.empty((m, n // BLOCK_SIZE), device=device, dtype=torch.uint8)
    rounded_m = (m + 127) // 128 * 128
    rounded_n = (n // BLOCK_SIZE + 3) // 4 * 4
    return allocate((rounded_m, rounded_n // 4), device=device, dtype=torch.int32)


def _launches(device: torch.device, pool: ScalePool, not_measured: dict[str, str]) -> list[Candidate]:
    """What launches a Triton kernel; where none can run, why goes to ``not_measured``."""
    reason = triton_refusal(Call(device, LAYOUT))
    if device.type != "cuda" and reason is None:
        reason = "Triton's interpreter launches nothing"
    if reason is not None:
        not_measured.update(dict.fromkeys((LAUNCH, LAUNCHER, QUANTIZE, QUANTIZE_DEFAULT, LINEAR), reason))
        return []
    from safealloc.kernels import triton_quantize

    x = torch.randn(ROWS, K, dtype=torch.bfloat16, device=device)
    x_fp4 = torch.empty(ROWS, K // 2, dtype=torch.uint8, device=device)
    scales = torch.zeros(LAYOUT.padded_shape(ROWS, K), dtype=torch.uint8, device=device)  # the pool's stay free
    global_scale = torch.tensor([448 * 6 / 5.0], device=device)
    narrow = x[:, :LINEAR_K].contiguous()
    weight = torch.randn(LINEAR_N, LINEAR_K, dtype=torch.bfloat16, device=device)
    weight_fp4, weight_scale = nvfp4_quantize(weight, global_scale, pool=pool, backend="triton")
    alpha = 1 / global_scale**2
    return [
        Candidate(LAUNCH, bare_launch(x, global_scale, x_fp4, scales)),
        Candidate(LAUNCHER, functools.partial(triton_quantize.quantize, x, global_scale, x_fp4, scales, LAYOUT)),
        Candidate(QUANTIZE, functools.partial(nvfp4_quantize, x, global_scale, layout=LAYOUT, pool=pool)),
        Candidate(QUANTIZE_DEFAULT, functools.partial(nvfp4_quantize, x, global_scale, layout=LAYOUT)),
        Candidate(LINEAR, functools.partial(nvfp4_linear, narrow, weight_fp4, weight_scale, global_scale, alpha)),
    ]


def bare_launch(x: Tensor, global_scale: Tensor, x_fp4: Tensor, scales: Tensor) -> Callable[[], object]:
    """The quantization kernel by Triton's own launcher alone: its arguments are those of one call of ``quantize``."""
    from safealloc.kernels import triton_quantize

    kernel = triton_quantize._quantize
    noted = _Noting(kernel)
    triton_quantize._quantize = noted
    try:
        triton_quantize.quantize(x, global_scale, x_fp4, scales, LAYOUT)
    finally:
        triton_quantize._quantize = kernel
    (launch,) = noted.launches
    return launch


class _Noting:
    """In place of a Triton kernel: notes its launches instead."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.launches: list[Callable[[], object]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def note(*arguments: Any, **options: Any) -> None:
            self.launches.append(lambda: self.kernel[grid](*arguments, **options))

        return note


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

"""``python -m benchmarks host``: what one call costs the host, without waiting for the device.

Candidates alternate in batches of calls, so that drift affects all of them alike. The garbage collector is off during a
batch, and the device is idle before it. Kernels are so small that the device keeps up with the host, which would otherwise
wait for its queue.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import random
import sys
import time
import timeit
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks import optional, timing
from benchmarks.summary import at_most, summary
from safealloc.commands.report import Progress
from safealloc.formats.format import BLOCK_SIZE
from safealloc.formats.layout import SfLayout, short
from safealloc.integrations.startup import Steps
from safealloc.integrations.vllm import ops as vllm_ops
from safealloc.integrations.vllm.engine import Engine
from safealloc.integrations.vllm.serve import Allocator
from safealloc.ops.backends import Call, triton_refusal
from safealloc.ops.linear import nvfp4_linear
from safealloc.ops.quantize import nvfp4_quantize
from safealloc.pool.default import default_pool
from safealloc.pool.pool import ScalePool

ROWS, K, LAYOUT = 8, 4096, SfLayout.layout_128x4
"""The shape of every scale buffer; only the device time of a fill depends on it."""

LINEAR_N, LINEAR_K = 128, 512  # so small that the device is done before the next call

EMPTY, ZEROS, ACQUIRE, SIDE_STREAM, OP, HOOK = (
    "torch.empty",
    "torch.zeros",
    "pool.acquire",
    "pool.acquire, side stream",
    "torch.ops.safealloc.acquire",
    "hook in vLLM",
)
EAGER, EAGER_OWN = "hook in vLLM outside captures, 1 to 1024 rows", "what it calls there, 1 to 1024 rows"
LAUNCH, LAUNCHER, QUANTIZE, QUANTIZE_DEFAULT, LINEAR = (
    "bare Triton launch",
    "triton_quantize.quantize",
    "nvfp4_quantize",
    "nvfp4_quantize, default pool",
    "nvfp4_linear",
)
EAGER_FUSED = "hook behind a fused producer outside captures, 1 to 1024 rows"
_CONTEXT = "vllm.forward_context"


@dataclass(frozen=True, slots=True)
class Candidate:
    """One call.

    Attributes:
        name: in tables, JSON and pictures.
        call: the call.
        stream: current during the call; ``None`` is the default stream.
    """

    name: str
    call: Callable[[], object]
    stream: torch.cuda.Stream | None = None


def run(device: torch.device, quick: bool, progress: Progress) -> dict[str, Any]:
    """Measure everything.

    Args:
        device: a CUDA device; on a CPU, candidates that launch kernels are left out.
        quick: fewer and smaller batches.
        progress: called before each batch.

    Returns:
        What was measured, as the JSON has it: ``calls`` by name, ``not_measured`` and ``targets``.
    """
    batches, calls = (5, 500) if quick else (15, 2000)
    not_measured: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        if device.type == "cuda":
            stack.enter_context(torch.cuda.device(device))
        pool = stack.enter_context(ScalePool(device))
        candidates = [*allocations(device, pool), *_launches(device, pool, not_measured)]
        stack.enter_context(vllm_step(device))  # last: the candidates may import vLLM's own module of that name
        times = alternate(candidates, batches, calls, device, progress)
    return {
        "rows": ROWS,
        "k": K,
        "layout": short(LAYOUT),
        "batches": batches,
        "calls_per_batch": calls,
        "calls": {name: summary(samples) for name, samples in times.items()},
        "not_measured": not_measured,
        "targets": targets(times),
    }


def alternate(
    candidates: Sequence[Candidate], batches: int, calls: int, device: torch.device, progress: Progress
) -> dict[str, list[float]]:
    """Microseconds per call of each candidate in each batch."""
    timers = {one.name: timeit.Timer(one.call, timer=time.perf_counter_ns) for one in candidates}  # without the gc
    times: dict[str, list[float]] = {one.name: [] for one in candidates}
    for batch in range(-1, batches):  # the first, short, compiles and fills caches
        progress("warm-up" if batch < 0 else f"batch {batch + 1} of {batches}", max(batch, 0) / batches)
        for one in candidates:
            with torch.cuda.stream(one.stream):
                _synchronize(device)
                nanoseconds = timers[one.name].timeit(20 if batch < 0 else calls)
                if batch >= 0:
                    times[one.name].append(nanoseconds / calls / 1e3)
    _synchronize(device)
    progress("done", 1.0)
    return times


def targets(times: Mapping[str, Sequence[float]]) -> list[dict[str, Any]]:
    """The targets, and what was reached; ratios are taken within a batch.

    Args:
        times: microseconds per call in each batch, by name.
    """

    def ratio(ours: str, theirs: str) -> list[float]:
        return [timing.ratio(times[ours], times[theirs])] if ours in times and theirs in times else []

    return [
        at_most("pool.acquire, a hit: microseconds", 1.0, [timing.median(times[ACQUIRE])]),
        at_most("pool.acquire against torch.empty: times", round(1 / 3, 4), ratio(ACQUIRE, EMPTY)),
        at_most("hook in vLLM against torch.empty: times", 2.0, ratio(HOOK, EMPTY)),
        at_most("hook in vLLM outside captures against what it calls there: times", 1.2, ratio(EAGER, EAGER_OWN)),
        at_most("nvfp4_quantize against a bare Triton launch: times", 2.0, ratio(QUANTIZE, LAUNCH)),
    ]


@contextlib.contextmanager
def vllm_step(device: torch.device) -> Iterator[None]:
    """Inside, the hooks have an allocator as in a vLLM worker that captures its model."""
    allocator = Allocator()
    allocator.enabled = True
    allocator.vllm_scale_tensor = _vllm_functions()[0][1]
    allocator.engine = Engine(Steps({ROWS: 1}), device)
    allocator.engine.pool = default_pool(device)
    context = sys.modules.get(_CONTEXT)
    sys.modules[_CONTEXT] = SimpleNamespace(_forward_context=object())  # how vLLM shows that a model runs
    try:
        with mock.patch.object(vllm_ops, "allocator", allocator):
            yield
    finally:
        del sys.modules[_CONTEXT]
        if context is not None:
            sys.modules[_CONTEXT] = context


def allocations(device: torch.device, pool: ScalePool) -> list[Candidate]:
    """The candidates that allocate scales, and launch nothing but fills."""
    shape = LAYOUT.padded_shape(ROWS, K)
    acquire = functools.partial(pool.acquire, ROWS, K, LAYOUT)
    candidates = [
        Candidate(EMPTY, functools.partial(torch.empty, shape, dtype=torch.uint8, device=device)),
        Candidate(ZEROS, functools.partial(torch.zeros, shape, dtype=torch.uint8, device=device)),
        Candidate(ACQUIRE, acquire),
    ]
    if device.type == "cuda":
        candidates.append(Candidate(SIDE_STREAM, acquire, torch.cuda.Stream(device)))
    candidates.append(Candidate(OP, functools.partial(torch.ops.safealloc.acquire, ROWS, K, int(LAYOUT), device)))
    candidates.append(Candidate(HOOK, functools.partial(vllm_ops.scales, ROWS, K, device, None)))
    rows = random.Random(0).choices(range(1, 1025), k=4096)
    theirs = _vllm_functions()[0][1]
    candidates += [
        Candidate(EAGER, functools.partial(outside_captures, itertools.cycle(rows), vllm_ops.scales, device, None)),
        Candidate(EAGER_OWN, functools.partial(outside_captures, itertools.cycle(rows), theirs, device, True)),
    ]
    if device.type == "cuda":  # the kernel that zeroes the padding is launched too
        fused = functools.partial(vllm_ops.scales, fused=True)
        candidates.append(
            Candidate(EAGER_FUSED, functools.partial(outside_captures, itertools.cycle(rows), fused, device, None))
        )
    own = [Candidate(name, functools.partial(call, ROWS, K, device, True)) for name, call in _vllm_functions()]
    return candidates + own


def outside_captures(rows: Iterator[int], function: Callable[..., Tensor], *rest: Any) -> Tensor:
    """Call a function for the next number of rows while no engine captures."""
    allocator = vllm_ops.allocator
    engine, allocator.engine = allocator.engine, None
    try:
        return function(next(rows), K, *rest)
    finally:
        allocator.engine = engine


def _vllm_functions() -> list[tuple[str, Callable[[int, int, torch.device, bool], Tensor]]]:
    """The function that vLLM calls, where it is installed; else stand-ins for the two versions in its releases."""
    custom_ops = optional.load("vllm._custom_ops")
    if not isinstance(custom_ops, str):
        version = getattr(optional.load("vllm"), "__version__", "of unknown version")
        return [(f"vLLM {version}'s own", custom_ops.create_fp4_scale_tensor)]
    return [
        ("torch.empty as vLLM calls it (stand-in)", functools.partial(create_fp4_scale_tensor, torch.empty)),
        ("torch.zeros as vLLM calls it (stand-in)", functools.partial(create_fp4_scale_tensor, torch.zeros)),
    ]


def create_fp4_scale_tensor(
    allocate: Callable[..., Tensor], m: int, n: int, device: torch.device, is_sf_swizzled_layout: bool
) -> Tensor:
    """As vLLM's function of this name (0.32.0), which calls ``torch.empty`` or ``torch.zeros`` as ``allocate``."""
    if not is_sf_swizzled_layout:
        return torch.empty((m, n // BLOCK_SIZE), device=device, dtype=torch.uint8)
    rounded_m = (m + 127) // 128 * 128
    rounded_n = (n // BLOCK_SIZE + 3) // 4 * 4
    return allocate((rounded_m, rounded_n // 4), device=device, dtype=torch.int32)


def _launches(device: torch.device, pool: ScalePool, not_measured: dict[str, str]) -> list[Candidate]:
    """The candidates that launch a Triton kernel; where none can run, ``not_measured`` gets the reason."""
    reason = triton_refusal(Call(device, LAYOUT))
    if device.type != "cuda" and reason is None:
        reason = "Triton's interpreter launches nothing"
    if reason is not None:
        not_measured.update(dict.fromkeys((LAUNCH, LAUNCHER, QUANTIZE, QUANTIZE_DEFAULT, LINEAR), reason))
        return []
    from safealloc.kernels import triton_quantize

    x = torch.randn(ROWS, K, dtype=torch.bfloat16, device=device)
    x_fp4 = torch.empty(ROWS, K // 2, dtype=torch.uint8, device=device)
    scales = torch.zeros(LAYOUT.padded_shape(ROWS, K), dtype=torch.uint8, device=device)  # not a pool buffer
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
    """The launch that ``triton_quantize.quantize`` makes of these arguments, without the Python before it."""
    from triton import JITFunction

    from safealloc.kernels import triton_quantize

    launches: list[Callable[[], object]] = []

    def record(kernel: Any, *arguments: Any, grid: tuple[int, ...], warmup: bool, **options: Any) -> None:
        launches.append(lambda: kernel[grid](*arguments, **options))

    with mock.patch.object(JITFunction, "run", record):
        triton_quantize.quantize(x, global_scale, x_fp4, scales, LAYOUT)
    (launch,) = launches
    return launch


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

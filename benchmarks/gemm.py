"""Latency of the Triton GEMM as a node of a CUDA graph, against the bytes that it must move, and vLLM's emulation.

Each call in a graph multiplies by another weight, and no cache holds them all: at decode a layer's weight comes from memory
at every step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks import optional, timing
from benchmarks.summary import summary
from safealloc.formats.layout import MAX_ROWS_8X4, SfLayout, short
from safealloc.kernels import triton_gemm
from safealloc.pool.pool import ScalePool

EMULATION = "vLLM's emulation"
_EMULATION_MODULE = "vllm.model_executor.layers.quantization.utils.nvfp4_emulation_utils"

_WEIGHT_BYTES = 200_000_000
"""Four times the L2 cache of an H200."""

Emulation = Callable[..., Tensor]
"""``run_nvfp4_emulations``: the weight to bfloat16, and a matmul."""


def emulation(device: torch.device, pool: ScalePool) -> Emulation | str:
    """The GEMM that vLLM falls back to where none of its kernels run, tried once in a capture; or why it cannot be."""
    module = optional.load(_EMULATION_MODULE)
    if isinstance(module, str):
        return module
    run: Emulation | None = getattr(module, "run_nvfp4_emulations", None)
    if run is None:
        return "this vLLM has no run_nvfp4_emulations"
    x, one = torch.ones(1, 256, dtype=torch.bfloat16, device=device), torch.ones(1, device=device)
    weight, scales = random_weights(128, 256, 1, device)[0]
    try:
        timing.captured(_emulated(run, x, one, [(weight, scales)]), pool)
    except Exception as error:
        return f"run_nvfp4_emulations failed: {type(error).__name__}: {error}"
    return run


def bytes_read(m: int, n: int, k: int) -> int:
    """The weight and the activation once: 1/2 + 1/16 bytes per element."""
    return (n + m) * k * 9 // 16


def bytes_written(m: int, n: int) -> int:
    """A bfloat16 result."""
    return 2 * m * n


def measure(
    pool: ScalePool,
    copy: timing.Copy,
    emulation: Emulation | None,
    m: int,
    n: int,
    k: int,
    rounds: int,
    replays: int,
) -> dict[str, Any]:
    """One shape, alternating with a copy."""
    device = pool.device
    layout = SfLayout.layout_8x4 if m <= MAX_ROWS_8X4 else SfLayout.layout_128x4  # as nvfp4_linear chooses
    weights = random_weights(n, k, copies(n, k), device)
    a, a_scales = _random_fp4(m, k, layout, device)
    alpha = torch.ones(1, device=device)
    out = torch.empty(m, n, dtype=torch.bfloat16, device=device)

    def step() -> None:
        for weight, scales in weights:
            triton_gemm.mm(a, weight, a_scales, scales, alpha, out, layout)

    graphs = {"copy": copy.graph, "gemm": timing.captured(step, pool)}
    if emulation is not None:
        x = torch.randn(m, k, dtype=torch.bfloat16, device=device)
        graphs[EMULATION] = timing.captured(_emulated(emulation, x, alpha, weights), pool)
    times = timing.interleaved(graphs, rounds, replays)
    moved = bytes_read(m, n, k) + bytes_written(m, n)
    us = summary([time / len(weights) for time in times["gemm"]])
    share = timing.ratio(times["copy"], times["gemm"]) * len(weights) * moved / copy.nbytes
    result = {
        "m": m,
        "n": n,
        "k": k,
        "layout": short(layout),
        "weights": len(weights),
        **us,
        "bytes_read": bytes_read(m, n, k),
        "bytes_written": bytes_written(m, n),
        "bytes_per_second": round(1e6 * moved / us["us"]),
        "copy_bytes_per_second": round(1e6 * copy.nbytes / timing.median(times["copy"])),
        "share_of_copy": round(share, 4),
        "baselines": {},
    }
    if EMULATION in times:
        emulated = summary([time / len(weights) for time in times[EMULATION]])
        result["baselines"] = {
            EMULATION: emulated | {"ratio_to_ours": round(timing.ratio(times[EMULATION], times["gemm"]), 4)}
        }
    return result


def copies(n: int, k: int) -> int:
    """How many weights of ``[n, k]`` a graph needs so that together they exceed 200 MB."""
    return _WEIGHT_BYTES // bytes_read(0, n, k) + 1


def _emulated(run: Emulation, x: Tensor, one: Tensor, weights: Sequence[tuple[Tensor, Tensor]]) -> Callable[[], None]:
    """Multiply by each weight. Scales are read in the linear layout, which vLLM keeps here; only the time matters."""
    rows, k = weights[0][0].shape[0], x.shape[1]
    linear = [(weight, scales.view(torch.float8_e4m3fn).view(rows, k // 16)) for weight, scales in weights]

    def step() -> None:
        for weight, scales in linear:
            run(x, one, weight, scales, one, swizzle=False)

    return step


def random_weights(n: int, k: int, count: int, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """Codes, uint8 ``[n, k // 2]``, and scales in 128x4 of as many weights."""
    return [_random_fp4(n, k, SfLayout.layout_128x4, device) for _ in range(count)]


def _random_fp4(rows: int, k: int, layout: SfLayout, device: torch.device) -> tuple[Tensor, Tensor]:
    """Random codes, uint8 ``[rows, k // 2]``, and scales from 1/2 to 2; a constant would draw less power."""
    codes = torch.randint(256, (rows, k // 2), dtype=torch.uint8, device=device)
    one_half, two = 0x30, 0x40
    return codes, torch.randint(one_half, two, layout.padded_shape(rows, k), dtype=torch.uint8, device=device)

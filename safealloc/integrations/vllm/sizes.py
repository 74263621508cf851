"""Sizes that vLLM chooses, in one place."""

from __future__ import annotations

from typing import Any

MAX_CAPTURE_SIZES = (512, 1024)
"""The largest batch that vLLM captures: 1024 on compute capability 10.x, 512 elsewhere (vLLM 0.33.0)."""

MAX_TOKENS_PER_EXPERT = 163840
"""Rows of vLLM's expert scales, for each expert a token: its default VLLM_MAX_TOKENS_PER_EXPERT_FP4_MOE (vLLM 0.32.0)."""


def capture_sizes(largest: int) -> tuple[int, ...]:
    """The batch sizes up to ``largest`` that vLLM captures: 1, 2, 4, then by 8 below 256, by 16 from there (vLLM 0.33.0)."""
    sizes = (1, 2, 4, *range(8, 256, 8), *range(256, largest + 1, 16))
    return tuple(size for size in sizes if size <= largest)


def captured_rows(vllm_config: Any, query: int, *, second_runner: bool) -> tuple[int, ...]:
    """Rows of the CUDA graphs that an engine will capture, in ascending order.

    Speculative decoding changes ``cudagraph_capture_sizes`` after vLLM has measured memory. The rules are those of
    ``CompilationConfig.adjust_cudagraph_sizes_for_spec_decode`` and ``CudagraphDispatcher.initialize_cudagraph_keys`` (model
    runner V1), and of ``CudaGraphManager._init_candidates`` (V2), in vLLM 0.32.0.

    Args:
        vllm_config: a ``VllmConfig``.
        query: tokens of a request in a decode step.
        second_runner: model runner V2.
    """
    compilation = vllm_config.compilation_config
    mode, sizes = compilation.cudagraph_mode, sorted(compilation.cudagraph_capture_sizes or ())
    if mode is None or not mode.value or not sizes or vllm_config.model_config.enforce_eager:
        return ()
    largest = getattr(compilation, "max_cudagraph_capture_size", None) or sizes[-1]
    most_decoded = query * vllm_config.scheduler_config.max_num_seqs
    rounded = sorted({-(-size // query) * query for size in sizes})
    if second_runner:
        decoded = [size for size in rounded if size <= min(most_decoded, largest)]
    else:
        if query > 1 and _is_full(mode.decode_mode()):
            sizes = [size for size in rounded if size <= largest] or [query]
        decoded = [size for size in sizes if query <= size <= most_decoded]
    mixed = sizes if mode.mixed_mode().value else []
    separate = decoded if mode.separate_routine() and _is_full(mode.decode_mode()) else []
    return tuple(sorted({*mixed, *separate}))


def _is_full(mode: Any) -> bool:
    return bool(mode.name == "FULL")

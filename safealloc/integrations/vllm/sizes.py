"""Sizes that vLLM chooses by default, in one place."""

from __future__ import annotations

MAX_CAPTURE_SIZES = (512, 1024)
"""The largest batch that vLLM captures: 1024 on compute capability 10.x, 512 elsewhere (vLLM 0.33.0)."""

MAX_TOKENS_PER_EXPERT = 163840
"""Rows of vLLM's expert scales, for each expert a token: its default VLLM_MAX_TOKENS_PER_EXPERT_FP4_MOE (vLLM 0.32.0)."""


def capture_sizes(largest: int) -> tuple[int, ...]:
    """The batch sizes up to ``largest`` that vLLM captures: 1, 2, 4, then by 8 below 256, by 16 from there (vLLM 0.33.0)."""
    sizes = (1, 2, 4, *range(8, 256, 8), *range(256, largest + 1, 16))
    return tuple(size for size in sizes if size <= largest)

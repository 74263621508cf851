"""How vLLM runs a model, and what it chooses by default: batch sizes, the kernels of routed experts (vLLM 0.32.0)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from safealloc.integrations.vllm.sizes import MAX_CAPTURE_SIZES, capture_sizes

GPUS = {
    **dict.fromkeys(("a100", "a6000"), 8),
    **dict.fromkeys(("h100", "h200", "gh200"), 9),
    **dict.fromkeys(("b200", "gb200", "b300", "gb300"), 10),
    "thor": 11,
    **dict.fromkeys(("rtx-5090", "rtx-pro-6000", "dgx-spark"), 12),
}
"""Major compute capability by name."""

FIRST_WITH_NVFP4 = 10
"""GPUs of a lower compute capability run NVFP4 weights with Marlin, whose activations stay in bfloat16."""

CUTLASS = "VLLM_CUTLASS"  # quantizes the rows of experts into scales whose padding nobody zeroes
FLASHINFER_CUTLASS = "FLASHINFER_CUTLASS"  # quantizes its input as linear layers do, without all2all

_DEFAULT_BACKENDS = {10: "FLASHINFER_TRTLLM", 11: CUTLASS, 12: FLASHINFER_CUTLASS}
"""With FlashInfer; without it all of them take vLLM's CUTLASS (``oracle/nvfp4.py``)."""

MOE_BACKENDS = ("auto", "cutlass", "flashinfer_trtllm", "flashinfer_cutlass", "flashinfer_cutedsl", "marlin")
"""As ``--moe-backend`` has them: those that vLLM can use for NVFP4 on such GPUs."""


def capability(gpu: str) -> int:
    """The major compute capability of a GPU that is named like :data:`GPUS`, or "10.0". Raises: ValueError: neither."""
    name = gpu.lower()
    major, _, minor = name.partition(".")
    if name in GPUS:
        return GPUS[name]
    if major.isdecimal() and minor.isdecimal():
        return int(major)
    raise ValueError(f"must be a compute capability such as 10.0, or one of {', '.join(GPUS)}, got {gpu!r}")


@dataclass(frozen=True, slots=True)
class Deployment:
    """How vLLM runs a model."""

    sizes: tuple[int, ...]  # captured batch sizes, in tokens
    tensor: int = 1  # tensor-parallel ranks
    data: int = 1  # data-parallel ranks
    expert_parallel: bool = False
    capability: int | None = None  # the GPU's major compute capability, if it is known
    moe_backend: str = "auto"  # one of MOE_BACKENDS
    layout_rule: str = "128x4"  # or "trtllm": 8x4 up to 32 rows
    engine: str = "vllm"  # or "sglang"

    @property
    def expert_ranks(self) -> int:
        """Ranks that share the routed experts: vLLM divides them among data-parallel ranks too."""
        return self.tensor * self.data

    @property
    def row_ranks(self) -> int:
        """Ranks that share the rows of shared experts, each with whole ones (``use_sequence_parallel_moe``)."""
        return self.tensor if self.expert_parallel and self.data > 1 else 1

    @property
    def expert_kernel(self) -> str | None:
        """What runs NVFP4 experts; ``None`` where the GPU decides and is not known."""
        if self.moe_backend != "auto":
            return CUTLASS if self.moe_backend == "cutlass" else self.moe_backend.upper()
        return None if self.capability is None else _DEFAULT_BACKENDS.get(self.capability, "MARLIN")


def default_sizes(capability: int | None, spec_tokens: int, max_num_seqs: int) -> tuple[int, ...]:
    """Batch sizes in tokens, before decode graphs have theirs (``VllmConfig._set_cudagraph_sizes``)."""
    largest, query = MAX_CAPTURE_SIZES[capability == 10], spec_tokens + 1
    most = min(2 * max_num_seqs * query, largest)
    if spec_tokens:
        requests = min(max_num_seqs, largest)
        decodes = [query * count for count in (*capture_sizes(requests), requests)]
    else:
        decodes = [max_num_seqs]
    return tuple(sorted({*capture_sizes(most), *(size for size in decodes if size <= most)}))


def with_decode_sizes(sizes: Iterable[int], spec_tokens: int, max_num_seqs: int) -> tuple[int, ...]:
    """Sizes, with those of decode graphs: each is rounded up to whole requests of ``spec_tokens + 1`` tokens.

    Model runner V2 captures both (``CudaGraphManager._init_candidates``); V1, which is not planned, the rounded ones only.
    """
    given, query = set(sizes), spec_tokens + 1
    rounded = {-(-size // query) * query for size in given}
    return tuple(sorted(given | {size for size in rounded if size <= min(max(given), max_num_seqs * query)}))

"""What a pool will hold for a model in SGLang: its decode graphs, and its linear layers' inputs (SGLang 0.5.23)."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from safealloc.commands.plan.architectures import ExpertSite, Site, architecture
from safealloc.commands.plan.checkpoint import NVFP4
from safealloc.commands.plan.deployment import FIRST_WITH_NVFP4, Deployment
from safealloc.formats.format import ScaleFormat
from safealloc.formats.layout import SfLayout
from safealloc.formats.spec import ScaleSpec
from safealloc.integrations.sglang import targets

ENGINE = "sglang"
SPECULATIVE_REQUESTS = 48
"""Requests at once, which SGLang sets for speculative decoding where nothing else is given."""

GIBIBYTES = {
    "rtx-5090": 32,
    "a6000": 48,
    "h100": 80,
    **dict.fromkeys(("rtx-pro-6000", "gh200"), 96),
    **dict.fromkeys(("thor", "dgx-spark"), 120),
    "h200": 141,
    **dict.fromkeys(("b200", "gb200"), 180),
    **dict.fromkeys(("b300", "gb300"), 270),
}
"""Memory by name; an A100 has 40 or 80."""

_MOST = ((20, 8, 8), (35, 48, 160), (60, 32, 160), (160, 256, 512))  # below so many GiB: with up to 3 ranks, with more

_FORMATS = {NVFP4: ScaleFormat.nvfp4, "MXFP8": ScaleFormat.mxfp8}  # by scheme

_VLLM = {
    "data_parallel_size": (1, None),
    "enable_expert_parallel": (False, None),
    "moe_backend": ("auto", None),
    "layout": ("128x4", None),
    "spec_tokens": (0, "speculative_num_draft_tokens"),
    "max_num_seqs": (1024, "max_running_requests"),
    "max_cudagraph_capture_size": (None, "cuda_graph_max_bs"),
    "cudagraph_capture_sizes": (None, "cuda_graph_bs"),
}
"""Options of vLLM: the default, and SGLang's option of that meaning."""


def most_requests(gibibytes: float, tensor: int) -> int:
    """Requests of the largest decode graph by default (``handle_gpu_memory_settings``)."""
    return next((few if tensor < 4 else many for below, few, many in _MOST if gibibytes < below), 512)


def batch_sizes(largest: int, *, speculative: bool) -> tuple[int, ...]:
    """Requests of each decode graph by default (``generate_decode_cuda_graph_batch_sizes``)."""
    if speculative:
        sizes = (*range(1, 9), *range(10, 33, 2), *range(40, 65, 4), *range(72, 257, 8), *range(272, largest, 16))
    else:
        sizes = (1, 2, 4, 8, 12, *range(16, 257, 8), *range(272, 512, 16), *range(512, largest, 32))
    return (*(size for size in sizes if size < largest), largest)


def deployment(given: argparse.Namespace, capability: int | None) -> Deployment:
    """From the options. Raises: ValueError: they do not say how large the graphs are."""
    tensor, width = given.tensor_parallel_size, given.speculative_num_draft_tokens
    requests, largest = given.max_running_requests, given.cuda_graph_max_bs
    if given.cuda_graph_bs:
        sizes = tuple(size for sizes in given.cuda_graph_bs for size in sizes)
    else:
        if largest is None:
            if given.gpu not in GIBIBYTES:
                raise ValueError(
                    "SGLang's largest decode graph follows from the GPU's memory: give --cuda-graph-max-bs N, or --gpu with "
                    f"one of {', '.join(GIBIBYTES)}"
                )
            largest = min(most_requests(GIBIBYTES[given.gpu], tensor), requests or 512)
        sizes = batch_sizes(largest, speculative=width is not None)
    if requests is None and width is not None:
        requests = SPECULATIVE_REQUESTS
    rows = sorted({size * (width or 1) for size in sizes if requests is None or size <= requests})
    if not rows:
        raise ValueError(f"no decode graph has at most {requests} requests: give --max-running-requests {min(sizes)}")
    return Deployment(tuple(rows), tensor, capability=capability, engine=ENGINE)


def check_options(given: argparse.Namespace) -> None:
    """Raises: ValueError: an option of the other engine is given."""
    for name, (default, ours) in _VLLM.items():
        theirs = getattr(given, name) != default
        if given.engine == ENGINE and theirs:
            instead = f"use {_option(ours)}" if ours else "leave it out, a plan for SGLang has nothing like it"
            raise ValueError(f"{_option(name)} is an option of vLLM: with --engine sglang {instead}")
        if given.engine != ENGINE and ours and getattr(given, ours) is not None:
            raise ValueError(f"{_option(ours)} is an option of SGLang: give --engine sglang, or use {_option(name)}")


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def served(
    fields: Mapping[str, Any], placed: Sequence[tuple[str, Site | ExpertSite]], deployment: Deployment
) -> tuple[Sequence[Site], Sequence[ScaleSpec], Sequence[str]]:
    """The sites a pool serves, its buffers, and what they give; ``placed`` has the scheme of each."""
    if deployment.capability is not None and deployment.capability < FIRST_WITH_NVFP4:
        return [], [], ["SGLang quantizes no activation to NVFP4 or MXFP8 for this GPU: a pool holds nothing"]
    found = [
        (_FORMATS[scheme], site)
        for scheme, site in placed
        if isinstance(site, Site) and scheme in _FORMATS and site.k % _FORMATS[scheme].block_size == 0
    ]
    shapes = sorted({(format.name, site.k, rows) for format, site in found for rows in deployment.sizes})
    buffers = [ScaleSpec.checked(rows, k, SfLayout.layout_128x4, format=ScaleFormat[name]) for name, k, rows in shapes]
    remarks = []
    if fused := _fused(fields, placed):
        remarks.append(
            f"before mlp.down_proj of {fused} layers, SGLang's fused SiLU + NVFP4 quantizer ({targets.FUSED.since} or later) "
            "leaves padding unwritten: a pool gives safety there"
        )
    if found:
        where = "elsewhere" if fused else "here"
        remarks.append(
            f"{where} FlashInfer's quantizer zeroes padding: a pool adds no safety. No time was measured in SGLang"
        )
    if any(isinstance(site, ExpertSite) for _, site in placed):
        remarks.append("buffers of routed experts, which grouped CuTe-DSL kernels take, are not counted")
    return [site for _, site in found], buffers, remarks


def _fused(fields: Mapping[str, Any], placed: Sequence[tuple[str, Site | ExpertSite]]) -> int:
    """Layers with the fused producer: dense Qwen3.5, ModelOpt's checkpoints, Gated DeltaNet (``models/qwen3_5.py``)."""
    stored = fields.get("quantization_config")
    if architecture(fields) != "Qwen3_5ForConditionalGeneration" or (
        isinstance(stored, dict) and stored.get("quant_method") == "compressed-tensors"
    ):
        return 0
    layers: dict[str, set[int]] = {}
    for scheme, site in placed:
        if scheme == NVFP4 or site.name == "linear_attn.out_proj":
            layers.setdefault(site.name, set()).update(site.layers)
    wanted = ("mlp.gate_up_proj", "mlp.down_proj", "linear_attn.out_proj")
    return len(set.intersection(*(layers.get(name, set()) for name in wanted)))

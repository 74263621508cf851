"""``safealloc plan``: every buffer that a pool will hold for a model in vLLM, from its Hugging Face configuration."""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from safealloc.commands import models, report
from safealloc.formats.layout import MAX_ROWS_8X4, SfLayout, short
from safealloc.formats.spec import ScaleSpec
from safealloc.integrations.vllm.sizes import MAX_CAPTURE_SIZES, MAX_TOKENS_PER_EXPERT, capture_sizes

SUMMARY = "every buffer that a pool will hold on each rank for a model in vLLM, and its bytes"

_LARGEST_BATCH = 1 << 20  # rows


@dataclass(frozen=True, slots=True)
class Experts:
    """What a pool will hold on one rank for routed experts, and what vLLM's CUTLASS path allocates instead.

    A pool keeps one buffer per k, which serves all captured batch sizes in turn. vLLM allocates at each of the two calls of a
    layer and frees the first before the second, so graphs that share a memory pool hold the larger of the two.
    """

    expert_parallel: bool  # whether each rank has whole experts
    sites: Sequence[models.ExpertSite]  # where the rows of experts are quantized
    buffers: Sequence[ScaleSpec]  # one per k, for the rows of the largest batch: tokens times experts per token

    @property
    def nbytes(self) -> int:
        """Scales and records."""
        return sum(spec.nbytes for spec in self.buffers)

    @property
    def vllm_nbytes(self) -> int:
        """What vLLM's graphs hold at once."""
        return max(self.vllm_call_nbytes(spec) for spec in self.buffers)

    @property
    def right_sized_nbytes(self) -> int:
        """What they would hold at once if vLLM allocated by need."""
        return max(right_sized_nbytes(spec) for spec in self.buffers)

    @property
    def freed_nbytes(self) -> int:
        """How much less a pool holds than vLLM's graphs; below zero for batches near vLLM's limit.

        Between the two calls vLLM's memory may hold other tensors of a graph, which then need memory elsewhere.
        """
        return self.vllm_nbytes - self.nbytes

    def vllm_call_nbytes(self, spec: ScaleSpec) -> int:
        """What vLLM allocates at each call in place of a buffer (``scaled_fp4_experts_quant``, vLLM 0.32.0)."""
        return MAX_TOKENS_PER_EXPERT * self.sites[0].topk * spec.padded_shape[1]

    def as_dict(self) -> dict[str, Any]:
        return {
            "expert_parallel": self.expert_parallel,
            "sites": [models.as_dict(site) for site in self.sites],
            "buffers": [self._buffer(spec) for spec in self.buffers],
            "bytes": self.nbytes,
            "vllm_bytes": self.vllm_nbytes,
            "right_sized_bytes": self.right_sized_nbytes,
            "freed_bytes": self.freed_nbytes,
        }

    def _buffer(self, spec: ScaleSpec) -> dict[str, Any]:
        sizes = {"vllm_bytes": self.vllm_call_nbytes(spec), "right_sized_bytes": right_sized_nbytes(spec)}
        return _buffer(spec) | {"experts": spec.experts} | sizes


def _buffer(spec: ScaleSpec) -> dict[str, Any]:
    matrix = {"rows": spec.rows, "k": spec.k, "layout": spec.layout.name}
    return matrix | {"padded_shape": list(spec.padded_shape), "bytes": spec.nbytes}


def right_sized_nbytes(spec: ScaleSpec) -> int:
    """Scales of ``rows + 127 * experts`` rows, the bound of vLLM's PR 37626 for what a call needs."""
    assert spec.experts is not None
    return (spec.rows + (spec.layout.tile.rows - 1) * spec.experts) * spec.padded_shape[1]


@dataclass(frozen=True, slots=True)
class Result:
    """What a pool will hold on one rank."""

    model: str  # the configuration's architecture
    tensor_parallel: int  # ranks
    sizes: tuple[int, ...]  # captured batch sizes
    layout_rule: str  # "128x4", or "trtllm" for 8x4 up to 32 rows
    sites: Sequence[models.Site]  # where activations are quantized, outside of the routed experts
    buffers: Sequence[ScaleSpec]  # of those sites, one per captured size and k
    # what it also holds for routed experts, which no other number includes; ``None`` where there are none
    experts: Experts | None

    @property
    def nbytes(self) -> int:
        return sum(spec.nbytes for spec in self.buffers)

    @property
    def per_call_nbytes(self) -> int:
        """What allocation at each call needs at once: graphs that share a memory pool reuse one block for all."""
        return max(spec.nbytes for spec in self.buffers)

    def as_dict(self) -> dict[str, Any]:
        return {
            "command": "safealloc plan",
            "model": self.model,
            "tensor_parallel": self.tensor_parallel,
            "sizes": list(self.sizes),
            "layout_rule": self.layout_rule,
            "sites": [models.as_dict(site) for site in self.sites],
            "buffers": [_buffer(spec) for spec in self.buffers],
            "bytes": self.nbytes,
            "per_call_bytes": self.per_call_nbytes,
            "experts": None if self.experts is None else self.experts.as_dict(),
        }


def run(
    config: Path, tensor_parallel: int, sizes: Sequence[int], layout_rule: str, *, expert_parallel: bool = False
) -> Result:
    """Read a ``config.json``, or the one in a folder, and plan; see :class:`Result` and :class:`Experts`.

    Raises:
        UsageError: the file is not the configuration of a transformer, or the model cannot be split that way; or vLLM's
            expert scales have no room for the largest batch.
    """
    fields = _read(config)
    ordered = tuple(sorted(set(sizes)))
    experts = None
    try:
        sites = models.sites(fields, tensor_parallel)
        expert_sites = models.expert_sites(fields, tensor_parallel, expert_parallel=expert_parallel)
        shapes = itertools.product(sorted({site.k for site in sites}), ordered)
        buffers = [ScaleSpec.checked(rows, k, _layout(rows, layout_rule)) for k, rows in shapes]
        if expert_sites:
            experts = Experts(expert_parallel, expert_sites, expert_buffers(expert_sites, ordered[-1]))
    except ValueError as error:
        raise report.UsageError(str(error)) from error
    return Result(_model(fields), tensor_parallel, ordered, layout_rule, sites, buffers, experts)


def expert_buffers(sites: Sequence[models.ExpertSite], largest: int) -> list[ScaleSpec]:
    """One buffer per k, for batches of up to ``largest`` tokens. Raises: ValueError: vLLM has no room for so many."""
    if largest > MAX_TOKENS_PER_EXPERT:
        raise ValueError(
            f"vLLM quantizes at most {MAX_TOKENS_PER_EXPERT} tokens at once for experts "
            f"(VLLM_MAX_TOKENS_PER_EXPERT_FP4_MOE), the largest batch has {largest}"
        )
    ks = sorted({site.k for site in sites})
    return [ScaleSpec.grouped(largest * sites[0].topk, k, SfLayout.layout_128x4, sites[0].experts) for k in ks]


def show(result: Result, out: Console) -> None:
    """Print a plan: batch sizes whose buffers have one shape share a row."""
    sites = [(site.name, str(site.k), str(site.n), str(len(site.layers))) for site in result.sites]
    title = f"{result.model} on {result.tensor_parallel} ranks: sites"
    report.table(out, title, ("", "k", "n", "layers"), report.fine(sites))
    groups: dict[tuple[int, SfLayout, str], list[ScaleSpec]] = {}
    for spec in result.buffers:
        groups.setdefault((spec.k, spec.layout, _shape(spec)), []).append(spec)
    rows = []
    for (k, layout, shape), specs in groups.items():
        batches = str(specs[0].rows) if len(specs) == 1 else f"{specs[0].rows} to {specs[-1].rows}"
        size = _size(sum(spec.nbytes for spec in specs))
        rows.append((str(k), batches, short(layout), shape, str(len(specs)), size))
    title = f"Buffers for {len(result.sizes)} captured batch sizes"
    report.table(out, title, ("k", "rows", "layout", "padded shape", "buffers", "bytes"), report.fine(rows))
    out.print(f"In all {len(result.buffers)} buffers, {_size(result.nbytes)}, on each rank; layers use them in turn.")
    out.print(f"Allocated at each call, the graphs need {_size(result.per_call_nbytes)} at once, and a fill per call.")
    if result.experts is not None:
        out.print()
        _show_experts(result.experts, out)


def _show_experts(experts: Experts, out: Console) -> None:
    rows = []
    for spec in experts.buffers:
        names = ", ".join(site.name for site in experts.sites if site.k == spec.k)
        sizes = (spec.nbytes, right_sized_nbytes(spec), experts.vllm_call_nbytes(spec))
        rows.append((names, str(spec.k), str(spec.rows), _shape(spec), *map(_size, sizes)))
    site = experts.sites[0]
    title = f"Expert scales: {site.experts} experts on each rank, {site.topk} per token, in {len(site.layers)} layers"
    headings = ("", "k", "rows", "padded shape", "bytes", "right-sized", "vLLM, per call")
    report.table(out, title, headings, report.fine(rows))
    freed = experts.freed_nbytes
    compared = f"{_size(freed)} are freed" if freed >= 0 else f"{_size(-freed)} less"
    out.print(
        f"In all {_size(experts.nbytes)} with row records, on each rank, for all captured batch sizes; the graphs of "
        f"vLLM's CUTLASS path hold {_size(experts.vllm_nbytes)} at once: {compared}."
    )


def _model(fields: Mapping[str, Any]) -> str:
    """The architecture, else the type, else "unknown"."""
    architectures = fields.get("architectures")
    first = architectures[0] if isinstance(architectures, list) and architectures else fields.get("model_type")
    return first if isinstance(first, str) else "unknown"


def _shape(spec: ScaleSpec) -> str:
    return " x ".join(map(str, spec.padded_shape))


def _size(nbytes: int) -> str:
    return f"{nbytes / 2**20:.1f} MiB" if nbytes >= 2**20 else f"{nbytes / 2**10:.1f} KiB"


def _layout(rows: int, rule: str) -> SfLayout:
    return SfLayout.layout_8x4 if rule == "trtllm" and rows <= MAX_ROWS_8X4 else SfLayout.layout_128x4


def _read(config: Path) -> Mapping[str, Any]:
    path = config / "config.json" if config.is_dir() else config
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise report.UsageError(f"{path}: {error.strerror or error}") from error
    except ValueError as error:
        raise report.UsageError(f"{path}: not JSON: {error}") from error
    except RecursionError as error:
        raise report.UsageError(f"{path}: lists or objects are nested too deeply") from error
    if not isinstance(fields, dict):
        raise report.UsageError(f"{path}: a configuration is a JSON object")
    text_config = fields.get("text_config")  # of a multimodal model
    return {**fields, **text_config} if isinstance(text_config, dict) else fields


def add_arguments(parser: argparse.ArgumentParser) -> None:
    rank = report.integer(1)
    rows = report.integer(1, _LARGEST_BATCH)
    default, blackwell = MAX_CAPTURE_SIZES

    def sizes(text: str) -> tuple[int, ...]:
        return tuple(map(rows, text.split(",")))

    about = "a Hugging Face config.json, or the folder it is in"
    parser.add_argument("config", type=Path, metavar="CONFIG", help=about)
    about = "ranks a layer is split over (%(default)s)"
    parser.add_argument("--tensor-parallel", "--tp", type=rank, default=1, metavar="N", help=about)
    about = "each rank has whole routed experts (vLLM's --enable-expert-parallel); without it each expert is split"
    parser.add_argument("--expert-parallel", action="store_true", help=about)
    captured = parser.add_mutually_exclusive_group()
    about = "the largest of vLLM's default batch sizes; vLLM's own default on compute capability 10.x is "
    about += f"{blackwell} (%(default)s)"
    captured.add_argument("--max-size", type=rows, default=default, metavar="N", help=about)
    about = "captured batch sizes, instead of vLLM's default"
    captured.add_argument("--sizes", type=sizes, metavar="N,N,...", help=about)
    about = "trtllm: 8x4 for up to 32 rows (%(default)s)"
    parser.add_argument("--layout", choices=("128x4", "trtllm"), default="128x4", help=about)


def main(given: argparse.Namespace) -> int:
    """Plan and print."""
    report.check_writable(given.json)
    sizes = given.sizes or capture_sizes(given.max_size)
    result = run(given.config, given.tensor_parallel, sizes, given.layout, expert_parallel=given.expert_parallel)
    report.deliver(given.json, result.as_dict(), lambda out: show(result, out))
    return 0

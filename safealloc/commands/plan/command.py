"""``safealloc plan``: every buffer that a pool will hold for a model in vLLM or SGLang, from its configuration."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from safealloc.commands import report
from safealloc.commands.plan import architectures, checkpoint, sglang
from safealloc.commands.plan.architectures import ExpertSite, Site
from safealloc.commands.plan.deployment import (
    CUTLASS,
    FIRST_WITH_NVFP4,
    FLASHINFER_CUTLASS,
    MOE_BACKENDS,
    Deployment,
    capability,
    default_sizes,
    with_decode_sizes,
)
from safealloc.formats.format import ScaleFormat
from safealloc.formats.layout import MAX_ROWS_8X4, SfLayout, short
from safealloc.formats.spec import ScaleSpec
from safealloc.integrations.vllm.sizes import MAX_TOKENS_PER_EXPERT, capture_sizes

SUMMARY = "every buffer that a pool will hold on each rank for a model in vLLM or SGLang, and its bytes"

_LARGEST_BATCH = 1 << 20  # rows


@dataclass(frozen=True, slots=True)
class Experts:
    """What a pool will hold on one rank for routed experts, and what vLLM's CUTLASS path allocates instead.

    A pool keeps one buffer per k, which serves all captured batch sizes in turn. vLLM allocates at each of the two calls of a
    layer and frees the first before the second, so graphs that share a memory pool hold the larger of the two.
    """

    sites: Sequence[ExpertSite]
    buffers: Mapping[str, ScaleSpec]  # by the weight that reads it, for the rows of the largest batch
    certain: bool  # whether vLLM's CUTLASS path is known to run

    @property
    def held(self) -> list[ScaleSpec]:
        """One per k."""
        return list({spec.k: spec for spec in self.buffers.values()}.values())

    @property
    def nbytes(self) -> int:
        """Scales and records."""
        return sum(spec.nbytes for spec in self.held)

    @property
    def vllm_nbytes(self) -> int:
        """What vLLM's graphs hold at once."""
        return max(self.vllm_call_nbytes(spec) for spec in self.held)

    @property
    def freed_nbytes(self) -> int | None:
        """How much less a pool holds than vLLM's graphs, below zero for batches near vLLM's limit; ``None``: not known.

        Between the two calls vLLM's memory may hold other tensors of a graph, which then need memory elsewhere.
        """
        return self.vllm_nbytes - self.nbytes if self.certain else None

    def vllm_call_nbytes(self, spec: ScaleSpec) -> int:
        """What vLLM allocates at each call in place of a buffer (``scaled_fp4_experts_quant``, vLLM 0.32.0)."""
        return MAX_TOKENS_PER_EXPERT * self.sites[0].topk * spec.padded_shape[1]

    def as_dict(self) -> dict[str, Any]:
        layers = sum(len(site.layers) for site in self.sites)
        site = {"experts": self.sites[0].experts, "topk": self.sites[0].topk, "layers": layers}
        return {
            "sites": [{"name": name, "k": spec.k} | site for name, spec in self.buffers.items()],
            "buffers": [self._buffer(spec) for spec in self.held],
            "bytes": self.nbytes,
            "vllm_bytes": self.vllm_nbytes,
            "right_sized_bytes": max(map(right_sized_nbytes, self.held)),
            "freed_bytes": self.freed_nbytes,
        }

    def _buffer(self, spec: ScaleSpec) -> dict[str, Any]:
        sizes = {"vllm_bytes": self.vllm_call_nbytes(spec), "right_sized_bytes": right_sized_nbytes(spec)}
        return _buffer(spec) | {"experts": spec.experts} | sizes


def _buffer(spec: ScaleSpec) -> dict[str, Any]:
    matrix = {"rows": spec.rows, "k": spec.k, "layout": spec.layout.name, "format": spec.format.name}
    return matrix | {"padded_shape": list(spec.padded_shape), "bytes": spec.nbytes}


def right_sized_nbytes(spec: ScaleSpec) -> int:
    """Scales of ``rows + 127 * experts`` rows, the bound of vLLM's PR 37626 for what a call needs."""
    assert spec.experts is not None
    return (spec.rows + (spec.layout.tile.rows - 1) * spec.experts) * spec.padded_shape[1]


@dataclass(frozen=True, slots=True)
class Result:
    """What a pool will hold on one rank."""

    model: str  # the configuration's architecture
    deployment: Deployment
    quantization: str  # what the checkpoint says, in a word
    layers: Sequence[tuple[str, Site | ExpertSite]]  # linear layers and experts, each with how it is quantized
    sites: Sequence[Site]  # where activations are quantized to NVFP4 in tiles, once for a row
    buffers: Sequence[ScaleSpec]  # of those sites, one per number of rows and k
    # what it also holds for routed experts, which no other number includes; ``None`` where there is nothing
    experts: Experts | None
    # by site with its format and layers: MX scales of the largest batch, which no other number includes
    mx: Sequence[tuple[str, int, ScaleSpec]]
    remarks: Sequence[str]  # what the numbers leave out, and why

    @property
    def nbytes(self) -> int:
        return sum(spec.nbytes for spec in self.buffers)

    @property
    def per_call_nbytes(self) -> int:
        """What allocation at each call needs at once: graphs that share a memory pool reuse one block for all."""
        return max((spec.nbytes for spec in self.buffers), default=0)

    def as_dict(self) -> dict[str, Any]:
        others = [
            (scheme, site) for scheme, site in self.layers if scheme != checkpoint.NVFP4 and site not in self.sites
        ]
        return {
            "command": "safealloc plan",
            "engine": self.deployment.engine,
            "model": self.model,
            "tensor_parallel": self.deployment.tensor,
            "data_parallel": self.deployment.data,
            "expert_parallel": self.deployment.expert_parallel,
            "moe_backend": self.deployment.expert_kernel,
            "quantization": self.quantization,
            "sizes": list(self.deployment.sizes),
            "layout_rule": self.deployment.layout_rule,
            "sites": [architectures.as_dict(site) for site in self.sites],
            "others": [architectures.as_dict(site) | {"scheme": scheme} for scheme, site in others],
            "buffers": [_buffer(spec) for spec in self.buffers],
            "bytes": self.nbytes,
            "per_call_bytes": self.per_call_nbytes,
            "experts": None if self.experts is None else self.experts.as_dict(),
            "mx": [
                {"name": name, "layers": layers, "experts": spec.experts} | _buffer(spec)
                for name, layers, spec in self.mx
            ],
            "remarks": list(self.remarks),
        }


def run(config: Path, deployment: Deployment, *, as_nvfp4: bool = False) -> Result:
    """Read a ``config.json``, or the one in a folder, and plan; see :class:`Result` and :class:`Experts`.

    With ``as_nvfp4`` every layer counts as NVFP4 W4A4, whatever the checkpoint says.

    Raises:
        UsageError: the file is not the configuration of an architecture that is known, or vLLM refuses to run it so.
    """
    try:
        fields, beside = _read(config)
        stored = checkpoint.constant(checkpoint.NVFP4) if as_nvfp4 else checkpoint.read(fields, beside)
        found: dict[tuple[str, Site | ExpertSite], list[int]] = {}
        for layer, site in architectures.sites(fields, deployment):
            found.setdefault((stored.scheme(layer, site), site), []).append(layer)
        placed = [(scheme, replace(site, layers=tuple(layers))) for (scheme, site), layers in found.items()]
        if deployment.expert_parallel and not any(isinstance(site, ExpertSite) for _, site in placed):
            raise ValueError("vLLM refuses --enable-expert-parallel: the configuration has no routed experts")
        name = architectures.architecture(fields)
        method = f"as {checkpoint.NVFP4}" if as_nvfp4 else stored.method
        if deployment.engine == sglang.ENGINE:
            sites, buffers, remarks = sglang.served(fields, placed, deployment)
            return Result(name, deployment, method, placed, sites, buffers, None, (), remarks)
        nvfp4 = [site for scheme, site in placed if scheme == checkpoint.NVFP4]
        sites, experts, remarks = _served(nvfp4, deployment)
        shapes = {(site.k, -(-rows // site.row_ranks)) for site in sites for rows in deployment.sizes}
        buffers = [ScaleSpec.checked(rows, k, _layout(rows, deployment)) for k, rows in sorted(shapes)]
        mx = _mx(placed, deployment)
        return Result(name, deployment, method, placed, sites, buffers, experts, mx, [*remarks, *_mx_remarks(mx)])
    except ValueError as error:
        raise report.UsageError(str(error)) from error


def _served(
    nvfp4: Sequence[Site | ExpertSite], deployment: Deployment
) -> tuple[Sequence[Site], Experts | None, Sequence[str]]:
    """Of the NVFP4 layers and experts, what a pool serves; and remarks about the rest."""
    sites = [site for site in nvfp4 if isinstance(site, Site)]
    routed = [site for site in nvfp4 if isinstance(site, ExpertSite)]
    if not nvfp4:
        return [], None, ["no activation is quantized to NVFP4: a pool holds nothing; --as-nvfp4 plans as if all were"]
    if deployment.capability is not None and deployment.capability < FIRST_WITH_NVFP4:
        return (
            [],
            None,
            ["this GPU runs NVFP4 weights with Marlin, which quantizes no activation: a pool holds nothing"],
        )
    kernel = deployment.expert_kernel
    if not routed:
        return sites, None, []
    unfit = next((site for site in routed if site.gated and site.n % 128), None)
    if unfit is not None and kernel in (None, CUTLASS, FLASHINFER_CUTLASS):  # prepare_nvfp4_moe_layer_for_fi_or_cutlass
        rows = f"gate and up have {unfit.n} rows on each rank, not a multiple of 128"
        if kernel is None:
            return sites, None, [f"vLLM refuses {unfit.name} with CUTLASS: {rows}"]
        raise ValueError(
            f"vLLM refuses {unfit.name} with {kernel}: {rows}; other ranks or --enable-expert-parallel may do"
        )
    if kernel in (None, CUTLASS):
        buffers = expert_buffers(routed, deployment.sizes[-1] * deployment.data)
        return sites, Experts(routed, buffers, kernel is not None), []
    if kernel == FLASHINFER_CUTLASS and deployment.data == 1:
        inputs = [Site(f"{site.name}.w13", site.k, site.n, site.layers) for site in routed]
        return [*sites, *inputs], None, [f"{kernel} runs the experts; a pool holds the scales of their input only"]
    return sites, None, [f"{kernel} runs the experts; a pool holds no scales for them"]


def _mx(
    placed: Sequence[tuple[str, Site | ExpertSite]], deployment: Deployment
) -> Sequence[tuple[str, int, ScaleSpec]]:
    """Activations that are quantized to MXFP8 or MXFP4 in tiles, in the largest batch.

    Of routed experts those of MXFP4, as vLLM's CUTLASS_MXFP4_MXFP4 quantizes them; other kernels take linear scales.
    """
    found = []
    for scheme, site in placed:
        format = checkpoint.MX.get(scheme)
        if format is not None and isinstance(site, Site):
            rows = -(-deployment.sizes[-1] // site.row_ranks)
            spec = ScaleSpec.checked(rows, site.k, SfLayout.layout_128x4, None, format)
            found.append((site.name, len(site.layers), spec))
        elif format is ScaleFormat.mxfp4 and isinstance(site, ExpertSite):
            buffers = expert_buffers([site], deployment.sizes[-1] * deployment.data, format)
            found += [(name, len(site.layers), spec) for name, spec in buffers.items()]
    return found


def _mx_remarks(mx: Sequence[tuple[str, int, ScaleSpec]]) -> Iterator[str]:
    if any(spec.experts is None for _, _, spec in mx):
        yield (
            "FlashInfer's quantizers allocate the MX scales of linear layers at each call and write their padding: a pool "
            "holds none of them"
        )
    if any(spec.experts is not None for _, _, spec in mx):
        yield (
            "a pool holds the MX scales of experts where vLLM runs them with CUTLASS_MXFP4_MXFP4, one buffer for each k; "
            "other kernels take linear scales"
        )


def expert_buffers(
    sites: Sequence[ExpertSite], largest: int, format: ScaleFormat = ScaleFormat.nvfp4
) -> dict[str, ScaleSpec]:
    """By weight, for up to ``largest`` tokens of all data-parallel ranks. Raises: ValueError: too many for vLLM."""
    if largest > MAX_TOKENS_PER_EXPERT:
        raise ValueError(
            f"vLLM quantizes at most {MAX_TOKENS_PER_EXPERT} tokens at once for experts "
            f"(VLLM_MAX_TOKENS_PER_EXPERT_FP4_MOE), the largest batch has {largest}"
        )
    found = {}
    for site in sites:
        width = site.width if site.gated else -(-site.width // 128) * 128  # vLLM pads what is not gated
        for name, k in ((f"{site.name}.w13", site.k), (f"{site.name}.w2", width)):
            found[name] = ScaleSpec.grouped(largest * site.topk, k, SfLayout.layout_128x4, site.experts, format)
    return found


def show(result: Result, out: Console) -> None:
    """Print a plan: buffers of one k and layout share a row."""
    layers = [(site.name, str(site.k), str(site.n), str(len(site.layers)), scheme) for scheme, site in result.layers]
    deployment = result.deployment
    ranks = f"TP {deployment.tensor}" + (f", DP {deployment.data}" if deployment.data > 1 else "")
    title = f"{result.model}, {ranks}, {result.quantization}: linear layers and experts"
    report.table(out, title, ("", "k", "n", "layers", "scheme"), report.fine(layers))
    groups: dict[tuple[int, SfLayout, str], list[ScaleSpec]] = {}
    for spec in result.buffers:
        groups.setdefault((spec.k, spec.layout, spec.format.name), []).append(spec)
    rows = []
    for (k, layout, _), specs in groups.items():
        batches = str(specs[0].rows) if len(specs) == 1 else f"{specs[0].rows} to {specs[-1].rows}"
        size = _size(sum(spec.nbytes for spec in specs))
        rows.append((str(k), batches, short(layout), _shape(specs[-1]), str(len(specs)), size))
    if rows:
        title = f"Buffers for {len(deployment.sizes)} captured batch sizes"
        report.table(out, title, ("k", "rows", "layout", "largest", "buffers", "bytes"), report.fine(rows))
        out.print(
            f"In all {len(result.buffers)} buffers, {_size(result.nbytes)}, on each rank; layers use them in turn."
        )
        fill = "" if deployment.engine == sglang.ENGINE else ", and a fill per call"
        once = f"Allocated at each call, the graphs need {_size(result.per_call_nbytes)} at once{fill}."
        out.print(once, end="\n\n" if result.experts or result.mx or result.remarks else "\n")
    if result.experts is not None:
        _show_experts(result.experts, out)
    if result.mx:
        cells = [
            (name, str(layers), spec.format.name, str(spec.k), str(spec.rows), _shape(spec), _size(spec.nbytes))
            for name, layers, spec in result.mx
        ]
        headings = ("", "layers", "format", "k", "rows", "padded shape", "bytes")
        report.table(out, "MX scales in 128x4 of the largest batch", headings, report.fine(cells))
    for remark in result.remarks:
        out.print(f"{remark[0].upper()}{remark[1:]}.")


def _show_experts(experts: Experts, out: Console) -> None:
    rows = []
    for name, spec in experts.buffers.items():
        sizes = (spec.nbytes, right_sized_nbytes(spec), experts.vllm_call_nbytes(spec))
        rows.append((name, str(spec.k), str(spec.rows), _shape(spec), *map(_size, sizes)))
    site = experts.sites[0]
    layers = sum(len(site.layers) for site in experts.sites)
    title = f"Expert scales: {site.experts} experts on each rank, {site.topk} per token, in {layers} layers"
    headings = ("", "k", "rows", "padded shape", "bytes", "right-sized", "vLLM, per call")
    report.table(out, title, headings, report.fine(rows))
    freed = experts.freed_nbytes
    compared = (
        f"{_size(abs(freed))} {'are freed' if freed >= 0 else 'less'}" if freed is not None else "--gpu says if it runs"
    )
    out.print(
        f"In all {_size(experts.nbytes)} with row records, on each rank, for all captured batch sizes; the graphs of "
        f"vLLM's CUTLASS path hold {_size(experts.vllm_nbytes)} at once: {compared}."
    )


def _shape(spec: ScaleSpec) -> str:
    return " x ".join(map(str, spec.padded_shape))


def _size(nbytes: int) -> str:
    return f"{nbytes / 2**20:.1f} MiB" if nbytes >= 2**20 else f"{nbytes / 2**10:.1f} KiB"


def _layout(rows: int, deployment: Deployment) -> SfLayout:
    few = deployment.layout_rule == "trtllm" and rows <= MAX_ROWS_8X4
    return SfLayout.layout_8x4 if few else SfLayout.layout_128x4


def _read(config: Path) -> tuple[Mapping[str, Any], Mapping[str, Any] | None]:
    """The fields of the language model, and those of ``hf_quant_config.json`` if there is one."""
    path = config / "config.json" if config.is_dir() else config
    if path.name == "params.json" or (not path.exists() and path.with_name("params.json").exists()):
        raise ValueError(f"{path}: params.json is Mistral's own format; give the config.json that is published with it")
    fields = _load(path)
    if "dim" in fields and "hidden_size" not in fields:
        raise ValueError(f"{path}: these are fields of Mistral's params.json; give the config.json published with it")
    beside = path.with_name("hf_quant_config.json")
    text = fields.get("text_config")  # of a multimodal model
    if isinstance(text, dict):
        own = {name: fields[name] for name in ("architectures", "quantization_config") if fields.get(name) is not None}
        fields = {**fields, **text, **own}
    return fields, _load(beside) if beside.exists() else None


def _load(path: Path) -> Mapping[str, Any]:
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from error
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    except RecursionError as error:
        raise ValueError(f"{path}: lists or objects are nested too deeply") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{path}: a configuration is a JSON object")
    return fields


def add_arguments(parser: argparse.ArgumentParser) -> None:
    rank, rows = report.integer(1), report.integer(1, _LARGEST_BATCH)

    def sizes(text: str) -> tuple[int, ...]:
        return tuple(map(rows, text.split(",")))

    def gpu(text: str) -> str:
        try:
            capability(text)
            return text.lower()
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    def tokens(text: str) -> int:
        given = json.loads(text)
        return report.integer(0, 1024)(str(given.get("num_speculative_tokens") if isinstance(given, dict) else given))

    tokens.__name__ = "number of tokens"
    captured = parser.add_mutually_exclusive_group()
    about = "a Hugging Face config.json, or the folder it is in"
    parser.add_argument("config", type=Path, metavar="CONFIG", help=about)
    about = "compute capability (10.0) or name (b200): decides the default batch sizes, and what runs experts"
    parser.add_argument("--gpu", type=gpu, metavar="GPU", help=about)
    about = "what serves the model (%(default)s)"
    parser.add_argument("--engine", choices=("vllm", sglang.ENGINE), default="vllm", help=about)
    for names, about in (
        (
            ("--tensor-parallel-size", "-tp", "--tensor-parallel", "--tp", "--tp-size"),
            "ranks a layer is split over (%(default)s)",
        ),
        (("--data-parallel-size", "-dp"), "engines that share the routed experts (%(default)s)"),
    ):
        parser.add_argument(*names, type=rank, default=1, metavar="N", help=about)
    about = "each rank has whole routed experts; without it each expert is split"
    parser.add_argument("--enable-expert-parallel", "-ep", "--expert-parallel", action="store_true", help=about)
    about = f"what runs NVFP4 experts: {', '.join(MOE_BACKENDS)} (%(default)s)"
    parser.add_argument("--moe-backend", choices=MOE_BACKENDS, default="auto", metavar="KERNELS", help=about)
    about = "draft tokens of speculative decoding: a number, or JSON with num_speculative_tokens"
    parser.add_argument("--spec-tokens", "--speculative-config", "-sc", type=tokens, default=0, metavar="N", help=about)
    about = "requests at once, which bound the default batch sizes (%(default)s)"
    parser.add_argument("--max-num-seqs", type=rows, default=1024, metavar="N", help=about)
    about = "the largest of the default batch sizes, instead of the GPU's"
    captured.add_argument("--max-cudagraph-capture-size", "--max-size", type=rows, metavar="N", help=about)
    about = "captured batch sizes, instead of vLLM's default; N,N,... too"
    captured.add_argument("--cudagraph-capture-sizes", "--sizes", type=sizes, nargs="+", metavar="N", help=about)
    about = "trtllm: 8x4 for up to 32 rows (%(default)s)"
    parser.add_argument("--layout", choices=("128x4", "trtllm"), default="128x4", help=about)
    about = "as if every linear layer and expert were NVFP4, whatever the checkpoint says"
    parser.add_argument("--as-nvfp4", action="store_true", help=about)
    options = parser.add_argument_group("with --engine sglang")
    graphs = options.add_mutually_exclusive_group()
    about = "requests of the largest decode graph, instead of what the GPU's memory allows"
    graphs.add_argument("--cuda-graph-max-bs", "--cuda-graph-max-bs-decode", type=rows, metavar="N", help=about)
    about = "requests of each decode graph, instead of SGLang's default; N,N,... too"
    graphs.add_argument("--cuda-graph-bs", "--cuda-graph-bs-decode", type=sizes, nargs="+", metavar="N", help=about)
    about = "requests at once, which bound the decode graphs"
    options.add_argument("--max-running-requests", type=rows, metavar="N", help=about)
    about = "rows of a request in a step of speculative decoding"
    options.add_argument("--speculative-num-draft-tokens", type=report.integer(1, 1024), metavar="N", help=about)


def main(given: argparse.Namespace) -> int:
    """Plan and print."""
    report.check_writable(given.json)
    try:
        sglang.check_options(given)
        deployment = _deployment(given)
    except ValueError as error:
        raise report.UsageError(str(error)) from error
    result = run(given.config, deployment, as_nvfp4=given.as_nvfp4)
    report.deliver(given.json, result.as_dict(), lambda out: show(result, out))
    return 0


def _deployment(given: argparse.Namespace) -> Deployment:
    major = None if given.gpu is None else capability(given.gpu)
    if given.engine == sglang.ENGINE:
        return sglang.deployment(given, major)
    if given.cudagraph_capture_sizes or given.max_cudagraph_capture_size:
        sizes = [size for sizes in given.cudagraph_capture_sizes or () for size in sizes]
        sizes = sizes or [*capture_sizes(given.max_cudagraph_capture_size)]
    else:
        sizes = [*default_sizes(major, given.spec_tokens, given.max_num_seqs)]
    return Deployment(
        with_decode_sizes(sizes, given.spec_tokens, given.max_num_seqs),
        given.tensor_parallel_size,
        given.data_parallel_size,
        given.enable_expert_parallel,
        major,
        given.moe_backend,
        given.layout,
    )

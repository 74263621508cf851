"""``safealloc bench``: what each way to keep padding clean costs a quantization, a decode step and the host; guard modes."""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from benchmarks.models import MODELS
from safealloc import _optional
from safealloc._checks import checked_device
from safealloc.commands import doctor, plan, report
from safealloc.commands.repro import replay
from safealloc.formats.layout import SfLayout
from safealloc.formats.spec import ScaleSpec

PARTS = ("quantize", "decode", "host", "moe", "guard")
"""Modules of ``benchmarks`` whose ``run`` measures one."""

Tell = Callable[[str, str, float], None]
"""Tells whoever waits which part is at what, and the share of the part that is done."""


@dataclass(frozen=True, slots=True)
class Options:
    """What to measure, checked.

    Attributes:
        parts: some of ``PARTS``.
        device: a CUDA device.
        quick: fewer shapes and rounds.
    """

    parts: tuple[str, ...]
    device: torch.device
    quick: bool


@dataclass(frozen=True, slots=True)
class Result:
    """What came out.

    Attributes:
        device: as PyTorch names it.
        device_name: its model.
        capability: compute capability.
        versions: of the packages, CUDA's runtime and the driver.
        quick: whether fewer shapes and rounds were measured.
        parts: what each part that ran returned, by its name.
    """

    device: str
    device_name: str
    capability: str | None
    versions: Mapping[str, str | None]
    quick: bool
    parts: Mapping[str, dict[str, Any]]

    def as_dict(self) -> dict[str, Any]:
        return {
            "command": "safealloc bench",
            "device": self.device,
            "device_name": self.device_name,
            "capability": self.capability,
            "versions": dict(self.versions),
            "quick": self.quick,
            **self.parts,
            "memory": memory(),
        }


def memory() -> list[dict[str, Any]]:
    """Bytes of scale buffers for Llama 3.3 70B on one GPU at vLLM's captured batch sizes: computed, not measured."""
    ks = {site.k for model in MODELS if model.title == "Llama 3.3 70B, TP 1" for site in model.sites}
    groups = []
    for largest in plan.MAX_SIZES:
        sizes = plan.vllm_sizes(largest)
        buffers = [ScaleSpec(rows, k, SfLayout.layout_128x4) for k in ks for rows in sizes]
        bars = {
            "pool, kept at zero": sum(spec.nbytes for spec in buffers),
            "pool, compact": sum(spec.nbytes for spec in plan.compact(buffers)),
            "allocated and filled at each call": max(spec.nbytes for spec in buffers),
        }
        groups.append({"sizes": len(sizes), "largest": largest, "bars": bars})
    return groups


def checked_options(part: str, quick: bool) -> Options:
    """What the user asked for.

    Args:
        part: one of ``PARTS``, or "all".
        quick: as in :class:`Options`.

    Raises:
        UsageError: nothing can be measured on this machine.
    """
    device = checked_device(None)
    reason = replay.refusal(device)
    if reason is not None:
        raise report.UsageError(f"it needs a CUDA device of compute capability 8.9 or more, and Triton: {reason}")
    return Options(PARTS if part == "all" else (part,), device, quick)


def check_pictures(folder: Path | None) -> None:
    """See before the work starts whether pictures can be drawn into a folder; nothing is touched.

    Raises:
        UsageError: they cannot.
    """
    if folder is None:
        return
    if reason := _optional.missing("matplotlib"):
        raise report.UsageError(f"--plot: {reason} (pip install safealloc[plot])")
    try:
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        if not there.is_dir():
            raise report.UsageError(f"--plot {folder}: {there} is no directory")
        if not os.access(there, os.W_OK):
            raise report.UsageError(f"--plot {folder}: {there} is not writable")
    except OSError as error:  # a name that is too long, a folder that may not be searched
        raise report.UsageError(f"--plot {folder}: {error.strerror or error}") from error


@contextlib.contextmanager
def progress() -> Iterator[Tell]:
    """A bar for each part, on standard error if that is a terminal; gone afterwards."""
    out = Console(stderr=True)
    with Progress(console=out, transient=True, disable=not out.is_terminal) as bars:
        tasks = {part: bars.add_task(part, total=1.0, visible=False) for part in PARTS}
        yield lambda part, what, done: bars.update(
            tasks[part], description=f"{part}: {what}", completed=done, visible=True
        )


def run(options: Options, tell: Tell) -> Result:
    """Measure one part after the other."""
    device = options.device
    parts: dict[str, dict[str, Any]] = {}
    for part in options.parts:
        module = importlib.import_module(f"benchmarks.{part}")  # not before: it imports Triton
        parts[part] = module.run(device, options.quick, lambda what, done, part=part: tell(part, what, done))
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else ()
    return Result(
        device=str(device),
        device_name=report.device_name(device),
        capability=".".join(map(str, capability)) or None,
        versions=report.versions() | {"cuda_runtime": torch.version.cuda, "cuda_driver": doctor.driver().version},
        quick=options.quick,
        parts=parts,
    )


def draw(result: Result, folder: Path | None) -> list[Path]:
    """Draw pictures into a folder; it is made where it is not there.

    Returns:
        The files.

    Raises:
        UsageError: they cannot be written.
    """
    if folder is None:
        return []
    from benchmarks import plots

    try:
        folder.mkdir(parents=True, exist_ok=True)
        return plots.draw(result.as_dict(), folder)
    except OSError as error:
        raise report.UsageError(f"--plot {folder}: {error.strerror or error}") from error


def show(result: Result, out: Console) -> None:
    """Print a result."""
    versions = ", ".join(f"{name} {version}" for name, version in result.versions.items() if version is not None)
    out.print(f"{result.device} ({result.device_name}), {versions}\n")
    for part, found in result.parts.items():
        _SHOW[part](found, out)


def _show_quantize(found: Mapping[str, Any], out: Console) -> None:
    few = found["few_rows"]
    names = _names(row["baselines"] for row in few)
    for layout in dict.fromkeys(row["layout"] for row in few):
        rows = [
            (str(row["rows"]), str(row["k"]), *_microseconds(row["baselines"], names))
            for row in few
            if row["layout"] == layout
        ]
        _table(out, f"Quantization of few rows, {layout}: microseconds a graph node", ("rows", "k", *names), rows)
    floor = {name: [row["floor"][name]["us"] for row in few] for name in _names(row["floor"] for row in few)}
    rows = [(name, f"{min(us):.2f} to {max(us):.2f}") for name, us in floor.items()]
    _table(out, "The least a graph node takes, measured beside each shape", ("", "microseconds"), rows)
    rows = [(str(row["rows"]), str(row["k"]), row["layout"], *_bandwidth(row)) for row in found["many_rows"]]
    _table(out, "Quantization of many rows, through the pool", ("rows", "k", "layout", *_BANDWIDTH), rows)
    names = _names(row["baselines"] for row in found["gemm"])
    rows = [
        (
            *(str(row[size]) for size in ("m", "n", "k")),
            row["layout"],
            *_bandwidth(row),
            *_microseconds(row["baselines"], names),
        )
        for row in found["gemm"]
    ]
    _table(out, "Triton GEMM", ("m", "n", "k", "layout", *_BANDWIDTH, *names), rows)
    _show_rest(found, out)


def _show_decode(found: Mapping[str, Any], out: Console) -> None:
    models = found["models"]
    names = [*found["baselines"]]
    pool, *others = names
    for model in models:
        rows = [
            (
                str(row["batch"]),
                f"{row['gemm_only']['us']:.1f}",
                f"{row['baselines'][pool]['us']:.1f}",
                *(f"{row['baselines'][name]['over_pool_a_quantization']['us']:+.2f}" for name in others),
            )
            for row in model["batches"]
        ]
        title = f"{_title(model)}: microseconds a step; of the others, a quantization over the pool"
        _table(out, title, ("batch", "gemm only", *names), rows)
    largest = [(model, model["batches"][-1]) for model in models]
    rows = [
        (_title(model), str(row["batch"]), *(_dash(row["baselines"][name]["nodes"]) for name in names))
        for model, row in largest
    ]
    _table(out, "Nodes of a step's graph", ("", "batch", *names), rows)
    rows = [
        (
            _title(model),
            str(row["batch"]),
            *(_kibibytes(row["baselines"][name]["graph_memory_bytes"]) for name in names),
            _kibibytes(row["baselines"][pool]["pool_bytes"]),
        )
        for model, row in largest
    ]
    _table(out, "KiB of a graph's own memory, and of the pool", ("", "batch", *names, "pool's buffers"), rows)


def _show_host(found: Mapping[str, Any], out: Console) -> None:
    _table(out, "Microseconds a call on the host", ("", "median", "quartiles"), _calls(found))
    _show_rest(found, out)


def _show_moe(found: Mapping[str, Any], out: Console) -> None:
    names = _names(row["baselines"] for row in found["rows"])
    for k in dict.fromkeys(row["k"] for row in found["rows"]):
        of_k = [row for row in found["rows"] if row["k"] == k]
        rows = [
            (
                str(row["batch"]),
                row["routing"],
                *_microseconds(row["baselines"], names),
                f"{row['baselines']['pool']['ratio_to_alone']:.2f}",
            )
            for row in of_k
        ]
        what = "SiLU, mul and quantization" if of_k[0]["silu_and_mul"] else "Quantization"
        title = (
            f"{what} of {found['topk']} rows a token, routed to {found['experts']} experts, k {k}: microseconds a call"
        )
        _table(out, title, ("tokens", "routing", *names, "pool / alone"), rows)
    held = found["memory"]
    names = [name for name in _names(held) if name not in ("k", "batch")]
    rows = [(str(row["k"]), str(row["batch"]), *(_kibibytes(row[name]) for name in names)) for row in held]
    _table(out, "KiB of scales held for all batches", ("k", "tokens", *names), rows)
    _show_rest(found, out)


def _show_guard(found: Mapping[str, Any], out: Console) -> None:
    rows = [
        (
            _title(row),
            str(row["batch"]),
            str(row["buffers"]),
            f"{row['off']['us']:.1f}",
            *(f"{row[what]['over_off']['us']:+.2f}" for what in ("counts", "looks")),
        )
        for row in found["steps"]
    ]
    headings = ("", "batch", "buffers", "off", "counts", "looks")
    _table(out, "A decode step: microseconds, and over that with a node that counts or looks", headings, rows)
    rows = [
        (
            _title(row),
            str(row["buffers"]),
            _kibibytes(row["bytes"]),
            *(f"{row[what]['us']:.2f}" for what in ("counts", "looks")),
        )
        for row in found["nodes"]
    ]
    title = "The node alone, over buffers for all batch sizes that vLLM captures: microseconds"
    _table(out, title, ("", "buffers", "KiB", "counts", "looks"), rows)
    _table(out, "Microseconds a call on the host", ("", "median", "quartiles"), _calls(found["host"]))
    _show_rest(found, out)


def _calls(found: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    return [
        (name, f"{call['us']:.2f}", " to ".join(f"{us:.2f}" for us in call["quartiles"]))
        for name, call in found["calls"].items()
    ]


def _show_rest(found: Mapping[str, Any], out: Console) -> None:
    """What was not measured and why, and the targets."""
    for name, reason in found["not_measured"].items():
        out.print(f"{name}: not measured, {reason}\n")
    if not found["targets"]:
        return
    rows = [
        ((row["name"], str(row["target"]), _dash(row["reached"]), "yes" if row["met"] else "NO"), bool(row["met"]))
        for row in found["targets"]
    ]
    report.table(out, "Targets", ("", "target", "reached", "met"), rows)


_BANDWIDTH = ("microseconds", "GB/s", "of a copy's")


def _bandwidth(row: Mapping[str, Any]) -> tuple[str, ...]:
    return f"{row['us']:.2f}", f"{row['bytes_per_second'] / 1e9:.0f}", f"{row['share_of_copy']:.0%}"


def _microseconds(row: Mapping[str, Any], names: Iterable[str]) -> tuple[str, ...]:
    return tuple(f"{row[name]['us']:.2f}" if name in row else "-" for name in names)


def _names(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Every key, in the order of its first row."""
    return list(dict.fromkeys(name for row in rows for name in row))


def _title(model: Mapping[str, Any]) -> str:
    return f"{model['model']}, TP {model['tensor_parallel']}"


def _dash(number: float | None) -> str:
    return "-" if number is None else str(number)


def _kibibytes(nbytes: int) -> str:
    return f"{nbytes / 2**10:.0f}"


def _table(out: Console, title: str, headings: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    report.table(out, title, headings, ((row, True) for row in rows))


_SHOW: dict[str, Callable[[Mapping[str, Any], Console], None]] = {
    "quantize": _show_quantize,
    "decode": _show_decode,
    "host": _show_host,
    "moe": _show_moe,
    "guard": _show_guard,
}

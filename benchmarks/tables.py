"""The tables that ``python -m benchmarks`` prints."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console

from safealloc.commands import report


def show(result: Mapping[str, Any], out: Console) -> None:
    """Print a result.

    Args:
        result: as the JSON has it.
        out: where to.
    """
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items() if version is not None)
    out.print(f"{result['device']} ({result['device_name']}), {versions}\n")
    for part, show_part in _SHOW.items():
        if part in result:
            show_part(result[part], out)


def _show_quantize(found: Mapping[str, Any], out: Console) -> None:
    few = found["few_rows"]
    names = _names(row["baselines"] for row in few)
    for layout in dict.fromkeys(row["layout"] for row in few):
        rows = [
            (str(row["rows"]), str(row["k"]), *_microseconds(row["baselines"], names))
            for row in few
            if row["layout"] == layout
        ]
        _table(out, f"Quantization of few rows, {layout}: microseconds per graph node", ("rows", "k", *names), rows)
    floor = {name: [row["floor"][name]["us"] for row in few] for name in _names(row["floor"] for row in few)}
    rows = [(name, f"{min(us):.2f} to {max(us):.2f}") for name, us in floor.items()]
    _table(out, "The shortest graph nodes, measured beside each shape", ("", "microseconds"), rows)
    _show_arithmetic(found.get("arithmetic", ()), out)
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
    _show_not_measured_and_targets(found, out)


def _show_arithmetic(found: Sequence[Mapping[str, Any]], out: Console) -> None:
    for layout in dict.fromkeys(row["layout"] for row in found):
        rows = [row for row in found if row["layout"] == layout]
        names = list(
            dict.fromkeys((which, name) for row in rows for which, of in row["by_arithmetic"].items() for name in of)
        )
        shown = [
            (
                str(row["rows"]),
                str(row["k"]),
                *(f"{row['by_arithmetic'][which][name]['us']:.2f}" for which, name in names),
            )
            for row in rows
        ]
        headings = ("rows", "k", *(f"{which}: {name}" for which, name in names))
        _table(out, f"Arithmetic, {layout}: microseconds per graph node", headings, shown)


def _show_decode(found: Mapping[str, Any], out: Console) -> None:
    models = found["models"]
    if counts := found.get("counts"):
        out.print(f"A decode step has {counts}.\n")
    names = [*found["baselines"]]
    pool, *others = names
    for model in models:
        rows = [
            (
                str(row["batch"]),
                f"{row['gemm_only']['us']:.1f}",
                f"{row['baselines'][pool]['us']:.1f}",
                *(f"{row['baselines'][name]['over_pool_per_quantization']['us']:+.2f}" for name in others),
            )
            for row in model["batches"]
        ]
        title = f"{_title(model)}: microseconds per step; for the others, per quantization over the pool"
        _table(out, title, ("batch", "gemm only", *names), rows)
    largest = [(model, model["batches"][-1]) for model in models]
    rows = [
        (_title(model), str(row["batch"]), *(_or_dash(row["baselines"][name]["nodes"]) for name in names))
        for model, row in largest
    ]
    _table(out, "Graph nodes per step", ("", "batch", *names), rows)
    rows = [
        (
            _title(model),
            str(row["batch"]),
            *(_kibibytes(row["baselines"][name]["graph_memory_bytes"]) for name in names),
            _kibibytes(row["baselines"][pool]["pool_bytes"]),
        )
        for model, row in largest
    ]
    _table(out, "KiB of memory that each graph holds, and of the pool", ("", "batch", *names, "pool's buffers"), rows)


def _show_host(found: Mapping[str, Any], out: Console) -> None:
    _table(out, "Host time: microseconds per call", ("", "median", "quartiles"), _calls(found))
    _show_not_measured_and_targets(found, out)


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
        what = "SiLU, mul and grouped quantization" if of_k[0]["silu_and_mul"] else "Grouped quantization"
        title = f"{what}, {found['experts']} experts, {found['topk']} per token, k {k}: microseconds per call"
        _table(out, title, ("tokens", "routing", *names, "pool / alone"), rows)
    held = found["memory"]
    names = [name for name in _names(held) if name not in ("k", "batch")]
    rows = [(str(row["k"]), str(row["batch"]), *(_kibibytes(row[name]) for name in names)) for row in held]
    _table(out, "KiB of scale buffers for all batch sizes", ("k", "tokens", *names), rows)
    _show_not_measured_and_targets(found, out)


def _show_guard(found: Mapping[str, Any], out: Console) -> None:
    rows = [
        (
            _title(row),
            str(row["batch"]),
            str(row["buffers"]),
            f"{row['off']['us']:.1f}",
            *(f"{row[what]['over_off']['us']:+.2f}" for what in ("counts", "checks")),
        )
        for row in found["steps"]
    ]
    headings = ("", "batch", "buffers", "off", "counts", "checks")
    _table(
        out, "A decode step: microseconds, and what a node that counts replays or checks padding adds", headings, rows
    )
    rows = [
        (_title(row), str(row["batch"]), f"{row['nan']['off']['us']:.1f}", *_over_off(row["nan"]))
        for row in found["steps"]
        if "nan" in row  # not in results of earlier versions
    ]
    if rows:
        headings = ("", "batch", "off", *_nan_ways(found))
        _table(out, "A decode step: microseconds, and what SAFEALLOC_NAN=1 adds", headings, rows)
    rows = [
        (
            _title(row),
            str(row["buffers"]),
            _kibibytes(row["bytes"]),
            *(f"{row[what]['us']:.2f}" for what in ("counts", "checks")),
        )
        for row in found["nodes"]
    ]
    title = "The node alone, over buffers for all batch sizes that vLLM captures: microseconds per replay"
    _table(out, title, ("", "buffers", "KiB", "counts", "checks"), rows)
    _table(out, "Host time: microseconds per call", ("", "median", "quartiles"), _calls(found["host"]))
    _show_not_measured_and_targets(found, out)


def _nan_ways(found: Mapping[str, Any]) -> list[str]:
    first = next(row["nan"] for row in found["steps"] if "nan" in row)
    return [name for name, way in first.items() if isinstance(way, dict) and "over_off" in way]


def _over_off(found: Mapping[str, Any]) -> list[str]:
    return [
        f"{way['over_off']['us']:+.2f} ({way['ratio_to_off'] - 1:+.1%})"
        for way in found.values()
        if isinstance(way, dict) and "over_off" in way
    ]


def _calls(found: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    return [
        (name, f"{call['us']:.2f}", " to ".join(f"{us:.2f}" for us in call["quartiles"]))
        for name, call in found["calls"].items()
    ]


def _show_not_measured_and_targets(found: Mapping[str, Any], out: Console) -> None:
    """What was not measured and why; the targets, and whether they are met."""
    for name, reason in found["not_measured"].items():
        out.print(f"{name}: not measured, {reason}\n")
    if not found["targets"]:
        return
    rows = [
        ((row["name"], str(row["target"]), _or_dash(row["reached"]), "yes" if row["met"] else "NO"), bool(row["met"]))
        for row in found["targets"]
    ]
    report.table(out, "Targets", ("", "target", "reached", "met"), rows, names=0)


_BANDWIDTH = ("microseconds", "GB/s", "share of a copy")


def _bandwidth(row: Mapping[str, Any]) -> tuple[str, ...]:
    return f"{row['us']:.2f}", f"{row['bytes_per_second'] / 1e9:.0f}", f"{row['share_of_copy']:.0%}"


def _microseconds(row: Mapping[str, Any], names: Iterable[str]) -> tuple[str, ...]:
    return tuple(f"{row[name]['us']:.2f}" if name in row else "-" for name in names)


def _names(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Every key, in the order of its first row."""
    return list(dict.fromkeys(name for row in rows for name in row))


def _title(model: Mapping[str, Any]) -> str:
    return f"{model['model']}, TP {model['tensor_parallel']}"


def _or_dash(number: float | None) -> str:
    return "-" if number is None else str(number)


def _kibibytes(nbytes: int) -> str:
    return f"{nbytes / 2**10:.0f}"


def _table(out: Console, title: str, headings: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    report.table(out, title, headings, ((row, True) for row in rows), names=0)


_SHOW: dict[str, Callable[[Mapping[str, Any], Console], None]] = {
    "quantize": _show_quantize,
    "decode": _show_decode,
    "host": _show_host,
    "moe": _show_moe,
    "guard": _show_guard,
}

"""The vendors' arithmetic in ``python -m benchmarks quantize``: targets, and its calls interpreted; no GPU."""

from __future__ import annotations

from typing import Any

import pytest
from support.interpreted import printed_lines

pytest.importorskip("triton", reason="the benchmark launches the kernels")
from benchmarks import arithmetic


def row(
    rows: int = 8, k: int = 4096, *, vendor: str = "vllm", linear: float = 1.0, silu: float = 1.1, exact: float = 0.95
):
    found: dict[str, Any] = {
        name: {
            arithmetic.POOL: {"ratio_to_pool": 1.0, "ratio_to_exact": ratio},
            arithmetic.LINEAR: {"ratio_to_pool": 1 / linear, "ratio_to_exact": ratio},
            arithmetic.SILU: {"ratio_to_pool": silu, "ratio_to_exact": ratio},
        }
        for name, ratio in (("exact", 1.0), (vendor, exact))
    }
    return {"rows": rows, "k": k, "by_arithmetic": found}


def many(exact: float = 0.9, vllm: float = 0.9) -> dict[str, Any]:
    return {"by_arithmetic": {"exact": {"share_of_copy": exact}, "vllm": {"share_of_copy": vllm}}}


GOOD = [row(), row(1), row(32, 8192), row(vendor="flashinfer")]


def missed(rows: list[dict[str, Any]], shares: list[dict[str, Any]]) -> dict[str, float | None]:
    return {target["name"]: target["reached"] for target in arithmetic.targets(rows, shares) if not target["met"]}


def test_all_targets_can_be_met() -> None:
    assert missed(GOOD, [many()]) == {}
    assert len({target["name"] for target in arithmetic.targets(GOOD, [many()])}) == 13


@pytest.mark.parametrize(
    ("bad", "names"),
    [
        (row(linear=1.09, vendor="flashinfer"), {"exact: pool against linear", "flashinfer: pool against linear"}),
        (row(16, 4096, silu=1.2), {"exact: SiLU and mul", "vllm: SiLU and mul"}),
    ],
)
def test_the_worst_shape_decides(bad: dict[str, Any], names: set[str]) -> None:
    found = missed([*GOOD, bad], [many()])
    assert all(any(name.startswith(start) for name in found) for start in names)
    assert all("median" not in name or "flashinfer" in name for name in found)


def test_medians_decide_where_the_target_is_one() -> None:
    assert list(missed([row(linear=1.06)] * 2 + [row(vendor="flashinfer")], [many()])) == [
        "exact: pool against linear, median of rows <= 32, k >= 4096: times",
        "vllm: pool against linear, median of rows <= 32, k >= 4096: times",
    ]
    assert list(missed([row(exact=1.02), row(vendor="flashinfer")], [many()])) == [
        "vllm against exact, median of all shapes: times"
    ]


def test_other_shapes_do_not_count() -> None:
    others = [row(64, 4096, linear=2.0, silu=3.0), row(8, 2048, linear=2.0), row(32, 4096, silu=3.0)]
    assert missed([*GOOD, *GOOD, *others], [many()]) == {}


def test_many_rows_are_judged_in_both_arithmetics() -> None:
    assert missed(GOOD, [many(), many(exact=0.84)]) == {"exact: many rows: share of the bandwidth of a copy": 0.84}
    assert missed(GOOD, [many(), many(vllm=0.84)]) == {"vllm: many rows: share of the bandwidth of a copy": 0.84}


def test_nothing_measured_is_nothing_met() -> None:
    assert len(missed([], [])) == 13


PROGRAM = """
import torch
from safealloc import ScalePool
from safealloc.kernels import reference
from benchmarks import arithmetic

with ScalePool("cpu") as pool:
    for layout in arithmetic.VENDORS:
        found = arithmetic.nodes(pool, 3, 48, layout, {}, {})
        for name, calls in found.items():
            data, scales = calls[arithmetic.POOL]()
            same, linear = calls[arithmetic.LINEAR]()
            assert torch.equal(data, same) and torch.equal(layout.unswizzle(scales, 3, 48), linear)
            other, _ = calls[arithmetic.SILU]()
            assert not torch.equal(data, other)
            print(layout.name, name, *calls)
    pool.verify()
"""


def test_what_is_measured_is_right() -> None:
    assert printed_lines(PROGRAM) == [
        f"{layout} {name} pool linear SiLU and mul"
        for layout, vendor in (("layout_128x4", "vllm"), ("layout_8x4", "flashinfer"))
        for name in ("exact", vendor)
    ]

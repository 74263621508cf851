"""The guard's kernels against ``safealloc.pool.verify``: one dirty byte anywhere, in buffers of every kind.

Runs on a GPU and, with TRITON_INTERPRET=1, in Triton's interpreter on the CPU, as test_kernels.py does.
"""

from __future__ import annotations

import random

import pytest
import torch
from support.kernels import DEVICE, INTERPRETED, MARKS
from torch import Tensor

pytest.importorskip("triton", reason="the Triton kernels need triton")

from safealloc.formats.format import ScaleFormat
from safealloc.formats.layout import SfLayout
from safealloc.formats.spec import ScaleSpec
from safealloc.kernels import triton_guard
from safealloc.pool.buffer import zero_padded
from safealloc.pool.verify import find_corruptions

pytestmark = MARKS

SLOT, SLOTS = 5, 8
ROUNDS = 4 if INTERPRETED else 60


def random_spec(kind: str, layout: SfLayout) -> ScaleSpec:
    format = random.choice(list(ScaleFormat))
    rows, k = random.randint(1, 140 if INTERPRETED else 700), format.block_size * random.randint(1, 70)
    if kind == "grouped":
        return ScaleSpec.grouped(min(rows, 30) if INTERPRETED else rows, k, layout, 4, format)
    padded_k = k + 4 * format.block_size if kind == "padded" else None
    return ScaleSpec.checked(rows, k, layout, padded_k, format)


def filled_buffer(spec: ScaleSpec) -> Tensor:
    """Valid scales are NaN, padding is zero, and a record is one that steps could leave."""
    scales = zero_padded(spec, torch.device(DEVICE))
    record = spec.record_in(scales)
    if record is not None:
        places = torch.randperm(spec.stored_rows)[: spec.rows].int() + 1
        places[::3] = -1
        places[1::7] = 0
        record.copy_(places)
    scales.fill_(spec.format.nan_bytes[0])
    spec.zero_padding(scales)
    return scales


def flags() -> Tensor:
    return torch.zeros(SLOTS, dtype=torch.int32, pin_memory=not INTERPRETED)


def found(flags: Tensor) -> bool:
    if not INTERPRETED:
        torch.cuda.synchronize()
    assert flags.tolist() in ([0] * SLOTS, [1, 0, 0, 0, 0, 1, 0, 0])
    return bool(flags[SLOT])


def by_check(spec: ScaleSpec, scales: Tensor) -> bool:
    into = flags()
    triton_guard.check(spec, scales, into, SLOT)
    return found(into)


def by_table(spec: ScaleSpec, scales: Tensor, every: int = 3) -> bool:
    pieces = triton_guard.pieces_of(spec, scales)
    table = torch.zeros((1 + len(pieces), triton_guard.WORDS), dtype=torch.int64, pin_memory=not INTERPRETED)
    table[0, 0] = len(pieces)
    for row, piece in zip(table[1:], pieces, strict=True):
        row.copy_(torch.tensor([*piece, SLOT]))
    into, counters = flags(), torch.zeros(3, dtype=torch.int32, device=DEVICE)
    for _ in range(every - 1):
        triton_guard.check_table(table, into, counters, every)
    assert not found(into), "it checked before the N-th replay"
    triton_guard.check_table(table, into, counters, every)
    assert not counters.any()
    return found(into)


@pytest.mark.parametrize("kind", ["plain", "padded", "grouped"])
@pytest.mark.parametrize("layout", list(SfLayout), ids=lambda layout: layout.name)
class TestGuard:
    def test_one_dirty_byte(self, layout, kind):
        random.seed(f"{layout.name} {kind}")
        torch.manual_seed(0)
        dirtied = 0
        for _ in range(ROUNDS):
            spec = random_spec(kind, layout)
            scales = filled_buffer(spec)
            assert not find_corruptions([(spec, scales)])
            assert not by_check(spec, scales), f"{spec}: what is clean"
            assert not by_table(spec, scales), f"{spec}: what is clean"
            clean = scales.view(-1).clone()
            padding = (clean == 0).nonzero().flatten().tolist()
            if padding:
                at = random.choice(padding)
                scales.view(-1)[at] = random.choice((0x01, 0x38, 0x7F, 0x80, 0xFF))
                assert find_corruptions([(spec, scales)])
                assert by_check(spec, scales), f"{spec}: byte {at}"
                assert by_table(spec, scales), f"{spec}: byte {at}"
                dirtied += 1
        assert dirtied or (kind != "padded" and layout is SfLayout.layout_linear)

    def test_the_first_and_the_last_padding_byte(self, layout, kind):
        random.seed(f"ends {layout.name} {kind}")
        spec = random_spec(kind, layout)
        scales = filled_buffer(spec)
        padding = (scales.view(-1) == 0).nonzero().flatten().tolist()
        for at in {padding[0], padding[-1]} if padding else ():
            scales.view(-1)[at] = 1
            assert by_check(spec, scales)
            assert by_table(spec, scales, 1)
            scales.view(-1)[at] = 0
        assert not by_check(spec, scales)

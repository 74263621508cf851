"""The probe recovers the layout in which a GEMM reads its scales."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.audit_faults import (
    reads_as,
)
from support.audits import (
    LEAKS,
    planted,
)

from safealloc import SfLayout
from safealloc.audit import probe
from safealloc.audit.consumers import product
from safealloc.audit.probing import ALPHABET
from safealloc.formats.format import BLOCK_SIZE

CPU = torch.device("cpu")


class TestProbe:
    @settings(deadline=None, max_examples=60)
    @given(
        st.integers(1, 140),
        st.integers(1, 40),
        st.sampled_from(SfLayout),
        st.lists(st.sampled_from(ALPHABET), min_size=4, max_size=60, unique=True),
    )
    def test_the_reference_reads_the_layout_it_is_told(self, rows, cols, layout, alphabet):
        found = probe(product, layout, rows, cols * BLOCK_SIZE, CPU, alphabet=alphabet)
        assert torch.equal(found.offsets, layout.offsets(rows, cols * BLOCK_SIZE))
        assert layout in found.reads
        assert str(found) == f"reads {layout.name.removeprefix('layout_')}"

    @settings(deadline=None, max_examples=40)
    @given(st.integers(1, 70), st.integers(5, 40), st.sampled_from(SfLayout), st.sampled_from(SfLayout))
    def test_a_gemm_that_reads_another_layout_reads_that(self, rows, cols, told, other):
        found = probe(functools.partial(reads_as, other=other), told, rows, cols * BLOCK_SIZE, CPU)
        assert torch.equal(found.offsets, other.offsets(rows, cols * BLOCK_SIZE))
        assert other in found.reads

    @pytest.mark.parametrize("layout", SfLayout)
    @pytest.mark.parametrize("rows", range(1, 41))
    def test_the_layouts_differ_for_any_rows_up_to_40(self, layout, rows):
        assert probe(product, layout, rows, 512, CPU).reads == (layout,)

    def test_a_probe_takes_two_runs(self):
        calls = []

        def counting(*arguments):
            calls.append(None)
            return product(*arguments)

        probe(counting, SfLayout.layout_128x4, 40, 512, CPU)
        assert len(calls) == 2

    def test_a_leak_does_not_hide_the_layout(self):
        for rows in (1, 5):
            assert str(probe(planted(LEAKS).fn, SfLayout.layout_128x4, rows, 512, CPU)) == "reads 128x4"

    def test_an_output_that_is_not_one_scale_has_no_offset(self):
        found = probe(lambda *arguments: 1.05 * product(*arguments), SfLayout.layout_128x4, 5, 512, CPU)
        assert (found.reads, int(found.offsets.max())) == ((), -1)
        assert "reads no known layout: it takes no single byte for row 0, column 0" in str(found)

    def test_a_wrong_layout_is_explained_with_one_scale(self):
        found = probe(functools.partial(reads_as, other=SfLayout.layout_8x4), SfLayout.layout_128x4, 5, 512, CPU)
        assert str(found) == "reads 8x4: it takes byte 32 for row 0, column 4; in 128x4 that scale is byte 512"

"""Which pairs of a producer and a consumer are safe, on any memory and in a pool."""

from __future__ import annotations

import pytest
import torch
from support.audit_faults import (
    SHAPES,
    quantize_and_write,
)
from support.audits import (
    AS_HARDWARE,
    LEAKS,
    VALID_ONLY,
    consumer,
    producer,
)

from safealloc import ScalePool, SfLayout
from safealloc.audit import audit_producer
from safealloc.audit.combinations import Audited, combine, pairs
from safealloc.audit.known import KnownProducer

CPU = torch.device("cpu")


class TestCombinations:
    @pytest.mark.parametrize(
        ("made", "read", "safe", "safe_in_pool"),
        [
            (VALID_ONLY, "isolates, layout_128x4", True, True),
            (VALID_ONLY, AS_HARDWARE, False, True),
            (VALID_ONLY, LEAKS, False, True),
            ("zeroes all padding, layout_128x4", LEAKS, True, True),
            ("zeroes rows, skips columns", AS_HARDWARE, False, True),
            ("zeroes rows, skips columns", LEAKS, True, True),
            ("zeroes columns only", AS_HARDWARE, True, True),
            ("zeroes columns only", LEAKS, False, True),
            ("allocates, and leaves padding", AS_HARDWARE, False, True),
            ("writes NaN into padding columns", AS_HARDWARE, False, False),
            ("writes 1.0 into the last padding byte", LEAKS, False, False),
            ("writes one byte past its tile", "isolates, layout_128x4", False, False),
            ("writes 8x4 for 128x4", "isolates, layout_128x4", False, False),
            ("zeroes all padding, layout_128x4", "reads 128x4 as 8x4", False, False),
            ("zeroes all padding, layout_128x4", "forgets alpha", False, False),
        ],
    )
    def test_a_pair_is_safe_or_not(self, made, read, safe, safe_in_pool):
        pair = producer(made), consumer(read)
        assert list(pairs(*([one] for one in pair))) == [pair]
        assert combine(*pair).safe == safe
        with ScalePool("cpu") as pool:
            found = combine(*pair, pool)
        assert (found.safe, found.vllm) == (safe_in_pool, True)
        assert found.tried == (SHAPES if safe_in_pool else ())

    def test_padding_that_is_dirtied_only_in_a_pool_is_found_there(self):
        def only_there(x, global_scale, x_fp4, scales, layout):
            dirty = scales.data_ptr() in addresses
            quantize_and_write(x, global_scale, x_fp4, scales, layout, write="columns" if dirty else None)

        known = KnownProducer(
            "only in pools",
            (SfLayout.layout_128x4,),
            only_there,
            lambda device, layout: None,
            (SfLayout.layout_128x4,),
        )
        addresses: set[int] = set()
        made = Audited(known, SfLayout.layout_128x4, audit_producer(only_there, shapes=SHAPES, device="cpu"))
        read = consumer("isolates, layout_128x4")
        with ScalePool("cpu") as pool:
            assert combine(made, read, pool).safe
            scales = pool.acquire(5, 480, SfLayout.layout_128x4)
            addresses.add(scales.data_ptr())
            del scales
            found = combine(made, read, pool)
            assert not found.safe
            assert "at 5x480: buffer at" in found.why
            assert pool.verify() > 0

    def test_pairs_share_a_layout_and_whether_vllm_uses_them(self):
        made = [
            producer(VALID_ONLY),
            producer(f"{VALID_ONLY}, 8x4"),
            producer("writes one byte past its tile", vllm=False),
        ]
        read = [
            consumer(AS_HARDWARE),
            consumer("multiplies padding columns, 8x4", vllm=False),
            consumer(LEAKS, vllm=False),
        ]
        found = [(one.known.name, other.known.name) for one, other in pairs(made, read)]
        assert found == [(VALID_ONLY, AS_HARDWARE), ("writes one byte past its tile", LEAKS)]

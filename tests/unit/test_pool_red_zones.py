"""``debug=True`` puts bytes before and behind each buffer that nobody may write, and ``verify`` checks them too."""

from __future__ import annotations

import pytest
import torch

from safealloc import PaddingCorruptionError, ScalePool, ScaleSpec, SfLayout


@pytest.mark.parametrize("cache_bytes", [0, 1 << 20], ids=["for one call", "cached"])
@pytest.mark.parametrize("layout", SfLayout)
@pytest.mark.parametrize(
    ("offset", "words"),
    [
        (-1, "1 bytes before it"),
        (-512, "512 bytes before it"),
        (0, "0 bytes behind its end"),
        (511, "511 bytes behind its end"),
    ],
)
def test_a_write_outside_of_a_buffer_is_named(layout: SfLayout, offset: int, words: str, cache_bytes: int) -> None:
    with ScalePool("cpu", debug=True, cache_bytes=cache_bytes) as pool:
        scales = pool.acquire(5, 80, layout)
        at = scales.storage_offset() + (offset if offset < 0 else ScaleSpec(5, 80, layout).nbytes + offset)
        scales.as_strided((1,), (1,), at).fill_(0x38)
        with pytest.raises(
            PaddingCorruptionError, match=rf"rows=5, k=80.*1 bytes outside of it were written, first 0x38 {words}"
        ):
            pool.verify()
        with pytest.raises(PaddingCorruptionError):
            pool.acquire(5, 80, layout)
        pool.verify(repair=True)
        assert pool.verify() == 1


def test_grouped_scales_have_red_zones_behind_their_record() -> None:
    with ScalePool("cpu", debug=True) as pool:
        scales = pool.acquire_grouped(5, 80, 2)
        spec = pool.spec(scales)
        assert spec is not None
        scales.as_strided((1,), (1,), scales.storage_offset() + spec.nbytes).fill_(1)
        with pytest.raises(PaddingCorruptionError, match="0 bytes behind its end"):
            pool.verify()
        pool.verify(repair=True)


def test_buffers_are_aligned_and_padding_is_found_beside_red_zones() -> None:
    with ScalePool("cpu", debug=True) as pool:
        scales = pool.acquire(5, 80, SfLayout.layout_128x4)
        assert scales.data_ptr() % 512 == 0
        scales[-1, -1] = 7
        scales.as_strided((1,), (1,), scales.storage_offset() - 3).fill_(1)
        with pytest.raises(PaddingCorruptionError) as raised:
            pool.verify()
        assert [corruption.outside for corruption in raised.value.corruptions] == [None, -3]
        pool.verify(repair=True)


def test_a_pool_without_debug_has_none() -> None:
    with ScalePool("cpu") as pool:
        scales = pool.acquire(5, 80, SfLayout.layout_128x4)
        assert scales.untyped_storage().nbytes() == scales.numel()
        assert scales.dtype == torch.uint8

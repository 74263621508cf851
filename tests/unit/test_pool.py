"""ScalePool on a CPU: what it promises without captures."""

from __future__ import annotations

import gc
import logging

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.dlpack import to_dlpack

from safealloc import (
    PaddingCorruptionError,
    PoolClosedError,
    PoolExhaustedError,
    ScalePool,
    ScaleSpec,
    SfLayout,
    use_pool,
)
from safealloc.pool import buffer as buffer_module


@pytest.fixture
def pool():
    with ScalePool("cpu") as pool:
        yield pool


@pytest.mark.parametrize("layout", SfLayout)
@pytest.mark.parametrize(("rows", "k", "padded_k"), [(1, 16, None), (5, 496, None), (129, 4096, None), (8, 64, 128)])
def test_what_acquire_returns(pool, rows, k, padded_k, layout):
    buffer = pool.acquire(rows, k, layout, padded_k=padded_k)
    assert buffer.shape == layout.padded_shape(rows, k, padded_k=padded_k)
    assert buffer.dtype == torch.uint8
    assert buffer.is_contiguous()
    assert buffer.data_ptr() % 512 == 0
    assert not buffer.view(-1)[layout.padding_mask(rows, k, padded_k=padded_k)].any()
    assert pool.spec(buffer) == ScaleSpec(rows, k, layout, padded_k)


def test_only_padding_is_filled(pool, monkeypatch):
    monkeypatch.setattr(
        buffer_module, "_aligned", lambda nbytes, device: torch.full((nbytes,), 0xFF, dtype=torch.uint8)
    )
    buffer = pool.acquire(5, 48, SfLayout.layout_128x4)
    mask = SfLayout.layout_128x4.padding_mask(5, 48)
    assert (buffer.view(-1)[~mask] == 0xFF).all()
    assert not buffer.view(-1)[mask].any()


HOLDERS = {
    "tensor": lambda t: t,
    "view": lambda t: t[1:],
    "dtype view": lambda t: t.view(torch.float8_e4m3fn),
    "int32 view": lambda t: t.view(torch.int32),
    "numpy array": lambda t: t.numpy(),
    "memoryview": lambda t: memoryview(t.numpy()),
    "storage": lambda t: t.untyped_storage(),
    "dlpack capsule": to_dlpack,
    "tensor from dlpack": torch.from_dlpack,
    "autograd": lambda t: (torch.ones(t.shape, requires_grad=True) * t).sum(),
    "cycle": lambda t: (lambda box: box.append(box) or box)([t]),
}


@pytest.mark.parametrize("holder", HOLDERS)
def test_a_buffer_is_not_reused_while_anybody_holds_it(pool, holder):
    buffer = pool.acquire(8, 512, SfLayout.layout_8x4)
    address = buffer.data_ptr()
    held = HOLDERS[holder](buffer)
    del buffer
    other = pool.acquire(8, 512, SfLayout.layout_8x4)
    assert other.data_ptr() != address
    assert pool.stats().live == 2
    del held
    gc.collect()
    assert pool.acquire(8, 512, SfLayout.layout_8x4).data_ptr() == address
    assert pool.stats().live == 1
    del other


def test_looking_at_the_storage_leaves_no_trace(pool):
    for _ in range(3):
        buffer = pool.acquire(8, 512, SfLayout.layout_8x4)
        address = buffer.data_ptr()
        assert buffer.untyped_storage().nbytes() >= buffer.numel()
        weak = StorageWeakRef(buffer.untyped_storage())
        del buffer
        assert pool.acquire(8, 512, SfLayout.layout_8x4).data_ptr() == address
        del weak
    assert pool.stats().buffers == 1


def test_each_call_returns_a_fresh_tensor(pool):
    first = pool.acquire(8, 512, SfLayout.layout_8x4)
    first.mark = "mine"
    del first
    assert not hasattr(pool.acquire(8, 512, SfLayout.layout_8x4), "mark")


def test_shapes_layouts_and_padded_k_have_buffers_of_their_own(pool):
    shapes = [
        (8, 512, SfLayout.layout_128x4, None),
        (8, 512, SfLayout.layout_8x4, None),
        (8, 512, SfLayout.layout_linear, None),
        (7, 512, SfLayout.layout_8x4, None),
        (8, 528, SfLayout.layout_8x4, None),
        (8, 512, SfLayout.layout_8x4, 640),
    ]
    addresses = {pool.acquire(*shape[:3], padded_k=shape[3]).data_ptr() for shape in shapes}
    assert len(addresses) == len(shapes)


def test_padded_k_equal_to_k_is_none(pool):
    address = pool.acquire(8, 512, SfLayout.layout_8x4, padded_k=512).data_ptr()
    assert pool.acquire(8, 512, SfLayout.layout_8x4).data_ptr() == address


def test_a_layout_of_another_enum_is_the_same_layout(pool):
    import enum

    theirs = enum.Enum("SfLayout", {"layout_128x4": 0, "layout_8x4": 1})
    address = pool.acquire(8, 512, SfLayout.layout_8x4).data_ptr()
    assert pool.acquire(8, 512, theirs.layout_8x4).data_ptr() == address
    assert pool.stats().hits == 1


def test_an_inference_mode_buffer_can_be_written_outside(pool):
    with torch.inference_mode():
        buffer = pool.acquire(8, 512, SfLayout.layout_8x4)
    assert not buffer.is_inference()
    buffer.zero_()


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ((0, 512, SfLayout.layout_8x4), ValueError),
        ((-1, 512, SfLayout.layout_8x4), ValueError),
        ((8, 0, SfLayout.layout_8x4), ValueError),
        ((8, 24, SfLayout.layout_8x4), ValueError),
        ((8, -16, SfLayout.layout_8x4), ValueError),
        ((8.0, 512.5, SfLayout.layout_8x4), TypeError),
        (("8", 512, SfLayout.layout_8x4), TypeError),
        ((True, 512, SfLayout.layout_8x4), TypeError),
        ((8, 512, 3), ValueError),
        ((8, 512, "layout_8x4"), TypeError),
        ((8, 512, None), TypeError),
    ],
)
def test_bad_shapes_leave_the_pool_as_it_was(pool, arguments, error):
    before = pool.stats()
    with pytest.raises(error):
        pool.acquire(*arguments)
    with pytest.raises(error):
        pool.reserve(*arguments)
    assert pool.stats() == before


def test_bad_padded_k_copies_and_iterables(pool):
    before = pool.stats()
    for padded_k in (496, 520):
        with pytest.raises(ValueError, match="padded_k"):
            pool.acquire(8, 512, SfLayout.layout_8x4, padded_k=padded_k)
    with pytest.raises(ValueError, match="copies"):
        pool.reserve(8, 512, copies=0)
    with pytest.raises(TypeError, match="copies"):
        pool.reserve(8, 512, copies=1.5)
    with pytest.raises(ValueError, match="multiple"):
        pool.reserve((8, 16), (512, 24))  # the last one is wrong: none is made
    assert pool.stats() == before


@pytest.mark.parametrize(
    ("keywords", "error"),
    [
        ({"device": "meta"}, ValueError),
        ({"device": "no such device"}, ValueError),
        ({"device": "cuda:99"}, ValueError),
        ({"max_bytes": -1}, ValueError),
        ({"max_bytes": 1.5}, TypeError),
        ({"cache_bytes": -1}, ValueError),
        ({"cache_bytes": None}, TypeError),
        ({"growth_in_capture": "maybe"}, ValueError),
    ],
)
def test_bad_pools(keywords, error):
    with pytest.raises(error):
        ScalePool(**{"device": "cpu", **keywords})


def test_reserve_makes_the_product_and_is_idempotent(pool):
    pool.reserve(range(1, 9), (512, 1024), SfLayout.layout_8x4, copies=2)
    stats = pool.stats()
    assert stats.buffers == 32
    assert stats.bytes == 2 * sum(SfLayout.layout_8x4.nbytes(rows, k) for rows in range(1, 9) for k in (512, 1024))
    pool.reserve(range(1, 9), (512, 1024), SfLayout.layout_8x4, copies=2)
    assert pool.stats() == stats
    held = [pool.acquire(8, 512, SfLayout.layout_8x4) for _ in range(2)]
    assert pool.stats().hits == 2
    assert pool.stats().misses == 0
    pool.acquire(8, 512, SfLayout.layout_8x4)
    assert pool.stats().misses == 1
    del held


def test_ten_thousand_row_counts_stay_in_the_cache():
    with ScalePool("cpu", cache_bytes=1 << 20) as pool:
        pool.reserve(8, 1024, SfLayout.layout_128x4)
        for rows in range(1, 10_001):
            pool.acquire(rows, 1024, SfLayout.layout_128x4)
            if rows % 997 == 0:
                assert pool.stats().bytes <= (1 << 20) + SfLayout.layout_128x4.nbytes(8, 1024)
        stats = pool.stats()
        assert stats.bytes <= (1 << 20) + SfLayout.layout_128x4.nbytes(8, 1024)
        assert stats.evictions > 1000
        assert stats.misses == 9_999  # all but the reserved one
        assert pool.verify() == stats.buffers


def test_the_least_recently_used_goes_first():
    size = SfLayout.layout_128x4.nbytes(1, 1024)
    with ScalePool("cpu", cache_bytes=3 * size) as pool:
        for rows in (1, 2, 3):
            pool.acquire(rows, 1024, SfLayout.layout_128x4)
        pool.acquire(1, 1024, SfLayout.layout_128x4)
        pool.acquire(4, 1024, SfLayout.layout_128x4)
        assert pool.stats().evictions == 1
        misses = pool.stats().misses
        for rows in (1, 3, 4):
            pool.acquire(rows, 1024, SfLayout.layout_128x4)
        assert pool.stats().misses == misses
        pool.acquire(2, 1024, SfLayout.layout_128x4)
        assert pool.stats().misses == misses + 1


def test_what_does_not_fit_the_cache_is_made_for_one_call():
    with ScalePool("cpu", cache_bytes=0) as pool:
        buffer = pool.acquire(5, 48, SfLayout.layout_128x4)
        assert pool.stats().buffers == 0
        assert pool.spec(buffer) == ScaleSpec(5, 48, SfLayout.layout_128x4)
        assert pool.verify() == 1
        buffer[100, 0] = 0x7F
        with pytest.raises(PaddingCorruptionError):
            pool.verify()
        assert pool.verify(repair=True) == 1
        assert pool.verify() == 1
        view = buffer[5:]
        del buffer
        assert pool.verify() == 1
        del view
        assert pool.verify() == 0
        assert pool.acquire(5, 48, SfLayout.layout_128x4).shape == (128, 4)


def test_live_buffers_are_never_evicted():
    size = SfLayout.layout_128x4.nbytes(1, 1024)
    with ScalePool("cpu", cache_bytes=2 * size) as pool:
        held = [pool.acquire(rows, 1024, SfLayout.layout_128x4) for rows in (1, 2)]
        third = pool.acquire(3, 1024, SfLayout.layout_128x4)
        assert pool.stats().buffers == 2
        assert pool.stats().evictions == 0
        assert len({t.data_ptr() for t in (*held, third)}) == 3


def test_max_bytes_is_an_error_and_leaves_the_pool_as_it_was():
    size = SfLayout.layout_128x4.nbytes(1, 1024)
    with ScalePool("cpu", max_bytes=3 * size) as pool:
        pool.reserve(1, 1024)
        held = pool.acquire(2, 1024, SfLayout.layout_128x4)
        before = pool.stats()
        with pytest.raises(PoolExhaustedError, match="max_bytes"):
            pool.reserve((3, 4), 1024)
        with pytest.raises(PoolExhaustedError):
            pool.acquire(129, 1024, SfLayout.layout_128x4)
        after = pool.stats()
        assert (after.buffers, after.bytes, after.misses) == (before.buffers, before.bytes, before.misses)
        third = pool.acquire(3, 1024, SfLayout.layout_128x4)
        with pytest.raises(PoolExhaustedError):
            pool.acquire(4, 1024, SfLayout.layout_128x4)
        del held
        pool.acquire(4, 1024, SfLayout.layout_128x4)  # the idle one goes
        del third


def test_an_error_that_somebody_keeps_holds_no_buffer():
    """Its traceback shows what verify looked at; a buffer made for one call must go with its holder all the same."""
    with ScalePool("cpu", cache_bytes=0) as pool:
        buffer = pool.acquire(5, 80, SfLayout.layout_128x4)
        buffer.view(-1)[-1] = 0x7F
        with pytest.raises(PaddingCorruptionError) as kept:
            pool.verify()
        del buffer
        assert pool.verify() == 0
        assert kept.value.corruptions


def test_buffers_made_for_one_call_count_towards_max_bytes():
    size = SfLayout.layout_128x4.nbytes(1, 1024)
    with ScalePool("cpu", max_bytes=2 * size, cache_bytes=0) as pool:
        first, second = pool.acquire(1, 1024, SfLayout.layout_128x4), pool.acquire(1, 1024, SfLayout.layout_128x4)
        with pytest.raises(PoolExhaustedError):
            pool.acquire(1, 1024, SfLayout.layout_128x4)
        del first
        third = pool.acquire(1, 1024, SfLayout.layout_128x4)
        del second, third


def test_trim_frees_idle_cache_and_nothing_else(pool):
    pool.reserve(1, 1024)
    held = pool.acquire(2, 1024, SfLayout.layout_128x4)
    pool.acquire(3, 1024, SfLayout.layout_128x4)
    pool.acquire(4, 2048, SfLayout.layout_128x4)
    assert pool.trim() == SfLayout.layout_128x4.nbytes(3, 1024) + SfLayout.layout_128x4.nbytes(4, 2048)
    assert pool.stats().buffers == 2
    assert pool.trim() == 0
    address = held.data_ptr()
    del held
    assert pool.acquire(2, 1024, SfLayout.layout_128x4).data_ptr() == address


def test_spec_of_views_and_of_others(pool):
    buffer = pool.acquire(8, 512, SfLayout.layout_8x4)
    spec = ScaleSpec(8, 512, SfLayout.layout_8x4)
    assert pool.spec(buffer) == pool.spec(buffer.view(torch.float8_e4m3fn)) == pool.spec(buffer.view(-1)) == spec
    assert pool.spec(buffer.view(torch.int32)) == spec
    assert pool.spec(buffer[:2]) is None
    assert pool.spec(buffer[1:]) is None
    assert pool.spec(torch.zeros(8)) is None
    with ScalePool("cpu") as other:
        assert other.spec(buffer) is None
    with pytest.raises(TypeError):
        pool.spec("buffer")


def test_spec_forgets_memory_that_was_freed():
    with ScalePool("cpu", cache_bytes=0) as pool:
        address = pool.acquire(8, 512, SfLayout.layout_8x4).data_ptr()
        again = [torch.empty(n, dtype=torch.uint8) for n in (256, 512, 767, 1024)]
        assert all(pool.spec(t) is None for t in again)
        assert address


def test_verify_names_the_first_byte_and_counts(pool, caplog):
    clean, dirty = pool.acquire(3, 48, SfLayout.layout_128x4), pool.acquire(4, 4096, SfLayout.layout_8x4)
    clean.view(-1)[SfLayout.layout_128x4.offsets(3, 48).view(-1)] = 0xFF  # real bytes may be anything
    assert pool.verify() == 2
    logical = (6, 17)  # a padding row
    flat = SfLayout.layout_8x4.offsets(8, 4096)[logical]
    dirty.view(-1)[flat] = 0x7F
    dirty.view(-1)[SfLayout.layout_8x4.offsets(8, 4096)[7, 3]] = 1
    with pytest.raises(PaddingCorruptionError, match="0x7F at scale row 6, column 17") as error:
        pool.verify()
    (corruption,) = error.value.corruptions
    assert corruption.spec == ScaleSpec(4, 4096, SfLayout.layout_8x4)
    assert (corruption.row, corruption.column, corruption.value, corruption.count) == (6, 17, 0x7F, 2)
    with caplog.at_level(logging.WARNING, logger="safealloc"):
        assert pool.verify(repair=True) == 2
    assert "rows=4, k=4096, layout_8x4" in caplog.text
    assert pool.verify() == 2
    assert (clean.view(-1)[SfLayout.layout_128x4.offsets(3, 48).view(-1)] == 0xFF).all()


@pytest.mark.parametrize(
    "spec",
    [
        ScaleSpec(5, 48, SfLayout.layout_8x4),
        ScaleSpec(16, 48, SfLayout.layout_8x4),
        ScaleSpec(3, 32, SfLayout.layout_linear, 64),
    ],
    ids=str,
)
def test_verify_changes_no_real_byte_of_a_single_tile(pool, spec):
    """Such a buffer lies in memory in matrix order."""
    buffer = pool.acquire(spec.rows, spec.k, spec.layout, padded_k=spec.padded_k)
    real = spec.layout.offsets(spec.rows, spec.k, padded_k=spec.padded_k)
    buffer.view(-1)[real.view(-1)] = 0xFF
    buffer[0, -1] = 1
    with pytest.raises(PaddingCorruptionError):
        pool.verify()
    assert pool.verify(repair=True) == 1
    assert (buffer.view(-1)[real] == 0xFF).all()
    assert not buffer[0, -1]
    assert torch.equal(spec.layout.unswizzle(buffer, spec.rows, spec.k, padded_k=spec.padded_k), buffer.view(-1)[real])


def test_debug_verifies_at_each_acquire():
    with ScalePool("cpu", debug=True) as pool:
        buffer = pool.acquire(3, 48, SfLayout.layout_128x4)
        buffer[127, 3] = 1
        with pytest.raises(PaddingCorruptionError):
            pool.acquire(4, 48, SfLayout.layout_128x4)
        pool.verify(repair=True)
        pool.acquire(4, 48, SfLayout.layout_128x4)


def test_a_closed_pool(pool):
    buffer = pool.acquire(8, 512, SfLayout.layout_8x4)
    pool.close()
    pool.close()
    uses = [
        lambda: pool.acquire(8, 512, SfLayout.layout_8x4),
        lambda: pool.reserve(8, 512),
        lambda: pool.spec(buffer),
        pool.verify,
        pool.stats,
        pool.trim,
        pool.shared_captures,
        lambda: pool.record_stream(buffer, None),
        pool.__enter__,
        lambda: use_pool(pool).__enter__(),
    ]
    for use in uses:
        with pytest.raises(PoolClosedError):
            use()
    buffer.fill_(1)  # what somebody holds stays valid
    assert "closed" in repr(pool)


def test_the_promise_does_not_name_a_constant_use_count():
    """The idle use count is read from each buffer: a holder that was there from the start is not taken for a user."""
    from safealloc.pool.buffer import Buffer, zero_padded

    spec = ScaleSpec(8, 512, SfLayout.layout_8x4)
    base = zero_padded(spec, torch.device("cpu"))
    alias = base.view(torch.float8_e4m3fn)
    buffer = Buffer(spec, base, kept=False)
    assert buffer.claim() is not None
    view = base.detach()
    assert buffer.claim() is None
    del view
    assert buffer.claim() is not None
    del alias


@pytest.mark.parametrize(
    ("layout", "rows", "view", "held"),
    [
        (SfLayout.layout_128x4, 300, slice(0, 128), 128),
        (SfLayout.layout_128x4, 300, slice(128, 384), 172),
        (SfLayout.layout_128x4, 300, slice(256, 384), 44),
        (SfLayout.layout_128x4, 300, slice(64, 192), None),
        (SfLayout.layout_128x4, 300, slice(0, 100), None),
        (SfLayout.layout_8x4, 20, slice(8, 24), 12),
        (SfLayout.layout_8x4, 20, slice(4, 12), None),
        (SfLayout.layout_linear, 20, slice(3, 7), 4),
    ],
)
def test_a_view_of_whole_row_tiles_holds_the_rows_that_lie_in_it(pool, layout, rows, view, held):
    spec = pool.spec(pool.acquire(rows, 80, layout)[view])
    assert spec == (None if held is None else ScaleSpec(held, 80, layout))

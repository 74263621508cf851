"""ScalePool as an object: copies, forks, threads, the default pool, and its end."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import threading

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from safealloc import (
    PoolClosedError,
    SafeAllocError,
    ScalePool,
    SfLayout,
    default_pool,
    use_pool,
)


@pytest.fixture
def pool():
    with ScalePool("cpu") as pool:
        yield pool


def test_pickle_and_copy(pool):
    for attempt in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="pickled"):
            attempt(pool)
        with pytest.raises(SafeAllocError):
            attempt(pool)


def test_fork(pool):
    pool.acquire(8, 512, SfLayout.layout_8x4)
    default_pool("cpu").acquire(8, 512, SfLayout.layout_8x4)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            pool.acquire(8, 512, SfLayout.layout_8x4)
        except PoolClosedError as error:
            # The default pool of the child is its own.
            status = (
                0
                if "fork" in str(error) and default_pool("cpu").acquire(8, 512, SfLayout.layout_8x4) is not None
                else 2
            )
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    pool.acquire(8, 512, SfLayout.layout_8x4)


def test_threads_never_share_a_live_buffer():
    errors: list[BaseException] = []

    def work(pool: ScalePool, mark: int) -> None:
        try:
            for i in range(2000):
                buffer = pool.acquire(8, 64 * (1 + i % 3), SfLayout.layout_8x4)
                real = SfLayout.layout_8x4.offsets(8, 64 * (1 + i % 3)).view(-1)
                buffer.view(-1)[real] = mark
                assert (buffer.view(-1)[real] == mark).all()
        except BaseException as error:
            errors.append(error)

    with ScalePool("cpu") as pool:
        threads = [threading.Thread(target=work, args=(pool, mark)) for mark in range(1, 5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors, errors[0]
        stats = pool.stats()
        assert stats.buffers <= 3 * 4
        assert stats.hits + stats.misses == 4 * 2000
        assert pool.verify() == stats.buffers


def test_default_pool_and_use_pool():
    ours = default_pool("cpu")
    assert default_pool(torch.device("cpu")) is ours
    seen = []
    with ScalePool("cpu") as pool:
        with use_pool(pool) as used:
            assert used is pool
            assert default_pool("cpu") is pool
            thread = threading.Thread(target=lambda: seen.append(default_pool("cpu")))
            thread.start()
            thread.join()
            with ScalePool("cpu") as inner, use_pool(inner):
                assert default_pool("cpu") is inner
            assert default_pool("cpu") is pool
        assert default_pool("cpu") is ours
    assert seen == [ours]
    with pytest.raises(TypeError), use_pool("pool"):
        pass
    with pytest.raises(ValueError, match="device"):
        default_pool("meta")


def test_record_stream_on_a_cpu(pool):
    pool.record_stream(pool.acquire(8, 512, SfLayout.layout_8x4), None)
    with pytest.raises(ValueError, match="pool"):
        pool.record_stream(torch.zeros(8), None)


def test_a_forgotten_pool_frees_its_memory():
    pool = ScalePool("cpu")
    weak = StorageWeakRef(pool.acquire(8, 512, SfLayout.layout_8x4).untyped_storage())
    assert not weak.expired()
    del pool
    gc.collect()
    assert weak.expired()

"""Two micro-batches in alternating threads, on one stream and in one capture: vLLM's dual-batch overlap."""

from __future__ import annotations

import threading

import pytest
import torch
from support.adversary import Adversary
from support.layers import Layer

from safealloc import ScalePool, ScaleSpec, SfLayout, mm_fp4, nvfp4_quantize

pytestmark = pytest.mark.gpu
K, N, LAYERS = 1008, 128, 6  # 63 blocks a row: one padding column


class Turns:
    """Two threads, of which one runs at a time; ``give`` lets the other continue."""

    def __init__(self) -> None:
        self._turn = threading.Condition()
        self._whose = 0
        self._left = 2

    def wait(self, me: int) -> None:
        with self._turn:
            assert self._turn.wait_for(lambda: self._whose == me or self._left == 1, timeout=60)

    def give(self, me: int) -> None:
        with self._turn:
            self._whose = 1 - me
            self._turn.notify_all()
        self.wait(me)

    def leave(self, me: int) -> None:
        with self._turn:
            self._whose, self._left = 1 - me, self._left - 1
            self._turn.notify_all()


class MicroBatch:
    """A chain of layers on static input, yielding between a quantization and its GEMM."""

    def __init__(self, rows: int, pool: ScalePool, seed: int) -> None:
        self.layers = [Layer(rows, K, N, SfLayout.layout_128x4, pool, seed=seed + i) for i in range(LAYERS)]
        self.pool = pool
        self.addresses: list[int] = []

    def run(self, me: int, turns: Turns, held: list[int | None]) -> None:
        for layer in self.layers:
            x_fp4, scales = nvfp4_quantize(layer.x, layer.global_scale, layout=layer.layout, pool=self.pool)
            held[me] = scales.data_ptr()
            self.addresses.append(scales.data_ptr())
            assert held[1 - me] != held[me]
            turns.give(me)
            mm_fp4(x_fp4, layer.weight_fp4.T, scales, layer.weight_scale.T, layer.alpha, out=layer.y, backend="triton")
            held[me] = None
            del x_fp4, scales


def run_both(batches: list[MicroBatch], stream: torch.cuda.Stream) -> None:
    turns, held, errors = Turns(), [None, None], []

    def thread(me: int) -> None:
        try:
            torch.cuda.set_device(stream.device)
            with torch.cuda.stream(stream), torch.inference_mode():
                turns.wait(me)
                batches[me].run(me, turns, held)
        except BaseException as error:
            errors.append(error)
        finally:
            turns.leave(me)

    threads = [threading.Thread(target=thread, args=(me,)) for me in (0, 1)]
    for started in threads:
        started.start()
    for started in threads:
        started.join()
    if errors:
        raise errors[0]


@pytest.fixture
def pool():
    with ScalePool("cuda", growth_in_capture="error") as pool:
        pool.shared_captures()
        yield pool


@pytest.mark.parametrize(("first", "second"), [(8, 8), (16, 5)])
def test_two_micro_batches_in_one_capture_hold_one_buffer_each(pool, first, second):
    """As many buffers of a shape as are held at once, whatever the number of layers."""
    batches = [MicroBatch(first, pool, 0), MicroBatch(second, pool, 100)]
    stream = torch.cuda.Stream()
    run_both(batches, stream)  # warm-up, eager: leaves the buffers behind
    torch.cuda.synchronize()
    made = pool.stats().buffers
    assert made == 2
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        run_both(batches, stream)
    assert pool.stats().buffers == made
    assert pool.stats().captured == made
    if first == second:
        assert set(batches[0].addresses[LAYERS:]).isdisjoint(batches[1].addresses[LAYERS:])
    adversary = Adversary(pool, [ScaleSpec(rows, K, SfLayout.layout_128x4) for rows in {first, second}])
    for _ in range(50):
        for batch in batches:
            for layer in batch.layers:
                layer.x.normal_()
                layer.y.fill_(float("nan"))
        adversary.fill_cached_memory()
        adversary.write_eager_buffers()
        graph.replay()
    for batch in batches:
        for layer in batch.layers:
            layer.check()
    pool.verify()


def test_a_buffer_read_on_a_second_stream_is_not_handed_out_again_in_the_capture(pool):
    """Not even once its holder is gone, while the consumer has not run."""
    rows, communication = 8, torch.cuda.Stream()
    layers = [Layer(rows, K, N, SfLayout.layout_128x4, pool, seed=i) for i in range(4)]
    pool.reserve(rows, K, SfLayout.layout_128x4, copies=4)

    def step() -> list[int]:
        compute = torch.cuda.current_stream()
        addresses = []
        for layer in layers:
            x_fp4, scales = nvfp4_quantize(layer.x, layer.global_scale, layout=layer.layout, pool=pool)
            addresses.append(scales.data_ptr())
            communication.wait_stream(compute)
            with torch.cuda.stream(communication):
                torch.cuda._sleep(2_000_000)  # the next quantization is long over when this one is read
                layer.multiply(x_fp4, scales)
            pool.record_stream(scales, communication)
            x_fp4.record_stream(communication)
            del x_fp4, scales
        compute.wait_stream(communication)
        return addresses

    for layer in layers:
        layer.run()  # compiles the kernels
    pool.take_back()  # between steps, as a framework that captures without capture() does
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        addresses = step()
    assert len(set(addresses)) == len(layers)
    for _ in range(5):
        for layer in layers:
            layer.x.normal_()
            layer.y.fill_(float("nan"))
        graph.replay()
    torch.cuda.synchronize()
    for layer in layers:
        layer.check()
    pool.verify()

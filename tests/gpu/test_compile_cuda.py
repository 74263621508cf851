"""``torch.compile`` with Inductor on a GPU, in default mode and with CUDA graphs."""

from __future__ import annotations

import gc

import pytest
import torch
from support.layers import Layer

from safealloc import SafeAllocError, ScalePool, SfLayout, mm_fp4, nvfp4_linear, nvfp4_quantize, use_pool

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()
    gc.collect()


@pytest.fixture
def pool():
    with ScalePool("cuda") as pool, use_pool(pool):
        yield pool


def linear(x: torch.Tensor, layer: Layer) -> torch.Tensor:
    return nvfp4_linear(x, layer.weight_fp4, layer.weight_scale, layer.global_scale, layer.alpha, backend="triton")


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_linear(pool, mode):
    layer = Layer(8, 1008, 128, SfLayout.layout_8x4, pool)

    def model(x: torch.Tensor) -> torch.Tensor:
        return linear(torch.relu(linear(x * 2, layer).repeat(1, 8)[:, :1008].contiguous()), layer) + 1

    compiled = torch.compile(model, mode=mode, fullgraph=True, dynamic=mode == "default")
    pool.reserve((1, 3, 8, 40), 1008, SfLayout.layout_8x4, copies=4)
    pool.reserve(40, 1008, copies=4)
    for rows in (8, 3, 40, 1):
        for _ in range(4):
            x = torch.randn(rows, 1008, device="cuda", dtype=torch.bfloat16)
            torch.compiler.cudagraph_mark_step_begin()
            y = compiled(x)
            torch.testing.assert_close(y, model(x), rtol=2**-6, atol=0.05)
    assert pool.verify() > 0


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_scales_cross_a_compiled_graph_beside_temporaries_of_their_size(pool, mode):
    """8x4 scales for m = 8, k = 8192 and FP4 data for m = 8, k = 1024 are both 4096 bytes."""
    layer = Layer(8, 1024, 128, SfLayout.layout_8x4, pool)
    k = 8176  # 511 scale columns, one of padding
    wide = Layer(8, k, 128, SfLayout.layout_8x4, pool)
    pool.reserve(8, k, SfLayout.layout_8x4, copies=4)
    pool.reserve(8, 1024, SfLayout.layout_8x4, copies=4)

    def model(x: torch.Tensor, small: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        x_fp4, scales = nvfp4_quantize(x + 1, wide.global_scale, layout=SfLayout.layout_8x4)
        y = mm_fp4(x_fp4, wide.weight_fp4.T, scales, wide.weight_scale.T, wide.alpha, backend="triton")
        temporary = torch.full((8, 512), 0x7F, dtype=torch.uint8, device=x.device) | (small[:, :512] > 99).to(
            torch.uint8
        )
        z = linear(small * (temporary.flip(0).sum() // temporary.numel() // 127), layer)
        acquired = torch.ops.safealloc.acquire(8, k, 1, x.device)
        return y, z, (acquired & 0).sum() + temporary.sum()

    compiled = torch.compile(model, mode=mode, fullgraph=True)
    for _ in range(6):
        x = torch.randn(8, k, device="cuda", dtype=torch.bfloat16)
        small = torch.randn(8, 1024, device="cuda", dtype=torch.bfloat16)
        torch.compiler.cudagraph_mark_step_begin()
        got = [t.clone() for t in compiled(x, small)]
        for ours, eager in zip(got, model(x, small), strict=True):
            torch.testing.assert_close(ours, eager, rtol=2**-6, atol=0.05)
        pool.verify()


def test_the_hazard_is_real_without_the_lowering(pool, monkeypatch):
    """An opaque op's output is Inductor's to reuse, unless the lowering says otherwise."""
    with torch.library._scoped_library("safealloc_test", "FRAGMENT") as library:
        library.define("scales(Tensor like, SymInt rows, SymInt k) -> Tensor")
        library.impl("scales", lambda like, rows, k: pool.acquire(rows, k, SfLayout.layout_8x4), "CUDA")
        shape = SfLayout.layout_8x4.padded_shape(8, 8176)
        torch.library.register_fake(
            "safealloc_test::scales", lambda like, rows, k: like.new_empty(shape, dtype=torch.uint8), lib=library
        )
        library.define("consume(Tensor x) -> Tensor")
        library.impl("consume", lambda x: x.sum(dtype=torch.int32), "CUDA")
        torch.library.register_fake(
            "safealloc_test::consume", lambda x: x.new_empty((), dtype=torch.int32), lib=library
        )

        def model(acquire):
            def run(x: torch.Tensor) -> torch.Tensor:
                total = torch.ops.safealloc_test.consume(acquire(x))
                # It depends on the total, so that it cannot be made while the buffer is in use.
                temporary = torch.full(shape, 0x7F, dtype=torch.uint8, device=x.device) + (total > 2**30).to(
                    torch.uint8
                )
                return torch.ops.safealloc_test.consume(temporary) + total

            return run

        x = torch.randn(shape, device="cuda")
        with torch._inductor.config.patch(force_disable_caches=True):
            safe = torch.compile(model(lambda x: torch.ops.safealloc.acquire(8, 8176, 1, x.device)), fullgraph=True)
            pool.acquire(8, 8176, SfLayout.layout_8x4).zero_()
            assert int(safe(x)) == 0x7F * x.numel()
            assert pool.verify() == 1
            unsafe = torch.compile(model(lambda x: torch.ops.safealloc_test.scales(x, 8, 8176)), fullgraph=True)
            assert int(unsafe(x)) == 0x7F * x.numel()
        with pytest.raises(SafeAllocError, match="0x7F"):
            pool.verify()
        pool.verify(repair=True)


def test_a_pool_buffer_as_output_of_reduce_overhead_says_what_to_use(pool):
    def model(x: torch.Tensor) -> torch.Tensor:
        _, scales = nvfp4_quantize(x + 1, torch.ones(1, device="cuda"))
        return scales

    with pytest.raises(Exception, match="nvfp4_linear"):
        torch.compile(model, mode="reduce-overhead", fullgraph=True)(
            torch.randn(8, 1024, device="cuda", dtype=torch.bfloat16)
        )


def test_growth_under_cudagraph_trees(pool):
    """Nothing reserved: buffers are made in the warm-up of cudagraph trees, or zeroed in the graph."""
    layer = Layer(5, 1008, 128, SfLayout.layout_8x4, pool)
    compiled = torch.compile(lambda x: linear(x * 2, layer) * 2, mode="reduce-overhead", fullgraph=True)
    for _ in range(5):
        x = torch.randn(5, 1008, device="cuda", dtype=torch.bfloat16)
        torch.compiler.cudagraph_mark_step_begin()
        torch.testing.assert_close(compiled(x), linear(x * 2, layer) * 2, rtol=2**-6, atol=0.05)
    pool.verify()

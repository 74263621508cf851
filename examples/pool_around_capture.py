"""A pool around a CUDA graph capture: the graph has no fill, and its padding is zero at every replay.

The warm-up compiles the kernels, `reserve` makes the buffer before the capture needs it, and `capture` tells the pool which
graph uses it. Needs a CUDA device of compute capability 8.9 or more.
"""

from __future__ import annotations

import torch

from safealloc import ScalePool, SfLayout, capture, mm_fp4, nvfp4_quantize

ROWS, N, K = 8, 1024, 4096
LAYOUT = SfLayout.layout_8x4


def main() -> None:
    if not torch.cuda.is_available():
        raise SystemExit("this example captures a CUDA graph: it needs a CUDA device")
    x = torch.randn(ROWS, K, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(N, K, device="cuda", dtype=torch.bfloat16)
    global_scale = torch.tensor([448 * 6 / 5.0], device="cuda")
    alpha = 1 / global_scale**2

    with ScalePool("cuda") as pool:
        weight_fp4, weight_scales = nvfp4_quantize(weight, global_scale, pool=pool)

        def layer() -> torch.Tensor:
            x_fp4, scales = nvfp4_quantize(x, global_scale, layout=LAYOUT, pool=pool)
            return mm_fp4(x_fp4, weight_fp4.T, scales, weight_scales.T, alpha)

        expected = layer()
        pool.reserve(ROWS, K, LAYOUT)
        with capture(pool=pool) as graph:
            y = layer()
        for _ in range(3):
            graph.replay()
        torch.testing.assert_close(y, expected)

        report = pool.graph_report(graph)
        print(f"the graph uses {len(report.buffers)} pool buffer of {report.bytes} bytes")
        if report.nodes is not None:  # cuda-bindings is installed
            print(f"its nodes: {report.nodes}")
        print(f"{pool.verify()} buffers have clean padding after 3 replays")


if __name__ == "__main__":
    main()

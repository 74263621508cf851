"""Run under compute-sanitizer: ``sanitizer_program.py empty|pool|kernels``.

``empty`` and ``pool`` multiply over a scale buffer whose padding columns nobody writes; ``kernels`` runs every kernel.
"""

from __future__ import annotations

import sys

import torch

from safealloc import ScaleFormat, ScalePool, SfLayout
from safealloc.kernels import triton_padding
from safealloc.ops.backends import GEMMS, MX_QUANTIZERS, QUANTIZERS

ROWS, K, N = 5, 1008, 64  # 63 scale columns and one of padding


def main(what: str) -> None:
    shapes = [(ROWS, K)] if what != "kernels" else [(1, 1024), (ROWS, K), (33, 80), (130, 4112)]
    quantize, mm = QUANTIZERS["triton"].run, GEMMS["triton"].run
    one = torch.ones(1, device="cuda")
    for layout in (SfLayout.layout_128x4, SfLayout.layout_8x4):
        for rows, k in shapes:
            x = torch.ones(rows, k, device="cuda", dtype=torch.bfloat16)
            weight = torch.zeros(N, k // 2, dtype=torch.uint8, device="cuda")
            weight_scale = torch.zeros(SfLayout.layout_128x4.padded_shape(N, k), dtype=torch.uint8, device="cuda")
            x_fp4 = torch.empty(rows, k // 2, dtype=torch.uint8, device="cuda")
            out = torch.empty(rows, N, device="cuda", dtype=torch.bfloat16)
            pool = ScalePool("cuda")
            if what == "empty":
                scales = torch.empty(layout.padded_shape(rows, k), dtype=torch.uint8, device="cuda")
            else:
                scales = pool.acquire(rows, k, layout)
            valid = torch.tensor([rows - 1], dtype=torch.int32, device="cuda") if what == "kernels" else None
            quantize(x, one, x_fp4, scales, layout, valid)
            mm(x_fp4, weight, scales, weight_scale, one, out, layout)
            if what == "kernels":
                triton_padding.zero_padding(scales, layout, rows, k)
                for format in (ScaleFormat.mxfp8, ScaleFormat.mxfp4):
                    x = torch.ones(rows, 2 * k, device="cuda", dtype=torch.bfloat16)
                    data = torch.empty(format.data_shape(rows, 2 * k), dtype=torch.uint8, device="cuda")
                    scales = pool.acquire(rows, 2 * k, layout, format=format)
                    MX_QUANTIZERS["triton"].run(x, data, scales, layout, format, valid)
                    triton_padding.zero_padding(scales, layout, rows, 2 * k, format=format)
    torch.cuda.synchronize()


if __name__ == "__main__":
    main(sys.argv[1])

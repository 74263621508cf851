"""`mm_fp4` in place of FlashInfer's: one import changes, and two mistakes can no longer go unnoticed.

Stale padding in scales that no pool made is zeroed before the GEMM reads it. The pool knows in which layout its buffers were
written, and a flag that contradicts it is refused. Runs on any device.
"""

from __future__ import annotations

import torch

from safealloc import LayoutMismatchError, SfLayout, mm_fp4, nvfp4_quantize  # mm_fp4: was flashinfer's

ROWS, N, K = 5, 32, 96


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    x = torch.randn(ROWS, K, device=device, dtype=torch.bfloat16)
    weight = torch.randn(N, K, device=device, dtype=torch.bfloat16)
    global_scale = torch.tensor([448 * 6 / 5.0], device=device)
    alpha = 1 / global_scale**2
    x_fp4, scales = nvfp4_quantize(x, global_scale)
    weight_fp4, weight_scales = nvfp4_quantize(weight, global_scale)
    y = mm_fp4(x_fp4, weight_fp4.T, scales, weight_scales.T, alpha)

    # Scales as another producer leaves them in torch.empty: NaN wherever it wrote nothing.
    stale = scales.clone()
    padding = SfLayout.layout_128x4.padding_mask(ROWS, K, device)
    stale.view(-1)[padding] = 0x7F
    again = mm_fp4(x_fp4, weight_fp4.T, stale, weight_scales.T, alpha)
    print(f"NaN in {int(padding.sum())} padding bytes changed {int((again != y).sum())} results")

    try:
        mm_fp4(x_fp4, weight_fp4.T, scales, weight_scales.T, alpha, use_8x4_sf_layout=True)
    except LayoutMismatchError as error:
        print(f"refused: {error}")


if __name__ == "__main__":
    main()

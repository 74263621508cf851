"""A producer of your own writes its scales into a pool buffer, and never touches padding.

The producer here is plain PyTorch and stands for a kernel of yours. It writes one scale for each 16 columns, where the layout
puts it. The padding was zeroed when the pool made the buffer, so nothing has to zero it again. Runs on any device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from safealloc import ScalePool, SfLayout, mm_fp4, nvfp4_quantize

ROWS, N, K = 5, 32, 80  # 80 columns have 5 scales in a row, which a tile pads to 8
LAYOUT = SfLayout.layout_128x4
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def relu_and_quantize(x: Tensor, global_scale: Tensor, pool: ScalePool) -> tuple[Tensor, Tensor]:
    """ReLU of x [rows, k], then NVFP4: uint8 [rows, k // 2], and scales in a pool buffer."""
    rows, k = x.shape
    blocks = x.float().relu().view(rows, k // 16, 16)
    scale = (blocks.amax(-1) / 6 * global_scale).to(torch.float8_e4m3fn)  # [rows, k // 16]
    values = (blocks * global_scale / scale.float().clamp(min=2**-9)[..., None]).clamp(max=6)
    codes = (values[..., None] - E2M1.to(x.device)).abs().argmin(-1).to(torch.uint8).view(rows, k)

    scales = pool.acquire(rows, k, LAYOUT)  # in place of torch.empty: padding is zero
    scales.view(-1)[LAYOUT.offsets(rows, k, x.device)] = scale.view(torch.uint8)
    return codes[:, 0::2] | codes[:, 1::2] << 4, scales


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    x = torch.randn(ROWS, K, device=device, dtype=torch.bfloat16)
    weight = torch.randn(N, K, device=device, dtype=torch.bfloat16)
    x_scale, weight_scale = (448 * 6 / tensor.float().abs().max().reshape(1) for tensor in (x, weight))

    with ScalePool(device) as pool:
        weight_fp4, weight_scales = nvfp4_quantize(weight, weight_scale, pool=pool)
        for step in range(3):
            x_fp4, scales = relu_and_quantize(x, x_scale, pool)
            y = mm_fp4(x_fp4, weight_fp4.T, scales, weight_scales.T, 1 / (x_scale * weight_scale))
            error = (y.float() - x.float().relu() @ weight.float().T).abs().max() / y.float().abs().max()
            print(f"step {step}: the result is off by {error:.0%} of its largest value, as 4 bits allow")
            del x_fp4, scales  # nobody holds the buffer: the next step gets it again
        print(pool.stats())
        print(f"{pool.verify()} buffers have clean padding")


if __name__ == "__main__":
    main()

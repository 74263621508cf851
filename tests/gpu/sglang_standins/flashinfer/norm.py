"""FlashInfer's RMSNorm, in plain torch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flashinfer import missing

__getattr__ = missing.attribute


def rmsnorm(input: Tensor, weight: Tensor, eps: float = 1e-6, out: Tensor | None = None, *ignored: Any) -> Tensor:
    x = input.float()
    y = (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight.float()).to(input.dtype)
    return y if out is None else out.copy_(y)


def fused_add_rmsnorm(input: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6, *ignored: Any) -> None:
    residual.add_(input)
    input.copy_(rmsnorm(residual, weight, eps))

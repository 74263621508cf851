"""Argument checks shared by the public functions: each says what was given and what is accepted."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

BYTES = (torch.uint8, torch.float8_e4m3fn)
FP4 = (torch.uint8, torch.float4_e2m1fn_x2)


def check_tensor(
    name: str, tensor: Tensor, dtypes: Sequence[torch.dtype], shape: str, device: torch.device | None = None
) -> None:
    """Type, dtype, number of dimensions (of ``shape``, such as ``"[rows, k]"``) and device.

    Raises:
        TypeError: not a tensor, or of another dtype.
        ValueError: another number of dimensions or device.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor {shape}, got {type(tensor).__name__}")
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name} must be {' or '.join(map(str, dtypes))}, got {tensor.dtype}")
    if tensor.ndim != shape.count(",") + 1:
        raise ValueError(f"{name} must be {shape}, got shape {tuple(tensor.shape)}")
    if device is not None and tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, the other tensors are on {device}")


def check_contiguous(name: str, tensor: Tensor, what: str = "contiguous") -> None:
    """Raises: ValueError."""
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be {what}, got shape {tuple(tensor.shape)} with strides {tensor.stride()}")


def check_scalar(name: str, tensor: Tensor, dtype: torch.dtype, device: torch.device) -> None:
    """One element on the device; raises TypeError, ValueError."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a {dtype} tensor of one element, got {type(tensor).__name__}")
    if tensor.dtype != dtype:
        raise TypeError(f"{name} must be {dtype}, got {tensor.dtype}")
    if tensor.numel() != 1:
        raise ValueError(f"{name} must have one element, got shape {tuple(tensor.shape)}")
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, the other tensors are on {device}")

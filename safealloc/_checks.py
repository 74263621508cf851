"""Argument checks shared by the public functions: each says what was given and what is accepted."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

BYTES = (torch.uint8, torch.float8_e4m3fn)
FP4 = (torch.uint8, torch.float4_e2m1fn_x2)
FP8 = (torch.float8_e4m3fn,)


def check_tensor(
    name: str, tensor: Tensor, dtypes: Sequence[torch.dtype], shape: str | None, device: torch.device | None = None
) -> None:
    """Type, dtype, number of dimensions (of ``shape``, such as ``"[rows, k]"``; ``None`` is any) and device.

    Raises:
        TypeError: not a tensor, or of another dtype.
        ValueError: another number of dimensions or device.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor{f' {shape}' if shape else ''}, got {type(tensor).__name__}")
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name} must be {' or '.join(map(str, dtypes))}, got {tensor.dtype}")
    if shape is not None and tensor.ndim != shape.count(",") + 1:
        raise ValueError(f"{name} must be {shape}, got shape {tuple(tensor.shape)}")
    if device is not None and tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, the other tensors are on {device}")


def check_contiguous(name: str, tensor: Tensor) -> None:
    """Raises: ValueError: it is not."""
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got shape {tuple(tensor.shape)} with strides {tensor.stride()}")


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


def check_is_tensor(tensor: Tensor) -> None:
    """Raises: TypeError: it is not."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"expected a tensor, got {type(tensor).__name__}")


def checked_device(device: torch.device | str | int | None) -> torch.device:
    """A device with its index: ``None`` and ``"cuda"`` are the current CUDA device (``None`` the CPU without one).

    Raises:
        ValueError: neither a CPU nor a CUDA device that is there.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"not a device: {device!r}") from error
    if device.type == "cpu":
        return torch.device("cpu")
    if device.type != "cuda":
        raise ValueError(f"a ScalePool lives on a CPU or a CUDA device, got {device}")
    if torch.version.hip or not torch.cuda.is_available():
        raise ValueError(f"{device}: torch {torch.__version__} sees no CUDA device")
    index = torch.cuda.current_device() if device.index is None else device.index
    if index >= torch.cuda.device_count():
        raise ValueError(f"{device}: there are {torch.cuda.device_count()} CUDA devices")
    return torch.device("cuda", index)


def checked_bytes(value: int, name: str) -> int:
    """A number of bytes; raises TypeError, ValueError."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be a number of bytes, got {value!r}")
    if value < 0:
        raise ValueError(f"{name} must not be negative, got {value}")
    return value


def checked_count(value: int, name: str, least: int = 0) -> int:
    """An integer from ``least`` to 2**31 - 1, the largest that kernels count to; raises TypeError, ValueError."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if not least <= value < 1 << 31:
        raise ValueError(f"{name} must be at least {least} and below 2**31, got {value}")
    return value

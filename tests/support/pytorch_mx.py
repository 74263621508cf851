"""PyTorch's own MX quantizer, out of its test utilities: an oracle that shares no code with this package."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from unittest import mock

import pytest
import torch
from torch import Tensor

_UTILITIES = "torch.testing._internal.common_utils"


def to_mxfp(x: Tensor, format: str) -> tuple[Tensor, Tensor]:
    """Scales float8_e8m0fnu ``[rows, k // 32]`` and data of bfloat16 ``[rows, k]``, both as uint8."""
    # Its module imports one that needs a package of PyTorch's developers, and that freezes the flags of torch.backends.
    utilities = ModuleType(_UTILITIES)
    utilities.__getattr__ = lambda name: False  # type: ignore[method-assign]
    with mock.patch.dict(sys.modules, {_UTILITIES: utilities}):
        module = importlib.import_module("torch.testing._internal.common_quantized")
    if not hasattr(module, "to_mxfp"):
        pytest.skip(f"torch {torch.__version__} has no to_mxfp in its test utilities")
    scales, data = module.to_mxfp(x, 32, format)
    return scales.view(torch.uint8), data.view(torch.uint8)

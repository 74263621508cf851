"""What the tests of compiled code share: a weight, opaque ops, and the code that Inductor generated."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch import _dynamo as dynamo
from torch._inductor import config
from torch._inductor.utils import run_and_get_code

import safealloc
from safealloc import ScalePool, ScaleSpec, SfLayout, use_pool
from safealloc.kernels import reference

CPU = torch.device("cpu")
N, K = 24, 80
ONE = torch.ones(1)
ALPHA = torch.tensor([0.5])
ops = torch.ops.safealloc


def _weight() -> tuple[Tensor, Tensor]:
    w = torch.randn(N, K, generator=torch.Generator().manual_seed(1)).bfloat16()
    fp4, scales = (
        torch.empty(N, K // 2, dtype=torch.uint8),
        torch.zeros(SfLayout.layout_128x4.padded_shape(N, K), dtype=torch.uint8),
    )
    reference.quantize(w, ONE, fp4, scales, SfLayout.layout_128x4)
    return fp4, scales


W_FP4, W_SCALES = _weight()

library = torch.library.Library("safealloc_tests", "FRAGMENT")
library.define("total(Tensor t) -> Tensor")  # opaque: its argument has to be in memory
library.impl("total", lambda t: t.float().sum().reshape(1), "CPU")
torch.library.register_fake("safealloc_tests::total", lambda t: t.new_empty((1,), dtype=torch.float32), lib=library)
library.define("produce(Tensor x, Tensor(a!) scales) -> ()")  # a fused producer: writes valid scales and nothing else


def _produce(x: Tensor, scales: Tensor) -> None:
    spec = safealloc.default_pool("cpu").spec(scales)
    produced.append(spec)
    if spec is not None:
        scales.view(-1)[spec.layout.offsets(spec.rows, spec.k, padded_k=spec.padded_k)] = 0x38


produced: list[ScaleSpec | None] = []
library.impl("produce", _produce, "CPU")
torch.library.register_fake("safealloc_tests::produce", lambda x, scales: None, lib=library)
library.define("same_memory(Tensor a, Tensor b) -> Tensor")
library.impl("same_memory", lambda a, b: torch.tensor([float(a.data_ptr() == b.data_ptr())]), "CPU")
torch.library.register_fake(
    "safealloc_tests::same_memory", lambda a, b: a.new_empty((1,), dtype=torch.float32), lib=library
)
total = torch.ops.safealloc_tests.total


def activation(rows: int, k: int = K) -> Tensor:
    return torch.randn(rows, k, generator=torch.Generator().manual_seed(rows)).bfloat16()


def compiled_code(function: Callable[..., Any], *arguments: Any) -> tuple[Any, str]:
    """The result and the body of the generated wrapper."""
    result, sources = run_and_get_code(torch.compile(function, fullgraph=True), *arguments)
    (source,) = sources
    return result, source[source.index("def call(") : source.index("runner = Runner")]


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Nothing compiled before or after, in memory or on disk. A test file that imports it uses it."""
    produced.clear()
    dynamo.reset()
    with config.patch({"force_disable_caches": True, "fx_graph_cache": False}):
        yield
    dynamo.reset()


@pytest.fixture
def pool() -> Iterator[ScalePool]:
    with ScalePool("cpu") as pool, use_pool(pool):
        yield pool

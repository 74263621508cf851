"""How many graph nodes a captured quantization has."""

from __future__ import annotations

import pytest
import torch
from support.layers import Layer

from safealloc import ScalePool, SfLayout, capture
from safealloc.ops.backends import QUANTIZERS

pytestmark = pytest.mark.gpu


def nodes(layer: Layer, allocate) -> dict[str, int]:
    """Nodes by type of four quantizations whose scale buffers come from ``allocate``."""
    quantize = QUANTIZERS["triton"].run
    x_fp4 = torch.empty(layer.rows, layer.k // 2, dtype=torch.uint8, device="cuda")
    with capture(pool=layer.pool) as graph:
        for _ in range(4):
            scales = allocate()
            quantize(layer.x, layer.global_scale, x_fp4, scales, layer.layout)
            layer.multiply(x_fp4, scales)
            del scales
    return layer.pool.graph_report(graph).nodes


@pytest.mark.parametrize("layout", [SfLayout.layout_128x4, SfLayout.layout_8x4])
def test_the_pool_adds_no_node_and_zeros_add_one_per_call(layout):
    pytest.importorskip("cuda.bindings.driver", reason="node counts come from cuda.bindings")
    with ScalePool("cuda", growth_in_capture="error") as pool:
        layer = Layer(8, 1008, 64, layout, pool)
        layer.run()
        shape = layout.padded_shape(8, 1008)
        pooled = nodes(layer, lambda: pool.acquire(8, 1008, layout))
        empty = nodes(layer, lambda: torch.empty(shape, dtype=torch.uint8, device="cuda"))
        zeros = nodes(layer, lambda: torch.zeros(shape, dtype=torch.uint8, device="cuda"))
    assert pooled == empty == {"kernel": 8}
    assert sum(zeros.values()) == sum(pooled.values()) + 4

"""From a model that returns NaN to the layer that made the first one: a NaN is planted, and named.

On a CUDA device the layers are captured in a graph, and the NaN is planted before one of its replays; on a CPU, before one
of so many calls. `begin_step` counts steps, and `safe_point` logs what was found: in vLLM the plugin calls both.
"""

from __future__ import annotations

import contextlib
import logging
import math

import torch

from safealloc import ScalePool, capture, nvfp4_quantize

ROWS, K, LAYERS, STEPS = 8, 256, 4, 10


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    inputs = torch.ones(LAYERS, ROWS, K, dtype=torch.bfloat16, device=device)
    global_scales = torch.ones(LAYERS, 1, device=device)

    with ScalePool(device, nan=True) as pool:
        assert pool.nan is not None
        pool.nan.name_layers({global_scales[i].data_ptr(): f"model.layers.{i}.mlp.down_proj" for i in range(LAYERS)})

        def layers() -> None:
            for x, global_scale in zip(inputs, global_scales, strict=True):
                nvfp4_quantize(x, global_scale, pool=pool)

        layers()
        step = layers
        if device == "cuda":
            pool.reserve(ROWS, K, copies=LAYERS)
            with capture(pool=pool) as graph:
                layers()
            step = graph.replay

        for number in range(1, STEPS + 1):
            pool.safe_point()
            pool.nan.begin_step()
            with planted(inputs) if number == 7 else contextlib.nullcontext():
                step()
        if device == "cuda":
            torch.cuda.synchronize()  # the last step may still be running
        pool.safe_point()


@contextlib.contextmanager
def planted(inputs: torch.Tensor):
    """Two layers have a NaN at once: the earlier one is named."""
    inputs[3, 0, 0] = inputs[2, 3, 17] = math.nan
    yield
    inputs[3, 0, 0] = inputs[2, 3, 17] = 1


class Printer(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        print(record.getMessage())


if __name__ == "__main__":
    printer = Printer()
    logging.getLogger("safealloc.pool").addHandler(printer)
    try:
        main()
    finally:
        logging.getLogger("safealloc.pool").removeHandler(printer)

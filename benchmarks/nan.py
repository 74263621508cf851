"""What ``SAFEALLOC_NAN=1`` costs a decode step's graph: a part of ``python -m benchmarks guard``.

Three graphs of one step are replayed in turn: without it, with a node beside each quantizer, as beside a vendor's, and with
our quantizers, which test their input as they go. The quantizer is ours in all three.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from benchmarks import decode, timing
from benchmarks.baselines import POOL, Baseline, baselines
from safealloc.formats.layout import SfLayout
from safealloc.ops.quantize import nvfp4_quantize, silu_and_mul_nvfp4_quantize
from safealloc.pool.nan import NanWatch
from safealloc.pool.pool import ScalePool

OFF, NODE, OURS = "off", "a node beside each quantizer", "in our quantizers"


def graphs_of(step: decode.Step, plain: ScalePool, watching: ScalePool) -> dict[str, torch.cuda.CUDAGraph]:
    """The step captured in each of the three ways.

    Args:
        step: of a model without experts.
        plain: a pool without ``nan``.
        watching: a pool with it.
    """
    assert watching.nan is not None
    ways = {
        OFF: (baselines(plain)[POOL], plain),
        NODE: (_beside(baselines(plain)[POOL], watching.nan), plain),
        OURS: (_ours(baselines(watching)[POOL], watching), watching),
    }
    return {name: timing.captured(functools.partial(step.run, way), pool) for name, (way, pool) in ways.items()}


def _beside(way: Baseline, watch: NanWatch) -> Baseline:
    def quantize(
        x: Tensor, global_scale: Tensor, layout: SfLayout, silu_and_mul: bool = False
    ) -> tuple[Tensor, Tensor]:
        site = watch.site(x, global_scale)
        if site is None:
            raise RuntimeError("an input of a decode step cannot be watched")
        watch.note(x, site)
        return way.quantize(x, global_scale, layout, silu_and_mul)

    return Baseline(NODE, NODE, quantize, way.experts)


def _ours(way: Baseline, pool: ScalePool) -> Baseline:
    def quantize(
        x: Tensor, global_scale: Tensor, layout: SfLayout, silu_and_mul: bool = False
    ) -> tuple[Tensor, Tensor]:
        function = silu_and_mul_nvfp4_quantize if silu_and_mul else nvfp4_quantize
        return function(x, global_scale, layout=layout, pool=pool)

    return Baseline(OURS, OURS, quantize, way.experts)

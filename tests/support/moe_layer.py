"""One MoE layer in static memory, as a captured decode step has it; all but the quantizers is plain torch."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from safealloc import ScalePool, SfLayout, nvfp4_quantize_grouped, silu_and_mul_nvfp4_quantize_grouped
from safealloc.kernels import reference
from safealloc.kernels.reference_grouped import places

LAYOUT = SfLayout.layout_128x4

Quantize = Callable[..., tuple[Tensor, Tensor]]


class MoeLayer:
    """Route, quantize, multiply by each expert's weight, activate and quantize, multiply, and combine.

    What may change between replays: ``x``, the experts of each token in ``ids`` (-1: on another rank), and how many tokens
    are ``valid``. ``stale`` counts padding bytes that were not zero when a GEMM read the buffer, over all runs.
    """

    def __init__(self, tokens: int, topk: int, experts: int, hidden: int, width: int, pool: ScalePool) -> None:
        self.tokens, self.topk, self.experts, self.hidden, self.width = tokens, topk, experts, hidden, width
        self.pool = pool
        rng = torch.Generator(pool.device).manual_seed(tokens)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, device=pool.device, generator=rng)

        self.x = random(tokens, hidden).bfloat16()
        self.ids = torch.zeros(tokens, topk, dtype=torch.int32, device=pool.device)
        self.valid = torch.tensor([tokens], dtype=torch.int32, device=pool.device)
        self.share = torch.softmax(random(tokens, topk), 1)
        self.w13 = self.padded(random(experts, 2 * width, hidden))
        self.w2 = self.padded(random(experts, hidden, width))
        self.global_scales = torch.rand(experts, device=pool.device, generator=rng) * 100 + 1
        self.y = torch.zeros(tokens, hidden, device=pool.device)
        self.stale = torch.zeros(1, dtype=torch.int64, device=pool.device)

    @staticmethod
    def padded(weight: Tensor) -> Tensor:
        """With columns of zeros up to the last tile of scales."""
        k = weight.shape[-1]
        return F.pad(weight, (0, LAYOUT.padded_shape(1, k)[1] * 16 - k))

    def run(
        self,
        quantize: Quantize = nvfp4_quantize_grouped,
        activate: Quantize = silu_and_mul_nvfp4_quantize_grouped,
    ) -> None:
        self.y.copy_(self.compute(self.pool, quantize, activate))

    def expected(self) -> Tensor:
        """The result of the plain-torch quantizer, in memory of its own."""
        stale = self.stale.clone()
        with ScalePool(self.pool.device, cache_bytes=0) as pool:
            y = self.compute(pool, nvfp4_quantize_grouped, silu_and_mul_nvfp4_quantize_grouped, backend="reference")
        assert torch.equal(self.stale, stale)
        return y

    def check(self) -> None:
        """No stale byte was read, and each valid token has the reference's bits."""
        assert int(self.stale) == 0
        valid = int(self.valid)
        expected = self.expected()
        assert torch.equal(self.y[:valid], expected[:valid])
        assert not self.y.isnan().any()

    def compute(self, pool: ScalePool, quantize: Quantize, activate: Quantize, backend: str = "auto") -> Tensor:
        chosen = torch.where(self.ids < 0, self.experts, self.ids).view(-1)  # rows of another rank come last
        order = chosen.argsort(stable=True)
        counts = (chosen[:, None] == torch.arange(self.experts, device=chosen.device)).sum(0)
        tile = LAYOUT.tile.rows
        offsets = self.sums(counts), self.sums((counts + tile - 1) // tile * tile)
        row_tokens = (order // self.topk).to(torch.int32)
        padded_batch = {"valid_rows": self.valid, "row_tokens": row_tokens}
        given = {"layout": LAYOUT, "pool": pool, "backend": backend, **padded_batch}
        hidden = quantize(self.x[order // self.topk], self.global_scales, *offsets, **given)
        both = self.multiply(pool, *hidden, self.w13, *offsets, self.hidden)
        del hidden
        inner = activate(both.bfloat16(), self.global_scales, *offsets, **given)
        rows = self.multiply(pool, *inner, self.w2, *offsets, self.width)
        del inner
        back = torch.empty_like(rows)
        back[order] = rows
        return (back.view(self.tokens, self.topk, -1) * self.share[..., None]).sum(1)

    def sums(self, counts: Tensor) -> Tensor:
        return F.pad(counts.cumsum(0), (1, 0)).to(torch.int32)

    def multiply(
        self,
        pool: ScalePool,
        data: Tensor,
        scales: Tensor,
        weight: Tensor,
        expert_offsets: Tensor,
        blockscale_offsets: Tensor,
        k: int,
    ) -> Tensor:
        """The grouped GEMM, float32 ``[rows, n]``; it reads whole column tiles of scales, with zero data in padding."""
        spec = pool.spec(scales)
        assert spec is not None
        padded_rows, padded_cols = spec.padded_shape
        whole = scales.as_strided((padded_rows, padded_cols), (padded_cols, 1))
        logical = LAYOUT.logical(whole, padded_rows, k)
        expert, place = places(data.shape[0], expert_offsets, blockscale_offsets, padded_rows)
        valid = torch.zeros(padded_rows + 1, dtype=torch.bool, device=data.device)
        valid.index_fill_(0, torch.where(place < 0, padded_rows, place), True)
        outside = logical.clone()
        outside[:, : k // 16].masked_fill_(valid[:-1, None], 0)
        self.stale += outside.count_nonzero()
        row_scales = logical[place.clamp(min=0)].view(torch.float8_e4m3fn).float()
        values = F.pad(reference.decode_e2m1(data), (0, padded_cols * 16 - k)).view(len(data), padded_cols, 16)
        a = (values * row_scales[..., None]).view(len(data), 1, -1)
        own = expert.clamp(max=self.experts - 1)
        product = (a * weight[own]).sum(-1) / self.global_scales[own][:, None]  # sums in one order, captured or not
        return torch.where((place >= 0)[:, None], product, 0)

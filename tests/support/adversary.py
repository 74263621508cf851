"""An adversary that writes NaN bytes wherever a CUDA process can; the padding of a pool's buffers must stay zero."""

from __future__ import annotations

import contextlib

import torch

from safealloc import ScalePool, ScaleSpec

STALE = 0x7F  # NaN as e4m3, 1.0 as e8m0


class Adversary:
    """Writes into all memory that the caching allocator hands out, and the valid scales of eager buffers."""

    def __init__(self, pool: ScalePool, specs: list[ScaleSpec]) -> None:
        self.pool = pool
        self.specs = specs

        @torch.compile
        def compiled(x: torch.Tensor, rows: int, cols: int) -> torch.Tensor:
            temporary = torch.full((rows, cols), STALE, dtype=torch.uint8, device=x.device)
            flipped = torch.flip(temporary, (0,)) | x
            return flipped.to(torch.int32).sum(dtype=torch.int32)

        self._compiled = compiled

    def fill_cached_memory(self) -> None:
        """Fill free blocks of every size class that the buffers could have come from."""
        blocks = [
            torch.full((nbytes,), STALE, dtype=torch.uint8, device="cuda")
            for nbytes in (512, 1024, 2048, 4096, 1 << 16, 1 << 20, 2 << 20, 20 << 20)
            for _ in range(4)
        ]
        del blocks

    def fill_device(self) -> None:
        """Fill nearly all free memory of the device, or less where other processes take some meanwhile."""
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info()
        chunk = 1 << 30
        blocks: list[torch.Tensor] = []
        with contextlib.suppress(torch.OutOfMemoryError):
            for _ in range(int(free * 0.9) // chunk):
                blocks.append(torch.full((chunk,), STALE, dtype=torch.uint8, device="cuda"))
        torch.cuda.synchronize()
        del blocks
        torch.cuda.empty_cache()

    def write_eager_buffers(self) -> None:
        """Write the valid scales of buffers of the same shapes, as eager producers do."""
        for spec in self.specs:
            buffer = self.pool.acquire(spec.rows, spec.k, spec.layout, padded_k=spec.padded_k, format=spec.format)
            offsets = _offsets(spec)
            buffer.view(-1)[offsets] = spec.format.nan_bytes[0]

    def run_compiled_code(self) -> None:
        """Run code with temporaries of the buffers' size and dtype."""
        for spec in self.specs[:4]:
            rows, cols = spec.padded_shape
            ones = torch.ones((rows, cols), dtype=torch.uint8, device="cuda")
            assert int(self._compiled(ones, rows, cols)) == STALE * rows * cols


_cache: dict[ScaleSpec, torch.Tensor] = {}


def _offsets(spec: ScaleSpec) -> torch.Tensor:
    if spec not in _cache:
        _cache[spec] = spec.layout.offsets(spec.rows, spec.k, "cuda", padded_k=spec.padded_k, format=spec.format).view(
            -1
        )
    return _cache[spec]

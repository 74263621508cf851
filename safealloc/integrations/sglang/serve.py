"""Which of SGLang's calls of FlashInfer's quantizers write into a pool buffer.

FlashInfer's kernel stays, and so do its bits: inside a call, the ``torch.empty`` for the scales returns a buffer of the
engine's pool. Only calls in captures and their warm-ups are served. Elsewhere a producer that leaves padding unwritten gets
FlashInfer's own memory with the padding zeroed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from safealloc.errors import SafeAllocError
from safealloc.formats.format import ScaleFormat
from safealloc.formats.layout import SfLayout
from safealloc.integrations import serve, startup
from safealloc.integrations.serve import zero_padding

_LAYOUT = SfLayout.layout_128x4
NOT_CAPTURED = "rows that no decode graph has"
NOT_SEEN = "FlashInfer allocates otherwise"


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a quantizer that writes 128x4 scales."""

    rows: int  # grouped: whole tiles of all experts together
    k: int
    kind: str = startup.PLAIN  # FUSED and GROUPED producers write valid scales only
    format: ScaleFormat = ScaleFormat.nvfp4

    @property
    def nbytes(self) -> int:
        rows, cols = _LAYOUT.round_up(self.rows, self.k // self.format.block_size)
        return rows * cols


class Allocator(serve.Allocator):
    """Answers the calls of one process."""

    framework, logger = "SGLang", logging.getLogger("sglang.safealloc")
    silu_original: Callable[..., Any] | None = None  # FlashInfer's function, for the op of compiled code

    def quantize(self, run: Callable[[], Any], call: Call, bypassed: str | None = None) -> Any:
        """What ``run`` returns, with the scales in a pool buffer if an engine captures.

        ``bypassed`` is why no pool serves the call, if the caller knows.
        """
        if not self.enabled or call.rows < 1:
            return run()
        engine, buffer = self.engine, None
        if engine is not None and engine.pool is not None:
            if call.kind != startup.GROUPED and call.rows not in engine.steps.copies:
                bypassed = NOT_CAPTURED
            if bypassed is None:
                try:
                    buffer = engine.pool.acquire(call.rows, call.k, _LAYOUT, format=call.format)
                except Exception as error:
                    bypassed = self.handle_error(error)
        if buffer is None and call.kind == startup.PLAIN:
            result = run()
        else:
            with _Redirected(call, buffer) as redirected:
                result = run()
            if not redirected.seen:
                bypassed = bypassed or NOT_SEEN
                self.log_error(SafeAllocError(f"no allocation of {call.nbytes} bytes was seen"), NOT_SEEN)
        if engine is not None and engine.pool is not None:
            self.note(engine.count, bypassed or call.kind)
        return result


class _Redirected(TorchFunctionMode):
    """Inside, the first ``torch.empty`` of the size of a call's scales returns ``buffer``, or memory with padding zeroed."""

    def __init__(self, call: Call, buffer: Tensor | None) -> None:
        super().__init__()
        self.call, self.buffer, self.seen = call, buffer, False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        call = self.call
        # At 16 rows the data is as large as the scales.
        if (
            func is torch.empty
            and not self.seen
            and result.nbytes == call.nbytes
            and result.element_size() in (1, 4)
            and result.shape[-1] not in (call.k // 2, call.k)
        ):
            self.seen = True
            if self.buffer is not None and self.buffer.device == result.device:
                return self.buffer.view(-1).view(result.dtype).view(result.shape)
            if call.kind != startup.PLAIN:
                cols = _LAYOUT.round_up(1, call.k // call.format.block_size)[1]
                zero_padding(result.view(-1).view(torch.int32).view(-1, cols // 4), call.rows, call.k)
        return result


allocator = Allocator()

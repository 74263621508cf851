"""Whether padding reaches a GEMM's valid outputs, and in which layout it reads the scales."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from safealloc._checks import checked_device
from safealloc.audit import findings
from safealloc.audit.findings import KINDS, Change, ConsumerFinding, assert_verdicts, first_line, indices, spans
from safealloc.audit.probing import Consumer, call, data_for_gemm, for_gemm, probe, room, scales_in
from safealloc.audit.producers import activation, encoded, scaled, synchronize
from safealloc.formats.format import NAN_SCALE, ScaleFormat, checked_format
from safealloc.formats.layout import SfLayout, checked_layout
from safealloc.kernels import reference

CONSUMER_SHAPES = ((1, 512), (5, 480), (8, 512), (33, 480), (40, 512), (130, 512))
"""``(m, k)``: within one tile and across tiles, with 0 and 2 padding columns; of MX, twice the k."""

_MX = {0xFF: "NaN", 0x7F: "1.0", 0xFE: "2**127"}
POISON = {
    ScaleFormat.nvfp4: {NAN_SCALE: "NaN", 0x38: "1.0", 0x7E: "448"},
    ScaleFormat.mxfp8: _MX,
    ScaleFormat.mxfp4: _MX,
}
"""Bytes that padding is filled with, and what they are as scales of a format."""

TOLERANCE = 0.02
"""Largest allowed difference to the reference, over the largest correct output; rounding to bfloat16 is 0.004 of it."""

_N = 128  # rows of the weight
_CLEAN_RUNS = 3


def audit_consumer(
    fn: Consumer,
    *,
    name: str | None = None,
    layout: SfLayout = SfLayout.layout_128x4,
    shapes: Sequence[tuple[int, int]] | None = None,
    device: torch.device | str | None = None,
    format: ScaleFormat = ScaleFormat.nvfp4,
) -> list[ConsumerFinding]:
    """Whether padding of the activation's scales reaches a GEMM's outputs, and in which layout it reads them.

    Args:
        fn: called as ``fn(a, b, a_descale, b_descale, alpha, layout)`` with what ``mm_fp4`` takes: a uint8 ``[m, k // 2]``;
            b the weight uint8 ``[n, k // 2]`` transposed, with n = 128 and not shuffled; a_descale uint8
            ``[padded_rows, padded_cols]`` in ``layout``; b_descale the weight's scales in layout_128x4, uint8, transposed;
            alpha float32 of one element; ``layout`` the order of ``a_descale``. Returns the product ``[m, n]``,
            ``alpha * a @ b``, of a floating dtype. Of MXFP4 and MXFP8 it is called without alpha; of MXFP8 with what
            ``mm_mxfp8`` takes: a float8_e4m3fn ``[m, k]``, b ``[k, n]``, b_descale ``[padded_n, padded_cols]``.
        name: what the findings call it; ``None`` is the function's own.
        layout: the order of ``a_descale``.
        shapes: ``(m, k)`` each; ``None`` is ``CONSUMER_SHAPES``.
        device: of the tensors; ``None`` is the current CUDA device, or the CPU where there is none.
        format: of both operands.

    Returns:
        One finding for each shape. Outputs with poisoned padding are compared with those of the same call with clean
        padding, and these with the reference. An output counts as changed if it differs in both of two runs, by more than
        four times the difference between identical calls with clean padding.
    """
    layout, where, format = checked_layout(layout), checked_device(device), checked_format(format)
    name = str(getattr(fn, "__name__", fn)) if name is None else name
    found = []
    for rows, k in scaled(CONSUMER_SHAPES, format) if shapes is None else shapes:
        layout.padded_shape(rows, k, format=format)
        try:
            found.append(_one(fn, name, layout, rows, k, where, format))
        except Exception as error:
            found.append(ConsumerFinding(name, layout, rows, k, findings.CANNOT_RUN, first_line(error), format=format))
    return found


def assert_consumer(
    fn: Consumer,
    *,
    name: str | None = None,
    layout: SfLayout = SfLayout.layout_128x4,
    shapes: Sequence[tuple[int, int]] | None = None,
    device: torch.device | str | None = None,
    format: ScaleFormat = ScaleFormat.nvfp4,
    with_pool: bool = False,
) -> None:
    """Assert that no padding reaches a valid output of a GEMM.

    Args:
        fn, name, layout, shapes, device, format: as :func:`audit_consumer` takes them.
        with_pool: its scales come from a pool, so that it may read padding.

    Raises:
        AssertionError: with each finding that is not fine, in words; a shape that cannot run is not.
    """
    found = audit_consumer(fn, name=name, layout=layout, shapes=shapes, device=device, format=format)
    assert_verdicts(found, findings.POOL_CONSUMER if with_pool else findings.SAFE_CONSUMER)


def weight(k: int, device: torch.device, format: ScaleFormat = ScaleFormat.nvfp4) -> tuple[Tensor, Tensor, Tensor]:
    """A random weight of 128 rows and its scales, as :func:`audit_consumer` passes them, and its global scale."""
    x, global_scale = activation(_N, k, device)
    data, linear = encoded(x, global_scale, format)
    # Zeros follow the scales: a GEMM that takes them for another format reads beyond their end.
    memory = torch.zeros(room(_N, k, format), dtype=torch.uint8, device=device)
    scales = scales_in(memory, SfLayout.layout_128x4, _N, k, format)
    scales.copy_(SfLayout.layout_128x4.swizzle(linear))
    return data_for_gemm(data, format).T, for_gemm(scales, format), global_scale


def product(
    a: Tensor,
    b: Tensor,
    a_descale: Tensor,
    b_descale: Tensor,
    alpha: Tensor | None,
    layout: SfLayout,
    format: ScaleFormat = ScaleFormat.nvfp4,
) -> Tensor:
    """The reference's result in float32, called as a consumer is."""
    out = torch.empty((a.shape[0], b.shape[1]), device=a.device)
    reference.mm(a, b.T, a_descale, for_gemm(b_descale, format), alpha, out, layout, format=format)
    return out


def _one(
    fn: Consumer, name: str, layout: SfLayout, rows: int, k: int, device: torch.device, format: ScaleFormat
) -> ConsumerFinding:
    x, global_scale = activation(rows, k, device)
    data, linear = encoded(x, global_scale, format)
    a = data_for_gemm(data, format)
    b, b_descale, b_global_scale = weight(k, device, format)
    alpha = 1 / (global_scale * b_global_scale) if format is ScaleFormat.nvfp4 else None
    clean = layout.swizzle(linear)

    def run(scales: Tensor) -> Tensor:
        # Zeros follow the buffer: a GEMM that expects another layout reads beyond its end.
        memory = torch.zeros(room(rows, k, format), dtype=torch.uint8, device=device)
        memory[: scales.numel()] = scales.view(-1)
        given = scales_in(memory, layout, rows, k, format)
        out = call(fn, a.clone(), b, given, b_descale, alpha, layout, format)
        synchronize(device)
        if out.shape != (rows, b.shape[1]):
            raise ValueError(f"it returned shape {tuple(out.shape)}, not {(rows, b.shape[1])}")
        return out.float().clone()

    right = product(a, b, clean, b_descale, alpha, layout, format)
    scale = float(right.abs().max())
    outs = [run(clean) for _ in range(_CLEAN_RUNS)]
    noise = max(_largest(out - outs[0]) for out in outs[1:])
    error = _largest(outs[0] - right)
    seen = probe(fn, layout, rows, k, device, format=format)
    padded_rows, padded_cols = layout.padded_shape(rows, k, format=format)
    offsets = layout.offsets(padded_rows, padded_cols * format.block_size, device, format=format)
    paddings = offsets[rows:].flatten(), offsets[:rows, k // format.block_size :].flatten()
    changes = []
    for kind, padding in zip(KINDS, paddings, strict=True):
        for byte in POISON[format] if len(padding) else ():
            poisoned = clean.clone()
            poisoned.view(-1)[padding] = byte
            change = _change(kind, byte, run(poisoned), outs[0], noise, scale)
            if change.rows:  # run again: occasional differences between identical calls do not repeat in the same rows
                again = _change(kind, byte, run(poisoned), outs[0], noise, scale)
                change = replace(change, rows=tuple(row for row in change.rows if row in again.rows))
            if change.rows:
                changes.append(change)
    verdict = findings.READS if changes else findings.ISOLATES
    words = [_words(change, rows, format) for change in changes]
    finite = bool(outs[0].isfinite().all())
    if not finite or error > TOLERANCE * scale:
        verdict = findings.WRONG_RESULT
        words.insert(0, f"with clean padding the result is {f'off by {error / scale:.2g}' if finite else 'not finite'}")
        if not seen.as_told:
            words.insert(0, str(seen))
            if seen.read_format not in (None, format):
                verdict = findings.WRONG_FORMAT
            elif seen.reads or bool((seen.offsets >= 0).all()):
                verdict = findings.WRONG_LAYOUT
    elif not seen.as_told:  # as of inexact products, though the result shows that it reads the right scales
        words.append("the probe cannot tell its layout")
    if noise:
        words.append(f"identical calls differ by {noise / scale:.2g}")
    numbers = (tuple(changes), seen.reads, error / scale, noise / scale)
    return ConsumerFinding(
        name, layout, rows, k, verdict, "; ".join(words), *numbers, format=format, found_format=seen.read_format
    )


def _change(kind: str, byte: int, out: Tensor, clean: Tensor, noise: float, scale: float) -> Change:
    difference = out - clean
    changed = ~(difference.abs() <= 4 * noise)  # NaN counts as changed
    largest = _largest(difference[out.isfinite()]) if bool(out.isfinite().any()) else 0.0
    return Change(kind, byte, indices(changed.any(1)), int((~out.isfinite()).any(1).sum()), largest / scale)


def _words(change: Change, rows: int, format: ScaleFormat) -> str:
    how = [f"{change.nan_rows} not finite"] if change.nan_rows else []
    if change.largest:
        how.append(f"by up to {change.largest:.2g} of the largest output")
    changed = f"{POISON[format][change.byte]} in padding {change.kind} changes {len(change.rows)} of {rows} rows"
    return f"{changed} ({spans(change.rows)}): {', '.join(how)}"


def _largest(difference: Tensor) -> float:
    """Largest finite absolute value."""
    return float(torch.nan_to_num(difference, 0, 0, 0).abs().max())

"""Which padding a producer zeroes, leaves or dirties, and whether what it writes is right."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from safealloc._checks import checked_device
from safealloc.audit import findings
from safealloc.audit.findings import (
    KINDS,
    PaddingState,
    ProducerFinding,
    assert_verdicts,
    first_line,
    indices,
    named,
    spans,
)
from safealloc.formats.format import BLOCK_SIZE, E2M1_MAX, E4M3_MAX, NAN_SCALE, ScaleFormat, checked_format
from safealloc.formats.layout import SfLayout, checked_layout, short
from safealloc.kernels import reference, reference_mx
from safealloc.pool.memory import PrivateMemory

Producer = Callable[..., Any]
"""``fn(x, global_scale, x_fp4, scales, layout)``, of MX ``fn(x, data, scales, layout)``; see :func:`audit_producer`."""

PRODUCER_SHAPES = ((1, 512), (5, 480), (8, 512), (33, 720), (128, 512), (130, 208))
"""``(rows, k)``: within one tile and across tiles, with 0, 1, 2 and 3 padding columns; of MX, twice the k."""

_SENTINELS = (0xA5, 0x5B)
_FILL = (0xFF, NAN_SCALE)  # what torch.empty holds under deterministic algorithms, as uint8 and as e4m3
_MIB = 1 << 20
_GUARD = 4096  # bytes of sentinel on either side of a buffer, a multiple of the allocator's alignment of 512


class _Run(NamedTuple):
    """What one call wrote."""

    data: Tensor  # of ScaleFormat.data_shape
    scales: Tensor  # flat, padding included
    returned: bool  # both are the producer's own buffers
    beyond: list[str]  # what was written outside the given buffers, in words
    outside: int  # and how many bytes


def audit_producer(
    fn: Producer,
    *,
    name: str | None = None,
    layout: SfLayout = SfLayout.layout_128x4,
    shapes: Sequence[tuple[int, int]] | None = None,
    device: torch.device | str | None = None,
    of: Callable[[Tensor], Tensor] | None = None,
    format: ScaleFormat = ScaleFormat.nvfp4,
) -> list[ProducerFinding]:
    """What a quantizer does to the padding of the scale buffer it is given.

    Args:
        fn: called as ``fn(x, global_scale, x_fp4, scales, layout)``: x bfloat16 ``[rows, k]``, global_scale float32 of one
            element (what scales are multiplied by), x_fp4 uint8 ``[rows, k // 2]`` and scales uint8
            ``[padded_rows, padded_cols]``, both to be written. A function that allocates its results ignores those two and
            returns its own ``(x_fp4, scales)``. Of MXFP8 and MXFP4, it is called as ``fn(x, data, scales, layout)``, data
            uint8 ``[rows, k]`` or ``[rows, k // 2]``.
        name: what the findings call it; ``None`` is the function's own.
        layout: the order it writes scales in.
        shapes: ``(rows, k)`` each; ``None`` is ``PRODUCER_SHAPES``.
        device: of the tensors; ``None`` is the current CUDA device, or the CPU where there is none.
        of: what a fused producer quantizes, in plain torch, as a function of x; ``None`` is x.
        format: what it quantizes to.

    Returns:
        One finding for each shape. Scales one e4m3 step off the reference and data one step off are counted and allowed,
        since vendors use approximate reciprocals. MX scales are powers of two, and must be the reference's.

    A producer runs over two different sentinel bytes in turn, since it may write one of them itself. Memory that it allocates
    is filled by ``torch.use_deterministic_algorithms``, under which ``torch.empty`` holds 0xFF or 0x7F, and in the second
    run on CUDA by a memory pool that is filled with the sentinel. Writes outside buffers that it allocates are not detected.
    Where its memory does not come from that pool, padding that it fills with 0xFF or 0x7F counts as left.
    """
    layout, where = checked_layout(layout), checked_device(device)
    format = checked_format(format)
    name = str(getattr(fn, "__name__", fn)) if name is None else name
    if shapes is None:
        shapes = scaled(PRODUCER_SHAPES, format)
    found = []
    for rows, k in shapes:
        layout.padded_shape(rows, k, format=format)  # raises for an invalid shape, which is the caller's mistake
        try:
            found.append(_one(fn, name, layout, rows, k, where, of, format))
        except Exception as error:
            found.append(ProducerFinding(name, layout, rows, k, findings.CANNOT_RUN, first_line(error), format=format))
    return found


def assert_producer(
    fn: Producer,
    *,
    name: str | None = None,
    layout: SfLayout = SfLayout.layout_128x4,
    shapes: Sequence[tuple[int, int]] | None = None,
    device: torch.device | str | None = None,
    of: Callable[[Tensor], Tensor] | None = None,
    format: ScaleFormat = ScaleFormat.nvfp4,
    with_pool: bool = False,
) -> None:
    """Assert that a quantizer zeroes all padding.

    Args:
        fn, name, layout, shapes, device, of, format: as :func:`audit_producer` takes them.
        with_pool: it writes into pool buffers, so that it may leave padding as it is.

    Raises:
        AssertionError: with each finding that is not fine, in words; a shape that cannot run is not.
    """
    found = audit_producer(fn, name=name, layout=layout, shapes=shapes, device=device, of=of, format=format)
    assert_verdicts(found, findings.POOL_PRODUCER if with_pool else findings.SAFE_PRODUCER)


def scaled(shapes: Sequence[tuple[int, int]], format: ScaleFormat) -> list[tuple[int, int]]:
    """Shapes with as many scales of a format as these have of NVFP4."""
    return [(rows, k // BLOCK_SIZE * format.block_size) for rows, k in shapes]


def activation(rows: int, k: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """bfloat16 ``[rows, k]`` whose rows differ in size, and a global scale for the full range."""
    generator = torch.Generator().manual_seed(rows * 8191 + k)
    size = 1 + torch.arange(rows)[:, None] % 7
    x = (torch.randn(rows, k, generator=generator) * size).to(torch.bfloat16)
    scale = E4M3_MAX * E2M1_MAX / x.float().abs().max()
    return x.to(device), scale.reshape(1).to(device)


def _one(
    fn: Producer,
    name: str,
    layout: SfLayout,
    rows: int,
    k: int,
    device: torch.device,
    of: Callable[..., Tensor] | None,
    format: ScaleFormat,
) -> ProducerFinding:
    x, global_scale = activation(rows, k, device)
    is_nvfp4 = format is ScaleFormat.nvfp4
    before = (global_scale,) if is_nvfp4 else ()
    runs = [_run(fn, x, before, layout, format, sentinel, first=sentinel == _SENTINELS[0]) for sentinel in _SENTINELS]
    returned = runs[0].returned
    nbytes, data_shape = layout.nbytes(rows, k, format=format), format.data_shape(rows, k)
    quantized = x if of is None else of(x)
    for run in runs:
        if run.scales.numel() != nbytes or run.data.shape != data_shape:
            got = f"returned {run.scales.numel()} scale bytes and data {tuple(run.data.shape)}"
            why = f"{got}, where {short(layout)} has {nbytes} and {data_shape}"
            writes, found_format = _written(runs, quantized, global_scale, format)
            if writes:
                why = f"the scales are in {named(writes, found_format)}: {why}"
            return ProducerFinding(
                name,
                layout,
                rows,
                k,
                findings.WRONG_SCALES,
                why,
                returned=returned,
                writes=writes,
                format=format,
                found_format=found_format,
            )
    data, linear = encoded(quantized, global_scale, format)
    allowed = 1 if is_nvfp4 else 0
    scale_steps = _scale_steps(runs, layout, format, linear)
    data_steps = torch.stack([(_ordered(run.data, format) - _ordered(data, format)).abs() for run in runs]).amax(0)
    rows_state, columns_state, words = _padding(runs, layout, rows, k, format)
    scales_off, data_off = int((scale_steps == allowed).sum()) * allowed, int((data_steps == 1).sum())
    if scales_off or data_off:
        off = f"{scales_off} of {linear.numel()} scales and {data_off} of {rows * k} values"
        words.append(f"{off} are one step off the reference")
    outside = max(run.outside for run in runs)
    writes, found_format = _same_order(layout, rows, k, format), format
    verdict = findings.NO_PADDING if nbytes == linear.numel() else findings.ZEROES
    if rows_state.left or columns_state.left:
        verdict = findings.LEAVES
    if rows_state.dirtied or columns_state.dirtied:
        verdict = findings.DIRTIES
    if bool((data_steps > 1).any()):
        verdict = findings.WRONG_DATA
        words.insert(0, f"{int((data_steps > 1).sum())} of {rows * k} values are more than a step off the reference")
    if bool((scale_steps > allowed).any()):
        verdict = findings.WRONG_SCALES
        writes, found_format = _written(runs, quantized, global_scale, format)
        words.insert(0, _wrong_scales(scale_steps > allowed, linear))
        if writes:
            words[0] = f"the scales are in {named(writes, found_format)}: {words[0]}"
    if outside:
        verdict = findings.BEYOND
        words[:0] = next(run.beyond for run in runs if run.outside)
    numbers = (rows_state, columns_state, outside, scales_off, data_off, returned, writes)
    return ProducerFinding(
        name, layout, rows, k, verdict, "; ".join(words), *numbers, format=format, found_format=found_format
    )


def encoded(x: Tensor, global_scale: Tensor, format: ScaleFormat) -> tuple[Tensor, Tensor]:
    """The reference's data in bytes, and its scales in matrix order."""
    if format is ScaleFormat.nvfp4:
        return reference.encode(x, global_scale.reshape(()))
    return reference_mx.encode(x, format)


def _run(
    fn: Producer,
    x: Tensor,
    before: Sequence[Tensor],  # what it is given between x and its results
    layout: SfLayout,
    format: ScaleFormat,
    sentinel: int,
    *,
    first: bool,
) -> _Run:
    """One call over memory that holds the sentinel; ``torch.empty`` is filled in the first call and on a CPU."""
    if first or not x.is_cuda:
        with contextlib.suppress(Exception), _known_memory():  # there are dtypes that PyTorch cannot fill
            return _call(fn, x, before, layout, format, sentinel)
    sizes = 2 * x.numel(), math.prod(format.data_shape(*x.shape)), layout.nbytes(*x.shape, format=format)
    with _memory_of(sentinel, sizes, x.device) if x.is_cuda else contextlib.nullcontext():
        return _call(fn, x, before, layout, format, sentinel)


def _call(
    fn: Producer, x: Tensor, before: Sequence[Tensor], layout: SfLayout, format: ScaleFormat, sentinel: int
) -> _Run:
    rows, k = x.shape
    shapes = {"scales": layout.padded_shape(rows, k, format=format), "data": format.data_shape(rows, k)}
    memory = {
        what: torch.full((math.prod(shape) + 2 * _GUARD,), sentinel, dtype=torch.uint8, device=x.device)
        for what, shape in shapes.items()
    }
    scales, data = (memory[what][_GUARD:-_GUARD].view(shape) for what, shape in shapes.items())
    result = fn(x.clone(), *(tensor.clone() for tensor in before), data, scales, layout)
    synchronize(x.device)
    beyond, outside = [], 0
    for what, whole in memory.items():
        changed = whole != sentinel
        changed[_GUARD:-_GUARD] = False
        if offsets := [index - _GUARD for index in indices(changed)]:
            outside += len(offsets)
            size = math.prod(shapes[what])
            beyond.append(f"{len(offsets)} bytes written outside the {size} of the {what}, at {spans(offsets)}")
    returned = result is not None and result[1].data_ptr() != scales.data_ptr()
    wrote = result if returned else (data, scales)
    x_fp4, scale_bytes = (tensor.view(torch.uint8).clone() for tensor in wrote)
    return _Run(x_fp4.reshape(rows, -1), scale_bytes.reshape(-1), returned, beyond, outside)


def synchronize(device: torch.device) -> None:
    """Wait, so that a kernel's error is raised where it was called."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextlib.contextmanager
def _known_memory() -> Iterator[None]:
    """``torch.empty`` is filled with ``_FILL``, on any device."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    deterministic: Any = torch.utils.deterministic  # mypy does not see its attributes
    fill = deterministic.fill_uninitialized_memory
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.use_deterministic_algorithms(True, warn_only=True)
        deterministic.fill_uninitialized_memory = True
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])
            deterministic.fill_uninitialized_memory = fill


@contextlib.contextmanager
def _memory_of(byte: int, sizes: Sequence[int], device: torch.device) -> Iterator[None]:
    """Allocations on CUDA come from memory filled with this byte, enough for a few blocks of these sizes.

    PyTorch's caching allocator serves up to 1 MiB from segments of 2 MiB, and larger blocks from segments of 20 MiB or of
    their own size. Blocks of whole or half segments are filled here, so that no part of a segment holds anything else.
    """
    memory = PrivateMemory(device)
    blocks = [_MIB] * (2 + 4 * sum(sizes) // _MIB) + [max(20 * _MIB, size) for size in sizes if size > _MIB] * 4
    try:
        with memory.active():
            filled = [torch.full((size,), byte, dtype=torch.uint8, device=device) for size in blocks]
            torch.cuda.synchronize(device)
            del filled
            yield
    finally:
        memory.release()


def _scale_steps(runs: Sequence[_Run], layout: SfLayout, format: ScaleFormat, linear: Tensor) -> Tensor:
    """How many values the scales are off in the worse run, int32: positive values are ordered as their bytes."""
    rows, k = linear.shape[0], linear.shape[1] * format.block_size
    nbytes = layout.nbytes(rows, k, format=format)
    got = torch.stack([layout.unswizzle(run.scales[:nbytes], rows, k, format=format) for run in runs])
    return (got.int() - linear.int()).abs().amax(0)


def _ordered(packed: Tensor, format: ScaleFormat) -> Tensor:
    """Data values as integers in their order, int32 ``[rows, k]``; 0 and -0 are equal."""
    if format is ScaleFormat.mxfp8:
        return torch.where(packed >= 128, 128 - packed.int(), packed.int())
    codes = torch.stack((packed & 0xF, packed >> 4), -1).flatten(-2).int()
    return torch.where(codes >= 8, 8 - codes, codes)


def _wrong_scales(wrong: Tensor, linear: Tensor) -> str:
    row, column = (int(index) for index in wrong.nonzero()[0])
    return f"{int(wrong.sum())} of {linear.numel()} scales are not the reference's, first at row {row}, column {column}"


def _written(
    runs: Sequence[_Run], x: Tensor, global_scale: Tensor, told: ScaleFormat
) -> tuple[tuple[SfLayout, ...], ScaleFormat | None]:
    """In which layouts of which format wrong scales lie; none where they are nowhere the reference's."""
    for format in sorted(ScaleFormat, key=lambda format: format is not told):
        if x.shape[1] % format.block_size:
            continue
        # To MX no global scale is given: a quantizer to NVFP4 takes its own.
        global_scales = [global_scale] if told is format else [global_scale, torch.ones_like(global_scale)]
        for one in global_scales:
            _, linear = encoded(x, one, format)
            layouts = tuple(layout for layout in SfLayout if _lie_in(runs, layout, format, linear))
            if layouts:
                return layouts, format
    return (), None


def _lie_in(runs: Sequence[_Run], layout: SfLayout, format: ScaleFormat, linear: Tensor) -> bool:
    fits = math.prod(layout.round_up(*linear.shape)) <= runs[0].scales.numel()
    allowed = 1 if format is ScaleFormat.nvfp4 else 0
    return fits and bool((_scale_steps(runs, layout, format, linear) <= allowed).all())


def _same_order(layout: SfLayout, rows: int, k: int, format: ScaleFormat) -> tuple[SfLayout, ...]:
    """Layouts in which the valid scales are the same bytes."""
    offsets = layout.offsets(rows, k, format=format)
    return tuple(other for other in SfLayout if torch.equal(other.offsets(rows, k, format=format), offsets))


def _padding(
    runs: Sequence[_Run], layout: SfLayout, rows: int, k: int, format: ScaleFormat
) -> tuple[PaddingState, PaddingState, list[str]]:
    """What became of padding rows and padding columns, and that in words."""
    first, second = (layout.logical(run.scales, rows, k, format=format) for run in runs)
    zeroed = (first == 0) & (second == 0)
    if not runs[0].returned:
        left = ((first == _SENTINELS[0]) | (first == 0)) & ((second == _SENTINELS[1]) | (second == 0)) & ~zeroed
    else:
        left = (first == _FILL[0]) | (first == _FILL[1])
        if bool((left & (second == _SENTINELS[1])).any()):  # its memory came from the pool that holds the sentinel
            left &= second != first
    masks = {"zeroed": zeroed, "left": left, "dirtied": ~(zeroed | left)}
    states, words = [], []
    for kind, top, side in zip(KINDS, (rows, 0), (0, k // format.block_size), strict=True):
        region = slice(top, None if top else rows), slice(side, None)
        within = {what: mask[region] for what, mask in masks.items()}
        states.append(PaddingState(**{what: int(mask.sum()) for what, mask in within.items()}))
        for what, mask in within.items():
            if not bool(mask.any()):
                continue
            lines = [top + side + index for index in indices(mask.any(1 if kind == "rows" else 0))]
            word = f"padding {kind} {spans(lines)} {what}"
            if what == "dirtied" or not bool(mask.all()):
                word += f", {int(mask.sum())} of {mask.numel()} bytes"
            if what == "dirtied":
                row, column = (int(index) for index in mask.nonzero()[0])
                byte = int(first[region][row, column])
                word += f", first 0x{byte:02X} at row {top + row}, column {side + column}"
            words.append(word)
    return states[0], states[1], words

"""What a scale tensor holds, whoever made it: said once, where it is written, and checked where it is read."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._guards import active_fake_mode

from safealloc import _torch
from safealloc._checks import BYTES, check_contiguous, check_is_tensor, check_tensor
from safealloc.errors import LayoutMismatchError
from safealloc.formats.format import ScaleFormat
from safealloc.formats.layout import SfLayout, checked_layout
from safealloc.formats.spec import ScaleSpec
from safealloc.pool.contents import DECLARED, Note, note_of, remember_declared

_DTYPES = {format: tuple(dict.fromkeys((*BYTES, format.dtype, torch.int32))) for format in ScaleFormat}


def declare(
    tensor: Tensor,
    rows: int,
    k: int,
    layout: SfLayout,
    *,
    padded_k: int | None = None,
    format: ScaleFormat = ScaleFormat.nvfp4,
) -> Tensor:
    """Say what a scale tensor of somebody else's holds: consumers here check it from then on, as they check a pool's.

    The declaration covers the bytes of ``tensor``, and replaces what was declared of any of them before. A view of a larger
    tensor may be declared: its bytes are then scales, and the rest of the storage is not spoken of. It ends with the storage,
    and with any in-place write to the tensor or a view of it that PyTorch counts (``Tensor._version``), wherever in the
    tensor that is. What it does not count ends nothing: kernels that get a raw address, replays of a CUDA graph, writes
    through ``Tensor.data``, and writes to tensors that were made in ``torch.inference_mode``, dtype views among them.
    Declare again after those. Compiled code that writes to one of its inputs, as the zeroing of padding in :func:`mm_fp4`
    does, counts as a write before it runs.

    In traced code this does nothing, since a compiler may use the memory for something else: declare in the implementation
    of the op that writes the scales.

    Args:
        tensor: contiguous, of any shape, with exactly the bytes of such scales, padding included: uint8, float8_e4m3fn, the
            format's dtype, or int32 for four scales each.
        rows, k: the matrix, k in elements.
        layout: order of the scale bytes.
        padded_k: columns that the matrix was padded to, where that is more than ``k``.
        format: of the scales.

    Returns:
        ``tensor``.

    Raises:
        LayoutMismatchError: the tensor is a pool's, which says otherwise.
        TypeError, ValueError: an argument is wrong, or the tensor has not the bytes of such scales.
    """
    if traced():
        return tensor
    spec = ScaleSpec.checked(rows, k, layout, padded_k, format)
    check_tensor("tensor", tensor, _DTYPES[format], None)
    check_contiguous("tensor", tensor)
    nbytes = tensor.numel() * tensor.element_size()
    if nbytes != spec.scale_bytes:
        fitting = [one.name for one in SfLayout if one.nbytes(rows, k, padded_k=padded_k, format=format) == nbytes]
        raise ValueError(
            f"{format.name.upper()} scales of {spec} have {spec.scale_bytes} bytes, {spec.padded_shape}, got a tensor of "
            f"{nbytes} bytes" + (f", which fits {' and '.join(fitting)}" if fitting else "")
        )
    note = note_of(tensor)
    if note is None or note.pool == DECLARED:
        remember_declared(tensor, spec)
    elif note.spec_in(tensor) != spec:
        raise LayoutMismatchError(
            f"a pool's buffer of {note} cannot be declared as scales of {spec}: acquire one for that"
        )
    return tensor


def spec(tensor: Tensor) -> ScaleSpec | None:
    """What a scale tensor holds: a buffer of any pool, a declared tensor, or whole row tiles of one.

    Args:
        tensor: any tensor, view or dtype view. Of row tiles, the rows that lie in the view count.

    Returns:
        ``None`` where nothing is known, and in traced code.

    Raises:
        TypeError: not a tensor.
    """
    note = known(tensor)
    return None if note is None else note.spec_in(tensor)


def check(
    tensor: Tensor, rows: int, k: int, layout: SfLayout | None = None, *, format: ScaleFormat = ScaleFormat.nvfp4
) -> ScaleSpec | None:
    """Refuse scales that are known to be something else than a consumer reads; for wrappers around other consumers.

    Args:
        tensor: the scales.
        rows, k: the matrix that they are read for; k may have been padded as far as the columns of the scales go.
        layout: what the consumer reads; ``None`` is whatever they are in.
        format: what the consumer reads.

    Returns:
        What they hold; ``None`` where nothing is known, and in traced code.

    Raises:
        LayoutMismatchError: layout, format, rows or columns contradict.
        TypeError, ValueError: an argument is wrong.
    """
    note = known(tensor)
    asked = ScaleSpec.checked(
        rows, k, SfLayout.layout_128x4 if layout is None else checked_layout(layout), None, format
    )
    if note is None:
        return None
    held = note.spec_in(tensor)
    reason = contradiction(note, held, asked, layout is not None)
    if reason:
        raise LayoutMismatchError(reason)
    return held


def known(tensor: Tensor) -> Note | None:
    """What is known of the memory of a tensor; ``None`` in traced code. Raises TypeError: not a tensor."""
    check_is_tensor(tensor)
    return None if traced() or not tensor.numel() else note_of(tensor)


def contradiction(note: Note, held: ScaleSpec | None, asked: ScaleSpec, with_layout: bool = True) -> str | None:
    """Why scales cannot be read as ``asked``, in one sentence; ``None`` where they can.

    Args:
        note, held: what is known of their memory, and what they hold: ``note.spec_in`` of the tensor.
        asked: what a consumer reads; columns may be padded as far as they go in the buffer.
        with_layout: whether the consumer reads the layout of ``asked``, or whatever they are in.
    """
    spec = note.spec if held is None else held
    layout = asked.layout if with_layout else spec.layout
    reads = f"rows={asked.rows}, k={asked.k}{f', {layout.name}' if with_layout else ''} of {asked.format.name.upper()}"
    if spec.format is not asked.format:
        return f"{spec.format.name.upper()} scales ({note}) are read as scales of {reads}"
    if spec.layout is not layout:
        return f"scales in {spec.layout.name} ({note}) are read in {layout.name}, as scales of {reads}"
    if held is None:
        what = "holds" if note.parts > 1 else "is a part, which is no whole number of row tiles, of"
        return f"a tensor that {what} {note} is read as scales of {reads}"
    if held.experts is not None:
        return f"scales grouped by expert ({held}) are read as one matrix, as scales of {reads}"
    if held.rows != asked.rows or held.padded_shape[1] != layout.round_up(1, asked.cols)[1]:
        return f"scales of {held} are read as scales of {reads}"
    return None


def traced() -> bool:
    """Whether this runs while code is traced, or with fake tensors."""
    return torch.compiler.is_compiling() or (_torch.dispatch_modes() > 0 and active_fake_mode() is not None)

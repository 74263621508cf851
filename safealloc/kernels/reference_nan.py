"""What is not finite in a quantizer's input: the record of it, and the reference of :mod:`safealloc.kernels.triton_nan`.

A site is a quantizer in a graph, or an eager call of one shape. What it is lies in the host's memory, where a capture can
write it, int64 ``[SITE_WORDS]``; the record lies on the device, int64 ``[HEAD_WORDS + 2 * sites]``. NaN and infinity, two
kinds, are recorded apart, each by the first of its kind since the last look::

    site    0 address of the record        1 number                 2 whether the live rows of a step are rows of x
            3 columns of x
    record  0 step                         1 live rows of the step  2, 3 key of the first, by kind
            4, 5 how many elements         6 address of the flags, int32 ``[2]`` in the host's memory
            8 + 2 * number, and the next   flat index in x of the first at a site, by kind

A key is ``step << SITE_BITS | number``, so that the least is that of the earliest step, and in it that of the site which was
made first: sites are made in the order in which the layers run.
"""

from __future__ import annotations

from torch import Tensor

STEP, LIVE_ROWS, FIRST, COUNT, FLAGS, HEAD_WORDS = 0, 1, 2, 4, 6, 8
RECORD, NUMBER, COUNTS_LIVE_ROWS, WIDTH, SITE_WORDS = 0, 1, 2, 3, 4
SITE_BITS = 20
NOTHING = 1 << 62
"""In place of a key, an index or a number of live rows: there is none."""


def note(x: Tensor, site: Tensor, record: Tensor, flags: Tensor, valid_rows: Tensor | None = None) -> None:
    """Record what is not finite in ``x``.

    Args:
        x: bfloat16 or float16 ``[rows, columns]``.
        site: int64 ``[SITE_WORDS]``.
        record: where it is recorded.
        flags: int32 ``[2]``; that of a kind is set to 1 where one is recorded.
        valid_rows: int32, one element; rows at or beyond it do not count.
    """
    rows, number = x.shape[0], int(site[NUMBER])
    if valid_rows is not None:
        rows = min(rows, int(valid_rows))
    if site[COUNTS_LIVE_ROWS]:
        rows = min(rows, int(record[LIVE_ROWS]))
    live = x[: max(0, rows)]
    key = int(record[STEP]) << SITE_BITS | number
    for kind, found in enumerate((live.isnan(), live.isinf())):
        indices = found.flatten().nonzero()
        if not len(indices):
            continue
        record[COUNT + kind] += len(indices)
        if key <= record[FIRST + kind]:
            record[FIRST + kind] = key
            where = HEAD_WORDS + 2 * number + kind
            record[where] = min(int(record[where]), int(indices[0, 0]))
        flags[kind] = 1

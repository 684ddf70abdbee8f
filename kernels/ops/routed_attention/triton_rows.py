"""The Triton kernel that lists, for every unit, the queries that use it and those that do not."""

# mypy: disable-error-code="no-untyped-def"
# (the arguments are Triton values; their types are given at compile time)

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def list_rows(active, rows, preceding, n, BLOCK_ROWS: tl.constexpr):
    """Grid: (B * U). ``active`` and ``rows`` are [B * U, N], ``preceding`` [B * U, N + 1].

    Queries that use the unit come first, in ascending order; the others follow from the end, so one
    pass places both. ``preceding`` says how many users come before a query, and last their number.
    """
    unit = tl.program_id(0).to(tl.int64)
    used = 0
    for begin in range(0, n, BLOCK_ROWS):
        row = begin + tl.arange(0, BLOCK_ROWS)
        is_row = row < n
        on = tl.load(active + unit * n + row, mask=is_row, other=0).to(tl.int32)
        before = used + tl.cumsum(on, 0)
        place = tl.where(on != 0, before - 1, n - 1 - (row - before))
        tl.store(rows + unit * n + place, row, mask=is_row)
        tl.store(preceding + unit * (n + 1) + row, before - on, mask=is_row)
        used += tl.sum(on, 0)
    tl.store(preceding + unit * (n + 1) + n, used)

"""Triton kernels of the gradient: one for the queries, one for keys and values.

Both recompute the probabilities from lse (derivation: kernels/README.md). The first walks the rows
of the layout, the second its columns, so that every number is written once, by one program.
"""

# mypy: disable-error-code="no-untyped-def"
# (the arguments are Triton values; their types are given at compile time)

from __future__ import annotations

import triton
import triton.language as tl

from reattend.kernels.sparse_attention.triton_sweep import row_entries, seen_pairs
from reattend.kernels.triton_gradient import score_gradient
from reattend.kernels.triton_tiles import last_queries_first, load_tile


@triton.jit
def sparse_dq(
    q,
    k,
    v,
    dy,
    top,
    shift,
    dq,
    row_ptr,
    col,
    tile,
    tiles,
    head_layout,
    kv_start,
    kv_len,
    scale,
    softcap,
    heads,
    group,
    n,
    m,
    blocks,
    first,
    D: tl.constexpr,
    E: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Grid: as `sparse_prefill`. All tensors are contiguous; dq holds 0."""
    parts: tl.constexpr = BLOCK // BLOCK_ROWS
    key_parts: tl.constexpr = BLOCK // BLOCK_KEYS
    count = ((n + BLOCK - 2) // BLOCK + 1) * parts
    number, head, b = last_queries_first(count, heads, 1)
    start = tl.load(kv_start + b).to(tl.int32)
    end = tl.load(kv_len + b).to(tl.int32)
    first_pos = end - start - n
    low = tl.maximum(first_pos, 0)
    at = low // BLOCK + number // parts
    inside = number % parts * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    pos = at * BLOCK + inside
    row = pos - first_pos
    is_row = (pos >= low) & (row < n)
    begin, stop = row_entries(row_ptr, tl.load(head_layout + head), at - first, blocks)
    base = (b * heads + head) * n
    q_tile = load_tile(q + base * D, row.to(tl.int64) * D, is_row, D, BLOCK_D, True, UPCAST)
    dy_tile = load_tile(dy + base * E, row.to(tl.int64) * E, is_row, E, BLOCK_E, True, UPCAST)
    highest = tl.load(top + base + row, mask=is_row, other=float("inf"))
    is_row = is_row & (highest < float("inf"))
    moved = tl.load(shift + base + row, mask=is_row, other=0.0)
    keys = tl.minimum(end, m) - start
    cache = (b * (heads // group) + head // group) * m + start
    acc = tl.zeros((BLOCK_ROWS, BLOCK_D), tl.float32)
    for step in range(begin * key_parts, stop * key_parts):
        entry = step // key_parts
        within = step % key_parts * BLOCK_KEYS + tl.arange(0, BLOCK_KEYS)
        j = tl.load(col + entry) * BLOCK + within
        is_key = j < keys
        k_tile = load_tile(k + cache * D, j.to(tl.int64) * D, is_key, D, BLOCK_D, True, UPCAST)
        v_tile = load_tile(v + cache * E, j.to(tl.int64) * E, is_key, E, BLOCK_E, True, UPCAST)
        seen = seen_pairs(tiles, tl.load(tile + entry), inside, is_row, within, is_key, BLOCK)
        s = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
        dp = tl.dot(dy_tile, tl.trans(v_tile), input_precision=PRECISION)
        _, ds = score_gradient(s, dp, highest[:, None], moved[:, None], scale, softcap, HAS_SOFTCAP)
        ds = tl.where(seen, ds, 0.0)
        acc = tl.dot(ds.to(k_tile.dtype), k_tile, acc, input_precision=PRECISION)
    d = tl.arange(0, BLOCK_D)
    place = (base + row)[:, None] * D + d[None, :]
    out = (acc * scale).to(dq.dtype.element_ty)
    tl.store(dq + place, out, mask=is_row[:, None] & (d < D)[None, :])


@triton.jit
def sparse_dkv(
    q,
    k,
    v,
    dy,
    top,
    shift,
    dk,
    dv,
    col_ptr,
    rows,
    tile,
    tiles,
    head_layout,
    kv_start,
    kv_len,
    scale,
    softcap,
    heads,
    group,
    n,
    m,
    columns,
    first,
    D: tl.constexpr,
    E: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Grid: (columns * parts of a block * G * B). All tensors are contiguous; dk and dv hold 0.

    ``col_ptr`` (layouts, columns + 1 and one more at the end), ``rows`` and ``tile`` are the layout
    sorted by column.
    """
    parts: tl.constexpr = BLOCK // BLOCK_KEYS
    row_parts: tl.constexpr = BLOCK // BLOCK_ROWS
    pid = tl.program_id(0)
    number, rest = pid % (columns * parts), pid // (columns * parts)
    groups = heads // group
    g, b = rest % groups, (rest // groups).to(tl.int64)
    start = tl.load(kv_start + b).to(tl.int32)
    end = tl.load(kv_len + b).to(tl.int32)
    first_pos = end - start - n
    keys = tl.minimum(end, m) - start
    within = number % parts * BLOCK_KEYS + tl.arange(0, BLOCK_KEYS)
    j = number // parts * BLOCK + within
    is_key = j < keys
    cache = (b * groups + g) * m + start
    k_tile = load_tile(k + cache * D, j.to(tl.int64) * D, is_key, D, BLOCK_D, True, UPCAST)
    v_tile = load_tile(v + cache * E, j.to(tl.int64) * E, is_key, E, BLOCK_E, True, UPCAST)
    dk_acc = tl.zeros((BLOCK_KEYS, BLOCK_D), tl.float32)
    dv_acc = tl.zeros((BLOCK_KEYS, BLOCK_E), tl.float32)
    for head in range(g * group, g * group + group):
        place = col_ptr + tl.load(head_layout + head) * (columns + 1) + number // parts
        begin, stop = tl.load(place), tl.load(place + 1)
        base = (b * heads + head) * n
        for step in range(begin * row_parts, stop * row_parts):
            entry = step // row_parts
            inside = step % row_parts * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
            row = (tl.load(rows + entry) + first) * BLOCK + inside - first_pos
            is_row = (row >= 0) & (row < n)
            highest = tl.load(top + base + row, mask=is_row, other=float("inf"))
            is_row = is_row & (highest < float("inf"))
            moved = tl.load(shift + base + row, mask=is_row, other=0.0)
            at = row.to(tl.int64)
            q_tile = load_tile(q + base * D, at * D, is_row, D, BLOCK_D, True, UPCAST)
            dy_tile = load_tile(dy + base * E, at * E, is_row, E, BLOCK_E, True, UPCAST)
            seen = seen_pairs(tiles, tl.load(tile + entry), inside, is_row, within, is_key, BLOCK)
            s = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
            dp = tl.dot(dy_tile, tl.trans(v_tile), input_precision=PRECISION)
            # fmt: off
            p, ds = score_gradient(
                s, dp, highest[:, None], moved[:, None], scale, softcap, HAS_SOFTCAP
            )
            # fmt: on
            p, ds = tl.where(seen, p, 0.0), tl.where(seen, ds, 0.0)
            p, ds = tl.trans(p.to(dy_tile.dtype)), tl.trans(ds.to(q_tile.dtype))
            dv_acc = tl.dot(p, dy_tile, dv_acc, input_precision=PRECISION)
            dk_acc = tl.dot(ds, q_tile, dk_acc, input_precision=PRECISION)
    d, e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    place = cache + j
    tl.store(
        dk + place[:, None] * D + d[None, :],
        (dk_acc * scale).to(dk.dtype.element_ty),
        mask=is_key[:, None] & (d < D)[None, :],
    )
    tl.store(
        dv + place[:, None] * E + e[None, :],
        dv_acc.to(dv.dtype.element_ty),
        mask=is_key[:, None] & (e < E)[None, :],
    )

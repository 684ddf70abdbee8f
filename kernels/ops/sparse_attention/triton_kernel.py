"""Triton kernels of `reattend::sparse_attention`: one for prefill, one for decode.

Prefill: a tile is queries of one block and head, so its row of the layout is one. Decode: a tile is
all queries of all heads of a KV group; rows of the layout are walked one after the other (one,
where the heads share a layout), and entries may be split over programs.
"""

# mypy: disable-error-code="no-untyped-def"
# (the arguments are Triton values; their types are given at compile time)

from __future__ import annotations

import triton
import triton.language as tl

from reattend.kernels.sparse_attention.triton_sweep import row_entries, sweep
from reattend.kernels.triton_tiles import finish, last_queries_first, load_tile, split_range


@triton.jit
def sparse_prefill(
    q,
    k,
    v,
    y,
    lse,
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
    q_b,
    q_h,
    q_n,
    k_b,
    k_g,
    k_m,
    v_b,
    v_g,
    v_m,
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
    """Grid: (query blocks * parts of a block * H * B). y, lse: contiguous, filled with 0 and -inf.

    N queries touch at most (N + BLOCK - 2) // BLOCK + 1 blocks.
    """
    parts: tl.constexpr = BLOCK // BLOCK_ROWS
    count = ((n + BLOCK - 2) // BLOCK + 1) * parts
    number, head, b = last_queries_first(count, heads, 1)
    start = tl.load(kv_start + b).to(tl.int32)
    end = tl.load(kv_len + b).to(tl.int32)
    first_pos = end - start - n  # logical position of query 0, negative in padding
    low = tl.maximum(first_pos, 0)
    at = low // BLOCK + number // parts
    inside = number % parts * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    pos = at * BLOCK + inside
    row = pos - first_pos
    is_row = (pos >= low) & (row < n)
    begin, stop = row_entries(row_ptr, tl.load(head_layout + head), at - first, blocks)
    g, h = (head // group).to(tl.int64), head.to(tl.int64)
    q_rows = row.to(tl.int64) * q_n
    q_tile = load_tile(q + b * q_b + h * q_h, q_rows, is_row, D, BLOCK_D, True, UPCAST)
    keys = tl.minimum(end, m) - start
    k += b * k_b + g * k_g + start.to(tl.int64) * k_m
    v += b * v_b + g * v_g + start.to(tl.int64) * v_m
    acc = tl.zeros((BLOCK_ROWS, BLOCK_E), tl.float32)
    top = tl.full((BLOCK_ROWS,), float("-inf"), tl.float32)
    mass = tl.zeros((BLOCK_ROWS,), tl.float32)
    # fmt: off
    acc, top, mass = sweep(
        acc, top, mass, q_tile, inside, is_row, begin, stop, col, tile, tiles, k, v, k_m, v_m, keys,
        scale, softcap, D, E, HAS_SOFTCAP, UPCAST, PRECISION, False, BLOCK, BLOCK_KEYS, BLOCK_D,
        BLOCK_E,
    )
    # fmt: on
    out, log_sum = finish(acc, top, mass)
    e = tl.arange(0, BLOCK_E)
    place = (b * heads + h) * n + row
    tl.store(
        y + place[:, None] * E + e[None, :],
        out.to(y.dtype.element_ty),
        mask=is_row[:, None] & (e < E)[None, :],
    )
    tl.store(lse + place, log_sum, mask=is_row)


@triton.jit
def sparse_decode(
    q,
    k,
    v,
    y,
    lse,
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
    q_b,
    q_h,
    q_n,
    k_b,
    k_g,
    k_m,
    v_b,
    v_g,
    v_m,
    part,
    splits,
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
    """Grid: (row tiles * splits * G * B). ``part`` is B * H * N, the stride between splits.

    y and lse are (splits, B, H, N, E) and (splits, B, H, N), contiguous; with one split they are
    the outputs themselves, else `merge_splits` combines them.
    """
    rows = group * n
    count = tl.cdiv(rows, BLOCK_ROWS)
    groups = heads // group
    pid = tl.program_id(0)
    number, rest = pid % count, pid // count
    split, rest = rest % splits, rest // splits
    g, b = (rest % groups).to(tl.int64), (rest // groups).to(tl.int64)
    start = tl.load(kv_start + b).to(tl.int32)
    end = tl.load(kv_len + b).to(tl.int32)
    row = number * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    is_row = row < rows
    i = row // group
    h = g * group + row % group
    pos = end - start - n + i
    q_rows = h * q_h + i.to(tl.int64) * q_n
    q_tile = load_tile(q + b * q_b, q_rows, is_row, D, BLOCK_D, True, UPCAST)
    layout = tl.load(head_layout + h, mask=is_row, other=0)
    low = tl.min(tl.where(is_row, layout, 2147483647), 0)
    high = tl.max(tl.where(is_row, layout, 0), 0)
    keys = tl.minimum(end, m) - start
    k += b * k_b + g * k_g + start.to(tl.int64) * k_m
    v += b * v_b + g * v_g + start.to(tl.int64) * v_m
    acc = tl.zeros((BLOCK_ROWS, BLOCK_E), tl.float32)
    top = tl.full((BLOCK_ROWS,), float("-inf"), tl.float32)
    mass = tl.zeros((BLOCK_ROWS,), tl.float32)
    first_block = tl.maximum(end - start - n, 0) // BLOCK
    last_block = tl.maximum(end - start - 1, 0) // BLOCK
    for at in range(first_block, last_block + 1):
        for one in range(low, high + 1):
            mine = is_row & (layout == one) & (pos >= 0) & (pos // BLOCK == at)
            begin, stop = row_entries(row_ptr, one, at - first, blocks)
            stop = tl.where(tl.max(mine.to(tl.int32), 0) > 0, stop, begin)
            begin, stop = split_range(begin, stop, split, splits, 1)
            # fmt: off
            acc, top, mass = sweep(
                acc, top, mass, q_tile, pos % BLOCK, mine, begin, stop, col, tile, tiles, k, v, k_m,
                v_m, keys, scale, softcap, D, E, HAS_SOFTCAP, UPCAST, PRECISION, True, BLOCK,
                BLOCK_KEYS, BLOCK_D, BLOCK_E,
            )
            # fmt: on
    out, log_sum = finish(acc, top, mass)
    e = tl.arange(0, BLOCK_E)
    place = split.to(tl.int64) * part + (b * heads + h) * n + i
    tl.store(
        y + place[:, None] * E + e[None, :],
        out.to(y.dtype.element_ty),
        mask=is_row[:, None] & (e < E)[None, :],
    )
    tl.store(lse + place, log_sum, mask=is_row)

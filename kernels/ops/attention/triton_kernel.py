"""Triton kernels of `reattend::attention`: one for prefill, one for decode.

Both walk the keys once with a running softmax (FlashAttention-2); they differ in what a row of
the tile is. Prefill: consecutive queries of one head. Decode: all queries of all heads of one KV
group, so the cache is read once per group, and the keys may be split over programs.
"""

# mypy: disable-error-code="no-untyped-def"
# (the arguments are Triton values; their types are given at compile time)

from __future__ import annotations

import triton
import triton.language as tl

from reattend.kernels.attention.triton_sweep import sweep
from reattend.kernels.triton_tiles import (
    finish,
    key_range,
    last_queries_first,
    load_tile,
    split_range,
)


@triton.jit
def attention_prefill(
    q,
    k,
    v,
    y,
    lse,
    kv_start,
    kv_len,
    table,
    scale,
    softcap,
    window,
    heads,
    group,
    n,
    m,
    page,
    q_b,
    q_h,
    q_n,
    k_b,
    k_g,
    k_m,
    v_b,
    v_g,
    v_m,
    table_b,
    together,
    D: tl.constexpr,
    E: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    PAGED: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Grid: (query tiles * H * B). y and lse are contiguous (B, H, N, E) and (B, H, N).

    ``together`` divides H: so many heads, whose keys fit in L2, run side by side.
    """
    tile, head, b = last_queries_first(tl.cdiv(n, BLOCK_ROWS), heads, together)
    g, h = (head // group).to(tl.int64), head.to(tl.int64)
    start = tl.load(kv_start + b).to(tl.int32)
    end = tl.load(kv_len + b).to(tl.int32)
    row = tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    is_row = row < n
    pos = end - n + row
    e = tl.arange(0, BLOCK_E)
    q_rows = row.to(tl.int64) * q_n
    q_tile = load_tile(q + b * q_b + h * q_h, q_rows, is_row, D, BLOCK_D, True, UPCAST)
    first_pos = end - n + tile * BLOCK_ROWS
    last_pos = end - n + tl.minimum(n, (tile + 1) * BLOCK_ROWS) - 1
    lo, hi = key_range(start, tl.minimum(end, m), first_pos, last_pos, window, CAUSAL, HAS_WINDOW)
    cache = b * 0 if PAGED else b
    # fmt: off
    acc, top, mass = sweep(
        q_tile, pos, first_pos, last_pos, k + cache * k_b + g * k_g, v + cache * v_b + g * v_g,
        table + b * table_b, lo, hi, scale, softcap, window, page, k_b, k_m, v_b, v_m, D, E,
        CAUSAL, HAS_WINDOW, HAS_SOFTCAP, PAGED, UPCAST, PRECISION, BLOCK_ROWS, BLOCK_KEYS,
        BLOCK_D, BLOCK_E,
    )
    # fmt: on
    out, log_sum = finish(acc, top, mass)
    at = (b * heads + h) * n + row
    tl.store(
        y + at[:, None] * E + e[None, :],
        out.to(y.dtype.element_ty),
        mask=is_row[:, None] & (e < E)[None, :],
    )
    tl.store(lse + at, log_sum, mask=is_row)


@triton.jit
def attention_decode(
    q,
    k,
    v,
    y,
    lse,
    kv_start,
    kv_len,
    table,
    scale,
    softcap,
    window,
    heads,
    group,
    n,
    m,
    page,
    q_b,
    q_h,
    q_n,
    k_b,
    k_g,
    k_m,
    v_b,
    v_g,
    v_m,
    table_b,
    part,
    splits,
    D: tl.constexpr,
    E: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    PAGED: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
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
    tiles = tl.cdiv(rows, BLOCK_ROWS)
    groups = heads // group
    pid = tl.program_id(0)
    # tiles that read the same keys run side by side, so that the second finds them in L2
    tile, rest = pid % tiles, pid // tiles
    split, rest = rest % splits, rest // splits
    g, b = (rest % groups).to(tl.int64), (rest // groups).to(tl.int64)
    start = tl.load(kv_start + b).to(tl.int32)
    end = tl.load(kv_len + b).to(tl.int32)
    row = tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    is_row = row < rows
    i = row // group
    h = g * group + row % group
    pos = end - n + i
    e = tl.arange(0, BLOCK_E)
    q_rows = h * q_h + i.to(tl.int64) * q_n
    q_tile = load_tile(q + b * q_b, q_rows, is_row, D, BLOCK_D, True, UPCAST)
    first_pos, last_pos = end - n, end - 1
    lo, hi = key_range(start, tl.minimum(end, m), first_pos, last_pos, window, CAUSAL, HAS_WINDOW)
    lo, hi = split_range(lo, hi, split, splits, BLOCK_KEYS)
    cache = b * 0 if PAGED else b
    # fmt: off
    acc, top, mass = sweep(
        q_tile, pos, first_pos, last_pos, k + cache * k_b + g * k_g, v + cache * v_b + g * v_g,
        table + b * table_b, lo, hi, scale, softcap, window, page, k_b, k_m, v_b, v_m, D, E,
        CAUSAL, HAS_WINDOW, HAS_SOFTCAP, PAGED, UPCAST, PRECISION, BLOCK_ROWS, BLOCK_KEYS,
        BLOCK_D, BLOCK_E,
    )
    # fmt: on
    out, log_sum = finish(acc, top, mass)
    at = split.to(tl.int64) * part + (b * heads + h) * n + i
    tl.store(
        y + at[:, None] * E + e[None, :],
        out.to(y.dtype.element_ty),
        mask=is_row[:, None] & (e < E)[None, :],
    )
    tl.store(lse + at, log_sum, mask=is_row)

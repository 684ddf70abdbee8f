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

from reattend.kernels.triton_tiles import (
    finish,
    key_range,
    key_rows,
    mask_scores,
    online_softmax,
    split_range,
)


@triton.jit
def _sweep(
    q_tile,
    pos,
    k,
    v,
    table_row,
    lo,
    hi,
    scale,
    softcap,
    window,
    page,
    k_page,
    k_m,
    v_page,
    v_m,
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
    """Running softmax of one tile of rows over keys [lo, hi)."""
    d, e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    acc = tl.zeros((BLOCK_ROWS, BLOCK_E), tl.float32)
    top = tl.full((BLOCK_ROWS,), float("-inf"), tl.float32)
    mass = tl.zeros((BLOCK_ROWS,), tl.float32)
    for first in range(lo, hi, BLOCK_KEYS):
        j = first + tl.arange(0, BLOCK_KEYS)
        is_key = j < hi
        k_row = key_rows(j, is_key, table_row, page, k_page, k_m, PAGED)
        k_at = k + k_row[:, None] + d[None, :]
        k_tile = tl.load(k_at, mask=is_key[:, None] & (d < D)[None, :], other=0.0)
        if UPCAST:
            k_tile = k_tile.to(tl.float32)
        s = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
        s = mask_scores(s, j, pos, is_key, scale, softcap, window, CAUSAL, HAS_WINDOW, HAS_SOFTCAP)
        p, rescale, top, mass = online_softmax(s, top, mass)
        v_row = key_rows(j, is_key, table_row, page, v_page, v_m, PAGED)
        v_at = v + v_row[:, None] + e[None, :]
        v_tile = tl.load(v_at, mask=is_key[:, None] & (e < E)[None, :], other=0.0)
        if UPCAST:
            v_tile = v_tile.to(tl.float32)
        acc = acc * rescale[:, None]
        acc = tl.dot(p.to(v_tile.dtype), v_tile, acc, input_precision=PRECISION)
    return acc, top, mass


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
    """Grid: (query tiles * H * B). y and lse are contiguous (B, H, N, E) and (B, H, N)."""
    tiles = tl.cdiv(n, BLOCK_ROWS)
    pid = tl.program_id(0)
    # the last queries see the most keys: start them first
    tile = tiles - 1 - pid % tiles
    head, b = (pid // tiles) % heads, (pid // tiles // heads).to(tl.int64)
    g, h = (head // group).to(tl.int64), head.to(tl.int64)
    start = tl.load(kv_start + b).to(tl.int32)
    end = tl.load(kv_len + b).to(tl.int32)
    row = tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    is_row = row < n
    pos = end - n + row
    d, e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    q_at = q + b * q_b + h * q_h + row.to(tl.int64)[:, None] * q_n + d[None, :]
    q_tile = tl.load(q_at, mask=is_row[:, None] & (d < D)[None, :], other=0.0)
    if UPCAST:
        q_tile = q_tile.to(tl.float32)
    first_pos = end - n + tile * BLOCK_ROWS
    last_pos = end - n + tl.minimum(n, (tile + 1) * BLOCK_ROWS) - 1
    lo, hi = key_range(start, tl.minimum(end, m), first_pos, last_pos, window, CAUSAL, HAS_WINDOW)
    cache = b * 0 if PAGED else b
    # fmt: off
    acc, top, mass = _sweep(
        q_tile, pos, k + cache * k_b + g * k_g, v + cache * v_b + g * v_g, table + b * table_b,
        lo, hi, scale, softcap, window, page, k_b, k_m, v_b, v_m, D, E, CAUSAL, HAS_WINDOW,
        HAS_SOFTCAP, PAGED, UPCAST, PRECISION, BLOCK_ROWS, BLOCK_KEYS, BLOCK_D, BLOCK_E,
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
    SPLITS: tl.constexpr,
):
    """Grid: (SPLITS * row tiles * G * B). ``part`` is B * H * N, the stride between splits.

    y and lse are (SPLITS, B, H, N, E) and (SPLITS, B, H, N), contiguous; with one split they are
    the outputs themselves, else `merge_splits` combines them.
    """
    rows = group * n
    tiles = tl.cdiv(rows, BLOCK_ROWS)
    groups = heads // group
    pid = tl.program_id(0)
    split, rest = pid % SPLITS, pid // SPLITS
    tile, rest = rest % tiles, rest // tiles
    g, b = (rest % groups).to(tl.int64), (rest // groups).to(tl.int64)
    start = tl.load(kv_start + b).to(tl.int32)
    end = tl.load(kv_len + b).to(tl.int32)
    row = tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    is_row = row < rows
    i = row // group
    h = g * group + row % group
    pos = end - n + i
    d, e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    q_at = q + b * q_b + (h * q_h + i.to(tl.int64) * q_n)[:, None] + d[None, :]
    q_tile = tl.load(q_at, mask=is_row[:, None] & (d < D)[None, :], other=0.0)
    if UPCAST:
        q_tile = q_tile.to(tl.float32)
    lo, hi = key_range(start, tl.minimum(end, m), end - n, end - 1, window, CAUSAL, HAS_WINDOW)
    lo, hi = split_range(lo, hi, split, SPLITS, BLOCK_KEYS)
    cache = b * 0 if PAGED else b
    # fmt: off
    acc, top, mass = _sweep(
        q_tile, pos, k + cache * k_b + g * k_g, v + cache * v_b + g * v_g, table + b * table_b,
        lo, hi, scale, softcap, window, page, k_b, k_m, v_b, v_m, D, E, CAUSAL, HAS_WINDOW,
        HAS_SOFTCAP, PAGED, UPCAST, PRECISION, BLOCK_ROWS, BLOCK_KEYS, BLOCK_D, BLOCK_E,
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

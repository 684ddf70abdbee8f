"""Triton kernels of `reattend::latent_attention`: one for prefill, one for decode.

Every head reads the same rows, so a tile's rows are (query, head) pairs, heads fastest, and a
latent tile is loaded once and used twice: as keys and as values. Decode also splits the keys.
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
def _attend_rows(
    q_nope,
    q_rope,
    latent,
    rope,
    y,
    lse,
    kv_start,
    kv_len,
    table,
    scale,
    softcap,
    window,
    heads,
    n,
    m,
    page,
    qn_b,
    qn_h,
    qn_n,
    qr_b,
    qr_h,
    qr_n,
    latent_b,
    latent_m,
    rope_b,
    rope_m,
    table_b,
    part,
    split,
    tile,
    b,
    RANK: tl.constexpr,
    ROPE: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    PAGED: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_ROPE: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """One tile of rows over its (split of the) visible keys, then the store."""
    start = tl.load(kv_start + b).to(tl.int32)
    end = tl.load(kv_len + b).to(tl.int32)
    row = tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    is_row = row < n * heads
    i, h = row // heads, (row % heads).to(tl.int64)
    pos = end - n + i
    first_pos = end - n + tile * BLOCK_ROWS // heads
    last_pos = end - n + tl.minimum(n, tl.cdiv((tile + 1) * BLOCK_ROWS, heads)) - 1
    lo, hi = key_range(start, tl.minimum(end, m), first_pos, last_pos, window, CAUSAL, HAS_WINDOW)
    lo, hi = split_range(lo, hi, split, SPLITS, BLOCK_KEYS)

    r, w = tl.arange(0, BLOCK_RANK), tl.arange(0, BLOCK_ROPE)
    wide = i.to(tl.int64)
    q_at = q_nope + b * qn_b + (h * qn_h + wide * qn_n)[:, None] + r[None, :]
    q_tile = tl.load(q_at, mask=is_row[:, None] & (r < RANK)[None, :], other=0.0)
    if UPCAST:
        q_tile = q_tile.to(tl.float32)
    if ROPE > 0:
        w_at = q_rope + b * qr_b + (h * qr_h + wide * qr_n)[:, None] + w[None, :]
        w_tile = tl.load(w_at, mask=is_row[:, None] & (w < ROPE)[None, :], other=0.0)
        if UPCAST:
            w_tile = w_tile.to(tl.float32)

    if not PAGED:
        latent += b * latent_b
        rope += b * rope_b
    table_row = table + b * table_b
    acc = tl.zeros((BLOCK_ROWS, BLOCK_RANK), tl.float32)
    top = tl.full((BLOCK_ROWS,), float("-inf"), tl.float32)
    mass = tl.zeros((BLOCK_ROWS,), tl.float32)
    for first in range(lo, hi, BLOCK_KEYS):
        j = first + tl.arange(0, BLOCK_KEYS)
        is_key = j < hi
        at = key_rows(j, is_key, table_row, page, latent_b, latent_m, PAGED)
        c_at = latent + at[:, None] + r[None, :]
        c_tile = tl.load(c_at, mask=is_key[:, None] & (r < RANK)[None, :], other=0.0)
        if UPCAST:
            c_tile = c_tile.to(tl.float32)
        s = tl.dot(q_tile, tl.trans(c_tile), input_precision=PRECISION)
        if ROPE > 0:
            at = key_rows(j, is_key, table_row, page, rope_b, rope_m, PAGED)
            k_at = rope + at[:, None] + w[None, :]
            k_tile = tl.load(k_at, mask=is_key[:, None] & (w < ROPE)[None, :], other=0.0)
            if UPCAST:
                k_tile = k_tile.to(tl.float32)
            s = tl.dot(w_tile, tl.trans(k_tile), s, input_precision=PRECISION)
        s = mask_scores(s, j, pos, is_key, scale, softcap, window, CAUSAL, HAS_WINDOW, HAS_SOFTCAP)
        p, rescale, top, mass = online_softmax(s, top, mass)
        acc = acc * rescale[:, None]
        acc = tl.dot(p.to(c_tile.dtype), c_tile, acc, input_precision=PRECISION)

    out, log_sum = finish(acc, top, mass)
    at = split.to(tl.int64) * part + (b * heads + h) * n + i
    tl.store(
        y + at[:, None] * RANK + r[None, :],
        out.to(y.dtype.element_ty),
        mask=is_row[:, None] & (r < RANK)[None, :],
    )
    tl.store(lse + at, log_sum, mask=is_row)


@triton.jit
def latent_prefill(
    q_nope,
    q_rope,
    latent,
    rope,
    y,
    lse,
    kv_start,
    kv_len,
    table,
    scale,
    softcap,
    window,
    heads,
    n,
    m,
    page,
    qn_b,
    qn_h,
    qn_n,
    qr_b,
    qr_h,
    qr_n,
    latent_b,
    latent_m,
    rope_b,
    rope_m,
    table_b,
    RANK: tl.constexpr,
    ROPE: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    PAGED: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_ROPE: tl.constexpr,
):
    """Grid: (row tiles * B). y and lse are contiguous (B, H, N, r) and (B, H, N)."""
    tiles = tl.cdiv(n * heads, BLOCK_ROWS)
    pid = tl.program_id(0)
    # the last queries see the most keys: start them first
    tile = tiles - 1 - pid % tiles
    b = (pid // tiles).to(tl.int64)
    # fmt: off
    _attend_rows(
        q_nope, q_rope, latent, rope, y, lse, kv_start, kv_len, table, scale, softcap, window,
        heads, n, m, page, qn_b, qn_h, qn_n, qr_b, qr_h, qr_n, latent_b, latent_m, rope_b, rope_m,
        table_b, 0, pid * 0, tile, b, RANK, ROPE, CAUSAL, HAS_WINDOW, HAS_SOFTCAP, PAGED, UPCAST,
        PRECISION, BLOCK_ROWS, BLOCK_KEYS, BLOCK_RANK, BLOCK_ROPE, 1,
    )
    # fmt: on


@triton.jit
def latent_decode(
    q_nope,
    q_rope,
    latent,
    rope,
    y,
    lse,
    kv_start,
    kv_len,
    table,
    scale,
    softcap,
    window,
    heads,
    n,
    m,
    page,
    qn_b,
    qn_h,
    qn_n,
    qr_b,
    qr_h,
    qr_n,
    latent_b,
    latent_m,
    rope_b,
    rope_m,
    table_b,
    part,
    RANK: tl.constexpr,
    ROPE: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    PAGED: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_ROPE: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Grid: (SPLITS * row tiles * B). ``part`` is B * H * N, the stride between splits.

    y and lse are (SPLITS, B, H, N, r) and (SPLITS, B, H, N), contiguous; with one split they are
    the outputs themselves, else `merge_splits` combines them.
    """
    tiles = tl.cdiv(n * heads, BLOCK_ROWS)
    pid = tl.program_id(0)
    split, rest = pid % SPLITS, pid // SPLITS
    tile = rest % tiles
    b = (rest // tiles).to(tl.int64)
    # fmt: off
    _attend_rows(
        q_nope, q_rope, latent, rope, y, lse, kv_start, kv_len, table, scale, softcap, window,
        heads, n, m, page, qn_b, qn_h, qn_n, qr_b, qr_h, qr_n, latent_b, latent_m, rope_b, rope_m,
        table_b, part, split, tile, b, RANK, ROPE, CAUSAL, HAS_WINDOW, HAS_SOFTCAP, PAGED, UPCAST,
        PRECISION, BLOCK_ROWS, BLOCK_KEYS, BLOCK_RANK, BLOCK_ROPE, SPLITS,
    )
    # fmt: on

"""Triton kernels of `reattend::latent_attention`: one for prefill, one for decode.

Every head reads the same rows, so a tile's rows are (query, head) pairs, heads fastest, and a
latent tile is loaded once and used twice: as keys and as values. Decode also splits the keys.
"""

# mypy: disable-error-code="no-untyped-def"
# (the arguments are Triton values; their types are given at compile time)

from __future__ import annotations

import triton
import triton.language as tl

from reattend.kernels.latent_attention.triton_span import span
from reattend.kernels.triton_tiles import finish, key_range, load_tile, split_range, whole_keys


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
    splits,
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
    SPREAD: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_ROPE: tl.constexpr,
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
    lo, hi = split_range(lo, hi, split, splits, BLOCK_KEYS)

    wide = i.to(tl.int64)
    q_rows, w_rows = h * qn_h + wide * qn_n, h * qr_h + wide * qr_n
    q_tile = load_tile(q_nope + b * qn_b, q_rows, is_row, RANK, BLOCK_RANK, True, UPCAST)
    w_tile = q_tile  # never read without a rotary part
    if ROPE > 0:
        w_tile = load_tile(q_rope + b * qr_b, w_rows, is_row, ROPE, BLOCK_ROPE, True, UPCAST)

    if not PAGED:
        latent += b * latent_b
        rope += b * rope_b
    table_row = table + b * table_b
    acc = tl.zeros((BLOCK_ROWS, BLOCK_RANK), tl.float32)
    top = tl.full((BLOCK_ROWS,), float("-inf"), tl.float32)
    mass = tl.zeros((BLOCK_ROWS,), tl.float32)
    a, z = whole_keys(lo, hi, first_pos, last_pos, window, BLOCK_KEYS, CAUSAL, HAS_WINDOW)
    # fmt: off
    if HAS_WINDOW:
        acc, top, mass = span(
            acc, top, mass, q_tile, w_tile, pos, latent, rope, table_row, lo, a, hi, scale,
            softcap, window, page, latent_b, latent_m, rope_b, rope_m, RANK, ROPE, CAUSAL,
            HAS_WINDOW, HAS_SOFTCAP, PAGED, UPCAST, PRECISION, SPREAD, BLOCK_KEYS, BLOCK_RANK,
            BLOCK_ROPE, True,
        )
    acc, top, mass = span(
        acc, top, mass, q_tile, w_tile, pos, latent, rope, table_row, a, z, hi, scale,
        softcap, window, page, latent_b, latent_m, rope_b, rope_m, RANK, ROPE, CAUSAL,
        HAS_WINDOW, HAS_SOFTCAP, PAGED, UPCAST, PRECISION, SPREAD, BLOCK_KEYS, BLOCK_RANK,
        BLOCK_ROPE, False,
    )
    if z < hi:
        acc, top, mass = span(
            acc, top, mass, q_tile, w_tile, pos, latent, rope, table_row, z, hi, hi, scale,
            softcap, window, page, latent_b, latent_m, rope_b, rope_m, RANK, ROPE, CAUSAL,
            HAS_WINDOW, HAS_SOFTCAP, PAGED, UPCAST, PRECISION, SPREAD, BLOCK_KEYS, BLOCK_RANK,
            BLOCK_ROPE, True,
        )
    # fmt: on

    out, log_sum = finish(acc, top, mass)
    r = tl.arange(0, BLOCK_RANK)
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
    SPREAD: tl.constexpr,
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
        table_b, 0, pid * 0, 1, tile, b, RANK, ROPE, CAUSAL, HAS_WINDOW, HAS_SOFTCAP, PAGED, UPCAST,
        PRECISION, SPREAD, BLOCK_ROWS, BLOCK_KEYS, BLOCK_RANK, BLOCK_ROPE,
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
    splits,
    RANK: tl.constexpr,
    ROPE: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    PAGED: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    SPREAD: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_ROPE: tl.constexpr,
):
    """Grid: (row tiles * splits * B). ``part`` is B * H * N, the stride between splits.

    y and lse are (splits, B, H, N, r) and (splits, B, H, N), contiguous; with one split they are
    the outputs themselves, else `merge_splits` combines them.
    """
    tiles = tl.cdiv(n * heads, BLOCK_ROWS)
    pid = tl.program_id(0)
    # tiles that read the same keys run side by side, so that the second finds them in L2
    tile, rest = pid % tiles, pid // tiles
    split, b = rest % splits, (rest // splits).to(tl.int64)
    # fmt: off
    _attend_rows(
        q_nope, q_rope, latent, rope, y, lse, kv_start, kv_len, table, scale, softcap, window,
        heads, n, m, page, qn_b, qn_h, qn_n, qr_b, qr_h, qr_n, latent_b, latent_m, rope_b, rope_m,
        table_b, part, split, splits, tile, b, RANK, ROPE, CAUSAL, HAS_WINDOW, HAS_SOFTCAP, PAGED,
        UPCAST, PRECISION, SPREAD, BLOCK_ROWS, BLOCK_KEYS, BLOCK_RANK, BLOCK_ROPE,
    )
    # fmt: on

"""Triton kernel of the gradient of `reattend::latent_attention` for the cache.

A latent row is key and value of every head. A tile of rows walks the (query, head) pairs that see
it, and both gradients add up in one accumulator: ``(scale ds)^T q + p^T du`` is kept divided by the
scale, so that ds, which can be small, is rounded as it is. Where there are too few tiles for the
device, several programs share the pairs of a tile and write parts, which torch adds: no number is
added to atomically. Scores are made with keys as rows, as in `attention_dkv`.
"""

# mypy: disable-error-code="no-untyped-def"
# (the arguments are Triton values; their types are given at compile time)

from __future__ import annotations

import triton
import triton.language as tl

from reattend.kernels.attention.triton_dkv import seeing_rows
from reattend.kernels.latent_attention.triton_slices import (
    add_rows,
    held,
    inner,
    nothing,
    store_rows,
)
from reattend.kernels.triton_gradient import score_gradient
from reattend.kernels.triton_tiles import split_range, visible


@triton.jit
def _dkv_span(
    acc,
    k_acc,
    c,
    k,
    j,
    first_pos,
    q_nope,
    q_rope,
    du,
    top,
    shift,
    p_kept,
    ds_kept,
    is_key,
    begin,
    stop,
    heads,
    n,
    m,
    scale,
    softcap,
    window,
    qn_h,
    qn_n,
    qr_h,
    qr_n,
    RANK: tl.constexpr,
    ROPE: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    SPREAD: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_ROPE: tl.constexpr,
    SLICE: tl.constexpr,
    MASKED: tl.constexpr,
):
    """What the (query, head) pairs from begin to stop give to a tile of keys."""
    for first in range(begin, stop, BLOCK_ROWS):
        row = first + tl.arange(0, BLOCK_ROWS)
        is_row = row < n * heads
        i, h = row // heads, (row % heads).to(tl.int64)
        wide = i.to(tl.int64)
        at = h * n + wide
        q_rows, w_rows = h * qn_h + wide * qn_n, h * qr_h + wide * qr_n
        end = n * heads
        q = held(q_nope, q_rows, is_row, RANK, BLOCK_RANK, SLICE, True, UPCAST)
        dy = held(du, at * RANK, is_row, RANK, BLOCK_RANK, SLICE, True, UPCAST)
        number: tl.constexpr = tl.float32 if UPCAST else q_nope.dtype.element_ty
        # fmt: off
        if p_kept is not None:
            seen = is_row[None, :] & is_key[:, None]
            if MASKED:
                pos = first_pos + i
                seen = visible(seen, j[:, None], pos[None, :], window, CAUSAL, HAS_WINDOW)
            place = row.to(tl.int64)[None, :] * m + j[:, None]
            p = tl.load(p_kept + place, mask=seen, other=0.0).to(number)
            ds = tl.load(ds_kept + place, mask=seen, other=0.0).to(number)
            if ROPE > 0:
                w = held(q_rope, w_rows, is_row, ROPE, BLOCK_ROPE, SLICE // 2, True, UPCAST)
        else:
            # what lies beyond the last pair has probabilities of 0
            highest = tl.load(top + at, mask=is_row, other=float("inf"))
            moved = tl.load(shift + at, mask=is_row, other=0.0)
            s = inner(c, q, first < end, RANK, BLOCK_RANK, SLICE, UPCAST, PRECISION, SPREAD)
            if ROPE > 0:
                w = held(q_rope, w_rows, is_row, ROPE, BLOCK_ROPE, SLICE // 2, True, UPCAST)
                s += inner(
                    k, w, first < end, ROPE, BLOCK_ROPE, SLICE // 2, UPCAST, PRECISION, SPREAD
                )
            dp = inner(c, dy, first < end, RANK, BLOCK_RANK, SLICE, UPCAST, PRECISION, SPREAD)
            p, ds = score_gradient(
                s, dp, highest[None, :], moved[None, :], scale, softcap, HAS_SOFTCAP
            )
            if MASKED:
                pos = first_pos + i
                seen = visible(
                    is_row[None, :], j[:, None], pos[None, :], window, CAUSAL, HAS_WINDOW
                )
                p, ds = tl.where(seen, p, 0.0), tl.where(seen, ds, 0.0)
            p, ds = (p / scale).to(number), ds.to(number)
        acc = add_rows(
            acc, p, dy, first, end, RANK, BLOCK_RANK, SLICE, UPCAST, PRECISION, True
        )
        acc = add_rows(acc, ds, q, first, end, RANK, BLOCK_RANK, SLICE, UPCAST, PRECISION, False)
        if ROPE > 0:
            k_acc = add_rows(
                k_acc, ds, w, first, end, ROPE, BLOCK_ROPE, SLICE // 2, UPCAST, PRECISION, False
            )
        # fmt: on
    return acc, k_acc


@triton.jit
def latent_dkv(
    q_nope,
    q_rope,
    latent,
    rope,
    du,
    top,
    shift,
    d_latent,
    d_rope,
    p_kept,
    ds_kept,
    kv_start,
    kv_len,
    scale,
    softcap,
    window,
    heads,
    n,
    m,
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
    splits,
    part,
    RANK: tl.constexpr,
    ROPE: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    SPREAD: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_ROPE: tl.constexpr,
    SLICE: tl.constexpr,
):
    """Grid: (splits * key tiles * B). Keys that nobody sees get 0.

    The gradients are contiguous [splits, B, M, ...]; ``part`` is B * M, the rows between splits.
    The first keys are seen by the most queries: they start first. Where `latent_dq` kept p and ds,
    they are read, and neither the cache nor top and shift; else p_kept and ds_kept are None.
    """
    tiles = tl.cdiv(m, BLOCK_KEYS)
    pid = tl.program_id(0)
    split, rest = pid % splits, pid // splits
    tile, b = rest % tiles, (rest // tiles).to(tl.int64)
    start = tl.load(kv_start + b).to(tl.int32)
    end = tl.load(kv_len + b).to(tl.int32)
    first_key, first_pos = tile * BLOCK_KEYS, end - n
    j = first_key + tl.arange(0, BLOCK_KEYS)
    is_key, wide = (j >= start) & (j < end) & (j < m), j.to(tl.int64)
    latent += b * latent_b
    rope += b * rope_b
    c = held(latent, wide * latent_m, is_key, RANK, BLOCK_RANK, SLICE, True, UPCAST)
    k = c  # never read without a rotary part
    if ROPE > 0:
        k = held(rope, wide * rope_m, is_key, ROPE, BLOCK_ROPE, SLICE // 2, True, UPCAST)
    acc = nothing(BLOCK_KEYS, RANK, BLOCK_RANK, SLICE)
    k_acc = nothing(BLOCK_KEYS, ROPE, BLOCK_ROPE, SLICE // 2)
    # fmt: off
    if (first_key < end) & (first_key + BLOCK_KEYS > start):
        # in pairs, heads fastest: every bound is that of queries, times the heads
        lo, hi, a, z = seeing_rows(
            first_key * heads, (first_key + BLOCK_KEYS - 1) * heads, first_pos * heads,
            kv_start, n * heads, tl.minimum(window, m) * heads, False, BLOCK_ROWS, CAUSAL,
            HAS_WINDOW,
        )
        lo, hi = split_range(lo, hi, split, splits, BLOCK_ROWS)
        a, z = tl.minimum(tl.maximum(a, lo), hi), tl.minimum(tl.maximum(z, lo), hi)
        q_nope += b * qn_b
        q_rope += b * qr_b
        du += b * heads * n * RANK
        top += b * heads * n
        shift += b * heads * n
        if p_kept is not None:
            p_kept += b * heads * n * m
            ds_kept += b * heads * n * m
        if CAUSAL:
            acc, k_acc = _dkv_span(
                acc, k_acc, c, k, j, first_pos, q_nope, q_rope, du, top, shift,
                p_kept, ds_kept, is_key, lo, a, heads, n, m, scale, softcap, window, qn_h, qn_n,
                qr_h, qr_n, RANK, ROPE, CAUSAL, HAS_WINDOW, HAS_SOFTCAP, UPCAST, PRECISION, SPREAD,
                BLOCK_ROWS, BLOCK_RANK, BLOCK_ROPE, SLICE, True,
            )
        acc, k_acc = _dkv_span(
            acc, k_acc, c, k, j, first_pos, q_nope, q_rope, du, top, shift,
            p_kept, ds_kept, is_key, a, z, heads, n, m, scale, softcap, window, qn_h, qn_n,
            qr_h, qr_n, RANK, ROPE, CAUSAL, HAS_WINDOW, HAS_SOFTCAP, UPCAST, PRECISION, SPREAD,
            BLOCK_ROWS, BLOCK_RANK, BLOCK_ROPE, SLICE, False,
        )
        if HAS_WINDOW:
            acc, k_acc = _dkv_span(
                acc, k_acc, c, k, j, first_pos, q_nope, q_rope, du, top, shift,
                p_kept, ds_kept, is_key, z, hi, heads, n, m, scale, softcap, window, qn_h, qn_n,
                qr_h, qr_n, RANK, ROPE, CAUSAL, HAS_WINDOW, HAS_SOFTCAP, UPCAST, PRECISION, SPREAD,
                BLOCK_ROWS, BLOCK_RANK, BLOCK_ROPE, SLICE, True,
            )
    # fmt: on
    place, is_place = split.to(tl.int64) * part + b * m + wide, j < m
    store_rows(d_latent, place, acc, is_place, is_key, scale, RANK, BLOCK_RANK, SLICE)
    if ROPE > 0:
        store_rows(d_rope, place, k_acc, is_place, is_key, scale, ROPE, BLOCK_ROPE, SLICE // 2)

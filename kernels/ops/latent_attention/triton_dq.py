"""Triton kernel of the gradient of `reattend::latent_attention` for queries.

It walks the keys again, with the (query, head) pairs of `triton_kernel` as rows: probabilities are
recomputed from lse, a latent tile is loaded once for all that it is used for (scores, dp and the
gradient itself; in fp32 it is loaded slice by slice, `triton_slices`), and every number is written
once, by one program. It can leave probabilities and their gradients to `latent_dkv`.
"""

# mypy: disable-error-code="no-untyped-def"
# (the arguments are Triton values; their types are given at compile time)

from __future__ import annotations

import triton
import triton.language as tl

from reattend.kernels.latent_attention.triton_slices import (
    add_rows,
    held,
    inner,
    nothing,
    store_rows,
)
from reattend.kernels.triton_gradient import score_gradient
from reattend.kernels.triton_tiles import key_range, visible, whole_keys


@triton.jit
def _dq_span(
    acc,
    w_acc,
    q,
    w,
    du,
    top,
    shift,
    pos,
    latent,
    rope,
    begin,
    stop,
    hi,
    p_kept,
    ds_kept,
    is_row,
    scale,
    softcap,
    window,
    latent_m,
    rope_m,
    RANK: tl.constexpr,
    ROPE: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    SPREAD: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_ROPE: tl.constexpr,
    SLICE: tl.constexpr,
    MASKED: tl.constexpr,
):
    """What the keys from begin to stop give; hi ends the keys that count."""
    for first in range(begin, stop, BLOCK_KEYS):
        j = first + tl.arange(0, BLOCK_KEYS)
        is_key, at = j < hi, j.to(tl.int64)
        # fmt: off
        c = held(latent, at * latent_m, is_key, RANK, BLOCK_RANK, SLICE, MASKED, UPCAST)
        s = inner(q, c, first < hi, RANK, BLOCK_RANK, SLICE, UPCAST, PRECISION, SPREAD)
        if ROPE > 0:
            k = held(rope, at * rope_m, is_key, ROPE, BLOCK_ROPE, SLICE // 2, MASKED, UPCAST)
            s += inner(w, k, first < hi, ROPE, BLOCK_ROPE, SLICE // 2, UPCAST, PRECISION, SPREAD)
        dp = inner(du, c, first < hi, RANK, BLOCK_RANK, SLICE, UPCAST, PRECISION, SPREAD)
        p, ds = score_gradient(s, dp, top[:, None], shift[:, None], scale, softcap, HAS_SOFTCAP)
        if MASKED:
            seen = visible(is_key[None, :], j[None, :], pos[:, None], window, CAUSAL, HAS_WINDOW)
            p, ds = tl.where(seen, p, 0.0), tl.where(seen, ds, 0.0)
        ds = ds.to(tl.float32 if UPCAST else latent.dtype.element_ty)
        if p_kept is not None:
            inside = is_row[:, None] & is_key[None, :]
            tl.store(p_kept + j[None, :], (p / scale).to(latent.dtype.element_ty), mask=inside)
            tl.store(ds_kept + j[None, :], ds.to(latent.dtype.element_ty), mask=inside)
        acc = add_rows(
            acc, ds, c, first, hi, RANK, BLOCK_RANK, SLICE, UPCAST, PRECISION, False
        )
        if ROPE > 0:
            w_acc = add_rows(
                w_acc, ds, k, first, hi, ROPE, BLOCK_ROPE, SLICE // 2, UPCAST, PRECISION, False
            )
        # fmt: on
    return acc, w_acc


@triton.jit
def latent_dq(
    q_nope,
    q_rope,
    latent,
    rope,
    du,
    top,
    shift,
    dq_nope,
    dq_rope,
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
    """Grid: as `latent_prefill`. du and both gradients are contiguous, top and shift [B, H, N].

    p_kept and ds_kept are [B, N, H, M], or None; pairs that no query of a tile sees are not
    written.
    """
    tiles = tl.cdiv(n * heads, BLOCK_ROWS)
    pid = tl.program_id(0)
    # the last queries see the most keys: start them first
    tile, b = tiles - 1 - pid % tiles, (pid // tiles).to(tl.int64)
    start = tl.load(kv_start + b).to(tl.int32)
    end = tl.load(kv_len + b).to(tl.int32)
    row = tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    is_row = row < n * heads
    i, h = row // heads, (row % heads).to(tl.int64)
    pos, wide = end - n + i, i.to(tl.int64)
    q_rows, w_rows = h * qn_h + wide * qn_n, h * qr_h + wide * qr_n
    place = (b * heads + h) * n + wide
    q = held(q_nope + b * qn_b, q_rows, is_row, RANK, BLOCK_RANK, SLICE, True, UPCAST)
    dy = held(du, place * RANK, is_row, RANK, BLOCK_RANK, SLICE, True, UPCAST)
    w = q  # never read without a rotary part
    if ROPE > 0:
        w = held(q_rope + b * qr_b, w_rows, is_row, ROPE, BLOCK_ROPE, SLICE // 2, True, UPCAST)
    highest = tl.load(top + place, mask=is_row, other=float("inf"))
    moved = tl.load(shift + place, mask=is_row, other=0.0)
    first_pos = end - n + tile * BLOCK_ROWS // heads
    last_pos = end - n + tl.minimum(n, tl.cdiv((tile + 1) * BLOCK_ROWS, heads)) - 1
    lo, hi = key_range(start, tl.minimum(end, m), first_pos, last_pos, window, CAUSAL, HAS_WINDOW)
    a, z = whole_keys(lo, hi, first_pos, last_pos, window, BLOCK_KEYS, CAUSAL, HAS_WINDOW)
    latent += b * latent_b
    rope += b * rope_b
    if p_kept is not None:
        at = (b * n * heads + row).to(tl.int64) * m
        p_kept += at[:, None]
        ds_kept += at[:, None]
    acc = nothing(BLOCK_ROWS, RANK, BLOCK_RANK, SLICE)
    w_acc = nothing(BLOCK_ROWS, ROPE, BLOCK_ROPE, SLICE // 2)
    # fmt: off
    if HAS_WINDOW:
        acc, w_acc = _dq_span(
            acc, w_acc, q, w, dy, highest, moved, pos, latent, rope, lo, a, hi,
            p_kept, ds_kept, is_row, scale, softcap, window, latent_m, rope_m, RANK, ROPE, CAUSAL,
            HAS_WINDOW, HAS_SOFTCAP, UPCAST, PRECISION, SPREAD, BLOCK_KEYS, BLOCK_RANK, BLOCK_ROPE,
            SLICE, True,
        )
    acc, w_acc = _dq_span(
        acc, w_acc, q, w, dy, highest, moved, pos, latent, rope, a, z, hi,
        p_kept, ds_kept, is_row, scale, softcap, window, latent_m, rope_m, RANK, ROPE, CAUSAL,
        HAS_WINDOW, HAS_SOFTCAP, UPCAST, PRECISION, SPREAD, BLOCK_KEYS, BLOCK_RANK, BLOCK_ROPE,
        SLICE, False,
    )
    if z < hi:
        acc, w_acc = _dq_span(
            acc, w_acc, q, w, dy, highest, moved, pos, latent, rope, z, hi, hi,
            p_kept, ds_kept, is_row, scale, softcap, window, latent_m, rope_m, RANK, ROPE, CAUSAL,
            HAS_WINDOW, HAS_SOFTCAP, UPCAST, PRECISION, SPREAD, BLOCK_KEYS, BLOCK_RANK, BLOCK_ROPE,
            SLICE, True,
        )
    # fmt: on
    store_rows(dq_nope, place, acc, is_row, None, scale, RANK, BLOCK_RANK, SLICE)
    if ROPE > 0:
        store_rows(dq_rope, place, w_acc, is_row, None, scale, ROPE, BLOCK_ROPE, SLICE // 2)

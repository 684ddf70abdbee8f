"""Triton kernel of the gradient of `reattend::latent_attention` for queries.

It walks the keys again, with the (query, head) pairs of `triton_kernel` as rows: probabilities are
recomputed from lse, a latent tile is loaded once for all that it is used for (scores, dp and the
gradient itself), and every number is written once, by one program.
"""

# mypy: disable-error-code="no-untyped-def"
# (the arguments are Triton values; their types are given at compile time)

from __future__ import annotations

import triton
import triton.language as tl

from reattend.kernels.latent_attention.triton_span import product
from reattend.kernels.triton_gradient import score_gradient
from reattend.kernels.triton_tiles import key_range, load_tile, visible, whole_keys


@triton.jit
def _dq_span(
    acc,
    w_acc,
    q_tile,
    w_tile,
    du_tile,
    top,
    shift,
    pos,
    latent,
    rope,
    begin,
    stop,
    hi,
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
    MASKED: tl.constexpr,
):
    """What the keys from begin to stop give; hi ends the keys that count."""
    for first in range(begin, stop, BLOCK_KEYS):
        j = first + tl.arange(0, BLOCK_KEYS)
        is_key, at = j < hi, j.to(tl.int64)
        c_tile = load_tile(latent, at * latent_m, is_key, RANK, BLOCK_RANK, MASKED, UPCAST)
        s = product(q_tile, c_tile, first < hi, PRECISION, SPREAD)
        if ROPE > 0:
            k_tile = load_tile(rope, at * rope_m, is_key, ROPE, BLOCK_ROPE, MASKED, UPCAST)
            s += product(w_tile, k_tile, first < hi, PRECISION, SPREAD)
        dp = product(du_tile, c_tile, first < hi, PRECISION, SPREAD)
        _, ds = score_gradient(s, dp, top[:, None], shift[:, None], scale, softcap, HAS_SOFTCAP)
        if MASKED:
            seen = visible(is_key[None, :], j[None, :], pos[:, None], window, CAUSAL, HAS_WINDOW)
            ds = tl.where(seen, ds, 0.0)
        ds = ds.to(c_tile.dtype)
        acc = tl.dot(ds, c_tile, acc, input_precision=PRECISION)
        if ROPE > 0:
            w_acc = tl.dot(ds, k_tile, w_acc, input_precision=PRECISION)
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
):
    """Grid: as `latent_prefill`. du and both gradients are contiguous, top and shift [B, H, N]."""
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
    q_tile = load_tile(q_nope + b * qn_b, q_rows, is_row, RANK, BLOCK_RANK, True, UPCAST)
    du_tile = load_tile(du, place * RANK, is_row, RANK, BLOCK_RANK, True, UPCAST)
    w_tile = q_tile  # never read without a rotary part
    if ROPE > 0:
        w_tile = load_tile(q_rope + b * qr_b, w_rows, is_row, ROPE, BLOCK_ROPE, True, UPCAST)
    highest = tl.load(top + place, mask=is_row, other=float("inf"))
    moved = tl.load(shift + place, mask=is_row, other=0.0)
    first_pos = end - n + tile * BLOCK_ROWS // heads
    last_pos = end - n + tl.minimum(n, tl.cdiv((tile + 1) * BLOCK_ROWS, heads)) - 1
    lo, hi = key_range(start, tl.minimum(end, m), first_pos, last_pos, window, CAUSAL, HAS_WINDOW)
    a, z = whole_keys(lo, hi, first_pos, last_pos, window, BLOCK_KEYS, CAUSAL, HAS_WINDOW)
    latent += b * latent_b
    rope += b * rope_b
    acc = tl.zeros((BLOCK_ROWS, BLOCK_RANK), tl.float32)
    w_acc = tl.zeros((BLOCK_ROWS, BLOCK_ROPE), tl.float32)
    # fmt: off
    if HAS_WINDOW:
        acc, w_acc = _dq_span(
            acc, w_acc, q_tile, w_tile, du_tile, highest, moved, pos, latent, rope, lo, a, hi,
            scale, softcap, window, latent_m, rope_m, RANK, ROPE, CAUSAL, HAS_WINDOW, HAS_SOFTCAP,
            UPCAST, PRECISION, SPREAD, BLOCK_KEYS, BLOCK_RANK, BLOCK_ROPE, True,
        )
    acc, w_acc = _dq_span(
        acc, w_acc, q_tile, w_tile, du_tile, highest, moved, pos, latent, rope, a, z, hi,
        scale, softcap, window, latent_m, rope_m, RANK, ROPE, CAUSAL, HAS_WINDOW, HAS_SOFTCAP,
        UPCAST, PRECISION, SPREAD, BLOCK_KEYS, BLOCK_RANK, BLOCK_ROPE, False,
    )
    if z < hi:
        acc, w_acc = _dq_span(
            acc, w_acc, q_tile, w_tile, du_tile, highest, moved, pos, latent, rope, z, hi, hi,
            scale, softcap, window, latent_m, rope_m, RANK, ROPE, CAUSAL, HAS_WINDOW, HAS_SOFTCAP,
            UPCAST, PRECISION, SPREAD, BLOCK_KEYS, BLOCK_RANK, BLOCK_ROPE, True,
        )
    # fmt: on
    r = tl.arange(0, BLOCK_RANK)
    out = (acc * scale).to(dq_nope.dtype.element_ty)
    at = dq_nope + place[:, None] * RANK + r[None, :]
    tl.store(at, out, mask=is_row[:, None] & (r < RANK)[None, :])
    if ROPE > 0:
        r = tl.arange(0, BLOCK_ROPE)
        out = (w_acc * scale).to(dq_rope.dtype.element_ty)
        at = dq_rope + place[:, None] * ROPE + r[None, :]
        tl.store(at, out, mask=is_row[:, None] & (r < ROPE)[None, :])

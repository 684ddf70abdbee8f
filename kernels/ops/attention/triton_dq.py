"""Triton kernel of the gradient of `reattend::attention` for queries: it walks the keys again.

Probabilities are recomputed from lse; every number is written once, by one program. Of routed heads
a tile is filled with the queries that use the head, as in `routed_prefill`.
"""

# mypy: disable-error-code="no-untyped-def"
# (the arguments are Triton values; their types are given at compile time)

from __future__ import annotations

import triton
import triton.language as tl

from reattend.kernels.triton_gradient import score_gradient
from reattend.kernels.triton_tiles import (
    key_range,
    last_queries_first,
    load_tile,
    visible,
    whole_keys,
)


@triton.jit
def _dq_span(
    acc,
    q_tile,
    dy_tile,
    top,
    shift,
    pos,
    k,
    v,
    begin,
    stop,
    hi,
    scale,
    softcap,
    window,
    k_m,
    v_m,
    D: tl.constexpr,
    E: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    MASKED: tl.constexpr,
):
    """What the keys from begin to stop give; hi ends the keys that count."""
    for first in range(begin, stop, BLOCK_KEYS):
        j = first + tl.arange(0, BLOCK_KEYS)
        is_key, at = j < hi, j.to(tl.int64)
        k_tile = load_tile(k, at * k_m, is_key, D, BLOCK_D, MASKED, UPCAST)
        v_tile = load_tile(v, at * v_m, is_key, E, BLOCK_E, MASKED, UPCAST)
        s = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
        dp = tl.dot(dy_tile, tl.trans(v_tile), input_precision=PRECISION)
        _, ds = score_gradient(s, dp, top[:, None], shift[:, None], scale, softcap, HAS_SOFTCAP)
        if MASKED:
            seen = visible(is_key[None, :], j[None, :], pos[:, None], window, CAUSAL, HAS_WINDOW)
            ds = tl.where(seen, ds, 0.0)
        acc = tl.dot(ds.to(k_tile.dtype), k_tile, acc, input_precision=PRECISION)
    return acc


@triton.jit
def attention_dq(
    q,
    k,
    v,
    dy,
    top,
    shift,
    dq,
    rows,
    preceding,
    kv_start,
    kv_len,
    scale,
    softcap,
    window,
    heads,
    group,
    units,
    n,
    m,
    q_b,
    q_h,
    q_n,
    k_b,
    k_g,
    k_m,
    v_b,
    v_g,
    v_m,
    together,
    D: tl.constexpr,
    E: tl.constexpr,
    ROUTED: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Grid: as `attention_prefill`. dy and dq are contiguous, top and shift [B, H, N].

    ``rows`` and ``preceding`` are of `list_rows`, where heads are ROUTED.
    """
    tile, head, b = last_queries_first(tl.cdiv(n, BLOCK_ROWS), heads, together)
    g, h = (head // group).to(tl.int64), head.to(tl.int64)
    start = tl.load(kv_start + b).to(tl.int32)
    end = tl.load(kv_len + b).to(tl.int32)
    place = tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row, used = place, n
    first_row, last_row = tile * BLOCK_ROWS, tl.minimum(n, (tile + 1) * BLOCK_ROWS) - 1
    if ROUTED:
        unit = b * units + head // (heads // units)
        used = tl.load(preceding + unit * (n + 1) + n)
        listed = rows + unit * n
        row = tl.load(listed + place, mask=place < n, other=0)
        first_row = tl.load(listed + first_row)
        last_row = tl.load(listed + tl.maximum(tl.minimum(used - 1, last_row), 0))
    is_row, wide = place < used, row.to(tl.int64)
    pos = end - n + row
    base = (b * heads + h) * n
    q_tile = load_tile(q + b * q_b + h * q_h, wide * q_n, is_row, D, BLOCK_D, True, UPCAST)
    dy_tile = load_tile(dy + base * E, wide * E, is_row, E, BLOCK_E, True, UPCAST)
    highest = tl.load(top + base + row, mask=is_row, other=float("inf"))
    moved = tl.load(shift + base + row, mask=is_row, other=0.0)
    first_pos, last_pos = end - n + first_row, end - n + last_row
    lo, hi = key_range(start, tl.minimum(end, m), first_pos, last_pos, window, CAUSAL, HAS_WINDOW)
    if ROUTED:
        hi = tl.where(tile * BLOCK_ROWS < used, hi, lo)  # nobody asks: nothing is read
    a, z = whole_keys(lo, hi, first_pos, last_pos, window, BLOCK_KEYS, CAUSAL, HAS_WINDOW)
    k += b * k_b + g * k_g
    v += b * v_b + g * v_g
    acc = tl.zeros((BLOCK_ROWS, BLOCK_D), tl.float32)
    # fmt: off
    if HAS_WINDOW:
        acc = _dq_span(
            acc, q_tile, dy_tile, highest, moved, pos, k, v, lo, a, hi, scale, softcap, window, k_m,
            v_m, D, E, CAUSAL, HAS_WINDOW, HAS_SOFTCAP, UPCAST, PRECISION, BLOCK_KEYS, BLOCK_D,
            BLOCK_E, True,
        )
    acc = _dq_span(
        acc, q_tile, dy_tile, highest, moved, pos, k, v, a, z, hi, scale, softcap, window, k_m,
        v_m, D, E, CAUSAL, HAS_WINDOW, HAS_SOFTCAP, UPCAST, PRECISION, BLOCK_KEYS, BLOCK_D,
        BLOCK_E, False,
    )
    if z < hi:
        acc = _dq_span(
            acc, q_tile, dy_tile, highest, moved, pos, k, v, z, hi, hi, scale, softcap, window, k_m,
            v_m, D, E, CAUSAL, HAS_WINDOW, HAS_SOFTCAP, UPCAST, PRECISION, BLOCK_KEYS, BLOCK_D,
            BLOCK_E, True,
        )
    # fmt: on
    d, is_place = tl.arange(0, BLOCK_D), place < n
    out = (acc * scale).to(dq.dtype.element_ty)
    tl.store(
        dq + (base + row)[:, None] * D + d[None, :], out, mask=is_place[:, None] & (d < D)[None, :]
    )

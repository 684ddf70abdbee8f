"""Triton kernel of the gradient of `reattend::attention` for keys and values.

It walks the queries of a tile of keys, over all heads of its group, so that every number is written
once, by one program. Scores are made with keys as rows: the products that follow take the
probabilities as they are, from registers.
"""

# mypy: disable-error-code="no-untyped-def"
# (the arguments are Triton values; their types are given at compile time)

from __future__ import annotations

import triton
import triton.language as tl

from reattend.kernels.triton_gradient import score_gradient
from reattend.kernels.triton_tiles import load_tile, visible


@triton.jit
def _dkv_span(
    dk_acc,
    dv_acc,
    k_tile,
    v_tile,
    j,
    first_pos,
    q,
    dy,
    top,
    shift,
    rows,
    begin,
    stop,
    used,
    scale,
    softcap,
    window,
    q_n,
    D: tl.constexpr,
    E: tl.constexpr,
    ROUTED: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    MASKED: tl.constexpr,
):
    """What the queries from begin to stop of one head give to a tile of keys; used ends them."""
    for first in range(begin, stop, BLOCK_ROWS):
        place = first + tl.arange(0, BLOCK_ROWS)
        is_row, row = place < used, place
        if ROUTED:
            row = tl.load(rows + place, mask=is_row, other=0)
        at = row.to(tl.int64)
        q_tile = load_tile(q, at * q_n, is_row, D, BLOCK_D, True, UPCAST)
        dy_tile = load_tile(dy, at * E, is_row, E, BLOCK_E, True, UPCAST)
        # what lies beyond the last query has probabilities of 0
        highest = tl.load(top + row, mask=is_row, other=float("inf"))
        moved = tl.load(shift + row, mask=is_row, other=0.0)
        s = tl.dot(k_tile, tl.trans(q_tile), input_precision=PRECISION)
        dp = tl.dot(v_tile, tl.trans(dy_tile), input_precision=PRECISION)
        # fmt: off
        p, ds = score_gradient(
            s, dp, highest[None, :], moved[None, :], scale, softcap, HAS_SOFTCAP
        )
        # fmt: on
        if MASKED:
            pos = first_pos + row
            seen = visible(is_row[None, :], j[:, None], pos[None, :], window, CAUSAL, HAS_WINDOW)
            p, ds = tl.where(seen, p, 0.0), tl.where(seen, ds, 0.0)
        dv_acc = tl.dot(p.to(dy_tile.dtype), dy_tile, dv_acc, input_precision=PRECISION)
        dk_acc = tl.dot(ds.to(q_tile.dtype), q_tile, dk_acc, input_precision=PRECISION)
    return dk_acc, dv_acc


@triton.jit
def _before(row, preceding, n, ROUTED: tl.constexpr):
    """How many of the queries that are walked come before one: of all, or of a list."""
    at = tl.minimum(tl.maximum(row, 0), n)
    if ROUTED:
        at = tl.load(preceding + at)
    return at


@triton.jit
def seeing_rows(
    first_key,
    last_key,
    first_pos,
    preceding,
    n,
    window,
    ROUTED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
):
    """Queries [lo, hi) that see some of the keys, and [a, z), tiles from lo that see them all.

    They are places in a list where heads are ROUTED. Without a window z is hi: the last tile may
    reach beyond the last query.
    """
    lo, hi = first_pos * 0, _before(n, preceding, n, ROUTED)
    if CAUSAL:
        lo = _before(first_key - first_pos, preceding, n, ROUTED)
    if HAS_WINDOW:
        hi = _before(last_key + window - first_pos, preceding, n, ROUTED)
    hi = tl.maximum(hi, lo)
    a, z = lo, hi
    if CAUSAL:
        late = tl.maximum(_before(last_key - first_pos, preceding, n, ROUTED) - lo, 0)
        a = tl.minimum(lo + (late + BLOCK_ROWS - 1) // BLOCK_ROWS * BLOCK_ROWS, hi)
    if HAS_WINDOW:
        z = tl.minimum(hi, _before(first_key + window - first_pos, preceding, n, ROUTED))
        z = a + tl.maximum(z - a, 0) // BLOCK_ROWS * BLOCK_ROWS
    return lo, hi, a, z


@triton.jit
def attention_dkv(
    q,
    k,
    v,
    dy,
    top,
    shift,
    dk,
    dv,
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
    """Grid: (G * key tiles * B). dk and dv are contiguous; keys that nobody sees get 0.

    The first keys are seen by the most queries: they start first, of all groups. ``rows`` and
    ``preceding`` are of `list_rows`, where heads are ROUTED.
    """
    tiles, groups = tl.cdiv(m, BLOCK_KEYS), heads // group
    pid = tl.program_id(0)
    g, rest = (pid % groups).to(tl.int64), pid // groups
    tile, b = rest % tiles, (rest // tiles).to(tl.int64)
    start = tl.load(kv_start + b).to(tl.int32)
    end = tl.load(kv_len + b).to(tl.int32)
    first_key = tile * BLOCK_KEYS
    j = first_key + tl.arange(0, BLOCK_KEYS)
    is_key, wide = (j >= start) & (j < end) & (j < m), j.to(tl.int64)
    k_tile = load_tile(k + b * k_b + g * k_g, wide * k_m, is_key, D, BLOCK_D, True, UPCAST)
    v_tile = load_tile(v + b * v_b + g * v_g, wide * v_m, is_key, E, BLOCK_E, True, UPCAST)
    dk_acc = tl.zeros((BLOCK_KEYS, BLOCK_D), tl.float32)
    dv_acc = tl.zeros((BLOCK_KEYS, BLOCK_E), tl.float32)
    # fmt: off
    if (first_key < end) & (first_key + BLOCK_KEYS > start):
        for head in range(g * group, g * group + group):
            base = (b * heads + head) * n
            query = q + b * q_b + head * q_h
            unit = b * units + head // (heads // units)
            before, listed = preceding + unit * (n + 1), rows + unit * n
            used = _before(n, before, n, ROUTED)
            lo, hi, a, z = seeing_rows(
                first_key, first_key + BLOCK_KEYS - 1, end - n, before, n, window, ROUTED,
                BLOCK_ROWS, CAUSAL, HAS_WINDOW,
            )
            if CAUSAL:
                dk_acc, dv_acc = _dkv_span(
                    dk_acc, dv_acc, k_tile, v_tile, j, end - n, query, dy + base * E, top + base,
                    shift + base, listed, lo, a, used, scale, softcap, window, q_n, D, E, ROUTED,
                    CAUSAL, HAS_WINDOW, HAS_SOFTCAP, UPCAST, PRECISION, BLOCK_ROWS, BLOCK_D,
                    BLOCK_E, True,
                )
            dk_acc, dv_acc = _dkv_span(
                dk_acc, dv_acc, k_tile, v_tile, j, end - n, query, dy + base * E, top + base,
                shift + base, listed, a, z, used, scale, softcap, window, q_n, D, E, ROUTED, CAUSAL,
                HAS_WINDOW, HAS_SOFTCAP, UPCAST, PRECISION, BLOCK_ROWS, BLOCK_D, BLOCK_E, False,
            )
            if HAS_WINDOW:
                dk_acc, dv_acc = _dkv_span(
                    dk_acc, dv_acc, k_tile, v_tile, j, end - n, query, dy + base * E, top + base,
                    shift + base, listed, z, hi, used, scale, softcap, window, q_n, D, E, ROUTED,
                    CAUSAL, HAS_WINDOW, HAS_SOFTCAP, UPCAST, PRECISION, BLOCK_ROWS, BLOCK_D,
                    BLOCK_E, True,
                )
    # fmt: on
    d, e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    place, is_place = (b * groups + g) * m + j, j < m
    dk_out = tl.where(is_key[:, None], dk_acc * scale, 0.0).to(dk.dtype.element_ty)
    dv_out = tl.where(is_key[:, None], dv_acc, 0.0).to(dv.dtype.element_ty)
    tl.store(
        dk + place[:, None] * D + d[None, :], dk_out, mask=is_place[:, None] & (d < D)[None, :]
    )
    tl.store(
        dv + place[:, None] * E + e[None, :], dv_out, mask=is_place[:, None] & (e < E)[None, :]
    )

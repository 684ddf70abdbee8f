"""Triton kernels of `reattend::routed_attention`: one for prefill, one for decode.

They are those of `reattend::attention` (the same sweep over keys), with other rows. Prefill: a tile
is filled with queries of one head that use it, listed in ascending order, so that keys are shared
by as many rows as in dense attention; positions are the queries' own. A block mask would skip
nothing: of 64 consecutive queries some use the head. Decode: the queries of all heads of a KV
group; where none uses the group, no key of it is read.
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
def routed_prefill(
    q,
    k,
    v,
    y,
    lse,
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
    """Grid: (query tiles * H * B). y and lse are contiguous (B, H, N, E) and (B, H, N).

    ``rows`` and ``preceding`` are of `list_rows`; queries that do not use the head get 0 and -inf.
    """
    tile, head, b = last_queries_first(tl.cdiv(n, BLOCK_ROWS), heads, 1)
    g, h = (head // group).to(tl.int64), head.to(tl.int64)
    unit = b * units + head // (heads // units)
    used = tl.load(preceding + unit * (n + 1) + n)
    place = tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    is_row, is_other = place < used, (place >= used) & (place < n)
    row = tl.load(rows + unit * n + place, mask=place < n, other=0)
    at = (b * heads + h) * n + row
    e = tl.arange(0, BLOCK_E)
    if (tile + 1) * BLOCK_ROWS > used:
        none = tl.zeros((BLOCK_ROWS, BLOCK_E), y.dtype.element_ty)
        tl.store(y + at[:, None] * E + e[None, :], none, mask=is_other[:, None] & (e < E)[None, :])
        unseen = tl.full((BLOCK_ROWS,), float("-inf"), tl.float32)
        tl.store(lse + at, unseen, mask=is_other)
    if tile * BLOCK_ROWS < used:
        start = tl.load(kv_start + b).to(tl.int32)
        end = tl.load(kv_len + b).to(tl.int32)
        pos = end - n + row
        q_rows = row.to(tl.int64) * q_n
        q_tile = load_tile(q + b * q_b + h * q_h, q_rows, is_row, D, BLOCK_D, True, UPCAST)
        last = tl.minimum(used, (tile + 1) * BLOCK_ROWS) - 1
        first_pos = end - n + tl.load(rows + unit * n + tile * BLOCK_ROWS)
        last_pos = end - n + tl.load(rows + unit * n + last)
        lo, hi = key_range(
            start, tl.minimum(end, m), first_pos, last_pos, window, CAUSAL, HAS_WINDOW
        )
        # fmt: off
        acc, top, mass = sweep(
            q_tile, pos, first_pos, last_pos, k + b * k_b + g * k_g, v + b * v_b + g * v_g,
            kv_start, lo, hi, scale, softcap, window, 1, 0, k_m, 0, v_m, D, E, CAUSAL,
            HAS_WINDOW, HAS_SOFTCAP, False, UPCAST, PRECISION, BLOCK_ROWS, BLOCK_KEYS, BLOCK_D,
            BLOCK_E,
        )
        # fmt: on
        out, log_sum = finish(acc, top, mass)
        tl.store(
            y + at[:, None] * E + e[None, :],
            out.to(y.dtype.element_ty),
            mask=is_row[:, None] & (e < E)[None, :],
        )
        tl.store(lse + at, log_sum, mask=is_row)


@triton.jit
def routed_decode(
    q,
    k,
    v,
    y,
    lse,
    active,
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
    part,
    splits,
    D: tl.constexpr,
    E: tl.constexpr,
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
    """Grid: (row tiles * splits * G * B). ``part`` is B * H * N, the stride between splits.

    ``active`` (B, U, N) is 1 where a query uses a unit. y and lse are (splits, B, H, N, E) and
    (splits, B, H, N), contiguous; with one split they are the outputs themselves, else
    `merge_splits` combines them.
    """
    rows = group * n
    tiles = tl.cdiv(rows, BLOCK_ROWS)
    groups = heads // group
    pid = tl.program_id(0)
    tile, rest = pid % tiles, pid // tiles
    split, rest = rest % splits, rest // splits
    g, b = (rest % groups).to(tl.int64), (rest // groups).to(tl.int64)
    start = tl.load(kv_start + b).to(tl.int32)
    end = tl.load(kv_len + b).to(tl.int32)
    row = tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    is_row = row < rows
    i = row // group
    h = g * group + row % group
    unit = b * units + h // (heads // units)
    used = tl.load(active + unit * n + i, mask=is_row, other=0) != 0
    pos = end - n + i
    e = tl.arange(0, BLOCK_E)
    q_rows = h * q_h + i.to(tl.int64) * q_n
    q_tile = load_tile(q + b * q_b, q_rows, used, D, BLOCK_D, True, UPCAST)
    first_pos, last_pos = end - n, end - 1
    lo, hi = key_range(start, tl.minimum(end, m), first_pos, last_pos, window, CAUSAL, HAS_WINDOW)
    hi = tl.where(tl.max(used.to(tl.int32), 0) > 0, hi, lo)  # nobody asks: nothing is read
    lo, hi = split_range(lo, hi, split, splits, BLOCK_KEYS)
    # fmt: off
    acc, top, mass = sweep(
        q_tile, pos, first_pos, last_pos, k + b * k_b + g * k_g, v + b * v_b + g * v_g,
        kv_start, lo, hi, scale, softcap, window, 1, 0, k_m, 0, v_m, D, E, CAUSAL, HAS_WINDOW,
        HAS_SOFTCAP, False, UPCAST, PRECISION, BLOCK_ROWS, BLOCK_KEYS, BLOCK_D, BLOCK_E,
    )
    # fmt: on
    out, log_sum = finish(acc, top, mass)
    out = tl.where(used[:, None], out, 0.0)
    log_sum = tl.where(used, log_sum, float("-inf"))
    at = split.to(tl.int64) * part + (b * heads + h) * n + i
    tl.store(
        y + at[:, None] * E + e[None, :],
        out.to(y.dtype.element_ty),
        mask=is_row[:, None] & (e < E)[None, :],
    )
    tl.store(lse + at, log_sum, mask=is_row)

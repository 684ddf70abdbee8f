"""Running softmax of one tile of rows over a range of keys, for both kernels of the op."""

# mypy: disable-error-code="no-untyped-def"
# (the arguments are Triton values; their types are given at compile time)

from __future__ import annotations

import triton
import triton.language as tl

from reattend.kernels.triton_tiles import (
    LOG2E,
    key_rows,
    load_tile,
    mask_scores,
    online_softmax,
    soft_cap,
    whole_keys,
)


@triton.jit
def _span(
    acc,
    top,
    mass,
    q_tile,
    pos,
    k,
    v,
    table_row,
    begin,
    stop,
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
    BLOCK_KEYS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Running softmax over the tiles of keys from begin to stop; hi ends the keys that count."""
    for first in range(begin, stop, BLOCK_KEYS):
        j = first + tl.arange(0, BLOCK_KEYS)
        is_key = j < hi
        k_rows = key_rows(j, is_key, table_row, page, k_page, k_m, PAGED, MASKED)
        v_rows = key_rows(j, is_key, table_row, page, v_page, v_m, PAGED, MASKED)
        k_tile = load_tile(k, k_rows, is_key, D, BLOCK_D, MASKED, UPCAST)
        s = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
        factor = scale * LOG2E
        if HAS_SOFTCAP:
            s = soft_cap(s * scale, softcap)
            factor = LOG2E
        if MASKED:
            s = mask_scores(s, j, pos, is_key, window, CAUSAL, HAS_WINDOW)
        p, rescale, top, mass = online_softmax(s, top, mass, factor, MASKED)
        v_tile = load_tile(v, v_rows, is_key, E, BLOCK_E, MASKED, UPCAST)
        acc = acc * rescale[:, None]
        acc = tl.dot(p.to(v_tile.dtype), v_tile, acc, input_precision=PRECISION)
    return acc, top, mass


@triton.jit
def sweep(
    q_tile,
    pos,
    first_pos,
    last_pos,
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
    """One tile of rows over keys [lo, hi): masked at the edges, without masks in between."""
    acc = tl.zeros((BLOCK_ROWS, BLOCK_E), tl.float32)
    top = tl.full((BLOCK_ROWS,), float("-inf"), tl.float32)
    mass = tl.zeros((BLOCK_ROWS,), tl.float32)
    a, b = whole_keys(lo, hi, first_pos, last_pos, window, BLOCK_KEYS, CAUSAL, HAS_WINDOW)
    # fmt: off
    if HAS_WINDOW:
        acc, top, mass = _span(
            acc, top, mass, q_tile, pos, k, v, table_row, lo, a, hi, scale, softcap, window, page,
            k_page, k_m, v_page, v_m, D, E, CAUSAL, HAS_WINDOW, HAS_SOFTCAP, PAGED, UPCAST,
            PRECISION, BLOCK_KEYS, BLOCK_D, BLOCK_E, True,
        )
    acc, top, mass = _span(
        acc, top, mass, q_tile, pos, k, v, table_row, a, b, hi, scale, softcap, window, page,
        k_page, k_m, v_page, v_m, D, E, CAUSAL, HAS_WINDOW, HAS_SOFTCAP, PAGED, UPCAST,
        PRECISION, BLOCK_KEYS, BLOCK_D, BLOCK_E, False,
    )
    if b < hi:
        acc, top, mass = _span(
            acc, top, mass, q_tile, pos, k, v, table_row, b, hi, hi, scale, softcap, window, page,
            k_page, k_m, v_page, v_m, D, E, CAUSAL, HAS_WINDOW, HAS_SOFTCAP, PAGED, UPCAST,
            PRECISION, BLOCK_KEYS, BLOCK_D, BLOCK_E, True,
        )
    # fmt: on
    return acc, top, mass

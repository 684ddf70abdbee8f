"""Running softmax of one tile of rows over a span of latent rows, for both kernels of the op."""

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
)


@triton.jit
def product(q_tile, k_tile, always, PRECISION: tl.constexpr, SPREAD: tl.constexpr):
    """Scores (rows, keys) of two tiles.

    Seeing that the scores feed a second product, Triton gives every warp rows of its own; where
    there are more warps than rows for them, they repeat each other's work. SPREAD hides the second
    product behind a branch that is always taken, and the warps share the keys instead. (Both arms
    are the same, so that the compiler does not move work into one of them; it emits one.)
    """
    if SPREAD:
        if always:
            s = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
        else:
            s = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
    else:
        s = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
    return s


@triton.jit
def span(
    acc,
    top,
    mass,
    q_tile,
    w_tile,
    pos,
    latent,
    rope,
    table_row,
    begin,
    stop,
    hi,
    scale,
    softcap,
    window,
    page,
    latent_page,
    latent_m,
    rope_page,
    rope_m,
    RANK: tl.constexpr,
    ROPE: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    PAGED: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    SPREAD: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_ROPE: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Running softmax over the tiles of keys from begin to stop; hi ends the keys that count."""
    for first in range(begin, stop, BLOCK_KEYS):
        j = first + tl.arange(0, BLOCK_KEYS)
        is_key = j < hi
        c_rows = key_rows(j, is_key, table_row, page, latent_page, latent_m, PAGED, MASKED)
        c_tile = load_tile(latent, c_rows, is_key, RANK, BLOCK_RANK, MASKED, UPCAST)
        s = product(q_tile, c_tile, first < hi, PRECISION, SPREAD)
        if ROPE > 0:
            k_rows = key_rows(j, is_key, table_row, page, rope_page, rope_m, PAGED, MASKED)
            k_tile = load_tile(rope, k_rows, is_key, ROPE, BLOCK_ROPE, MASKED, UPCAST)
            s += product(w_tile, k_tile, first < hi, PRECISION, SPREAD)
        factor = scale * LOG2E
        if HAS_SOFTCAP:
            s = soft_cap(s * scale, softcap)
            factor = LOG2E
        if MASKED:
            s = mask_scores(s, j, pos, is_key, window, CAUSAL, HAS_WINDOW)
        p, rescale, top, mass = online_softmax(s, top, mass, factor, MASKED)
        acc = acc * rescale[:, None]
        acc = tl.dot(p.to(c_tile.dtype), c_tile, acc, input_precision=PRECISION)
    return acc, top, mass

"""The Triton kernel of `reattend::linear_attention` that computes all chunks side by side.

`linear_read` makes outputs from the state before a chunk and the pairs behind it, and the gradient
of the queries, which is the same sum with other arguments. Letters as in `triton_state.py`.
"""

# mypy: disable-error-code="no-untyped-def"
# (the arguments are Triton values; their types are given at compile time)

from __future__ import annotations

import triton
import triton.language as tl

from reattend.kernels.linear_attention.triton_range import dot_left, dot_right
from reattend.kernels.linear_attention.triton_state import LEAST, chunk_before, decay_between


@triton.jit
def tile_of(
    base,
    at,
    is_row,
    column,
    stride,
    WIDTH: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Tile (rows, columns) of rows `at` that are ``stride`` apart; what lies outside is 0."""
    tile = tl.load(
        base + at.to(tl.int64)[:, None] * stride + column[None, :],
        mask=is_row[:, None] & (column < WIDTH)[None, :],
        other=0.0,
    )
    if UPCAST:
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def products(
    a,
    b,
    row_a,
    row_b,
    is_a,
    is_b,
    a_n,
    b_n,
    F: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """Scalar products (rows of a, rows of b)."""
    s = tl.zeros((BLOCK_ROWS, BLOCK_ROWS), tl.float32)
    for begin in range(0, F, BLOCK_F):
        f = begin + tl.arange(0, BLOCK_F)
        a_tile = tile_of(a, row_a, is_a, f, a_n, F, UPCAST)
        b_tile = tile_of(b, row_b, is_b, f, b_n, F, UPCAST)
        s = tl.dot(a_tile, tl.trans(b_tile), s, input_precision=PRECISION)
    return s


@triton.jit
def through_state(
    a,
    state,
    row,
    is_row,
    a_n,
    column,
    rise,
    run,
    F: tl.constexpr,
    E: tl.constexpr,
    SUMS: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Rows (of F numbers) times a state (F, E) whose rows are ``rise`` and columns ``run`` apart.

    SUMS: also times its column E; else that product is 0.
    """
    acc = tl.zeros((BLOCK_ROWS, BLOCK_E), tl.float32)
    mass = tl.zeros((BLOCK_ROWS,), tl.float32)
    for begin in range(0, F, BLOCK_F):
        f = begin + tl.arange(0, BLOCK_F)
        a_tile = tile_of(a, row, is_row, f, a_n, F, UPCAST)
        s_tile = tl.load(
            state + f[:, None] * rise + column[None, :] * run,
            mask=(f < F)[:, None] & (column < E)[None, :],
            other=0.0,
        )
        acc = dot_right(a_tile, s_tile, acc, PRECISION)
        if SUMS:
            ones = tl.load(state + f * rise + E * run, mask=f < F, other=0.0)
            mass += tl.sum(a_tile.to(tl.float32) * ones[None, :], 1)
    return acc, mass


@triton.jit
def linear_read(
    q,
    k,
    v,
    y,
    mass,
    state,
    within,
    added,
    n,
    chunks,
    heads,
    group,
    lag,
    block,
    size,
    rise,
    run,
    q_b,
    q_h,
    q_n,
    k_b,
    k_g,
    k_n,
    v_b,
    v_g,
    v_n,
    F: tl.constexpr,
    E: tl.constexpr,
    HAS_DECAY: tl.constexpr,
    ONES: tl.constexpr,
    ADDED: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Grid: (tiles of E * T * H * B). y is [B, H, N, E], contiguous.

    ``state`` [B, G, T, size]; a number is at ``f * rise + e * run`` of its part. ONES: the
    values have a column of ones, and y is divided by its sum, which goes to ``mass`` [B, H, N].
    ADDED: queries and keys have one feature more, of the keys 1, of the queries ``added`` [B, H,
    N], and y is divided by ``mass``.
    """
    tiles_e: tl.constexpr = (E + BLOCK_E - 1) // BLOCK_E
    groups = heads // group
    pid = tl.program_id(0)
    tile_e, rest = pid % tiles_e, pid // tiles_e
    chunk, rest = rest % chunks, rest // chunks
    h, b = (rest % heads).to(tl.int64), (rest // heads).to(tl.int64)
    g = h // group
    row = chunk * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    is_row = row < n
    last = row // block * block - lag
    high = tl.minimum(chunk * BLOCK_ROWS + BLOCK_ROWS - 1, n - 1) // block * block - lag
    first = chunk_before(chunk, lag, block, BLOCK_ROWS)
    column = tile_e * BLOCK_E + tl.arange(0, BLOCK_E)
    query, key, value = q + b * q_b + h * q_h, k + b * k_b + g * k_g, v + b * v_b + g * v_g
    place = state + ((b * groups + g) * chunks + first) * size
    at = (b * heads + h) * n + row
    # fmt: off
    acc, total = through_state(
        query, place, row, is_row, q_n, column, rise, run, F, E, ONES, UPCAST, PRECISION,
        BLOCK_ROWS, BLOCK_F, BLOCK_E,
    )
    # fmt: on
    more = tl.zeros((BLOCK_ROWS,), tl.float32)
    if ADDED:
        more = tl.load(added + at, mask=is_row, other=0.0)
        ones = tl.load(place + F * rise + column * run, mask=column < E, other=0.0)
        acc += more[:, None] * ones[None, :]
    gap, own = 0.0, more
    sums = within + (b * groups + g) * chunks * BLOCK_ROWS
    if HAS_DECAY:
        gap = decay_between(sums, first, chunk, BLOCK_ROWS)
        own = tl.load(sums + row)
        acc *= tl.exp(own + gap)[:, None]
        total *= tl.exp(own + gap)
    for number in range(first, tl.maximum(high + BLOCK_ROWS, 0) // BLOCK_ROWS):
        j = number * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        is_key = j < n
        # fmt: off
        s = products(
            query, key, row, j, is_row, is_key, q_n, k_n, F, UPCAST, PRECISION, BLOCK_ROWS, BLOCK_F
        )
        # fmt: on
        if ADDED:
            s += more[:, None]
        seen = (j[None, :] <= last[:, None]) & is_key[None, :]
        if HAS_DECAY:
            apart = own[:, None] + gap - tl.load(sums + j)[None, :]
            s *= tl.exp(tl.where(seen, apart, float("-inf")))
            gap -= tl.load(sums + number * BLOCK_ROWS + BLOCK_ROWS - 1)
        else:
            s = tl.where(seen, s, 0.0)
        v_tile = tile_of(value, j, is_key, column, v_n, E, UPCAST)
        acc = dot_left(s, v_tile, acc, PRECISION)
        if ONES:
            total += tl.sum(s, 1)
    if ONES:
        acc = acc / tl.maximum(total, LEAST)[:, None]
        tl.store(mass + at, total, mask=is_row & (tile_e == 0))
    if ADDED:
        share = 1.0 / tl.maximum(tl.load(mass + at, mask=is_row, other=1.0), LEAST)
        acc *= share[:, None]
    tl.store(
        y + at[:, None] * E + column[None, :],
        acc.to(y.dtype.element_ty),
        mask=is_row[:, None] & (column < E)[None, :],
    )

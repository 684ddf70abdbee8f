"""Running softmax of one tile of rows over entries of a block layout, for prefill and decode."""

# mypy: disable-error-code="no-untyped-def"
# (the arguments are Triton values; their types are given at compile time)

from __future__ import annotations

import triton
import triton.language as tl

from reattend.kernels.triton_tiles import LOG2E, load_tile, online_softmax, soft_cap


@triton.jit
def row_entries(row_ptr, layout, at, blocks):
    """Entries [begin, stop) of a query block; none where the layout has no such row."""
    is_block = (at >= 0) & (at < blocks)
    place = row_ptr + layout * (blocks + 1) + at
    begin = tl.load(place, mask=is_block, other=0)
    return begin, tl.load(place + 1, mask=is_block, other=0)


@triton.jit
def seen_pairs(tiles, number, inside, is_row, within, is_key, BLOCK: tl.constexpr):
    """Bools (rows, keys): the bits of a tile (-1: all), of rows and keys that exist."""
    place = tiles + number.to(tl.int64) * BLOCK + inside
    bits = tl.load(place, mask=is_row & (number >= 0), other=-1)
    bit = (bits[:, None] >> within.to(tl.int64)[None, :]) & 1
    return (bit != 0) & is_row[:, None] & is_key[None, :]


@triton.jit
def sweep(
    acc,
    top,
    mass,
    q_tile,
    inside,
    is_row,
    begin,
    stop,
    col,
    tile,
    tiles,
    k,
    v,
    k_m,
    v_m,
    keys,
    scale,
    softcap,
    D: tl.constexpr,
    E: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS_DIFFER: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Add entries [begin, stop) to what was summed before.

    ``inside`` is each row's place in its query block. ``k`` and ``v`` point at logical key 0, and
    ``keys`` of them exist. ROWS_DIFFER: rows outside ``is_row`` hold other queries' sums and must
    not change.
    """
    parts: tl.constexpr = BLOCK // BLOCK_KEYS
    for step in range(begin * parts, stop * parts):
        entry = step // parts
        within = step % parts * BLOCK_KEYS + tl.arange(0, BLOCK_KEYS)
        number = tl.load(tile + entry)
        first = tl.load(col + entry) * BLOCK
        j = first + within
        is_key = j < keys
        k_tile = load_tile(k, j.to(tl.int64) * k_m, is_key, D, BLOCK_D, True, UPCAST)
        s = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
        factor = scale * LOG2E
        if HAS_SOFTCAP:
            s = soft_cap(s * scale, softcap)
            factor = LOG2E
        if ROWS_DIFFER or (number >= 0) | (first + BLOCK > keys):
            seen = seen_pairs(tiles, number, inside, is_row, within, is_key, BLOCK)
            s = tl.where(seen, s, float("-inf"))
        p, rescale, top, mass = online_softmax(s, top, mass, factor, True)
        v_tile = load_tile(v, j.to(tl.int64) * v_m, is_key, E, BLOCK_E, True, UPCAST)
        acc = acc * rescale[:, None]
        acc = tl.dot(p.to(v_tile.dtype), v_tile, acc, input_precision=PRECISION)
    return acc, top, mass

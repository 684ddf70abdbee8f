"""Pieces every attention kernel is made of: key range, soft cap, online softmax, split merge.

Rules of the house: pointer loads only, no inline assembly and no libdevice (so the interpreter
and every backend run the same code), 64-bit addresses, masks wherever a tile is not known to be
whole, explicit options. Scores live in base 2 (exp2 is the hardware's instruction); lse is stored
in base e.
"""

# mypy: disable-error-code="no-untyped-def"
# (the arguments are Triton values; their types are given at compile time)

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def soft_cap(s, cap):
    """cap * tanh(s / cap), with tanh from a sigmoid."""
    return cap * (2.0 * tl.sigmoid(2.0 * s / cap) - 1.0)


@triton.jit
def key_range(
    start,
    end,
    first_pos,
    last_pos,
    window,
    CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
):
    """Keys [lo, hi) that some query between the two positions may see."""
    lo = tl.maximum(start, 0)
    hi = end
    if HAS_WINDOW:
        lo = tl.maximum(lo, first_pos - window + 1)
    if CAUSAL:
        hi = tl.minimum(hi, last_pos + 1)
    return lo, hi


@triton.jit
def whole_keys(
    lo,
    hi,
    first_pos,
    last_pos,
    window,
    BLOCK_KEYS: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
):
    """Keys [a, b): the tiles, counted from lo, that every query between the positions sees whole.

    They need no mask; [lo, a) and [b, hi) do.
    """
    a = lo
    if HAS_WINDOW:
        late = tl.maximum(last_pos - window + 1 - lo, 0)
        a = tl.minimum(lo + (late + BLOCK_KEYS - 1) // BLOCK_KEYS * BLOCK_KEYS, hi)
    b = hi
    if CAUSAL:
        b = tl.minimum(hi, first_pos + 1)
    return a, a + tl.maximum(b - a, 0) // BLOCK_KEYS * BLOCK_KEYS


@triton.jit
def split_range(lo, hi, split, splits, BLOCK_KEYS: tl.constexpr):
    """The part of [lo, hi) that belongs to one split: whole tiles, evenly, by the true length."""
    tiles = tl.maximum(hi - lo + BLOCK_KEYS - 1, 0) // BLOCK_KEYS
    width = (tiles + splits - 1) // splits * BLOCK_KEYS
    mine = tl.minimum(lo + split * width, tl.maximum(hi, lo))
    return mine, tl.minimum(hi, mine + width)


@triton.jit
def key_rows(
    j,
    is_key,
    table_row,
    page,
    stride_page,
    stride_row,
    PAGED: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Address offset (64-bit) of each key of a tile, through the block table where there is one."""
    rows = j.to(tl.int64) * stride_row
    if PAGED:
        if MASKED:
            number = tl.load(table_row + j // page, mask=is_key, other=0).to(tl.int64)
        else:
            number = tl.load(table_row + j // page).to(tl.int64)
        rows = number * stride_page + (j % page).to(tl.int64) * stride_row
    return rows


@triton.jit
def load_tile(
    base,
    rows,
    is_row,
    WIDTH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    MASKED: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Tile (rows, BLOCK_WIDTH) from row offsets; what lies outside is 0.

    Rows are masked where MASKED, columns only where the width is not the tile's.
    """
    column = tl.arange(0, BLOCK_WIDTH)
    at = base + rows[:, None] + column[None, :]
    if MASKED:
        if WIDTH == BLOCK_WIDTH:
            tile = tl.load(at, mask=is_row[:, None], other=0.0)
        else:
            tile = tl.load(at, mask=is_row[:, None] & (column < WIDTH)[None, :], other=0.0)
    elif WIDTH == BLOCK_WIDTH:
        tile = tl.load(at)
    else:
        tile = tl.load(at, mask=(column < WIDTH)[None, :], other=0.0)
    if UPCAST:
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def last_queries_first(tiles, heads, together):
    """Tile of queries, head and row of the batch of a program; the grid is all three, in one.

    The last queries see the most keys: they start first, of so many heads side by side.
    """
    pid = tl.program_id(0)
    part, rest = pid // (tiles * together), pid % (tiles * together)
    parts = heads // together
    head = part % parts * together + rest % together
    return tiles - 1 - rest // together, head, (part // parts).to(tl.int64)


@triton.jit
def visible(inside, j, pos, window, CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr):
    """Of the pairs that are inside, those in which the query at ``pos`` sees key ``j``."""
    if CAUSAL:
        inside = inside & (j <= pos)
    if HAS_WINDOW:
        inside = inside & (pos - j < window)
    return inside


@triton.jit
def mask_scores(
    s,
    j,
    pos,
    is_key,
    window,
    CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
):
    """Scores (rows, keys) with -inf where the query does not see the key."""
    seen = visible(is_key[None, :], j[None, :], pos[:, None], window, CAUSAL, HAS_WINDOW)
    return tl.where(seen, s, float("-inf"))


@triton.jit
def online_softmax(s, top, mass, factor, MASKED: tl.constexpr):
    """One step of the running softmax over scores in units of ``factor`` (> 0) of base 2.

    The factor is applied inside the exponent, where it costs no instruction of its own. Returns
    the probabilities of this tile against the new maximum, the factor that rescales what was
    summed before, the new maximum and the new mass. Rows that saw nothing stay at -inf and 0.
    """
    new_top = tl.maximum(top, tl.max(s, 1) * factor)
    safe = new_top
    if MASKED:
        safe = tl.where(new_top == float("-inf"), 0.0, new_top)
    p = tl.exp2(s * factor - safe[:, None])
    rescale = tl.exp2(top - safe)
    return p, rescale, new_top, mass * rescale + tl.sum(p, 1)


@triton.jit
def finish(acc, top, mass):
    """Normalised output and lse in base e; rows that saw nothing give 0 and -inf."""
    safe = tl.where(mass > 0.0, mass, 1.0)
    lse = tl.where(mass > 0.0, (top + tl.log2(safe)) * LN2, float("-inf"))
    return acc / safe[:, None], lse


@triton.jit
def merge_splits(
    part,
    part_lse,
    out,
    lse,
    rows,
    splits,
    E: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Combine partial outputs (splits, rows, E) by their lse.

    Grid: (rows * cdiv(E, BLOCK_E)). All splits are one tile, so a program waits for memory once.
    Source: chunked-attention merge by log-sum-exp (Flash-Decoding).
    """
    chunks: tl.constexpr = (E + BLOCK_E - 1) // BLOCK_E
    pid = tl.program_id(0)
    row, chunk = (pid // chunks).to(tl.int64), pid % chunks
    e = chunk * BLOCK_E + tl.arange(0, BLOCK_E)
    s = tl.arange(0, BLOCK_SPLITS)
    at = s.to(tl.int64) * rows + row
    is_split = s < splits
    value = tl.load(
        part + at[:, None] * E + e[None, :],
        mask=is_split[:, None] & (e < E)[None, :],
        other=0.0,
    )
    log_sum = tl.load(part_lse + at, mask=is_split, other=float("-inf"))
    top = tl.max(log_sum, 0)
    weight = tl.exp2((log_sum - tl.where(top == float("-inf"), 0.0, top)) * LOG2E)
    mass = tl.sum(weight, 0)
    safe = tl.where(mass > 0.0, mass, 1.0)
    result = tl.sum(value * (weight / safe)[:, None], 0)
    tl.store(out + row * E + e, result.to(out.dtype.element_ty), mask=e < E)
    total = tl.where(mass > 0.0, top + tl.log2(safe) * LN2, float("-inf"))
    tl.store(lse + row, total, mask=chunk == 0)

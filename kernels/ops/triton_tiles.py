"""Pieces every attention kernel is made of: key range, soft cap, online softmax, split merge.

Rules of the house: pointer loads only, no inline assembly and no libdevice (so the interpreter
and every backend run the same code), 64-bit addresses, a mask on every dimension, explicit
options. Scores live in base 2 (exp2 is the hardware's instruction); lse is stored in base e.
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
def split_range(lo, hi, split, SPLITS: tl.constexpr, BLOCK_KEYS: tl.constexpr):
    """The part of [lo, hi) that belongs to one split: whole tiles, evenly, by the true length."""
    tiles = tl.maximum(hi - lo + BLOCK_KEYS - 1, 0) // BLOCK_KEYS
    width = (tiles + SPLITS - 1) // SPLITS * BLOCK_KEYS
    mine = lo + split * width
    return mine, tl.minimum(hi, mine + width)


@triton.jit
def key_rows(j, is_key, table_row, page, stride_page, stride_row, PAGED: tl.constexpr):
    """Address offset (64-bit) of each key of a tile, through the block table where there is one."""
    if PAGED:
        number = tl.load(table_row + j // page, mask=is_key, other=0).to(tl.int64)
        return number * stride_page + (j % page).to(tl.int64) * stride_row
    return j.to(tl.int64) * stride_row


@triton.jit
def mask_scores(
    s,
    j,
    pos,
    is_key,
    scale,
    softcap,
    window,
    CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):
    """Scale, cap and mask a tile of scores (rows, keys); the result is in base 2."""
    if HAS_SOFTCAP:
        s = soft_cap(s * scale, softcap) * LOG2E
    else:
        s = s * (scale * LOG2E)
    seen = is_key[None, :]
    if CAUSAL:
        seen = seen & (j[None, :] <= pos[:, None])
    if HAS_WINDOW:
        seen = seen & (pos[:, None] - j[None, :] < window)
    return tl.where(seen, s, float("-inf"))


@triton.jit
def online_softmax(s, top, mass):
    """One step of the running softmax.

    Returns the probabilities of this tile against the new maximum, the factor that rescales what
    was summed before, the new maximum and the new mass. Rows that saw nothing stay at -inf and 0.
    """
    new_top = tl.maximum(top, tl.max(s, 1))
    safe = tl.where(new_top == float("-inf"), 0.0, new_top)
    p = tl.exp2(s - safe[:, None])
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
    E: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Combine partial outputs (SPLITS, rows, E) by their lse; one program per row.

    Source: chunked-attention merge by log-sum-exp (Flash-Decoding).
    """
    row = tl.program_id(0).to(tl.int64)
    e = tl.arange(0, BLOCK_E)
    top = tl.load(part_lse + row).to(tl.float32)
    acc = tl.load(part + row * E + e, mask=e < E, other=0.0).to(tl.float32)
    mass = tl.where(top == float("-inf"), 0.0, 1.0)
    for split in range(1, SPLITS):
        at = split * rows.to(tl.int64) + row
        value = tl.load(part + at * E + e, mask=e < E, other=0.0).to(tl.float32)
        weight = tl.load(part_lse + at).to(tl.float32)
        new_top = tl.maximum(top, weight)
        safe = tl.where(new_top == float("-inf"), 0.0, new_top)
        old, new = tl.exp2((top - safe) * LOG2E), tl.exp2((weight - safe) * LOG2E)
        acc = acc * old + value * new
        mass = mass * old + new
        top = new_top
    safe = tl.where(mass > 0.0, mass, 1.0)
    result = acc / safe
    tl.store(out + row * E + e, result.to(out.dtype.element_ty), mask=e < E)
    total = tl.where(mass > 0.0, top + tl.log2(safe) * LN2, float("-inf"))
    tl.store(lse + row, total)

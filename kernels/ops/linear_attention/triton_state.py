"""Triton kernels of `reattend::linear_attention` that carry a state: all chunks, or one token.

Tokens are cut into T chunks of C. A scan goes through them in order and writes what the state is
before each, so that the outputs of all chunks can be computed side by side (`triton_kernel.py`).
Yang et al., arXiv 2312.06635. Letters as in `reference.py`; ``within`` [B, G, T * C] holds the sum
of log decays from the beginning of its chunk up to and with each token.
"""

# mypy: disable-error-code="no-untyped-def"
# (the arguments are Triton values; their types are given at compile time)

from __future__ import annotations

import triton
import triton.language as tl

LEAST = tl.constexpr(1e-12)


@triton.jit
def chunk_before(chunk, lag, block, C: tl.constexpr):
    """The first chunk that holds a key which not every query of a chunk sees (or none sees)."""
    low = chunk * C // block * block - lag
    return tl.maximum(low + 1, 0) // C


@triton.jit
def decay_between(within, first, last, C: tl.constexpr):
    """Sum of the log decays of the chunks [first, last)."""
    total = 0.0
    for chunk in range(first, last):
        total += tl.load(within + chunk * C + C - 1)
    return total


@triton.jit
def linear_state(
    k,
    v,
    before,
    state,
    after,
    within,
    n,
    chunks,
    groups,
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
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Grid: (tiles of F * tiles of E * G * B). ``before`` and ``after`` [B, G, F, E (+ 1)], fp32;
    ``state`` [B, G, T, F, E (+ 1)] gets what is there before every chunk. All contiguous. ONES: the
    values have one column more, of ones.
    """
    tiles_f: tl.constexpr = (F + BLOCK_F - 1) // BLOCK_F
    tiles_e: tl.constexpr = (E + BLOCK_E - 1) // BLOCK_E
    columns: tl.constexpr = E + 1 if ONES else E
    pid = tl.program_id(0)
    tile_e, rest = pid % tiles_e, pid // tiles_e
    tile_f, rest = rest % tiles_f, rest // tiles_f
    g, b = (rest % groups).to(tl.int64), (rest // groups).to(tl.int64)
    f, e = tile_f * BLOCK_F + tl.arange(0, BLOCK_F), tile_e * BLOCK_E + tl.arange(0, BLOCK_E)
    is_f, is_e = f < F, e < E
    kind = state.dtype.element_ty
    own = (b * groups + g) * F * columns + f * columns
    place = state + (b * groups + g) * chunks * F * columns + f * columns
    inside = is_f[:, None] & is_e[None, :]
    acc = tl.load(before + own[:, None] + e[None, :], mask=inside, other=0.0)
    ones = is_f & (tile_e == 0)
    mass = tl.zeros((BLOCK_F,), tl.float32)
    if ONES:
        mass = tl.load(before + own + E, mask=ones, other=0.0)
    sums = within + (b * groups + g) * chunks * BLOCK_ROWS
    key, value = k + b * k_b + g * k_g + tile_f * BLOCK_F, v + b * v_b + g * v_g + tile_e * BLOCK_E
    for chunk in range(chunks):
        tl.store(place[:, None] + e[None, :], acc.to(kind), mask=inside)
        if ONES:
            tl.store(place + E, mass.to(kind), mask=ones)
        place += F * columns
        row = chunk * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        is_row, at = row < n, row.to(tl.int64)
        k_tile = tl.load(
            key + at[:, None] * k_n + tl.arange(0, BLOCK_F)[None, :],
            mask=is_row[:, None] & is_f[None, :],
            other=0.0,
        )
        v_tile = tl.load(
            value + at[:, None] * v_n + tl.arange(0, BLOCK_E)[None, :],
            mask=is_row[:, None] & is_e[None, :],
            other=0.0,
        )
        if UPCAST:
            k_tile, v_tile = k_tile.to(tl.float32), v_tile.to(tl.float32)
        if HAS_DECAY:
            whole = tl.load(sums + chunk * BLOCK_ROWS + BLOCK_ROWS - 1)
            left = tl.exp(whole - tl.load(sums + row))
            k_tile = (k_tile.to(tl.float32) * left[:, None]).to(k_tile.dtype)
            acc *= tl.exp(whole)
            mass *= tl.exp(whole)
        acc = tl.dot(tl.trans(k_tile), v_tile, acc, input_precision=PRECISION)
        if ONES:
            mass += tl.sum(k_tile.to(tl.float32), 0)
    tl.store(after + own[:, None] + e[None, :], acc, mask=inside)
    if ONES:
        tl.store(after + own + E, mass, mask=ones)


@triton.jit
def linear_step(
    q,
    k,
    v,
    y,
    state,
    after,
    decay,
    heads,
    group,
    q_b,
    q_h,
    k_b,
    k_g,
    v_b,
    v_g,
    F: tl.constexpr,
    E: tl.constexpr,
    HAS_DECAY: tl.constexpr,
    ONES: tl.constexpr,
    OWN: tl.constexpr,
    FEATURED: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """One token. Grid: (tiles of E * G * B). The state of a group is read once, for all its heads.

    ``state`` and ``after`` are [B, G, F, E (+ 1)], ``decay`` [B, G], y [B, H, E], all contiguous.
    OWN: the query sees its own key. FEATURED: ``decay`` is [B, G, F], one for each row of a state.
    """
    tiles_e: tl.constexpr = (E + BLOCK_E - 1) // BLOCK_E
    columns: tl.constexpr = E + 1 if ONES else E
    groups = heads // group
    pid = tl.program_id(0)
    tile_e, rest = pid % tiles_e, pid // tiles_e
    g, b = (rest % groups).to(tl.int64), (rest // groups).to(tl.int64)
    f, e = tl.arange(0, BLOCK_F), tile_e * BLOCK_E + tl.arange(0, BLOCK_E)
    is_f, is_e = f < F, e < E
    inside = is_f[:, None] & is_e[None, :]
    at = (b * groups + g) * F * columns + f * columns
    seen = tl.load(state + at[:, None] + e[None, :], mask=inside, other=0.0)
    key = tl.load(k + b * k_b + g * k_g + f, mask=is_f, other=0.0).to(tl.float32)
    value = tl.load(v + b * v_b + g * v_g + e, mask=is_e, other=0.0).to(tl.float32)
    factor = 1.0
    if FEATURED:
        factor = tl.exp(tl.load(decay + (b * groups + g) * F + f, mask=is_f, other=0.0))
        seen *= factor[:, None]
    elif HAS_DECAY:
        factor = tl.exp(tl.load(decay + b * groups + g))
        seen *= factor
    new = seen + key[:, None] * value[None, :]
    tl.store(after + at[:, None] + e[None, :], new, mask=inside)
    if OWN:
        seen = new
    mass = key
    if ONES:
        mass = tl.load(state + at + E, mask=is_f, other=0.0) * factor
        tl.store(after + at + E, mass + key, mask=is_f & (tile_e == 0))
        if OWN:
            mass += key
    for number in range(group):
        head = g * group + number
        asked = tl.load(q + b * q_b + head * q_h + f, mask=is_f, other=0.0).to(tl.float32)
        out = tl.sum(asked[:, None] * seen, 0)
        if ONES:
            out = out / tl.maximum(tl.sum(asked * mass, 0), LEAST)
        tl.store(y + (b * heads + head) * E + e, out.to(y.dtype.element_ty), mask=is_e)

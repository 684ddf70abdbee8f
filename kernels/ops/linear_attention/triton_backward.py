"""Triton kernels of the gradient of `reattend::linear_attention`: a scan from the end, and what the
keys and values of every chunk get from later queries.

The gradient of the queries is `linear_read`. Letters as in `triton_state.py`.
"""

# mypy: disable-error-code="no-untyped-def"
# (the arguments are Triton values; their types are given at compile time)

from __future__ import annotations

import triton
import triton.language as tl

from reattend.kernels.linear_attention.triton_kernel import products, through_state, tile_of
from reattend.kernels.linear_attention.triton_range import dot_left
from reattend.kernels.linear_attention.triton_state import LEAST, chunk_before, decay_between


@triton.jit
def linear_state_back(
    q,
    dy,
    later,
    within,
    mass,
    added,
    n,
    chunks,
    heads,
    group,
    lag,
    block,
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
    """Gradients of the states that `linear_state` writes. Grid: the same.

    q [B, H, N, F] and dy [B, H, N, E] are contiguous. ONES: the gradient of the sums is dy and, of
    the column of ones, ``added`` [B, H, N], both divided by ``mass`` [B, H, N]. ``later`` is laid
    out as the states and holds the last gradient.
    """
    tiles_f: tl.constexpr = (F + BLOCK_F - 1) // BLOCK_F
    tiles_e: tl.constexpr = (E + BLOCK_E - 1) // BLOCK_E
    columns: tl.constexpr = E + 1 if ONES else E
    groups = heads // group
    pid = tl.program_id(0)
    tile_e, rest = pid % tiles_e, pid // tiles_e
    tile_f, rest = rest % tiles_f, rest // tiles_f
    g, b = (rest % groups).to(tl.int64), (rest // groups).to(tl.int64)
    f, e = tile_f * BLOCK_F + tl.arange(0, BLOCK_F), tile_e * BLOCK_E + tl.arange(0, BLOCK_E)
    is_f, is_e = f < F, e < E
    inside = is_f[:, None] & is_e[None, :]
    ones = is_f & (tile_e == 0)
    place = later + ((b * groups + g) * (chunks + 1) + chunks) * F * columns + f * columns
    acc = tl.load(place[:, None] + e[None, :], mask=inside, other=0.0)
    total = tl.zeros((BLOCK_F,), tl.float32)
    if ONES:
        total = tl.load(place + E, mask=ones, other=0.0)
    sums = within + (b * groups + g) * chunks * BLOCK_ROWS
    reached = chunks
    for number in range(chunks):
        chunk = chunks - 1 - number
        first = chunk_before(chunk, lag, block, BLOCK_ROWS)
        for _ in range(first, reached):  # nothing more is asked of the state before `reached`
            tl.store(place[:, None] + e[None, :], acc, mask=inside)
            if ONES:
                tl.store(place + E, total, mask=ones)
            place -= F * columns
            reached -= 1
            if HAS_DECAY:
                factor = tl.exp(tl.load(sums + reached * BLOCK_ROWS + BLOCK_ROWS - 1))
                acc *= factor
                total *= factor
        row = chunk * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        is_row = row < n
        for head in range(group):
            base = (b * heads + g * group + head) * n
            at = base + row
            q_tile = tl.load(
                q + at[:, None] * F + f[None, :], mask=is_row[:, None] & is_f[None, :], other=0.0
            )
            dy_tile = tl.load(
                dy + at[:, None] * E + e[None, :], mask=is_row[:, None] & is_e[None, :], other=0.0
            )
            if UPCAST:
                q_tile, dy_tile = q_tile.to(tl.float32), dy_tile.to(tl.float32)
            asked = q_tile.to(tl.float32)
            if HAS_DECAY:
                gap = decay_between(sums, first, chunk, BLOCK_ROWS)
                asked *= tl.exp(tl.load(sums + row) + gap)[:, None]
            if ONES:
                share = 1.0 / tl.maximum(tl.load(mass + at, mask=is_row, other=1.0), LEAST)
                asked *= share[:, None]
            acc = dot_left(tl.trans(asked), dy_tile, acc, PRECISION)
            if ONES:
                weight = tl.load(added + at, mask=is_row, other=0.0)
                total += tl.sum(asked * weight[:, None], 0)
    tl.store(place[:, None] + e[None, :], acc, mask=inside)
    if ONES:
        tl.store(place + E, total, mask=ones)


@triton.jit
def linear_read_back(
    k,
    q,
    dy,
    dv,
    later,
    within,
    mass,
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
    """Gradient of the values. Grid: (tiles of E * T * G * B). All tensors are contiguous.

    ``dv_j = sum over n that see j of weight (k_j . q_n) dy_n``, k and dv [B, G, N, ..], q and dy
    [B, H, N, ..]; with values for k, dy for q and queries for dy it is the gradient of the keys,
    where ``later`` is read across, and ADDED: the values' column of ones adds ``added`` [B, H, N]
    to every product. ONES: what queries give is divided by their ``mass`` [B, H, N].
    """
    tiles_e: tl.constexpr = (E + BLOCK_E - 1) // BLOCK_E
    groups = heads // group
    pid = tl.program_id(0)
    tile_e, rest = pid % tiles_e, pid // tiles_e
    chunk, rest = rest % chunks, rest // chunks
    g, b = (rest % groups).to(tl.int64), (rest // groups).to(tl.int64)
    j = chunk * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    is_key = j < n
    column = tile_e * BLOCK_E + tl.arange(0, BLOCK_E)
    base = (b * groups + g) * n
    key = k + base * F
    place = later + ((b * groups + g) * (chunks + 1) + chunk + 1) * size
    # fmt: off
    acc, _ = through_state(
        key, place, j, is_key, F, column, rise, run, F, E, False, UPCAST, PRECISION, BLOCK_ROWS,
        BLOCK_F, BLOCK_E,
    )
    # fmt: on
    if ADDED:
        acc += tl.load(place + F * rise + column * run, mask=column < E, other=0.0)[None, :]
    # chunks of queries of which some see keys here that are not in the state they read
    begin = (chunk * BLOCK_ROWS + lag + block - 1) // block * block // BLOCK_ROWS
    begin = tl.maximum(begin, chunk)
    end = (chunk * BLOCK_ROWS + BLOCK_ROWS - 2 + lag) // block * block + block - 1
    end = tl.minimum(end // BLOCK_ROWS + 1, chunks)
    gap, own = 0.0, tl.zeros((BLOCK_ROWS,), tl.float32)
    sums = within + (b * groups + g) * chunks * BLOCK_ROWS
    if HAS_DECAY:
        own = tl.load(sums + j)
        acc *= tl.exp(tl.load(sums + chunk * BLOCK_ROWS + BLOCK_ROWS - 1) - own)[:, None]
        gap = decay_between(sums, chunk, tl.minimum(begin, chunks), BLOCK_ROWS)
    for number in range(begin, end):
        row = number * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        is_row = row < n
        seen = (j[:, None] <= (row // block * block - lag)[None, :]) & is_row[None, :]
        weight = tl.where(seen, 1.0, 0.0)
        if HAS_DECAY:
            apart = tl.load(sums + row)[None, :] + gap - own[:, None]
            weight = tl.exp(tl.where(seen, apart, float("-inf")))
            gap += tl.load(sums + number * BLOCK_ROWS + BLOCK_ROWS - 1)
        for head in range(group):
            at = (b * heads + g * group + head) * n
            # fmt: off
            s = products(
                key, q + at * F, j, row, is_key, is_row, F, F, F, UPCAST, PRECISION, BLOCK_ROWS,
                BLOCK_F,
            )
            # fmt: on
            if ADDED:
                s += tl.load(added + at + row, mask=is_row, other=0.0)[None, :]
            s *= weight
            if ONES:
                divisor = tl.load(mass + at + row, mask=is_row, other=1.0)
                s = s / tl.maximum(divisor, LEAST)[None, :]
            dy_tile = tile_of(dy + at * E, row, is_row, column, E, E, UPCAST)
            acc = dot_left(s, dy_tile, acc, PRECISION)
    tl.store(
        dv + (base + j)[:, None] * E + column[None, :],
        acc.to(dv.dtype.element_ty),
        mask=is_key[:, None] & (column < E)[None, :],
    )

"""The Triton kernel of `reattend::linear_attention` where every feature decays by itself.

A program carries the state of a head, all features of some values, through chunks of C tokens and
writes outputs on its way. Pairs of a chunk are made key by key: both sums of log decays are at hand
then, and their difference is never positive, so nothing overflows (`channels.py`). Yang et al.,
arXiv 2312.06635.
"""

# mypy: disable-error-code="no-untyped-def"
# (the arguments are Triton values; their types are given at compile time)

from __future__ import annotations

import triton
import triton.language as tl

from reattend.kernels.linear_attention.triton_range import dot_right


@triton.jit
def linear_channels(
    q,
    k,
    v,
    y,
    state,
    after,
    within,
    n,
    chunks,
    heads,
    group,
    F: tl.constexpr,
    E: tl.constexpr,
    BACK: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    WHOLE_F: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Grid: (tiles of E * H * B). All tensors are contiguous.

    ``q`` [B, H, N, F], ``k`` [B, G, N, F], ``v`` [B, G, N, E], ``y`` [B, H, N, E], ``state`` and
    ``after`` [B, G, F, E]. ``within`` [B, G, T * C, F] holds sums of log decays from the beginning
    of a chunk up to and with each token. BACK: it is [B, G, T * C, E], and the columns of the state
    decay in place of its rows, which is what gradients are made of.
    """
    tiles_e: tl.constexpr = (E + BLOCK_E - 1) // BLOCK_E
    width: tl.constexpr = E if BACK else F
    groups = heads // group
    pid = tl.program_id(0)
    tile_e, rest = pid % tiles_e, pid // tiles_e
    h, b = (rest % heads).to(tl.int64), (rest // heads).to(tl.int64)
    owner = b * groups + h // group
    slot, f = tl.arange(0, BLOCK_ROWS), tl.arange(0, WHOLE_F)
    e = tile_e * BLOCK_E + tl.arange(0, BLOCK_E)
    is_f, is_e = f < F, e < E
    column = e if BACK else f
    is_column = column < width
    inside = is_f[:, None] & is_e[None, :]
    place = owner * F * E + f[:, None] * E + e[None, :]
    s = tl.load(state + place, mask=inside, other=0.0)
    query, out = q + (b * heads + h) * n * F, y + (b * heads + h) * n * E
    key, value = k + owner * n * F, v + owner * n * E
    sums = within + owner * chunks * BLOCK_ROWS * width
    none = tl.zeros((BLOCK_ROWS, BLOCK_E), tl.float32)
    for chunk in range(chunks):
        begin = chunk * BLOCK_ROWS
        row = begin + slot
        is_row, at = row < n, row.to(tl.int64)
        rows_f, rows_e = is_row[:, None] & is_f[None, :], is_row[:, None] & is_e[None, :]
        q_tile = tl.load(query + at[:, None] * F + f[None, :], mask=rows_f, other=0.0)
        k_tile = tl.load(key + at[:, None] * F + f[None, :], mask=rows_f, other=0.0)
        v_tile = tl.load(value + at[:, None] * E + e[None, :], mask=rows_e, other=0.0)
        if UPCAST:
            q_tile, k_tile = q_tile.to(tl.float32), k_tile.to(tl.float32)
            v_tile = v_tile.to(tl.float32)
        c = tl.load(
            sums + at[:, None] * width + column[None, :], mask=is_column[None, :], other=0.0
        )
        end = (begin + BLOCK_ROWS - 1).to(tl.int64)
        whole = tl.load(sums + end * width + column, mask=is_column, other=0.0)
        asked = q_tile.to(tl.float32)
        left = tl.exp(whole[None, :] - c)
        if BACK:
            acc = dot_right(q_tile, s, none, PRECISION) * tl.exp(c)
            given = (v_tile.to(tl.float32) * left).to(k_tile.dtype)
            s = s * tl.exp(whole)[None, :]
            s = tl.dot(tl.trans(k_tile), given, s, input_precision=PRECISION)
        else:
            now = (asked * tl.exp(c)).to(q_tile.dtype)
            acc = dot_right(now, s, none, PRECISION)
            kept = (k_tile.to(tl.float32) * left).to(v_tile.dtype)
            s = s * tl.exp(whole)[:, None]
            s = tl.dot(tl.trans(kept), v_tile, s, input_precision=PRECISION)
        for j in range(BLOCK_ROWS):
            there = (begin + j).to(tl.int64)
            is_key = there < n
            k_j = tl.load(key + there * F + f, mask=is_f & is_key, other=0.0).to(tl.float32)
            v_j = tl.load(value + there * E + e, mask=is_e & is_key, other=0.0).to(tl.float32)
            c_j = tl.load(sums + there * width + column, mask=is_column, other=0.0)
            seen = (slot >= j)[:, None]
            apart = tl.exp(tl.where(seen, c - c_j[None, :], float("-inf")))
            if BACK:
                score = tl.sum(asked * k_j[None, :], 1)
                acc += score[:, None] * v_j[None, :] * apart
            else:
                score = tl.sum(asked * k_j[None, :] * apart, 1)
                acc += score[:, None] * v_j[None, :]
        tl.store(out + at[:, None] * E + e[None, :], acc.to(y.dtype.element_ty), mask=rows_e)
    tl.store(after + place, s, mask=inside & (h % group == 0))

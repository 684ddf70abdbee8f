"""From patterns to the block layout that `reattend::sparse_attention` reads, for any length.

Whole blocks are decided by arithmetic on their ends; only blocks at an edge of a pattern are looked
at token by token. So the work grows with the blocks that are read, and with a byte for each pair of
blocks, not of tokens (patterns over grids are looked at in full).

Layout letters: P query blocks, Q key blocks, E blocks at an edge.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from reattend.kernels.sparse_attention import BlockLayout
from reattend.kernels.sparse_attention.mask import pack
from reattend.mixers.config import CoreConfig
from reattend.patterns.pattern import HeadPattern
from reattend.patterns.terms import Spans

#: blocks looked at token by token at once
_AT_ONCE = 4096


def block_layout(
    patterns: Sequence[HeadPattern],
    head_layout: Sequence[int],
    core: CoreConfig,
    length: int,
    *,
    start: int = 0,
    block: int = 64,
) -> BlockLayout:
    """The layout of queries start .. length - 1 over keys 0 .. length - 1 (logical positions).

    Args:
        patterns: one layout each.
        head_layout: which of them each query head uses.
        core: the block's own pattern, which cuts them.
        length: tokens.
        start: the first query; its whole block is laid out.
        block: tokens per block, as `BlockLayout` allows.
    """
    first, blocks = start // block, -(-length // block)
    counts, columns, edges, numbers = [], [], [], []
    for pattern in patterns:
        place, inside, tiles = entries(pattern, core, first, blocks, block)
        counts.append(torch.bincount(place[:, 0], minlength=blocks - first))
        columns.append(place[:, 1])
        edges.append(tiles)
        numbers.append(inside)
    tiles, found = torch.unique(torch.cat(edges), dim=0, return_inverse=True)
    inside = torch.cat(numbers)
    tile = torch.full((len(inside),), -1, dtype=torch.int32)
    tile[~inside] = found.int()
    ends = torch.cat(counts).cumsum(0).view(len(patterns), -1)
    begins = torch.cat([ends.new_zeros(1), ends[:-1, -1]])[:, None]
    return BlockLayout(
        block, first, torch.cat([begins, ends], 1).int(), torch.cat(columns).int(), tile, tiles,
        torch.tensor(head_layout, dtype=torch.int32),
    )  # fmt: skip


def entries(
    pattern: HeadPattern, core: CoreConfig, first: int, blocks: int, block: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(row and column of each entry, whether it is seen whole, bits of the others [E, block])."""
    begin = torch.arange(blocks) * block
    q0, k0 = begin[first:, None], begin[None]
    spans = Spans(q0, q0 + block - 1, k0, k0 + block - 1)
    some, every = pattern.touches(spans, core)
    place = some.nonzero()
    inside = every[place[:, 0], place[:, 1]]
    kept, bits = inside.clone(), []
    within = torch.arange(block)
    for part in (~inside).nonzero()[:, 0].split(_AT_ONCE):
        i = (place[part, 0, None, None] + first) * block + within[:, None]
        j = place[part, 1, None, None] * block + within
        seen = pattern.sees(i, j, core)
        live, whole = seen.flatten(1).any(1), seen.flatten(1).all(1)
        kept[part] = live
        inside[part] = whole
        bits.append(pack(seen[live & ~whole]))
    tiles = torch.cat(bits) if bits else torch.zeros(0, block, dtype=torch.int64)
    return place[kept], inside[kept], tiles

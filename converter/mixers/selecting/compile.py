"""From what was chosen to the block layout that `reattend::sparse_attention` reads.

Tiles of 64 x 64 tokens as 64 numbers of 64 bits each, so that unions and cuts are single
operations. A head's tiles are made a strip of query blocks at a time; what stays is the layout.

Layout letters: P query blocks, Q key blocks, E blocks that are read.
"""

from __future__ import annotations

import torch
from torch import Tensor

from reattend.kernels.sparse_attention import BlockLayout
from reattend.mixers.config import CoreConfig
from reattend.mixers.selecting.base import Chosen
from reattend.patterns.layouts import Rows, entries
from reattend.patterns.pattern import HeadPattern

BLOCK = 64
#: numbers of a strip: 32 MiB
_AT_ONCE = 1 << 22


class Fixed:
    """What does not depend on the head: the block's own pattern, and a pattern's terms."""

    def __init__(self, pattern: HeadPattern, core: CoreConfig, first: int, m: int) -> None:
        self.begin, self.blocks = first // BLOCK, -(-m // BLOCK)
        self.own = entries(HeadPattern(full=True), core, self.begin, self.blocks, BLOCK)
        self.terms = entries(pattern, core, self.begin, self.blocks, BLOCK)

    def words(self, found: Rows, begin: int, end: int) -> Tensor:
        """Bits of query blocks begin .. end - 1: int64 [P, Q, 64]."""
        stops = found.counts.cumsum(0)
        counts, stops = (x[begin - self.begin : end - self.begin] for x in (found.counts, stops))
        mine = slice(int(stops[0] - counts[0]), int(stops[-1]))
        words = torch.zeros(end - begin, self.blocks, BLOCK, dtype=torch.int64)
        each = torch.cat([found.tiles, words.new_full((1, BLOCK), -1)])[found.tile[mine]]
        row = torch.repeat_interleave(torch.arange(end - begin), counts)
        words[row, found.col[mine]] = each
        return words


def compiled(
    chosen: Chosen, fixed: Fixed, row: int, heads: int
) -> tuple[BlockLayout, float] | None:
    """The layout of one row of the batch, one per query head, and what running it takes.

    That is the keys that tiles read, of those a dense block's tiles would: a tile reads each key
    that any of its queries sees. None: the method knows single tokens only.
    """
    read = 0
    counts, columns, tile, tiles = [], [], [], []
    step = max(1, _AT_ONCE // (fixed.blocks * BLOCK))
    known = 0
    for head in range(heads):
        for begin in range(fixed.begin, fixed.blocks, step):
            end = min(begin + step, fixed.blocks)
            words = chosen.words(row, head, begin, end)
            if words is None:
                return None
            words = words.cpu() | fixed.words(fixed.terms, begin, end)
            words = words & fixed.words(fixed.own, begin, end)
            some, whole = (words != 0).any(-1), (words == -1).all(-1)
            counts.append(some.sum(1))
            columns.append(some.nonzero()[:, 1])
            part = words[some & ~whole]
            read += int(whole.sum()) * BLOCK + int(_keys(part))
            number = torch.full(some.shape, -1, dtype=torch.int64)
            number[some & ~whole] = torch.arange(known, known + len(part))
            tile.append(number[some])
            tiles.append(part)
            known += len(part)
    ends = torch.cat(counts).cumsum(0).view(heads, -1)
    begins = torch.cat([ends.new_zeros(1), ends[:-1, -1]])[:, None]
    layout = BlockLayout(
        BLOCK, fixed.begin, torch.cat([begins, ends], 1).int(), torch.cat(columns).int(),
        torch.cat(tile).int(), torch.cat(tiles), torch.arange(heads, dtype=torch.int32),
    )  # fmt: skip
    return layout, read / (heads * BLOCK * len(fixed.own.col))


def _keys(words_Er: Tensor) -> Tensor:
    """Keys that any query of a tile sees, over all tiles."""
    while words_Er.shape[1] > 1:
        half = words_Er.shape[1] // 2
        words_Er = words_Er[:, :half] | words_Er[:, half:]
    return ((words_Er >> torch.arange(BLOCK)) & 1).sum()

"""From patterns to the block layout that `reattend::sparse_attention` reads, for any length.

Blocks are listed by arithmetic (`listing.py`); of those at an edge of the pattern, one of each kind
is worked out (`edges.py`). So the work grows with the blocks that are read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from reattend.kernels.sparse_attention import BlockLayout
from reattend.mixers.config import CoreConfig
from reattend.patterns.edges import alike, tiles
from reattend.patterns.listing import RANGE, WHOLE, Problem, listed
from reattend.patterns.pattern import HeadPattern


class Rows(NamedTuple):
    """One pattern's part of a layout.

    Attributes:
        counts: entries of each row [P].
        col: key block of each entry, int32 [E].
        tile: row of `tiles`, or -1 where every pair is visible, int32 [E].
        tiles: bits [T, block], each once, in order.
    """

    counts: Tensor
    col: Tensor
    tile: Tensor
    tiles: Tensor


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
    parts = [entries(pattern, core, first, blocks, block) for pattern in patterns]
    tiles, tile = parts[0].tiles, [parts[0].tile]  # of a single pattern they are as they were
    if len(parts) > 1:
        tiles, numbers = _together([p.tiles for p in parts])
        tile = [number[p.tile] for number, p in zip(numbers, parts, strict=True)]
    ends = torch.cat([p.counts for p in parts]).cumsum(0).view(len(patterns), -1)
    begins = torch.cat([ends.new_zeros(1), ends[:-1, -1]])[:, None]
    return BlockLayout(
        block, first, torch.cat([begins, ends], 1).int(), _cat([p.col for p in parts]), _cat(tile),
        tiles, torch.tensor(head_layout, dtype=torch.int32),
    )  # fmt: skip


def _cat(parts: list[Tensor]) -> Tensor:
    """A single one is not copied."""
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _together(parts: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Tiles of several layouts, each once, and of each layout the numbers of its own; -1 stays."""
    tiles, number = torch.unique(torch.cat(parts), dim=0, return_inverse=True)
    none = number.new_tensor([-1])
    return tiles, [torch.cat([x, none]).int() for x in number.split([len(x) for x in parts])]


def below(upper: BlockLayout, lower: BlockLayout) -> BlockLayout:
    """The rows of two layouts of one pattern as one; `lower` begins where `upper` ends."""
    tiles, numbers = _together([upper.tiles, lower.tiles])
    return BlockLayout(
        upper.block, upper.first,
        torch.cat([upper.row_ptr, lower.row_ptr[:, 1:] + upper.row_ptr[:, -1:]], 1),
        torch.cat([upper.col, lower.col]),
        torch.cat([number[x.tile] for number, x in zip(numbers, (upper, lower), strict=True)]),
        tiles, upper.head_layout,
    )  # fmt: skip


def entries(pattern: HeadPattern, core: CoreConfig, first: int, blocks: int, block: int) -> Rows:
    """What a pattern shows of key blocks 0 .. blocks - 1 to query blocks first .. blocks - 1."""
    problem = Problem(pattern, core, first, blocks, block)
    own, words = problem.band(None), problem.key_words()
    counts, col, kind = listed(problem, own, words)
    hidden = own.hides(counts, col)
    at = (hidden | (kind != WHOLE)).nonzero()[:, 0]  # entries at an edge
    row, key, kind = torch.searchsorted(counts.cumsum(0), at, right=True), col[at].long(), kind[at]
    word = torch.where(kind == WHOLE, problem.full, words[key])
    moving = hidden[at] | ((word != problem.full) & (kind == RANGE))
    code = alike(problem, row + first, key, moving, torch.unique(word, return_inverse=True)[1])
    distinct, same = torch.unique(code, return_inverse=True)
    shown = torch.zeros(len(distinct), dtype=torch.int64)
    shown[same] = torch.arange(len(same))  # any one of its kind
    bits = tiles(problem, row[shown] + first, key[shown], word[shown])
    live = (bits != 0).any(1)
    partial = live & (bits != problem.full).any(1)
    edges, number = torch.unique(bits[partial], dim=0, return_inverse=True)
    of = torch.full((len(bits),), -1, dtype=torch.int32)
    of[partial] = number.int()
    tile = torch.full((len(col),), -1, dtype=torch.int32)
    tile[at] = of[same]
    if not bool(live.all()):
        dead = ~live[same]
        stays = torch.ones(len(col), dtype=torch.bool)
        stays[at[dead]] = False
        counts = counts - torch.bincount(row[dead], minlength=len(counts))
        col, tile = col[stays], tile[stays]
    return Rows(counts, col, tile, edges)

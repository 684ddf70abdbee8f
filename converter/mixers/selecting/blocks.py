"""Blocks of keys by the score of their mean key: MoBA, and pooled maps over blocks or grid tiles.

Lu et al., arXiv 2502.13189 (MoBA); arXiv 2407.02490 (MInference), 2505.14708 (DraftAttention),
2303.08810 (BiFormer), 2506.23858 (VMoBA), 2402.10685 (LongHeads). Nothing is trained.

Layout letters: as in `base`; c tokens per block.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from reattend.kernels.sparse_attention.mask import pack
from reattend.mixers.config import CoreConfig, RotaryConfig
from reattend.mixers.selecting.attended import attended_keys, turned
from reattend.mixers.selecting.base import Asked, Chosen, Method, Whole, off_grid, reach
from reattend.mixers.selecting.budget import within
from reattend.patterns.routing import Blocks


@dataclass(frozen=True)
class Routes(Chosen):
    """A map from queries, or regions of queries, to regions of keys.

    Attributes:
        map_BHRQ: which regions each row of the map sees.
        row_N: the row of each query.
        region_M: the region of each key.
        first: position of the first query.
        step: tokens of a region, where regions follow each other and are whole blocks of 64.
        each: tokens of a region, where they follow each other and every query has its own row.
    """

    map_BHRQ: Tensor
    row_N: Tensor
    region_M: Tensor
    first: int
    step: int = 0
    each: int = 0

    def mask(self) -> Tensor:
        """See `Chosen`."""
        return self.map_BHRQ.index_select(2, self.row_N).index_select(3, self.region_M)

    def words(self, row: int, head: int, begin: int, end: int) -> Tensor:
        """Where a region is whole blocks, a word is all ones or none."""
        m = len(self.region_M)
        place = torch.arange(begin * 64, end * 64, device=self.row_N.device) - self.first
        query = self.row_N[place.clamp(0, len(self.row_N) - 1)]  # others are no query's rows
        seen = self.map_BHRQ[row, head].index_select(0, query)
        blocks = -(-m // 64)
        if self.step:
            block = torch.arange(blocks, device=place.device) * 64 // self.step
            words = -seen[:, block].long()
            return words.view(end - begin, 64, blocks).transpose(1, 2).contiguous()
        seen = torch.nn.functional.pad(seen[:, self.region_M], (0, blocks * 64 - m))
        return pack(seen.view(end - begin, 64, blocks, 64).transpose(1, 2))


class BlocksMethod(Method):
    """See `Blocks`."""

    def __init__(self, selector: Blocks, core: CoreConfig, rotary: RotaryConfig | None) -> None:
        super().__init__()
        self.selector, self.core, self.rotary = selector, core, rotary
        self.block = selector.block if selector.acts == "both" and not selector.tile else 0
        self.attended = self.recalls = selector.key == "attended"

    def summary(self, k_BGQcd: Tensor) -> Tensor:
        """The mean key."""
        return k_BGQcd.mean(-2)

    def summarise(self, whole: Whole) -> Tensor:
        """The mean key, or for every query head an attended one."""
        if not self.attended:
            return self.summary(whole.k_BGQcd)
        return attended_keys(whole, self.core, self.rotary)

    def choose(self, asked: Asked) -> Routes:
        """Products of queries, or of their means, with what stands for blocks."""
        s, m = self.selector, asked.k_BGMd.shape[2]
        if s.tile:
            return self._tiles(asked)
        i, _ = asked.positions()
        region_M = torch.arange(m, device=i.device) // s.block
        query, row_N = asked.q_BHNd, torch.arange(len(i), device=i.device)
        if self.attended:
            query = turned(query, -i[:, 0], self.rotary)
        first_R = last_R = i
        if s.queries == "pooled":
            row_N = region_M[asked.first :] - region_M[asked.first]
            rows = int(row_N[-1]) + 1
            query = _pooled(query, row_N, rows)
            none = torch.zeros(rows, dtype=torch.long, device=i.device)
            first_R, last_R = (
                none.scatter_reduce(0, row_N, i[:, 0], end, include_self=False)[:, None]
                for end in ("amin", "amax")
            )
        keys = self._keys(asked)
        regions = keys.shape[2]
        allowed = reach(asked.core, first_R, s.block, regions, m)
        allowed = allowed | reach(asked.core, last_R, s.block, regions, m)
        sure = None
        scores = asked.scores(query, keys)
        if asked.core.causal:
            number = torch.arange(regions, device=i.device)
            back = last_R // s.block - number
            sure = (back >= 0) & (back < s.last) | (number < s.first)
            if s.queries == "each":
                # read in any case, and its mean may hold later keys: no part in softmax or ranking
                scores = scores.masked_fill(back == 0, float("-inf"))
        chosen = self._within(scores, allowed, sure)
        step, each = s.block % 64 == 0, s.queries == "each"
        return Routes(chosen, row_N, region_M, asked.first, s.block * step, s.block * each)

    def _within(self, scores: Tensor, allowed: Tensor, sure: Tensor | None) -> Tensor:
        if self.selector.across == "row":
            return within(scores, allowed, self.selector, sure)
        given = None if sure is None else sure.flatten()
        flat = within(scores.flatten(-2), allowed.flatten(), self.selector, given)
        return flat.view_as(scores)

    def _tiles(self, asked: Asked) -> Routes:
        """Regions are the tiles of a grid, and one more is all text, which sees and is seen."""
        s, m = self.selector, asked.k_BGMd.shape[2]
        rest = m - s.text_before - prod(s.shape)
        if rest < 0 or s.text_after not in (None, rest):
            raise off_grid(s.kind, prod(s.shape), m)
        tiles = prod(s.shape) // s.size
        region = tile_of(s).to(asked.k_BGMd.device)
        region_M = torch.nn.functional.pad(region, (s.text_before, rest), value=tiles)
        keys = _pooled(asked.k_BGMd, region_M, tiles + 1)[:, :, :tiles]
        query, row_N = asked.q_BHNd, torch.arange(m, device=region.device)
        own_R = torch.arange(tiles, device=region.device) if s.queries == "pooled" else region
        own = own_R[:, None] == torch.arange(tiles, device=region.device) if s.own else None
        if s.queries == "pooled":
            query, row_N = _pooled(query, region_M, tiles + 1)[:, :, :tiles], region_M
        else:
            query = query[:, :, s.text_before : m - rest]
        scores = asked.scores(query, keys)
        chosen = self._within(scores, torch.ones_like(scores[0, 0], dtype=torch.bool), own)
        if s.queries == "pooled":
            text = (0, 1, 0, 1)  # the last row and column
        else:
            text = (0, 1, s.text_before, rest)
        return Routes(torch.nn.functional.pad(chosen, text, value=True), row_N, region_M, 0)

    def _keys(self, asked: Asked) -> Tensor:
        """What stands for blocks [B, G or H, Q, d]; a cache holds that of whole ones."""
        k, block = asked.k_BGMd, self.selector.block
        whole, told = k.shape[2] // block, asked.summaries_BGQw
        if self.attended:
            if told is None and whole:
                told = self.summarise(asked.whole(block))
            elif told is None:  # a cache too short for a block was never written to
                heads = asked.core.heads // asked.core.kv_heads
                told = k.new_zeros(*k.shape[:2], 0, heads * k.shape[3])
            told = told.unflatten(-1, (-1, k.shape[-1])).transpose(2, 3).flatten(1, 2)
            # an incomplete block is nobody's but its own queries'
            return torch.nn.functional.pad(told, (0, 0, 0, -(-k.shape[2] // block) - whole))
        if told is None:
            told = self.summary(k[:, :, : whole * block].unflatten(2, (whole, block)))
        rest = k[:, :, whole * block :]
        return torch.cat([told, rest.mean(2, keepdim=True)], 2) if rest.shape[2] else told


def tile_of(select: Blocks) -> Tensor:
    """The tile of every token of the grid, tokens and tiles row by row."""
    place = torch.arange(prod(select.shape))
    region, many = torch.zeros_like(place), 1
    for size, tile in zip(reversed(select.shape), reversed(select.tile), strict=True):
        region = region + place % size // tile * many
        many, place = many * (size // tile), place // size
    return region


def _pooled(x_BHNd: Tensor, region_N: Tensor, regions: int) -> Tensor:
    """Means over the regions of tokens [B, H, R, d]; of none: 0."""
    shape = (*x_BHNd.shape[:2], regions, x_BHNd.shape[3])
    sums = x_BHNd.new_zeros(shape).index_add(2, region_N, x_BHNd)
    one = x_BHNd.new_ones(len(region_N), 1)
    return sums / one.new_zeros(regions, 1).index_add(0, region_N, one).clamp_min(1)

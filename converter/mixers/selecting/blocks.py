"""Blocks of keys by the score of their mean key: MoBA, and pooled maps over blocks or grid tiles.

Lu et al., arXiv 2502.13189 (MoBA); arXiv 2407.02490 (MInference), 2505.14708 (DraftAttention),
2303.08810 (BiFormer), 2506.23858 (VMoBA). What differs: DraftAttention and BiFormer keep the budget
over a whole map or per row as here `across` says; nothing is trained.

Layout letters: as in `base`; c tokens per block.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from reattend.errors import ArgumentError
from reattend.kernels.sparse_attention.mask import pack
from reattend.mixers.selecting.base import Asked, Chosen, Method, reach
from reattend.mixers.selecting.budget import within
from reattend.patterns.selectors import Blocks


@dataclass(frozen=True)
class Routes(Chosen):
    """A map from queries, or regions of queries, to regions of keys.

    Attributes:
        map_BHRQ: which regions each row of the map sees.
        row_N: the row of each query.
        region_M: the region of each key.
        first: position of the first query.
        step: tokens of a region, where regions follow each other and are whole blocks of 64.
    """

    map_BHRQ: Tensor
    row_N: Tensor
    region_M: Tensor
    first: int
    step: int = 0

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

    def __init__(self, selector: Blocks) -> None:
        super().__init__()
        self.selector = selector
        self.block = selector.block if selector.acts == "both" and not selector.grid else 0

    def summary(self, k_BGQcd: Tensor) -> Tensor:
        """The mean key."""
        return k_BGQcd.mean(-2)

    def choose(self, asked: Asked) -> Routes:
        """Products of queries, or of their means, with mean keys."""
        s, m = self.selector, asked.k_BGMd.shape[2]
        i, j = asked.positions()
        region_M = self._regions(m, j[0])
        regions = int(region_M[-1]) + 1 if not s.grid else m // s.size
        keys = self._means(asked, region_M, regions)
        query, row_N = asked.q_BHNd, torch.arange(len(i), device=i.device)
        first_R = last_R = i
        if s.queries == "pooled":
            row_N = region_M[asked.first :] - (0 if s.grid else region_M[asked.first])
            rows = int(row_N.max()) + 1
            query = _pooled(query, row_N, rows)
            none = torch.zeros(rows, dtype=torch.long, device=i.device)
            first_R, last_R = (
                none.scatter_reduce(0, row_N, i[:, 0], end, include_self=False)[:, None]
                for end in ("amin", "amax")
            )
        scores = asked.scores(query, keys)
        if s.grid:
            allowed = torch.ones(scores.shape[-2:], dtype=torch.bool, device=i.device)
        else:
            allowed = reach(asked.core, first_R, s.block, regions, m)
            allowed = allowed | reach(asked.core, last_R, s.block, regions, m)
        own = None
        if asked.core.causal:
            own = last_R // s.block == torch.arange(regions, device=i.device)
        if s.across == "head":
            flat = within(scores.flatten(-2), allowed.flatten(), s)
            chosen = flat.view_as(scores)
        else:
            chosen = within(scores, allowed, s, own)
        return Routes(
            chosen, row_N, region_M, asked.first, 0 if s.grid or s.block % 64 else s.block
        )

    def _regions(self, m: int, j: Tensor) -> Tensor:
        """The region of each key."""
        s = self.selector
        if not s.grid:
            return j // s.block
        if m != prod(s.grid):
            raise ArgumentError(
                f"a block with a grid of {prod(s.grid)} tokens was given {m}",
                where="select: blocks",
                next_step="convert with the grid of these inputs, in the order rows last",
            )
        place, region, many = j, torch.zeros_like(j), 1
        for size, tile in zip(reversed(s.grid), reversed(s.tile), strict=True):
            region = region + place % size // tile * many
            many, place = many * (size // tile), place // size
        return region

    def _means(self, asked: Asked, region_M: Tensor, regions: int) -> Tensor:
        """Mean keys [B, G, Q, d]; a cache holds those of whole blocks."""
        k, block = asked.k_BGMd, self.selector.block
        if self.selector.grid:
            return _pooled(k, region_M, regions)
        whole = k.shape[2] // block
        told = asked.summaries_BGQw
        if told is None:
            told = self.summary(k[:, :, : whole * block].unflatten(2, (whole, block)))
        rest = k[:, :, whole * block :]
        return torch.cat([told, rest.mean(2, keepdim=True)], 2) if rest.shape[2] else told


def _pooled(x_BHNd: Tensor, region_N: Tensor, regions: int) -> Tensor:
    """Means over the regions of tokens [B, H, R, d]."""
    shape = (*x_BHNd.shape[:2], regions, x_BHNd.shape[3])
    sums = x_BHNd.new_zeros(shape).index_add(2, region_N, x_BHNd)
    count = torch.bincount(region_N, minlength=regions)
    return sums / count[:, None]

"""MInference's vertical-slash heads: columns and diagonals that the last queries look at.

Jiang et al., arXiv 2407.02490, as released. What differs: a chosen diagonal is read token by token;
the released kernel reads the whole blocks it passes through.

Layout letters: as in `base`; t distance of a key before its query.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from reattend.kernels.sparse_attention.mask import pack
from reattend.mixers.scores import own_pattern
from reattend.mixers.selecting.base import Asked, Chosen, Method
from reattend.patterns.selectors import VerticalSlash


@dataclass(frozen=True)
class Lines(Chosen):
    """Keys and distances that every query sees: bool [B, H, M] each."""

    columns: Tensor
    slashes: Tensor
    first: int

    def mask(self) -> Tensor:
        """See `Chosen`."""
        m = self.columns.shape[-1]
        # at place x: distance m - 1 - x; a row of the mask is a window over it, the last one first
        apart = torch.nn.functional.pad(self.slashes.flip(-1), (0, m))
        return self.columns[..., None, :] | apart.unfold(-1, m, 1)[..., : m - self.first, :].flip(
            -2
        )

    def words(self, row: int, head: int, begin: int, end: int) -> Tensor:
        """A tile's diagonals depend on the distance of its blocks, its columns on the key block."""
        columns, slashes = self.columns[row, head], self.slashes[row, head]
        m, device = len(columns), columns.device
        blocks = -(-m // 64)
        within = torch.arange(64, device=device)
        seen = torch.nn.functional.pad(columns, (0, blocks * 64 - m)).view(blocks, 1, 64)
        column_Q = pack(seen)[:, 0]
        apart = torch.arange(end, device=device)[:, None, None] * 64
        apart = apart + within[:, None] - within
        near = (apart >= 0) & (apart < m) & slashes[apart.clamp(0, m - 1)]
        slash_D = pack(near)  # [distance in blocks, 64]
        p = torch.arange(begin, end, device=device)[:, None]
        distance = p - torch.arange(blocks, device=device)
        words = slash_D[distance.clamp_min(0)].masked_fill((distance < 0)[..., None], 0)
        return words | column_Q[None, :, None]


class VerticalSlashMethod(Method):
    """See `VerticalSlash`."""

    def __init__(self, selector: VerticalSlash) -> None:
        super().__init__()
        self.selector = selector

    def choose(self, asked: Asked) -> Lines:
        """Sums of the last queries' probabilities, by key and by distance."""
        s, n, m = self.selector, asked.q_BHNd.shape[2], asked.k_BGMd.shape[2]
        last = min(s.last_queries, n)
        i = torch.arange(m - last, m, device=asked.q_BHNd.device)[:, None]
        j = torch.arange(m, device=i.device)
        scores = asked.scores(asked.q_BHNd[:, :, n - last :], asked.k_BGMd)
        p = scores.masked_fill(~own_pattern(asked.core, i, j), float("-inf")).softmax(-1)
        by_column = p.sum(2)
        by_column[..., : s.first_columns] = float("inf")
        key = i - j  # the key at distance j before query i
        by_distance = p.gather(-1, key.clamp_min(0).expand_as(p)).masked_fill(key < 0, 0).sum(2)
        by_distance[..., : s.last_slashes] = float("inf")
        return Lines(_best(by_column, s.columns), _best(by_distance, s.slashes), m - n)


def _best(sums: Tensor, count: int) -> Tensor:
    """The `count` largest along the last axis, bool."""
    best = sums.topk(min(count, sums.shape[-1])).indices
    return torch.zeros_like(sums, dtype=torch.bool).scatter(-1, best, True)

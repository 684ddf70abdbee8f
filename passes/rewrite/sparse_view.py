"""What the heads of a block pay to every key: what selectors learn from.

Layout letters: n tokens of a row, J query heads of a KV head, R queries at a time, D hidden.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from reattend.mixers.base import Context
from reattend.mixers.config import CoreConfig
from reattend.mixers.scores import own_pattern, per_head
from reattend.mixers.selecting.base import products
from reattend.mixers.sparse import SparseAttention
from reattend.parts import query_heads

#: Queries whose attention is formed at a time.
QUERIES = 256


@dataclass(frozen=True)
class View:
    """A row of the block's input, as a class of its heads sees it.

    `core` is that of these heads, `sinks_H11` their logits.
    """

    q_HNd: Tensor
    k_GNd: Tensor
    v_GNe: Tensor
    core: CoreConfig
    sinks_H11: Tensor | None

    def probabilities(self) -> Iterator[tuple[int, slice, Tensor]]:
        """Of each KV head and some queries at a time: what its heads pay to every key [J, R, n]."""
        group = self.core.heads // self.core.kv_heads
        one = self.core.model_copy(update={"heads": group, "kv_heads": 1})
        n = self.k_GNd.shape[1]
        j = torch.arange(n, device=self.k_GNd.device)
        for g in range(self.core.kv_heads):
            own = slice(g * group, (g + 1) * group)
            for begin in range(0, n, QUERIES):
                rows = slice(begin, min(begin + QUERIES, n))
                s = products(self.q_HNd[None, own, rows], self.k_GNd[None, g : g + 1], one)[0]
                s = s.masked_fill(~own_pattern(one, j[rows, None], j), float("-inf"))
                if self.sinks_H11 is not None:
                    s = torch.cat([s, self.sinks_H11[own].expand(-1, s.shape[1], 1)], -1)
                yield g, rows, s.softmax(-1)[..., :n]


@torch.no_grad()
def viewed(mixer: SparseAttention, x_ND: Tensor, kv_heads: tuple[int, ...]) -> View:
    """The row [n, D] for the heads of these KV heads, in `width_of` the block."""
    like, core = mixer.q_proj.weight, mixer.config.core
    x = x_ND[None].to(like)
    q, new = mixer.project(x, x, Context(), None)
    heads = query_heads(core, kv_heads)
    wide = width_of(mixer)
    sinks = per_head(mixer.sinks)
    return View(
        q[0, heads].to(wide), new.keys[0, list(kv_heads)].to(wide),
        new.values[0, list(kv_heads)].to(wide),
        core.model_copy(update={"heads": len(heads), "kv_heads": len(kv_heads)}),
        None if sinks is None else sinks[heads].to(wide),
    )  # fmt: skip


def width_of(mixer: SparseAttention) -> torch.dtype:
    """What is learned in: float32, or float64 where the block is."""
    return torch.float64 if mixer.q_proj.weight.dtype == torch.float64 else torch.float32

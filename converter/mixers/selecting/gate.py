"""SeerAttention's gate: blocks of keys by a small trained score, for every query.

Gao et al., arXiv 2410.13276, and its form for decoding, SeerAttention-R: the queries of a KV head's
group are mapped and summed, a block of keys is the map of its largest, smallest and mean keys. What
differs: both maps read rotated queries and keys (the cache holds no others), so the gate needs no
rotation of its own; they start as the routing by mean keys (MoBA), not at random; a query's own
block, which is always read and may be incomplete, takes no part in the softmax, so what a query
reads never depends on later tokens.

Layout letters: as in `base`; J numbers of a query group, c tokens per block, w `gate_dim`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from reattend.mixers.config import CoreConfig
from reattend.mixers.selecting.base import Asked, Learner, reach
from reattend.mixers.selecting.blocks import Routes
from reattend.mixers.selecting.budget import within
from reattend.patterns.learned import Gate


class GateMethod(Learner):
    """See `Gate`.

    Attributes:
        query_GJw: from the queries of a group, side by side.
        key_Gdw: from a block's [largest | smallest | mean] key, [G, 3 d, w].
    """

    def __init__(self, selector: Gate, core: CoreConfig) -> None:
        super().__init__()
        self.selector, self.block, self.core = selector, selector.block, core
        d, group = core.qk_head_dim, core.heads // core.kv_heads
        for name, rows in (("query_GJw", group * d), ("key_Gdw", 3 * d)):
            zeros = torch.zeros(core.kv_heads, rows, selector.gate_dim)
            self.register_parameter(name, nn.Parameter(zeros, requires_grad=False))

    query_GJw: nn.Parameter
    key_Gdw: nn.Parameter

    @torch.no_grad()
    def start(self) -> None:
        """Weights under which the score of a block is the sum of its mean key's products.

        That is exact if `gate_dim` is at least the head width; further columns start at zero on
        the side of the queries, and at small numbers (always the same) on that of the keys.
        """
        d, w, scale = self.core.qk_head_dim, self.selector.gate_dim, self.core.scale
        generator = torch.Generator().manual_seed(0)
        key = torch.randn(self.key_Gdw.shape, generator=generator) * (3 * d) ** -0.5
        same = torch.eye(d, w)
        key[:, :, :d] = 0
        key[:, 2 * d :] += same
        query = (same * scale * w**0.5).repeat(self.query_GJw.shape[1] // d, 1)
        self.key_Gdw.copy_(key)
        self.query_GJw.copy_(query.expand_as(self.query_GJw))

    def summary(self, k_BGQcd: Tensor) -> Tensor:
        """What the gate knows of whole blocks."""
        return pooled(k_BGQcd) @ self.key_Gdw

    def scores(self, q_BHNd: Tensor, summaries_BGQw: Tensor) -> Tensor:
        """Of every block for every query of every group [B, G, N, Q], float32 or wider."""
        rows = q_BHNd.unflatten(1, (len(self.query_GJw), -1)).transpose(2, 3).flatten(3)
        product = (rows @ self.query_GJw) @ summaries_BGQw.transpose(-1, -2)
        wide = product if product.dtype == torch.float64 else product.float()
        scaled: Tensor = wide * self.selector.gate_dim**-0.5
        return scaled

    def choose(self, asked: Asked) -> Routes:
        """The best blocks of each group, the own one among them."""
        s, m = self.selector, asked.k_BGMd.shape[2]
        i, _ = asked.positions()
        regions = -(-m // s.block)
        summaries = asked.summaries_BGQw
        if summaries is None:
            whole = asked.k_BGMd[:, :, : m // s.block * s.block]
            summaries = self.summary(whole.unflatten(2, (m // s.block, s.block)))
        scores = self.scores(asked.q_BHNd, summaries)
        # an incomplete block is nobody's but its own queries'
        scores = nn.functional.pad(scores, (0, regions - scores.shape[-1]), value=float("-inf"))
        own = i // s.block == torch.arange(regions, device=i.device)
        allowed = reach(asked.core, i, s.block, regions, m)
        chosen = within(scores.masked_fill(own, float("-inf")), allowed, s, own)
        row_N = torch.arange(len(i), device=i.device)
        region_M = torch.arange(m, device=i.device) // s.block
        each = chosen.repeat_interleave(asked.core.heads // asked.core.kv_heads, 1)
        step = s.block if s.block % 64 == 0 else 0
        return Routes(each, row_N, region_M, asked.first, step, s.block)


def pooled(k_BGQcd: Tensor) -> Tensor:
    """The largest, smallest and mean numbers of blocks of keys, side by side [B, G, Q, 3 d]."""
    return torch.cat([k_BGQcd.amax(-2), k_BGQcd.amin(-2), k_BGQcd.mean(-2)], -1)

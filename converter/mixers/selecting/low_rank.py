"""Sparsifiner: tokens of an image by a trained low-rank guess of the attention.

Wei et al., arXiv 2303.13755. What differs: every KV head has a guess of its own, where the paper's
heads share one; no entry of the guess' factors is dropped; it starts at the softmax over the mean
keys of neighbours, not at random; tokens are not pruned.

Layout letters: as in `base`; M tokens, c narrow width, r columns.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from reattend.mixers.config import CoreConfig
from reattend.mixers.selecting.base import Asked, Learner, Tokens, off_grid
from reattend.mixers.selecting.budget import within
from reattend.patterns.learned import LowRank


class LowRankMethod(Learner):
    """See `LowRank`."""

    query_Gdc: nn.Parameter
    query_Gc: nn.Parameter
    key_Gdc: nn.Parameter
    key_Gc: nn.Parameter
    down_GMr: nn.Parameter
    up_GrM: nn.Parameter

    def __init__(self, selector: LowRank, core: CoreConfig) -> None:
        super().__init__()
        self.selector, self.core = selector, core
        d, c, m, r = core.qk_head_dim, selector.width(core), selector.tokens, selector.columns
        for name, shape in {
            "query_Gdc": (d, c), "query_Gc": (c,), "key_Gdc": (d, c), "key_Gc": (c,),
            "down_GMr": (m, r), "up_GrM": (r, m),
        }.items():  # fmt: skip
            zeros = torch.zeros(core.kv_heads, *shape)
            self.register_parameter(name, nn.Parameter(zeros, requires_grad=False))

    @torch.no_grad()
    def start(self) -> None:
        """Means over neighbours; the first channels of queries and keys, at the block's scale."""
        d, c = self.query_Gdc.shape[1:]
        m, r = self.down_GMr.shape[1:]
        same = torch.eye(d, c) * (self.core.scale * c**0.5) ** 0.5
        column = torch.arange(m) * r // m
        mean = nn.functional.one_hot(column, r).to(same)
        mean = mean / mean.sum(0)
        for x, value in (
            (self.query_Gdc, same), (self.query_Gc, 0 * same[0]), (self.key_Gdc, same),
            (self.key_Gc, 0 * same[0]), (self.down_GMr, mean), (self.up_GrM, mean.t()),
        ):  # fmt: skip
            x.copy_(value.expand_as(x))

    def guess(self, q_BHNd: Tensor, k_BGMd: Tensor) -> Tensor:
        """What every query pays to every key, about [B, H, N, M], float32 or wider."""
        wide = torch.float64 if q_BHNd.dtype == torch.float64 else torch.float32
        w = {name: p.to(wide) for name, p in self.named_parameters()}
        q = q_BHNd.to(wide).unflatten(1, (k_BGMd.shape[1], -1))
        q_BGJNc = q @ w["query_Gdc"][:, None] + w["query_Gc"][:, None, None]
        k_BGMc = k_BGMd.to(wide) @ w["key_Gdc"] + w["key_Gc"][:, None]
        column_BGcr = k_BGMc.transpose(-1, -2) @ w["down_GMr"]
        share = (q_BGJNc @ column_BGcr[:, :, None] * q_BGJNc.shape[-1] ** -0.5).softmax(-1)
        found: Tensor = share @ w["up_GrM"][:, None]
        return found.flatten(1, 2)

    def choose(self, asked: Asked) -> Tokens:
        """The tokens that are guessed to get most; text sees everything.

        Raises:
            ArgumentError: the image has another size.
        """
        s, m = self.selector, asked.k_BGMd.shape[2]
        if m != s.tokens:
            raise off_grid(s.kind, s.tokens, m)
        every = torch.ones((), dtype=torch.bool, device=asked.k_BGMd.device)
        chosen = within(self.guess(asked.q_BHNd, asked.k_BGMd), every, s)
        chosen[:, :, : s.text_before] = True
        chosen[:, :, m - (s.text_after or 0) :] = True
        return Tokens(chosen)

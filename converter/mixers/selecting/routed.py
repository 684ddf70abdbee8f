"""Attention where every query has blocks of its own: the queries of a block are gathered, not keys.

The tiles of neighbouring queries that choose differently are nearly everything; here each block of
keys meets just the queries that chose it, and what the blocks give is merged by log-sum-exp, as in
MoBA (Lu et al., arXiv 2502.13189). Computes no gradients.

Layout letters: as in `base`; S queries that chose a block, K its keys.
"""

from __future__ import annotations

import torch
from torch import Tensor

from reattend.mixers.config import CoreConfig
from reattend.mixers.scores import own_pattern


def attend_routed(
    q_BHNd: Tensor, k_BGMd: Tensor, v_BGMe: Tensor, map_BHNQ: Tensor, block: int, core: CoreConfig
) -> Tensor:
    """The output [B, H, N, e].

    Args:
        q_BHNd, k_BGMd, v_BGMe: without padding; queries are the last of the keys' tokens.
        map_BHNQ: which blocks of keys each query chose; it sees of them what its own pattern shows.
        block: keys per block.
        core: of these heads.
    """
    (batch, heads, n, _), m, groups = q_BHNd.shape, k_BGMd.shape[2], k_BGMd.shape[1]
    wide = torch.float64 if q_BHNd.dtype == torch.float64 else torch.float32
    y = q_BHNd.new_zeros(batch, groups, heads // groups * n, v_BGMe.shape[-1], dtype=wide)
    lse = y.new_full(y.shape[:3], float("-inf"))
    q_BGSd = q_BHNd.unflatten(1, (groups, -1)).flatten(2, 3)
    chosen = map_BHNQ.unflatten(1, (groups, -1)).flatten(2, 3)
    for b in range(batch):
        for g in range(groups):
            for number in range(map_BHNQ.shape[-1]):
                rows = chosen[b, g, :, number].nonzero()[:, 0]
                if len(rows) == 0:
                    continue
                keys = slice(number * block, min((number + 1) * block, m))
                out, part = _part(
                    q_BGSd[b, g, rows], k_BGMd[b, g, keys], v_BGMe[b, g, keys], core,
                    (rows % n + m - n)[:, None], torch.arange(m, device=rows.device)[keys],
                )  # fmt: skip
                before = lse[b, g, rows]
                after = torch.logaddexp(before, part)
                shares = [(x - after).nan_to_num(nan=float("-inf")).exp() for x in (before, part)]
                y[b, g, rows] = y[b, g, rows] * shares[0][:, None] + out * shares[1][:, None]
                lse[b, g, rows] = after
    y_BHNe: Tensor = y.unflatten(2, (-1, n)).flatten(1, 2).to(q_BHNd.dtype)
    return y_BHNe


def _part(
    q_Sd: Tensor, k_Kd: Tensor, v_Ke: Tensor, core: CoreConfig, i: Tensor, j: Tensor
) -> tuple[Tensor, Tensor]:
    """Output [S, e] and log-sum-exp [S] over one block; 0 and -inf where nothing is seen."""
    scores = q_Sd @ k_Kd.t() * core.scale
    scores = scores if scores.dtype == torch.float64 else scores.float()
    if core.softcap:
        scores = core.softcap * torch.tanh(scores / core.softcap)
    if core.causal:
        scores = scores.masked_fill(~own_pattern(core, i, j), float("-inf"))
    lse = scores.logsumexp(-1)
    weights = (scores - lse.nan_to_num(neginf=0.0)[:, None]).exp()
    return weights @ v_Ke.to(weights.dtype), lse

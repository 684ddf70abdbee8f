"""LongHeads: what stands for a block of keys is what the block's own queries make of it.

Lu et al., arXiv 2402.10685, as released: inside a block every query head attends to all of the
block; its mean output, taken as a query, weighs the block's keys, and their sum stands for the
block. Keys are turned as if the block were the whole text, and are compared with queries that are
not turned at all, so that distance plays no part in the choice. What differs: chosen keys keep
their positions, where the paper counts them anew to read beyond the trained length.

Layout letters: as in `base`; c tokens per block, J query heads of a KV head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from reattend.mixers.config import CoreConfig, RotaryConfig
from reattend.mixers.rotary import rotate
from reattend.mixers.selecting.base import Whole, products


def turned(x_BhNd: Tensor, by_N: Tensor, rotary: RotaryConfig | None) -> Tensor:
    """Queries or keys as they would be so many tokens later."""
    if rotary is None:
        return x_BhNd
    wide = torch.float64 if x_BhNd.dtype == torch.float64 else torch.float32
    inv_freq = torch.tensor(rotary.inv_freq, dtype=wide, device=x_BhNd.device)
    angle_NP = by_N[:, None].to(wide) * inv_freq
    return rotate(x_BhNd, (angle_NP.cos()[None], angle_NP.sin()[None]), rotary.pairs)


def attended_keys(whole: Whole, core: CoreConfig, rotary: RotaryConfig | None) -> Tensor:
    """What stands for whole blocks, one for each query head [B, G, Q, J d]."""
    assert whole.q_BHQcd is not None
    blocks, c = whole.k_BGQcd.shape[2:4]
    begin = torch.arange(whole.number, whole.number + blocks, device=whole.k_BGQcd.device) * c
    local = turned(whole.k_BGQcd.flatten(2, 3), -begin.repeat_interleave(c), rotary)
    # a block is a row of the batch
    q, k, v = (
        x.transpose(1, 2).flatten(0, 1) for x in (whole.q_BHQcd, whole.k_BGQcd, whole.v_BGQce)
    )
    local = local.unflatten(2, (blocks, c)).transpose(1, 2).flatten(0, 1)
    groups = k.shape[1]
    mean = _weighed(products(q, k, core), v).mean(2, keepdim=True)
    found = _weighed(products(mean.to(q.dtype), local, core), local)
    batch = len(whole.k_BGQcd)
    return found.view(batch, blocks, groups, q.shape[1] // groups * q.shape[3]).transpose(1, 2)


def _weighed(scores_BHNM: Tensor, x_BGMe: Tensor) -> Tensor:
    """Sums [B, H, N, e] by the softmax of scores."""
    groups = x_BGMe.shape[1]
    p = scores_BHNM.softmax(-1).to(x_BGMe.dtype).unflatten(1, (groups, -1)).flatten(2, 3)
    sums: Tensor = p @ x_BGMe
    return sums.view(*scores_BHNM.shape[:3], x_BGMe.shape[3])

"""A relative position bias: one number per head and bucket of the distance key - query.

Raffel et al., T5, arXiv 1910.10683, section 2.1. Which distance falls into which bucket is data
(`RelativeConfig.buckets`), so every rule that depends on the distance alone is this module.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from reattend.mixers.config import RelativeConfig


def relative_bias(
    weight_RH: Tensor, buckets: tuple[int, ...], n: int, m: int, offset: int = 0
) -> Tensor:
    """What is added to the scores, [1, H, N, M].

    Args:
        weight_RH: one row per bucket, one column per head.
        buckets: bucket of the distances -L..L (key - query, in tokens); further ones are L's.
        n, m: queries and keys; query i stands at position `offset` + i, key j at j.
        offset: tokens before the first query.
    """
    device = weight_RH.device
    far = len(buckets) // 2
    keys, queries = torch.arange(m, device=device), torch.arange(n, device=device) + offset
    distance_NM = (keys[None, :] - queries[:, None]).clamp(-far, far) + far
    bucket_NM = torch.tensor(buckets, device=device)[distance_NM]
    bias: Tensor = weight_RH[bucket_NM].permute(2, 0, 1)[None]
    return bias


class RelativeBias(nn.Module):
    """The bias of one block, with its own table `weight` [R, H]."""

    def __init__(self, config: RelativeConfig, heads: int) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.zeros(config.rows, heads))

    def forward(self, n: int, m: int, offset: int = 0) -> Tensor:
        """[1, H, N, M]; see `relative_bias`."""
        return relative_bias(self.weight, self.config.buckets, n, m, offset)

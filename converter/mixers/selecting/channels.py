"""Double Sparsity: tokens by a product over a few channels, held beside the cache as labels.

Yang et al., arXiv 2408.07092. What differs: labels have the cache's dtype, not 4 bits; channels are
per KV head, summed over the query heads that read it.

Layout letters: as in `base`; r channels of a label.
"""

from __future__ import annotations

import torch
from torch import Tensor

from reattend.mixers.config import CoreConfig
from reattend.mixers.scores import own_pattern
from reattend.mixers.selecting.base import Asked, Method, Tokens
from reattend.mixers.selecting.budget import within
from reattend.patterns.selectors import Channels


class ChannelsMethod(Method):
    """See `Channels`.

    Attributes:
        channels_Gr: which numbers of a key its label has, in the normal form's order.
    """

    block, pairwise = 1, True
    channels_Gr: Tensor

    def __init__(self, selector: Channels, core: CoreConfig) -> None:
        super().__init__()
        self.selector = selector
        first = torch.arange(selector.width(core)).expand(core.kv_heads, -1)
        self.register_buffer("channels_Gr", first.clone())

    def calibrate(self, queries_BHNd: Tensor, keys_BGNd: Tensor) -> None:
        """Take the channels with the largest mean |query x key| of one token."""
        group = queries_BHNd.shape[1] // keys_BGNd.shape[1]
        product = (queries_BHNd * keys_BGNd.repeat_interleave(group, 1)).abs().mean((0, 2))
        each = product.unflatten(0, (-1, group)).sum(1)
        best = each.topk(self.channels_Gr.shape[1]).indices.sort(-1).values
        self.channels_Gr = best.to(self.channels_Gr.device)

    def summary(self, k_BGQcd: Tensor) -> Tensor:
        """The label of every key."""
        return _picked(k_BGQcd[..., 0, :], self.channels_Gr)

    def choose(self, asked: Asked) -> Tokens:
        """Products of labels."""
        labels = asked.summaries_BGQw
        if labels is None:
            labels = _picked(asked.k_BGMd, self.channels_Gr)
        channels_Hr = self.channels_Gr.repeat_interleave(asked.core.heads // asked.core.kv_heads, 0)
        i, j = asked.positions()
        scores = asked.scores(_picked(asked.q_BHNd, channels_Hr), labels)
        return Tokens(within(scores, own_pattern(asked.core, i, j), self.selector))


def _picked(x_BGNd: Tensor, channels_Gr: Tensor) -> Tensor:
    """Channels of its own for every head [B, G, N, r]."""
    index = channels_Gr[None, :, None].expand(*x_BGNd.shape[:1], -1, x_BGNd.shape[2], -1)
    return x_BGNd.gather(-1, index)

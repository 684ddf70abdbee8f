"""Estimated softmax weights: positive random features, beside exact weights on chosen blocks.

exp(s q . k) is the mean of exp(w . x - |x|^2 / 2) exp(w . y - |y|^2 / 2) over normal w, with
x = sqrt(s) q, y = sqrt(s) k (Performer, Choromanski et al., arXiv 2009.14794). With B(n) the keys
of the blocks that query n attends to exactly, phi the features,

    y_n = [ sum_(j in B(n)) exp(s_nj) v_j + sum_(j not in B(n)) phi(q_n) . phi(k_j) v_j ]
        / [ the same with values of 1 ]

the second sum as the one over all keys less that over B(n): sparse plus low rank (Scatterbrain,
Chen et al., arXiv 2110.15343). With all keys in B(n) it is empty, and y is softmax attention.

Features are kept as logarithms until the largest is known, so nothing overflows.

Layout letters: B batch, H query heads, G KV heads, N tokens, P blocks of c tokens, T blocks that
are read, d and e key and value widths, f features.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from reattend.kernels.linear_attention import linear_attention
from reattend.kernels.linear_attention.reference import divided, with_ones
from reattend.mixers.everywhere_config import EverywhereConfig
from reattend.mixers.features import widened
from reattend.mixers.top_blocks import best, blocks, gathered, hidden, real_first


class Estimated(nn.Module):
    """Directions of the features, of each KV head, and what is computed with them."""

    def __init__(self, config: EverywhereConfig, heads: int, width: int, features: int) -> None:
        super().__init__()
        self.config = config
        self.weight_Gfd = nn.Parameter(torch.zeros(heads, features, width))

    def start(self) -> None:
        """Normal directions, orthogonal in groups of d, from a generator of their own."""
        heads, features, width = self.weight_Gfd.shape
        generator = torch.Generator().manual_seed(0)
        groups = -(-features // width)
        drawn = torch.randn(heads, groups, width, width, generator=generator, dtype=torch.float64)
        q, r = torch.linalg.qr(drawn)  # with the signs of r, every direction is equally likely
        q = q * r.diagonal(dim1=-2, dim2=-1).sign()[..., None, :]
        turned = q.flatten(1, 2)[:, :features]
        shape = (heads, features, width)
        length = torch.randn(shape, generator=generator, dtype=torch.float64).norm(dim=-1)
        with torch.no_grad():
            self.weight_Gfd.copy_(turned * length[..., None])

    def forward(
        self, q_BHNd: Tensor, k_BGNd: Tensor, v_BGNe: Tensor, scale: float, valid_BN: Tensor | None
    ) -> Tensor:
        """Outputs [B, H, N, e], in float32 or wider."""
        repeat = q_BHNd.shape[1] // k_BGNd.shape[1]
        tokens = real_first(valid_BN)
        q, k, v = (widened(tokens.sorted(x)) for x in (q_BHNd, k_BGNd, v_BGNe))
        (n, size), count_B = (q.shape[2], self.config.sparse_block), tokens.count_B
        k_all, v_all = (x.repeat_interleave(repeat, 1) for x in (k, with_ones(v)))
        whole = self.config.sparse_top >= 1
        if not whole:
            log_q, log_k = self._log(q, scale, repeat), self._log(k_all, scale, repeat)
            if count_B is not None:
                gone = torch.arange(n, device=q.device) >= count_B[:, None]
                log_k = log_k.masked_fill(gone[:, None, :, None], torch.finfo(q.dtype).min)
            top_q = log_q.detach().amax(-1, keepdim=True)
            top_k = log_k.detach().amax((-2, -1), keepdim=True)
            f_q, f_k = (log_q - top_q).exp(), (log_k - top_k).exp()
            far = linear_attention(f_q, f_k, v_all, bidirectional=True)[0]
            top = top_q + top_k
        if not self.config.sparse_top:
            return tokens.back(divided(far))
        found = best(q, k, self.config, count_B)
        near_k, near_v = (gathered(blocks(x, size), found) for x in (k_all, v_all))
        none = hidden(found, size, n, count_B)
        scores = blocks(q, size) @ near_k.transpose(-1, -2) * scale
        scores = scores.masked_fill(none, torch.finfo(scores.dtype).min)
        most = scores.detach().amax(-1, keepdim=True)
        if whole:
            sums = (scores - most).exp() @ near_v
        else:
            top_P = blocks(top, size)
            most = torch.maximum(most, top_P)
            near_f = gathered(blocks(f_k, size), found)
            counted = blocks(f_q, size) @ near_f.transpose(-1, -2)
            exact = (scores - most).exp() - counted.masked_fill(none, 0.0) * (top_P - most).exp()
            sums = exact @ near_v + blocks(far, size) * (top_P - most).exp()
        return tokens.back(divided(sums.flatten(2, 3)[:, :, :n]))

    def _log(self, x_BHNd: Tensor, scale: float, repeat: int) -> Tensor:
        """Logarithms of the features [B, H, N, f]."""
        weight = self.weight_Gfd.to(x_BHNd.dtype).repeat_interleave(repeat, 0)
        x = x_BHNd * scale**0.5
        log: Tensor = x @ weight.transpose(-1, -2) - x.square().sum(-1, keepdim=True) / 2
        return log - torch.tensor(weight.shape[1], dtype=x.dtype).log() / 2

"""The softmax part of linear attention with a window: sums over a band of keys.

Layout letters: B batch, G KV heads, r query heads of each, L places, T blocks of C places, d key
width, c columns of the values.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from reattend.mixers.linear_config import WindowForm

#: Places of a block, at least: narrow windows share one.
BLOCK = 32


def first_visible(count: Tensor, window: int, form: WindowForm) -> Tensor:
    """The first place that the last of `count` tokens sees; 0 tokens: 0."""
    if form == "sliding" or not window:
        return (count - window).clamp_min(0)
    return ((count - 1).clamp_min(0) // window * window - window).clamp_min(0)


def band(
    q_BHLd: Tensor, k_BGLd: Tensor, v_BGLc: Tensor, scale: float, window: int, form: WindowForm
) -> Tensor:
    """``sum_j exp(s_nj - max_j s_nj) v_j`` over the window of each query, [B, H, L, c].

    Args:
        q_BHLd, k_BGLd, v_BGLc: in order of place from a whole window on, all in one dtype.
        scale: of the scores.
        window: w, more than 0.
        form: see `LinearConfig`.
    """
    groups, length = k_BGLd.shape[1], q_BHLd.shape[2]
    size = max(window, BLOCK) if form == "sliding" else -(-BLOCK // window) * window
    size = min(size, length)
    count = -(-length // size)
    fill = (0, 0, 0, count * size - length)
    q, k, v = (F.pad(x, fill).unflatten(2, (count, size)) for x in (q_BHLd, k_BGLd, v_BGLc))
    q = q.unflatten(1, (groups, -1))
    shift = 0
    if count > 1:
        shift = size
        k, v = (torch.cat([F.pad(x, (0, 0, 0, 0, 1, 0))[:, :, :-1], x], 3) for x in (k, v))
    a = torch.arange(size, device=q.device)[:, None]
    b = torch.arange(-shift, size, device=q.device)[None]
    low = a - window + 1 if form == "sliding" else (a // window - 1) * window
    seen = ((b >= low) & (b <= a)).expand(count, -1, -1).clone()
    seen[0, :, :shift] = False  # nothing stands before the first block
    scores = q @ k.transpose(-1, -2)[:, :, None] * scale
    p = shifted_exp(scores.masked_fill(~seen, float("-inf")))
    y: Tensor = (p @ v[:, :, None]).flatten(3, 4)[..., :length, :]
    return y.flatten(1, 2)


def shifted_exp(scores: Tensor) -> Tensor:
    """exp of what is left of scores when each row's largest is taken away."""
    return (scores - scores.detach().amax(-1, keepdim=True)).exp()

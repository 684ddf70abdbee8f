"""Read ALiBi off a mask's values: a slope per head times the position of the key.

Press et al., arXiv 2108.12409. What is added to a whole row does not matter to a softmax, so
slope x (key - query), slope x key and slopes counted from the last key are one record.
"""

from __future__ import annotations

import torch
from torch import Tensor

from reattend.mixers.scores import shown
from reattend.passes.find.reasons import NotUnderstood
from reattend.spec import Alibi


def read_alibi(mask: Tensor, heads: int) -> Alibi:
    """The slopes of an additive mask without weights.

    Args:
        mask: its values in float64, broadcasting to [B, H, N, M], N = M > 2.
        heads: H.

    Raises:
        NotUnderstood: it is not linear in the position of the key, or differs between rows.
    """
    other = NotUnderstood("the mask adds a constant bias that is not linear in key position")
    while mask.dim() < 4:
        mask = mask[None]
    if mask.shape[1] not in (1, heads) or mask.shape[-1] < 3:
        raise other
    m = mask.shape[-1]
    mask = mask.expand(-1, heads, m, m)
    if not bool((mask == mask[:1]).all()):
        raise NotUnderstood("the mask adds a bias that differs between rows of the batch")
    added_HNM, seen_HNM = mask[0], shown(mask)[0]
    row = int(seen_HNM[0].sum(-1).argmax())
    keys = torch.nonzero(seen_HNM[0, row]).flatten()
    if len(keys) < 3:
        raise other
    first, last = int(keys[0]), int(keys[-1])
    slopes_H = (added_HNM[:, row, last] - added_HNM[:, row, first]) / (last - first)
    rest_HNM = added_HNM - slopes_H[:, None, None] * torch.arange(m)
    level_HN1 = torch.where(seen_HNM, rest_HNM, -torch.inf).amax(-1, keepdim=True)
    gap = torch.where(seen_HNM, (rest_HNM - level_HN1).abs(), 0.0).amax()
    if float(gap) > 1e-12 * m * max(1.0, float(added_HNM[seen_HNM].abs().max())):
        raise other
    return Alibi(tuple(slopes_H.tolist()))

"""From scores to what is chosen: top-k, a share, top-p or a threshold.

Layout letters: Q units (blocks or tokens) that are ranked.
"""

from __future__ import annotations

import torch
from torch import Tensor

from reattend.patterns.selector import Budgeted


def within(
    scores: Tensor, allowed: Tensor, budget: Budgeted, forced: Tensor | None = None
) -> Tensor:
    """Which units are chosen, bool in the shape of the scores.

    Args:
        scores: [..., Q], higher is better.
        allowed: which units may be chosen; broadcasts. The others take no part in any ranking.
        budget: how many.
        forced: units that are chosen in any case, and count; broadcasts.
    """
    allowed = allowed.expand(scores.shape)
    scores = scores.masked_fill(~allowed, float("-inf"))
    sure = torch.zeros_like(allowed) if forced is None else forced.expand(scores.shape) & allowed
    if budget.threshold is not None:
        return (scores.softmax(-1) >= budget.threshold) & allowed | sure
    if budget.topp is not None:
        if budget.topp >= 1:
            return allowed.clone()
        if budget.measure == "softmax":
            return _nucleus(scores.softmax(-1), budget.topp) & allowed | sure
        p = _above_least(scores, allowed)
        left = budget.topp - p.masked_fill(~sure, 0).sum(-1, keepdim=True)
        return _nucleus(p.masked_fill(sure, 0), left) & allowed | sure
    ranked = scores.masked_fill(sure, float("inf"))
    if budget.topk is not None:
        best = ranked.topk(min(budget.topk, scores.shape[-1]), sorted=False).indices
        return torch.zeros_like(allowed).scatter(-1, best, True) & allowed | sure
    assert budget.ratio is not None
    count = (allowed.sum(-1, keepdim=True) * budget.ratio).ceil()
    order = ranked.argsort(dim=-1, descending=True, stable=True)
    taken = torch.arange(scores.shape[-1], device=scores.device) < count
    return torch.zeros_like(allowed).scatter(-1, order, taken) & allowed | sure


def _nucleus(shares: Tensor, least: Tensor | float) -> Tensor:
    """The fewest units whose shares sum to at least so much."""
    p, order = shares.sort(-1, descending=True)
    taken = p.cumsum(-1) - p < least
    return torch.zeros_like(taken).scatter(-1, order, taken)


def _above_least(scores: Tensor, allowed: Tensor) -> Tensor:
    """Shares of how far each score is above the least (VMoBA, arXiv 2506.23858)."""
    least = scores.masked_fill(~allowed, float("inf")).amin(-1, keepdim=True)
    above = (scores - least).masked_fill(~allowed, 0)
    return above / above.sum(-1, keepdim=True).clamp_min(torch.finfo(above.dtype).tiny)

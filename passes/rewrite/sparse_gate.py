"""What a row teaches a gate: the largest probability in every block of keys.

SeerAttention, Gao et al., arXiv 2410.13276: the target of a query is its largest probability in
every block, over the heads that share them, normalised; the loss is KL(target || softmax of the
gate). What differs: a query's own block takes no part (it is always read).

Layout letters: as in `mixers/selecting/gate.py`; n tokens of a text, R queries that have a choice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from reattend.mixers.selecting.base import reach
from reattend.mixers.selecting.gate import GateMethod, pooled
from reattend.mixers.sparse import SparseAttention
from reattend.passes.rewrite.sparse_view import viewed


@dataclass(frozen=True)
class GateLesson:
    """The queries of a text that have a choice, pooled keys [1, G, Q, 3 d], what to learn, and
    which blocks are ranked.
    """

    measure: ClassVar[str] = "kl"
    unit: ClassVar[str] = "nats"
    q_1HNd: Tensor
    pooled_1GQd: Tensor
    target_GNQ: Tensor
    ranked_NQ: Tensor

    def loss(self, student: GateMethod) -> Tensor:
        """KL(target || gate), mean over queries and KV heads."""
        scores = student.scores(self.q_1HNd, self.pooled_1GQd @ student.key_Gdw)[0]
        return divergence(scores, self.target_GNQ, self.ranked_NQ)


def divergence(scores_GNQ: Tensor, target_GNQ: Tensor, ranked_NQ: Tensor) -> Tensor:
    """KL(target || softmax of the scores of what is ranked), mean over queries and KV heads."""
    log = scores_GNQ.masked_fill(~ranked_NQ, float("-inf")).log_softmax(-1)
    # what is not ranked has log -inf and target 0, and must not reach the gradient
    log = log.masked_fill(~ranked_NQ, 0.0)
    return (torch.xlogy(target_GNQ, target_GNQ) - target_GNQ * log).sum(-1).mean()


@torch.no_grad()
def lesson(
    mixer: SparseAttention, x_ND: Tensor, kv_heads: tuple[int, ...], method: GateMethod
) -> GateLesson | None:
    """None: no query of the text has two blocks to choose from."""
    block = method.block
    n, core, device = len(x_ND), mixer.config.core, mixer.q_proj.weight.device
    # the blocks before a query's own that it can reach at all
    i, whole = torch.arange(n, device=device)[:, None], n // block
    earlier = torch.arange(whole, device=device) < i // block
    ranked = earlier & reach(core, i, block, whole, n)
    rows = (ranked.sum(-1) > 1).nonzero()[:, 0]
    if len(rows) == 0:
        return None
    seen = viewed(mixer, x_ND, kv_heads)
    target = seen.k_GNd.new_zeros(len(kv_heads), n, whole)
    for g, some, p in seen.probabilities():
        best = p[..., : whole * block].amax(0).unflatten(-1, (whole, block)).amax(-1)
        best = best * ranked[some]
        tiny = torch.finfo(best.dtype).tiny
        target[g, some] = best / best.sum(-1, keepdim=True).clamp_min(tiny)
    keys = pooled(seen.k_GNd[None, :, : whole * block].unflatten(2, (whole, block)))
    return GateLesson(seen.q_HNd[None, :, rows], keys, target[:, rows], ranked[rows])

"""What a row teaches a score of values: how much attention a token gets from all that follow.

The scores of `mixers/selecting/values.py` do not depend on the query, so KL(target || softmax of
the scores) of all queries together needs of the targets only their sums by token and their entropy.
The target of a query is what the heads of a group pay to the tokens before it, normalised. The
paper trains its scores with the whole model from scratch (Shi et al., arXiv 2508.02124).

Layout letters: as there; n tokens of a text.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from reattend.mixers.config import CoreConfig
from reattend.mixers.scores import own_pattern
from reattend.mixers.selecting.values import ValuesMethod
from reattend.mixers.sparse import SparseAttention
from reattend.passes.rewrite.sparse_view import viewed


@dataclass(frozen=True)
class ValuesLesson:
    """Values of a text, sums of the targets by token, and their entropy in nats."""

    measure: ClassVar[str] = "kl"
    unit: ClassVar[str] = "nats"
    v_1GNe: Tensor
    paid_GN: Tensor
    entropy: Tensor
    core: CoreConfig

    def loss(self, student: ValuesMethod) -> Tensor:
        """KL(target || scores), mean over queries that have a choice and KV heads."""
        scores_GN, ranked_NN = student.scores(self.v_1GNe)[0], ranked(self.core, self.paid_GN)
        rows = ranked_NN.any(-1)
        each = scores_GN[:, None].masked_fill(~ranked_NN[rows], float("-inf")).logsumexp(-1)
        cross = each.sum() - (self.paid_GN * scores_GN).sum()
        return (cross - self.entropy) / each.numel()


def ranked(core: CoreConfig, like_GN: Tensor) -> Tensor:
    """Which tokens each query ranks [N, N]: those before it, if it sees more than one."""
    i = torch.arange(like_GN.shape[1], device=like_GN.device)
    seen = own_pattern(core, i[:, None], i) & (i[:, None] != i)
    return seen & (seen.sum(-1, keepdim=True) > 1)


@torch.no_grad()
def lesson(
    mixer: SparseAttention, x_ND: Tensor, kv_heads: tuple[int, ...], method: ValuesMethod
) -> ValuesLesson | None:
    """None: no query has two tokens before it."""
    seen = viewed(mixer, x_ND, kv_heads)
    paid = seen.k_GNd.new_zeros(len(kv_heads), len(x_ND))
    mine, entropy = ranked(seen.core, paid), paid.new_zeros(())
    if not bool(mine.any()):
        return None
    for g, rows, p in seen.probabilities():
        target = p.sum(0) * mine[rows]
        target = target / target.sum(-1, keepdim=True).clamp_min(torch.finfo(p.dtype).tiny)
        paid[g] += target.sum(0)
        entropy -= torch.xlogy(target, target).sum()
    return ValuesLesson(seen.v_GNe[None], paid, entropy, seen.core)

"""What a row teaches about where chunks end: how unlike later queries look at both sides of a gap.

DHSA, Xiong et al., arXiv 2510.24606, first release: the mean attention of all later queries to the
`window` tokens before a gap and to those behind it; the target is sigmoid(4 log(larger / smaller)),
the loss a focal binary cross-entropy. What differs: attention is that of one KV head's group.

Layout letters: as in `mixers/selecting/segments.py`; n tokens of a text.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from reattend.mixers.selecting.segments import STEEP, SegmentsMethod
from reattend.mixers.sparse import SparseAttention
from reattend.passes.rewrite.sparse_view import viewed

FOCUS, SMALL = 2.0, 1e-6


@dataclass(frozen=True)
class BoundaryLesson:
    """Keys of a text, and the targets of its inner gaps, the first behind token 2 u - 1."""

    measure: ClassVar[str] = "bce"
    unit: ClassVar[str] = "nats"
    k_1GNd: Tensor
    target_GT: Tensor

    def loss(self, student: SegmentsMethod) -> Tensor:
        """Mean over gaps and KV heads."""
        u = student.selector.window
        logit = student.logits(self.k_1GNd)[0, :, u : u + self.target_GT.shape[1]]
        p, target = logit.sigmoid(), self.target_GT
        apart = binary_cross_entropy_with_logits(logit, target, reduction="none")
        return ((1 - p * target - (1 - p) * (1 - target)) ** FOCUS * apart).mean()


@torch.no_grad()
def lesson(
    mixer: SparseAttention, x_ND: Tensor, kv_heads: tuple[int, ...], method: SegmentsMethod
) -> BoundaryLesson | None:
    """None: the text has no inner gap."""
    n, u = len(x_ND), method.selector.window
    if n <= 4 * u:
        return None
    seen = viewed(mixer, x_ND, kv_heads)
    gaps = torch.arange(2 * u - 1, n - 2 * u, device=seen.k_GNd.device)
    targets = []
    paid_NN = seen.k_GNd.new_zeros(n, n)
    for _, rows, p in seen.probabilities():
        paid_NN[rows] = p.mean(0)
        if rows.stop == n:
            # of the queries from a row on, to the keys before a column
            sums = paid_NN.flip(0).cumsum(0).flip(0).cumsum(1)
            sums = torch.nn.functional.pad(sums, (1, 0))[gaps + u]
            begin, middle, end = (sums.gather(1, (gaps + 1 + t)[:, None])[:, 0] for t in (-u, 0, u))
            ratio = (torch.maximum(middle - begin, end - middle) + SMALL) / (
                torch.minimum(middle - begin, end - middle) + SMALL
            )
            targets.append((STEEP * (ratio + SMALL).log()).sigmoid())
    return BoundaryLesson(seen.k_GNd[None], torch.stack(targets))

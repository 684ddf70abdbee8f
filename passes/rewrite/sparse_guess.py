"""What an image teaches a low-rank guess: the attention of every query, by squared error.

Sparsifiner, Wei et al., arXiv 2303.13755 (its attention reconstruction; the paper then trains the
whole model with what is chosen). Probabilities are formed anew at every step: all of them would be
many times the queries and keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from reattend.mixers.selecting.base import off_grid
from reattend.mixers.selecting.low_rank import LowRankMethod
from reattend.mixers.sparse import SparseAttention
from reattend.passes.rewrite.sparse_view import View, viewed


@dataclass(frozen=True)
class GuessLesson:
    """An image, as the heads see it."""

    measure: ClassVar[str] = "error"
    unit: ClassVar[str] = "squared, per query"
    seen: View

    def loss(self, student: LowRankMethod) -> Tensor:
        """Sum over keys, mean over the image's queries and heads."""
        s, seen = student.selector, self.seen
        guessed = student.guess(seen.q_HNd[None], seen.k_GNd[None])[0]
        guessed = guessed.unflatten(0, (seen.core.kv_heads, -1))
        total, image = guessed.new_zeros(()), slice(s.text_before, s.tokens - (s.text_after or 0))
        for g, rows, p in seen.probabilities():
            mine = slice(max(image.start - rows.start, 0), max(image.stop - rows.start, 0))
            total = total + (guessed[g][:, rows] - p)[:, mine].square().sum()
        mean: Tensor = total / ((image.stop - image.start) * seen.core.heads)
        return mean


@torch.no_grad()
def lesson(
    mixer: SparseAttention, x_ND: Tensor, kv_heads: tuple[int, ...], method: LowRankMethod
) -> GuessLesson:
    """Of an image.

    Raises:
        ArgumentError: it has another size.
    """
    s = method.selector
    if len(x_ND) != s.tokens:
        raise off_grid(s.kind, s.tokens, len(x_ND))
    return GuessLesson(viewed(mixer, x_ND, kv_heads))

"""Blocks that show what their heads do while the model runs, for finders that look at attention.

Probabilities are formed for one KV head and a strip of queries at a time, never [N, N] for all
heads. Layout letters: B rows, N tokens, H query heads, G KV heads, r query heads of a KV head, n
queries of a strip.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor

from reattend.errors import PlanError
from reattend.mixers.base import Context, Mixer
from reattend.mixers.config import CoreConfig
from reattend.mixers.dense import DenseAttention
from reattend.mixers.scores import per_head, probabilities, visibility
from reattend.passes.rewrite.base import Answered, Measure, Subject
from reattend.passes.rewrite.sparse_build import like

#: numbers of one strip's probabilities
STRIP = 1 << 20


class Look(NamedTuple):
    """One call of a block: rotated queries [B, H, N, d], keys [B, G, N, d], values [B, G, N, e]."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    sinks: Tensor | None
    core: CoreConfig

    def strips(self, head: int, block: int = 1) -> Iterator[tuple[slice, Tensor]]:
        """Queries, and what they give to each key [B, r, n, N], of the query heads of a KV head.

        Args:
            head: the KV head.
            block: strips end at multiples of it.
        """
        rows, length, group = len(self.q), self.q.shape[2], self.group(head)
        q, k = self.q[:, group], self.k[:, head : head + 1]
        sinks = per_head(self.sinks)
        seen = visibility(self.mask, self.core, length, length, q)
        if seen is not None and seen.shape[1] > 1:  # a mask for every head
            seen = seen[:, group]
        step = max(1, STRIP // (rows * q.shape[1] * length * block)) * block
        for start in range(0, length, step):
            here = slice(start, min(start + step, length))
            shown = seen if seen is None or seen.shape[2] == 1 else seen[:, :, here]
            own = None if sinks is None else sinks[group]
            yield here, probabilities(q[:, :, here], k, self.core, shown, own)

    def group(self, head: int) -> slice:
        """The query heads that read a KV head."""
        each = self.core.heads // self.core.kv_heads
        return slice(head * each, (head + 1) * each)


class Watched(DenseAttention):
    """Computes what the block did, and hands every call to `watch` with its output [B, H, N, e].

    `watch` returns the output that the model goes on with.
    """

    watch: Callable[[Look, Tensor], Tensor]

    def attend(
        self, query: Any, rows: Any, ctx: Context, span: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        """See `Mixer.attend`."""
        y = super().attend(query, rows, ctx, span)
        q, (k, v) = query[0], rows
        look = Look(q.detach(), k.detach(), v.detach(), ctx.mask, self.sinks, self.config.core)
        return self.watch(look, y)


def watched(dense: DenseAttention, watch: Callable[[Look, Tensor], Tensor]) -> Watched:
    """A block around the modules of `dense`."""
    made = like(dense, Watched)
    made.watch = watch
    return made


@contextmanager
def answering(
    asked: str, sites: Sequence[Subject], measure: Measure, mixers: Mapping[str, Mixer],
    length: int, rows: int, *, where: str = "to: sparse",
    instead: str = "use finder: search, or name the heads that stay in heads_full",
) -> Iterator[Iterator[Answered]]:  # fmt: skip
    """`Measure.answers`, for an option (`asked`) that cannot do without.

    Raises:
        PlanError: the model is not a causal language model that runs with its blocks replaced.
    """
    told = measure.answers(mixers, length, rows)
    if told is None or not all(s.dense.config.core.causal for s in sites):
        raise PlanError(
            f"{asked} watches a causal language model continue text that repeats itself",
            where=where,
            why="this model has no logits, sees what comes later, or cannot run with its blocks "
            "replaced",
            next_step=instead,
        )
    with told as runs:
        yield runs

"""The retrieval-head score: how often a head looks at the very token that the model then copies.

Wu et al., arXiv 2404.15574. On rows whose second half repeats their first, a head scores where the
key it gives most to lies at the source of the next token and the model emits that token. The share
of the copied tokens for which it does is its score; a KV head has the best of its query heads'.
Nothing is trained: one run per row. What differs: a key a few tokens from the source counts too,
because the layers before may have carried the token there (on `recall-llama` copying heads look
nine tokens behind the source, and at the source itself in 4 of 1,719 cases, which ranks nothing).
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from reattend.errors import PlanError
from reattend.passes.rewrite.base import Answered, Measure, Subject
from reattend.passes.rewrite.repeats import sources
from reattend.passes.rewrite.sparse_watch import Look, answering, watched

#: Rows that are watched; "few samples suffice" (Wu et al., section 2).
ROWS = 16
#: Tokens from the source that count, at most and as a share of the row: chance finds one in 32.
NEAR, NEAR_SHARE = 16, 1 / 64


def retrieval(sites: list[Subject], measure: Measure) -> dict[str, Tensor]:
    """The score of every KV head, [G] by path, 0 to 1.

    Raises:
        PlanError: no causal language model, or it copies nothing.
    """
    looked: dict[str, Tensor] = {}

    def watch(path: str, look: Look, y: Tensor) -> Tensor:
        looked[path] = most(look)
        return y

    blocks = {s.path: watched(s.dense, partial(watch, s.path)) for s in sites}
    hits = {s.path: torch.zeros(s.dense.config.core.heads) for s in sites}
    copied = 0
    told = answering("finder: retrieval", sites, measure, blocks, measure.length, ROWS)
    with told as runs, torch.no_grad():
        for run in runs:
            asked = emitted(run)
            copied += len(asked)
            before = sources(len(run.ids_N)).to(asked.device)
            source = before[asked + 1 - len(before)]
            near = min(NEAR, int(NEAR_SHARE * len(run.ids_N)))
            for path, top_HN in looked.items():
                hits[path] += ((top_HN[:, asked] - source).abs() <= near).sum(-1).cpu()
    if not copied:
        raise PlanError(
            "finder: retrieval needs a model that copies: no token of repeated text was told right",
            where="to: sparse",
            next_step="use finder: search or instant, or longer rows (calibrate.seq_len)",
        )
    return {
        s.path: (hits[s.path] / copied).unflatten(0, (s.dense.config.core.kv_heads, -1)).amax(-1)
        for s in sites
    }


def most(look: Look) -> Tensor:
    """The key that each query gives most to [H, N], of the first row."""
    found = [
        torch.cat([a_BrnN[0].argmax(-1) for _, a_BrnN in look.strips(head)], -1)
        for head in range(look.core.kv_heads)
    ]
    return torch.cat(found)


def emitted(run: Answered) -> Tensor:
    """Positions in the second half after which the original tells the copied token."""
    return run.place_K[run.own_K == run.ids_N[run.place_K + 1]]

"""Does what was trained beat what needs no training? Attention kept, beside vertical-slash heads.

Vertical-slash heads (MInference, arXiv 2407.02490) choose by the last queries of the text at hand.
On rows that were not trained on they are given columns and diagonals, equally many, until they read
at least as many keys; what counts is the share of the block's own attention that lies on keys that
are read, mean over queries and query heads.

Layout letters: n tokens of a row, H query heads.
"""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from torch import Tensor

from reattend.mixers.scores import own_pattern
from reattend.mixers.selecting.base import Asked, Method
from reattend.mixers.selecting.vertical_slash import VerticalSlashMethod
from reattend.mixers.sparse import SparseAttention
from reattend.mixers.sparse_config import HeadClass
from reattend.passes.rewrite.sparse_view import View, viewed, width_of
from reattend.patterns.pattern import HeadPattern
from reattend.patterns.selectors import VerticalSlash

#: Rows that are compared, and tokens of each: masks of all heads are formed.
ROWS, TOKENS = 2, 512
#: what evidence has where it does not; `reattend.report.headline` looks for it
BEHIND = "does_not_beat"


class Kept(NamedTuple):
    """Shares of the block's attention, and of its keys."""

    attention: float
    keys: float


def compared(
    mixer: SparseAttention, texts: list[Tensor], heads: HeadClass, method: Method
) -> tuple[Kept, Kept] | None:
    """What the heads keep, and vertical-slash heads that read as much; None: not causal.

    Args:
        mixer: the block.
        texts: rows of its input [n, D] that the method was not trained on.
        heads: the method's class; the terms of its pattern are read too.
        method: as trained.
    """
    if not mixer.config.core.causal or not texts:
        return None
    method = copy.deepcopy(method).to(width_of(mixer))
    found: list[tuple[Kept, Kept]] = []
    for x_ND in texts[:ROWS]:
        seen = viewed(mixer, x_ND[:TOKENS], heads.kv_heads)
        ours = _read(seen, method, heads.pattern)
        low, high = 1, len(x_ND[:TOKENS])
        while low < high:
            middle = (low + high) // 2
            if _read(seen, lines(middle)).sum() < ours.sum():
                low = middle + 1
            else:
                high = middle
        found.append((_kept(seen, ours), _kept(seen, _read(seen, lines(low)))))
    return _mean([one for one, _ in found]), _mean([other for _, other in found])


def stated(ours: Kept, theirs: Kept) -> dict[str, str]:
    """For the report."""
    if ours.keys == 1.0:
        said = "nothing is left out of rows this short: raise calibrate.seq_len, or read less"
        return {"attention_kept": f"not compared, {said} (looked at: {TOKENS} tokens at most)"}
    words = (
        f"{ours.attention:.4f} of the attention on {ours.keys:.3f} of the keys; untrained "
        f"vertical-slash: {theirs.attention:.4f} on {theirs.keys:.3f}"
    )
    behind = {} if ours.attention > theirs.attention else {BEHIND: "untrained vertical-slash"}
    return {"attention_kept": words, **behind}


def lines(size: int) -> VerticalSlashMethod:
    """So many columns and diagonals; the first and the nearest are among them, as released."""
    return VerticalSlashMethod(
        VerticalSlash(
            kind="vertical-slash", columns=size, slashes=size, first_columns=min(4, size),
            last_slashes=min(16, size),
        )
    )  # fmt: skip


@torch.no_grad()
def _read(seen: View, method: Method, pattern: HeadPattern | None = None) -> Tensor:
    """Which keys every query reads [H, n, n]: what is chosen, itself, and a pattern's terms."""
    asked = Asked(seen.q_HNd[None], seen.k_GNd[None], seen.core, v_BGMe=seen.v_GNe[None])
    i, j = asked.positions()
    mask = method.choose(asked).mask()[0]
    terms = (i == j) if pattern is None else pattern.sees(i, j, seen.core)
    read: Tensor = (mask | terms) & own_pattern(seen.core, i, j)
    return read


def _mean(found: list[Kept]) -> Kept:
    attention, keys = (sum(x) / len(found) for x in zip(*found, strict=True))
    return Kept(attention, keys)


def _kept(seen: View, read_HNN: Tensor) -> Kept:
    group = seen.core.heads // seen.core.kv_heads
    paid = kept = 0.0
    for g, rows, p_JRn in seen.probabilities():
        paid += float(p_JRn.double().sum())
        kept += float((p_JRn * read_HNN[g * group : (g + 1) * group, rows]).double().sum())
    n, i = read_HNN.shape[1], torch.arange(read_HNN.shape[1], device=read_HNN.device)
    every = int(own_pattern(seen.core, i[:, None], i[None]).expand(n, n).sum()) * seen.core.heads
    return Kept(kept / paid, int(read_HNN.sum()) / every)

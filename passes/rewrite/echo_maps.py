"""How alike two layers attend: what two heads give to the same keys, and which head matches which.

The likeness of two heads is the mean over queries of sum over keys of min(p, p'), 1 for the same
weights and 0 where they share no key: one less their total variation. Queries are a sample of every
row's, so all layers' weights fit into memory together.

Layout letters: B rows, H query heads, G KV groups, n sampled queries, N keys.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import permutations
from typing import NamedTuple

import torch
from torch import Tensor

from reattend.errors import PlanError
from reattend.mixers.config import CoreConfig
from reattend.passes.rewrite.base import Measure, Subject
from reattend.passes.rewrite.sparse_watch import Look, watched

#: queries of a row that are looked at
QUERIES = 32
#: heads of a group, and groups, up to which every order is tried
TRIED = 6


class Match(NamedTuple):
    """A follower's KV groups and query heads in its leader's order, and how alike they attend."""

    alike: float
    groups: tuple[int, ...]
    heads: tuple[int, ...]


#: of a leader and a follower, by their places
Likeness = Callable[[int, int], Match]


def likeness(sites: Sequence[Subject], measure: Measure) -> Likeness:
    """Of any two sites, on calibration rows of the original.

    Raises:
        PlanError: the model cannot be run with its blocks watched.
    """
    seen: dict[str, list[Tensor]] = {s.path: [] for s in sites}
    blocks = {s.path: watched(s.dense, partial(_look, seen[s.path])) for s in sites}
    trial = measure.trial(blocks)
    if trial is None:
        raise PlanError(
            "who follows is measured in the model",
            where="to: echo",
            why="this one cannot run with its blocks replaced",
            next_step="convert a model whose attention blocks are modules of their own",
        )
    with torch.no_grad(), trial as gap:
        gap()
    maps = [seen[s.path][0] for s in sites]

    def alike(leader: int, follower: int) -> Match:
        overlap_HH = overlaps(maps[leader], maps[follower])
        return matched(overlap_HH, sites[leader].dense.config.core)

    return alike


def _look(into: list[Tensor], look: Look, y_BHNe: Tensor) -> Tensor:
    """Keep the attention [B, H, n, N] of some queries of one call."""
    length = look.q.shape[2]
    picked = torch.arange(length - 1, -1, -max(1, length // QUERIES)).flip(0)
    heads = []
    for group in range(look.core.kv_heads):
        strips = [p for _, p in look.strips(group)]
        heads.append(torch.cat(strips, 2)[:, :, picked].float().cpu())
    into.append(torch.cat(heads, 1))
    return y_BHNe


def overlaps(leader_BHnN: Tensor, follower_BHnN: Tensor) -> Tensor:
    """Likeness [H, H] of every head of one block with every head of another."""
    rows = []
    for head in leader_BHnN.unbind(1):
        least = torch.minimum(head[:, None], follower_BHnN).sum(-1)  # [B, H, n]
        rows.append(least.double().mean((0, 2)))
    return torch.stack(rows)


def matched(overlap_HH: Tensor, core: CoreConfig) -> Match:
    """The order of a follower's heads, groups whole, that is most like its leader's."""
    groups, each = core.kv_heads, core.heads // core.kv_heads
    blocks = overlap_HH.unflatten(1, (groups, each)).unflatten(0, (groups, each))
    inner = [[assigned(blocks[a, :, b]) for b in range(groups)] for a in range(groups)]
    worth = torch.tensor([[total for total, _ in row] for row in inner], dtype=torch.float64)
    total, order = assigned(worth)
    heads = [b * each + i for a, b in enumerate(order) for i in inner[a][b][1]]
    return Match(total / core.heads, tuple(order), tuple(heads))


def assigned(worth_nn: Tensor) -> tuple[float, list[int]]:
    """One column for each row, of large sum: the best of all for few, else the largest first."""
    n = len(worth_nn)
    if n <= TRIED:
        value = worth_nn.tolist()
        best = max(permutations(range(n)), key=lambda p: sum(value[i][j] for i, j in enumerate(p)))
        return float(sum(value[i][j] for i, j in enumerate(best))), list(best)
    left, order, total = worth_nn.clone(), [0] * n, 0.0
    for _ in range(n):
        row, column = divmod(int(left.argmax()), n)
        order[row] = column
        total += float(worth_nn[row, column])
        left[row], left[:, column] = -torch.inf, -torch.inf
    return total, order

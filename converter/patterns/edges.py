"""The tiles of blocks at an edge of a pattern: of blocks that are alike, one is worked out.

Two pairs of blocks are alike where the same keys of the block are seen by every query, and where
what moves on with the query lies alike in both: equally far apart, and equally far into its period.

Layout letters: E entries at an edge, P query blocks, Q key blocks, R ranges.
"""

from __future__ import annotations

from math import lcm

import torch
from torch import Tensor

from reattend.kernels.sparse_attention.mask import pack
from reattend.patterns.listing import Problem
from reattend.patterns.terms import Term

#: pairs of blocks looked at token by token at once
_AT_ONCE = 1024
#: ends of ranges looked at at once: 32 MiB
_NUMBERS = 1 << 22


def alike(problem: Problem, row: Tensor, col: Tensor, moving: Tensor, word: Tensor) -> Tensor:
    """A number per entry; entries of one number have the same tile [E].

    Args:
        problem: the pattern and the blocks.
        row: query block of each entry.
        col: key block of each entry.
        moving: whether anything that moves on with the query ends in the entry.
        word: number of what is seen by key.
    """
    q = problem.blocks
    steps = [t.repeats for t in problem.pattern.terms if not t.by_key]
    steps.append(problem.core.chunk if problem.core.pattern == "chunked" else 1)
    known = [step for step in steps if step is not None]
    if len(known) == len(steps):
        period = min(lcm(*known, problem.block) // problem.block, q)  # in blocks
        place = (row - col + q) * period + row % period
    else:
        period, place = q, row * q + col
    return word * (2 * q * period) + torch.where(moving, 1 + place, 0)


def tiles(problem: Problem, row: Tensor, col: Tensor, words: Tensor) -> Tensor:
    """Bits of the tiles [E, block].

    Args:
        problem: the pattern and the blocks.
        row: query block of each entry.
        col: key block of each entry.
        words: what every query sees of the key block [E].
    """
    b = problem.block
    i = row[:, None] * b + torch.arange(b)
    start = col[:, None] * b
    found = torch.where(row == col, 1, 0)[:, None] << torch.arange(b) | words[:, None]
    for term in problem.moving:
        found |= _range_bits(problem, term, i, start)
    if problem.pattern.grids:
        found |= _tested(problem, i, start)
    if problem.pattern.full:
        found = torch.full_like(found, -1)
    return found & _range_bits(problem, None, i, start)


def _range_bits(problem: Problem, term: Term | None, i: Tensor, start: Tensor) -> Tensor:
    """Keys in the ranges of a term as bits of the block that begins at `start`."""
    ends, _ = problem.ranges(term, i[:1, :1])
    step = max(1, _NUMBERS // (problem.block * ends.shape[-1]))
    parts = zip(i.split(step), start.split(step), strict=True)
    return torch.cat([_few_bits(problem, term, *part) for part in parts])


def _few_bits(problem: Problem, term: Term | None, i: Tensor, start: Tensor) -> Tensor:
    """See `_range_bits`; ranges move on with i, so the ends of two queries tell what is reached."""
    b = problem.block
    below = torch.tensor([(1 << n) - 1 if n < 64 else -1 for n in range(b + 1)])
    first, last = problem.ranges(term, i)
    reached = (last[:, -1] >= start) & (first[:, 0] < start + b)
    found = torch.zeros_like(i)
    for r in range(first.shape[-1]):
        at = reached[:, r].nonzero()[:, 0]
        low = (first[at, :, r] - start[at]).clamp(0, b)
        high = (last[at, :, r] - start[at] + 1).clamp(0, b)
        found[at] |= below[high] & ~below[low]
    return found


def _tested(problem: Problem, i: Tensor, start: Tensor) -> Tensor:
    """What grids show, token by token."""
    parts = []
    for own, other in zip(i.split(_AT_ONCE), start.split(_AT_ONCE), strict=True):
        j = (other + torch.arange(problem.block))[:, None]
        seen = torch.zeros((), dtype=torch.bool)
        for grid in problem.pattern.grids:
            seen = seen | grid.sees(own[..., None], j)
        parts.append(pack(seen))
    return torch.cat(parts) if parts else torch.zeros_like(i)

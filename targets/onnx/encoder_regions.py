"""Which rows a region of queries reads, for patterns over a grid of known size.

Queries that are near in the grid see nearly the same keys: a region is a box of the grid, and reads
every key that one of its queries sees. Layout letters: N tokens, R regions, c queries and K keys of
a region, L rows that all regions read, S what their queries see of those.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from math import prod

import torch
from torch import Tensor

from reattend.mixers.config import CoreConfig
from reattend.patterns.grids import Grid
from reattend.patterns.pattern import HeadPattern

#: sides of the boxes that are tried, by the number of axes
_BOXES: dict[int, tuple[tuple[int, ...], ...]] = {
    1: ((16,), (64,)),
    2: ((4, 4), (8, 8), (16, 16)),
    3: ((2, 4, 4), (4, 4, 4), (1, 8, 8), (2, 8, 8), (1, 1, 64), (1, 4, 64)),
}
#: reading a row costs as much as so many queries that look at it
_READING = 12
#: a region costs as much besides as so many pairs
_STARTING = 8000
#: share of all pairs, all that included, above which a mask is as fast
_PAYS = 0.9


@dataclass(frozen=True)
class Regions:
    """What a `RegionAttention` is given, for the queries of the grid.

    Attributes:
        first, tokens: where the grid lies.
        query_rows_Rc: tokens of each region, counted from the first of the grid.
        key_rows_L: rows that the regions read, of the whole sequence.
        seen_S: which of its rows each query of a region sees, [c, K] flat; regions share it.
        spans_R3: of each region, where its rows begin and end, and where what is seen begins.
        at_N: where each query is among all regions'.
    """

    first: int
    tokens: int
    query_rows_Rc: Tensor
    key_rows_L: Tensor
    seen_S: Tensor
    spans_R3: Tensor
    at_N: Tensor

    @property
    def told(self) -> tuple[Tensor, ...]:
        """As the node has them."""
        return self.query_rows_Rc, self.key_rows_L, self.seen_S, self.spans_R3, self.at_N

    @property
    def work(self) -> int:
        """Pairs that are formed, and the rest in pairs' worth."""
        regions, c = self.query_rows_Rc.shape
        return len(self.key_rows_L) * (c + _READING) + regions * _STARTING


def regions(pattern: HeadPattern, core: CoreConfig, n: int) -> Regions | None:
    """The cheapest boxes for a sequence of n tokens; None where reading rows would not pay.

    Args:
        pattern: with at least one grid, which fits n.
        core: of the block.
        n: tokens.
    """
    grid = pattern.grids[0]
    most = _PAYS * grid.tokens * n
    found = min((_boxed(pattern, core, grid, n, x) for x in _sides(grid)), key=lambda r: r.work)
    return found if found.work < most else None


def _sides(grid: Grid) -> Iterator[tuple[int, ...]]:
    own = getattr(grid, "tile", None)
    if own is not None:  # a tile's queries see the same keys
        yield own
    for sides in _BOXES[len(grid.shape)]:
        yield tuple(min(s, n) for s, n in zip(sides, grid.shape, strict=True))


def _boxed(
    pattern: HeadPattern, core: CoreConfig, grid: Grid, n: int, sides: tuple[int, ...]
) -> Regions:
    index = torch.arange(grid.tokens).view(grid.shape)
    counts = [-(-size // side) for size, side in zip(grid.shape, sides, strict=True)]
    width, every = prod(sides), torch.arange(n)[None]
    queries, keys, spans = [], [], []
    shown: dict[bytes, int] = {}
    read = many = 0
    at_N = torch.zeros(grid.tokens, dtype=torch.long)
    for number, corner in enumerate(product(*(range(k) for k in counts))):
        box = index[tuple(slice(a * s, a * s + s) for a, s in zip(corner, sides, strict=True))]
        inside = box.flatten()
        at_N[inside] = number * width + torch.arange(len(inside))
        padded = torch.cat([inside, inside[-1:].expand(width - len(inside))])
        sees = pattern.sees(padded[:, None] + grid.text_before, every, core)
        rows = sees.any(0).nonzero()[:, 0]
        queries.append(padded)
        keys.append(rows)
        seen = sees[:, rows].numpy().tobytes()
        if seen not in shown:
            shown[seen], many = many, many + len(seen)
        spans.append((read, read + len(rows), shown[seen]))
        read += len(rows)
    return Regions(
        grid.text_before, grid.tokens, torch.stack(queries), torch.cat(keys),
        torch.frombuffer(bytearray(b"".join(shown)), dtype=torch.bool), torch.tensor(spans), at_N,
    )  # fmt: skip

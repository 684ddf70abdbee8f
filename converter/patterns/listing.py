"""Which key blocks each query block reads, by arithmetic on the ends of ranges: no pair is tested.

The keys of a pattern are those that every query sees, and ranges that move on with the query and
never back. So a row of blocks is a few segments: blocks of the one kind before, between and after
blocks of the other. The work grows with the blocks listed; over grids, with all pairs of blocks.

Layout letters: P query blocks, Q key blocks, R ranges, E entries listed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from reattend.kernels.sparse_attention.mask import pack
from reattend.mixers.config import CoreConfig
from reattend.mixers.scores import own_range
from reattend.patterns.grids import Grid, Spans
from reattend.patterns.pattern import HeadPattern
from reattend.patterns.terms import Term

#: what is known of an entry: keys that every query sees, a range reaches into it, it is seen whole
KEYS, RANGE, WHOLE = 0, 1, 2


class Band(NamedTuple):
    """Of each query block [P, R]: some .. end may be seen, whole .. stop by every query whole."""

    some: Tensor
    end: Tensor
    whole: Tensor
    stop: Tensor

    def hides(self, counts: Tensor, col: Tensor) -> Tensor:
        """Of entries within one range per row: which are not seen whole."""
        stop, whole = self.stop[:, 0].int(), self.whole[:, 0].int()
        if not bool((whole > 0).any() | (self.end > self.stop + 1).any() | (counts == 0).any()):
            hidden = torch.zeros_like(col, dtype=torch.bool)  # causal: the last of a row at most
            last = counts.cumsum(0) - 1
            hidden[last] = col[last] > stop
            return hidden
        hidden = col > torch.repeat_interleave(stop, counts)
        return hidden | (col < torch.repeat_interleave(whole, counts))


@dataclass(frozen=True)
class Problem:
    """A pattern, the block's own pattern, and the blocks: first .. blocks - 1 of queries."""

    pattern: HeadPattern
    core: CoreConfig
    first: int
    blocks: int
    block: int

    @property
    def length(self) -> int:
        """Tokens, whole blocks."""
        return self.blocks * self.block

    @property
    def full(self) -> int:
        """The word of a query that sees a whole block."""
        return -1 if self.block == 64 else (1 << self.block) - 1

    def band(self, term: Term | None) -> Band:
        """The ranges of a term, or of the block's own pattern (None), in blocks."""
        q0 = torch.arange(self.first, self.blocks) * self.block
        ends = [self.ranges(term, i) for i in (q0, q0 + self.block - 1)]
        (first, last), (first_1, last_1) = ends  # of the first query of a block, and of its last
        b, most = self.block, self.blocks - 1
        return Band(
            (first // b).clamp_min(0),
            (last_1 // b).clamp_max(most),
            (-(-first_1 // b)).clamp_min(0),
            ((last + 1) // b - 1).clamp_max(most),
        )

    def ranges(self, term: Term | None, i: Tensor) -> tuple[Tensor, Tensor]:
        """(first, last) key of the ranges of queries at i, [..., R]."""
        if term is None:
            first, last = own_range(self.core, i, self.length)
            return first[..., None], last[..., None]
        return term.ranges(i, self.length)

    def key_words(self) -> Tensor:
        """Keys that every query sees, as bits of each key block: int64 [Q]."""
        j = torch.arange(self.length)
        seen = torch.zeros(self.length, dtype=torch.bool)
        for term in self.pattern.terms:
            if term.by_key:
                seen |= term.sees(j.new_zeros(()), j)
        return pack(seen.view(self.blocks, self.block))

    @property
    def moving(self) -> list[Term]:
        """Terms that are ranges; a query always sees itself."""
        return [t for t in self.pattern.terms if not t.by_key and not isinstance(t, Grid)]


class Entries(NamedTuple):
    """Row by row, key blocks ascending: entries of each row [P], int32 key blocks and kinds [E]."""

    counts: Tensor
    col: Tensor
    kind: Tensor


def listed(problem: Problem, own: Band, words: Tensor) -> Entries:
    """Every block that a query may see; what the block's own pattern hides is left out."""
    kinds = torch.where(words == problem.full, WHOLE, KEYS)
    fixed = words.nonzero()[:, 0]
    bands = [_cut(problem.band(term), own) for term in problem.moving]
    if problem.pattern.full:
        bands = [own]
    diagonal = torch.arange(problem.first, problem.blocks)[:, None]
    if not any(bool(((x.some <= diagonal) & (diagonal <= x.end)).any(1).all()) for x in bands):
        bands.append(Band(diagonal, diagonal, diagonal, diagonal - 1))
    if len(bands) == 1 and bands[0].some.shape[1] == 1 and not problem.pattern.grids:
        return _segments(problem, own, bands[0], fixed, kinds[fixed])
    return _merged(problem, own, bands, fixed, kinds[fixed])


def _cut(band: Band, own: Band) -> Band:
    some, end = torch.maximum(band.some, own.some), torch.minimum(band.end, own.end)
    return Band(some, end, band.whole, band.stop)


def _segments(problem: Problem, own: Band, band: Band, fixed: Tensor, kinds: Tensor) -> Entries:
    """One range per row: fixed blocks before it, its ends and its middle, fixed blocks after."""
    q, count = problem.blocks, len(fixed)
    some, end = band.some[:, 0], torch.maximum(band.end, band.some - 1)[:, 0]
    whole = torch.minimum(torch.maximum(band.whole[:, 0], some), end + 1)
    stop = torch.maximum(torch.minimum(band.stop[:, 0], end), whole - 1)
    begin = torch.searchsorted(fixed, own.some[:, 0])
    left = torch.maximum(torch.searchsorted(fixed, some), begin)
    right = torch.searchsorted(fixed, end, right=True)
    last = torch.maximum(torch.searchsorted(fixed, own.end[:, 0], right=True), right)
    # a table of all that a segment may be a part of: fixed blocks, blocks of an end, whole ones
    every = torch.arange(q)
    table = torch.cat([fixed, every, every]).int()
    kind = torch.cat([kinds, torch.full((q,), RANGE), torch.full((q,), WHOLE)]).to(torch.uint8)
    begins = torch.stack([begin, count + some, count + q + whole, count + stop + 1, right], 1)
    sizes = torch.stack([left - begin, whole - some, stop + 1 - whole, end - stop, last - right], 1)
    place = _ranges(begins.flatten().int(), sizes.flatten())
    return Entries(sizes.sum(1), table.index_select(0, place), kind.index_select(0, place))


def _ranges(begins: Tensor, sizes: Tensor) -> Tensor:
    """begin .. begin + size - 1 of each, one after another; of the type of `begins`."""
    ends = sizes.cumsum(0)
    shift = (begins - (ends - sizes)).to(begins.dtype)
    found = torch.repeat_interleave(shift, sizes)
    return found.add_(torch.arange(len(found), dtype=begins.dtype))


def _merged(
    problem: Problem, own: Band, bands: list[Band], fixed: Tensor, kinds: Tensor
) -> Entries:
    """Several ranges per row: listed one by one, then sorted; of equal ones the most is known."""
    q, rows = problem.blocks, problem.blocks - problem.first
    row = torch.arange(rows) * q
    begin = torch.searchsorted(fixed, own.some[:, 0])
    sizes = torch.searchsorted(fixed, own.end[:, 0], right=True) - begin
    place = _ranges(begin, sizes)
    found = [4 * (torch.repeat_interleave(row, sizes) + fixed[place]) + kinds[place]]
    for band in bands:
        size = (band.end - band.some + 1).clamp_min(0)
        place = _ranges((row[:, None] + band.some).flatten(), size.flatten())
        col = place % q
        of = torch.repeat_interleave(torch.arange(size.numel()), size.flatten())
        inside = (col >= band.whole.flatten()[of]) & (col <= band.stop.flatten()[of])
        found.append(4 * place + torch.where(inside, WHOLE, RANGE))
    for grid in problem.pattern.grids:
        k, wide = torch.arange(q), problem.block - 1
        q0, k0 = k[problem.first :, None] * problem.block, k[None] * problem.block
        near, every = grid.touches(Spans(q0, q0 + wide, k0, k0 + wide))
        near = near & (k >= own.some) & (k <= own.end)
        place = near.flatten().nonzero()[:, 0]
        found.append(4 * place + torch.where(every.flatten()[place], WHOLE, RANGE))
    both = torch.cat(found).unique()  # sorted
    last = torch.ones_like(both, dtype=torch.bool)
    last[:-1] = both[1:] // 4 != both[:-1] // 4
    both = both[last]
    place = both // 4
    counts = torch.bincount(place // q, minlength=rows)
    return Entries(counts, (place % q).int(), (both % 4).to(torch.uint8))

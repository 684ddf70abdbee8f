"""The terms of a pattern: each says which keys a query sees; a pattern is the union of its terms.

Positions are counted from the first real token of a sequence, so padding on the left moves nothing.
A term answers twice: `sees` exactly for positions, `touches` for whole blocks, where *some* may be
generous (it is checked token by token afterwards) and *every* may be shy, never the other way.

Layout letters: i query positions, j key positions, any shapes that broadcast.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from pydantic import Field, model_validator
from torch import Tensor

from reattend.mixers.config import Frozen


@dataclass(frozen=True)
class Spans:
    """Blocks of positions, both ends included: queries q0..q1 [P, 1], keys k0..k1 [1, Q]."""

    q0: Tensor
    q1: Tensor
    k0: Tensor
    k1: Tensor

    @property
    def nearest(self) -> Tensor:
        """The smallest |i - j| in each pair of blocks, in tokens."""
        return torch.maximum(self.q0 - self.k1, self.k0 - self.q1).clamp_min(0)

    @property
    def farthest(self) -> Tensor:
        """The largest |i - j|."""
        return torch.maximum(self.q1 - self.k0, self.k1 - self.q0)


class Term(Frozen, ABC):
    """One part of a pattern."""

    @abstractmethod
    def sees(self, i: Tensor, j: Tensor) -> Tensor:
        """True where query i sees key j; causality is not a term's business."""

    def touches(self, spans: Spans) -> tuple[Tensor, Tensor]:
        """(some, every) of the pairs in each two blocks [P, Q]; by default: nothing is known."""
        shape = torch.broadcast_shapes(spans.q0.shape, spans.k0.shape)
        some = torch.ones(shape, dtype=torch.bool, device=spans.q0.device)
        return some, torch.zeros_like(some)

    @property
    def monotone(self) -> bool:
        """Whether a causal query never sees a key that the query before it did not (KV-monotone).

        Only then may a cache forget what the last query did not see.
        """
        return False


class Sinks(Term):
    """The first `tokens` of the sequence (StreamingLLM, Xiao et al., arXiv 2309.17453)."""

    tokens: int = Field(gt=0)

    def sees(self, i: Tensor, j: Tensor) -> Tensor:
        """Every query."""
        return (j < self.tokens) & (i >= 0)

    def touches(self, spans: Spans) -> tuple[Tensor, Tensor]:
        """By the ends of the key block."""
        real = spans.q0 >= 0
        return (spans.k0 < self.tokens) & (spans.q1 >= 0), (spans.k1 < self.tokens) & real

    @property
    def monotone(self) -> bool:
        """Sinks stay."""
        return True


class Window(Term):
    """Keys closer than `base + slope x (tokens up to the query)`, the query itself included.

    With a slope this is the elastic window of MoA (Fu et al., arXiv 2406.14909); there the width
    is fixed for a request by its whole length, here by each query's own position, so that a text
    read in pieces is read alike.
    """

    base: int  # may be negative beside a slope: short texts then see one token
    slope: float = Field(default=0.0, ge=0.0, le=1.0)

    @model_validator(mode="after")
    def _sees_itself(self) -> Window:
        if self.base <= 0 and self.slope == 0:
            raise ValueError("a window must hold at least one token")
        return self

    def width(self, i: Tensor) -> Tensor | int:
        """Tokens in the window of query i, at least its own."""
        if self.slope == 0:
            return self.base
        return (self.base + (self.slope * (i + 1).double()).floor().long()).clamp_min(1)

    def sees(self, i: Tensor, j: Tensor) -> Tensor:
        """Both directions; causality hides one where it holds."""
        return (i - j).abs() < self.width(i)

    def touches(self, spans: Spans) -> tuple[Tensor, Tensor]:
        """By the distances between two blocks; the widest and the narrowest window."""
        return spans.nearest < self.width(spans.q1), spans.farthest < self.width(spans.q0)

    @property
    def monotone(self) -> bool:
        """The first key of the window never moves back, because slope <= 1."""
        return True


class Stride(Term):
    """Every `period`-th block of keys, at the same places for all queries.

    Block n is seen if (n + offset) mod period == 0 (S2-Attention, Lin et al., arXiv 2407.17678).

    Attributes:
        period: one block in so many is seen.
        offset: blocks that the first one is moved to the front by.
        block: tokens per block.
    """

    period: int = Field(gt=0)
    offset: int = Field(default=0, ge=0)
    block: int = Field(default=64, gt=0)

    def sees(self, i: Tensor, j: Tensor) -> Tensor:
        """Depends on the key alone."""
        return (torch.div(j, self.block, rounding_mode="floor") + self.offset) % self.period == 0

    def touches(self, spans: Spans) -> tuple[Tensor, Tensor]:
        """A multiple of the period among the key block's own blocks."""
        first, last = spans.k0 // self.block + self.offset, spans.k1 // self.block + self.offset
        some = last // self.period > (first - 1) // self.period
        every = (first == last) & (first % self.period == 0) | (self.period == 1)
        shape = torch.broadcast_shapes(spans.q0.shape, spans.k0.shape)
        return some.expand(shape), every.expand(shape)

    @property
    def monotone(self) -> bool:
        """Absolute places stay."""
        return True


class Powers(Term):
    """Blocks whose distance is a power of two (PowerAttention, arXiv 2503.03588).

    Attributes:
        block: tokens per block.
    """

    block: int = Field(default=64, gt=0)

    def sees(self, i: Tensor, j: Tensor) -> Tensor:
        """Distance in blocks, either direction."""
        return _is_power((i // self.block - j // self.block).abs())

    def touches(self, spans: Spans) -> tuple[Tensor, Tensor]:
        """A power of two between the smallest and the largest distance in blocks."""
        near = spans.q0 // self.block - spans.k1 // self.block
        far = spans.q1 // self.block - spans.k0 // self.block
        around = (near <= 0) & (far >= 0)  # both directions: every distance from none on
        low = torch.minimum(near.abs(), far.abs()).masked_fill(around, 0)
        high = torch.maximum(near.abs(), far.abs())
        every = (near == far) & _is_power(high)
        up = torch.ones_like(low)
        for _ in range(62):  # the smallest power that is not below `low`
            short = up < low
            if not bool(short.any()):
                break
            up = torch.where(short, up * 2, up)
        return up <= high, every


class Columns(Term):
    """Single keys, by position: the vertical lines of MInference (arXiv 2407.02490)."""

    at: tuple[int, ...] = Field(min_length=1)

    def sees(self, i: Tensor, j: Tensor) -> Tensor:
        """Every query."""
        return torch.isin(j, torch.tensor(self.at, device=j.device)) & (i >= 0)

    def touches(self, spans: Spans) -> tuple[Tensor, Tensor]:
        """How many of them lie in the key block."""
        return _counted(self.at, spans.k0, spans.k1, spans.q0)

    @property
    def monotone(self) -> bool:
        """Columns stay."""
        return True


class Slashes(Term):
    """Keys at fixed distances before the query: the diagonals of MInference (arXiv 2407.02490)."""

    distances: tuple[int, ...] = Field(min_length=1)

    def sees(self, i: Tensor, j: Tensor) -> Tensor:
        """Distance i - j, in tokens."""
        return torch.isin(i - j, torch.tensor(self.distances, device=j.device))

    def touches(self, spans: Spans) -> tuple[Tensor, Tensor]:
        """How many of the distances between two blocks are listed."""
        return _counted(self.distances, spans.q0 - spans.k1, spans.q1 - spans.k0, spans.q0)


def _is_power(n: Tensor) -> Tensor:
    return (n > 0) & ((n & (n - 1)) == 0)


def _counted(
    listed: tuple[int, ...], low: Tensor, high: Tensor, like: Tensor
) -> tuple[Tensor, Tensor]:
    """(some, every) of the whole numbers low..high is listed."""
    places = torch.tensor(sorted(set(listed)), device=low.device)
    found = torch.searchsorted(places, high.contiguous(), right=True) - torch.searchsorted(
        places, low.contiguous()
    )
    shape = torch.broadcast_shapes(found.shape, like.shape)
    return (found > 0).expand(shape), (found == high - low + 1).expand(shape)

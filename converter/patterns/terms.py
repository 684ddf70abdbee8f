"""The terms of a pattern: each says which keys a query sees; a pattern is the union of its terms.

Positions are counted from the first real token of a sequence, so padding on the left moves nothing.
A term answers twice: `sees` for pairs of positions, and, for block layouts, as what it is made of:
keys that every query sees (`by_key`), or `ranges` of keys that move on with the query.

Layout letters: i query positions, j key positions, any shapes that broadcast; R ranges.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor

from reattend.mixers.config import Frozen


class Term(Frozen, ABC):
    """One part of a pattern.

    Attributes:
        by_key: every query sees the same keys.
    """

    by_key: ClassVar[bool] = False

    @abstractmethod
    def sees(self, i: Tensor, j: Tensor) -> Tensor:
        """True where query i sees key j; causality is not a term's business."""

    def ranges(self, i: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """(first, last) key of each range that query i sees, [..., R]; empty where last < first.

        Neither end moves back as i grows. Keys below 0, or from `length` on, may be among them.
        Where a term is neither this nor `by_key`, layouts look at it token by token.
        """
        raise NotImplementedError(type(self).__name__)

    @property
    def repeats(self) -> int | None:
        """Query and key moved on by so many tokens see each other as before; None: by none."""
        return None

    @property
    def monotone(self) -> bool:
        """Whether a causal query never sees a key that the query before it did not (KV-monotone).

        Only then may a cache forget what the last query did not see.
        """
        return False


class Sinks(Term):
    """The first `tokens` of the sequence (StreamingLLM, Xiao et al., arXiv 2309.17453)."""

    by_key = True
    tokens: int = Field(gt=0)

    def sees(self, i: Tensor, j: Tensor) -> Tensor:
        """Every query."""
        return (j < self.tokens) & (i >= 0)

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

    def ranges(self, i: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """One around the query."""
        width = self.width(i)
        return (i - width + 1)[..., None], (i + width - 1)[..., None]

    @property
    def repeats(self) -> int | None:
        """A width that grows never repeats."""
        return None if self.slope else 1

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

    by_key = True
    period: int = Field(gt=0)
    offset: int = Field(default=0, ge=0)
    block: int = Field(default=64, gt=0)

    def sees(self, i: Tensor, j: Tensor) -> Tensor:
        """Depends on the key alone."""
        return (torch.div(j, self.block, rounding_mode="floor") + self.offset) % self.period == 0

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

    def ranges(self, i: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """A block at every power of two, in both directions."""
        powers = [1 << n for n in range((length // self.block + 1).bit_length())]
        apart = torch.tensor([*(-p for p in powers), *powers], device=i.device)
        first = (i[..., None] // self.block - apart) * self.block
        return first, first + self.block - 1

    @property
    def repeats(self) -> int:
        """A block of its own."""
        return self.block


class Columns(Term):
    """Single keys, by position: the vertical lines of MInference (arXiv 2407.02490)."""

    by_key = True
    at: tuple[int, ...] = Field(min_length=1)

    def sees(self, i: Tensor, j: Tensor) -> Tensor:
        """Every query."""
        return torch.isin(j, torch.tensor(self.at, device=j.device)) & (i >= 0)

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

    def ranges(self, i: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """One for every run of distances that follow each other."""
        listed = torch.tensor(sorted(set(self.distances)), device=i.device)
        gap = listed.diff() > 1
        begins = torch.cat([listed[:1], listed[1:][gap]])
        ends = torch.cat([listed[:-1][gap], listed[-1:]])
        return i[..., None] - ends, i[..., None] - begins

    @property
    def repeats(self) -> int:
        """Distances are all there is."""
        return 1


def _is_power(n: Tensor) -> Tensor:
    return (n > 0) & ((n & (n - 1)) == 0)

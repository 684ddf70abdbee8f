"""Terms over a grid of image or video tokens, with text tokens before or behind it.

Every query sees all text, and text sees everything. Layout letters: i query positions, j key
positions, any shapes that broadcast.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from math import prod
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from reattend.patterns.terms import Term


@dataclass(frozen=True)
class Spans:
    """Blocks of positions, both ends included: queries q0..q1 [P, 1], keys k0..k1 [1, Q]."""

    q0: Tensor
    q1: Tensor
    k0: Tensor
    k1: Tensor


class Grid(Term):
    """A grid of tokens, rows last: (height, width) or (frames, height, width).

    Attributes:
        shape: places along every axis; empty: not known yet, see `laid_out`.
        text_before: tokens of the sequence before the grid (a class token, a prompt).
        text_after: tokens behind it; None: any number.
    """

    shape: tuple[int, ...] = Field(default=(), max_length=3)
    text_before: int = Field(default=0, ge=0)
    text_after: int | None = Field(default=None, ge=0)

    @model_validator(mode="after")
    def _has_tokens(self) -> Grid:
        if self.shape and min(self.shape) < 1:
            raise ValueError("a grid needs at least one token along every axis")
        return self

    @property
    def tokens(self) -> int:
        """Tokens of the grid, text left out."""
        return prod(self.shape)

    def fits(self, length: int) -> bool:
        """Whether a sequence of so many tokens has this grid and its text."""
        rest = length - self.text_before - self.tokens
        return rest >= 0 and self.text_after in (None, rest)

    def words(self) -> str:
        """For people: `1 + 14 x 14 tokens`."""
        parts = [str(self.text_before or ""), " x ".join(map(str, self.shape))]
        parts.append("any" if self.text_after is None else str(self.text_after or ""))
        return " + ".join(part for part in parts if part) + " tokens"

    def sees(self, i: Tensor, j: Tensor) -> Tensor:
        """Text on either side, or near in the grid."""
        a, b = i - self.text_before, j - self.text_before
        text = (a < 0) | (a >= self.tokens) | (b < 0) | (b >= self.tokens)
        return text | self.near(self._places(a), self._places(b))

    def touches(self, spans: Spans) -> tuple[Tensor, Tensor]:
        """(some, every) of the pairs in each two blocks [P, Q]; some may be generous, every shy.

        By how far apart blocks lie along the axes; text by its ends.
        """
        q, k = (spans.q0, spans.q1), (spans.k0, spans.k1)
        outside = [self._outside(*ends) for ends in (q, k)]
        some = outside[0][0] | outside[1][0] | self.close(spans)
        return some, (outside[0][1] | outside[1][1]).expand(some.shape)

    def close(self, spans: Spans) -> Tensor:
        """Generous: whether some places of two blocks are within `reach` along every axis.

        The first axis always tells; a later one where both blocks lie in one line of those before.
        """
        shape = torch.broadcast_shapes(spans.q0.shape, spans.k0.shape)
        found = torch.ones(shape, dtype=torch.bool, device=spans.q0.device)
        alone = found
        inner = self.tokens
        for size, reach in zip(self.shape, self.reach, strict=True):
            inner //= size
            q0, q1, k0, k1 = (
                torch.div(x - self.text_before, inner, rounding_mode="floor")
                for x in (spans.q0, spans.q1, spans.k0, spans.k1)
            )
            apart = torch.maximum(q0 % size - k1 % size, k0 % size - q1 % size)
            found = found & ((apart <= reach) | ~alone)
            alone = alone & (q0 == q1) & (k0 == k1)
        return found

    def _outside(self, first: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
        """Whether (some, all) tokens of a block are text."""
        begin, end = self.text_before, self.text_before + self.tokens
        return (first < begin) | (last >= end), (last < begin) | (first >= end)

    @property
    @abstractmethod
    def reach(self) -> tuple[int, ...]:
        """Along every axis, the farthest that a query may see."""

    @abstractmethod
    def near(self, query: list[Tensor], key: list[Tensor]) -> Tensor:
        """Whether a query's place in the grid sees a key's; a coordinate per axis."""

    def _places(self, index: Tensor) -> list[Tensor]:
        found, rest = [], index
        for size in reversed(self.shape):
            found.append(rest % size)
            rest = torch.div(rest, size, rounding_mode="floor")
        return found[::-1]


class GridWindow(Grid):
    """Places around the query's own, in grid units.

    `box`: no axis differs by more than `radius`. `circle`: the squared distance is below radius^2
    (CLEAR, arXiv 2412.16112). `neighborhood`: as `box`, but a window at the border moves inside, so
    that every query sees the same number (NATTEN, arXiv 2204.07143).

    Attributes:
        radius: places to either side.
        norm: the form, see the class.
    """

    radius: int = Field(gt=0)
    norm: Literal["box", "circle", "neighborhood"] = "box"

    @property
    def reach(self) -> tuple[int, ...]:
        """A window that moved inside reaches twice as far."""
        far = {"box": 1, "circle": 1, "neighborhood": 2}[self.norm] * self.radius
        return (far - (self.norm == "circle"),) * len(self.shape)

    def near(self, query: list[Tensor], key: list[Tensor]) -> Tensor:
        """See the class."""
        if self.norm == "circle":
            apart = sum((a - b) ** 2 for a, b in zip(query, key, strict=True))
            assert isinstance(apart, Tensor)
            return apart < self.radius**2
        inside = torch.ones((), dtype=torch.bool, device=query[0].device)
        for a, b, size in zip(query, key, self.shape, strict=True):
            if self.norm == "neighborhood":
                a = a.clamp(self.radius, max(size - 1 - self.radius, self.radius))
            inside = inside & ((a - b).abs() <= self.radius)
        return inside


class GridTiles(Grid):
    """The grid in tiles; a query sees tiles within `radius` of its own, whole.

    Sliding tile attention, arXiv 2502.04507.

    Attributes:
        tile: grid places along every axis.
        radius: tiles to either side.
    """

    tile: tuple[int, ...]
    radius: int = Field(default=1, ge=0)

    @model_validator(mode="after")
    def _divides(self) -> GridTiles:
        if self.shape and (
            len(self.tile) != len(self.shape)
            or any(t < 1 or n % t for t, n in zip(self.tile, self.shape, strict=True))
        ):
            raise ValueError(f"tile {self.tile} does not divide the grid {self.shape}")
        return self

    @property
    def reach(self) -> tuple[int, ...]:
        """From one end of a tile to the other end of the last one seen."""
        return tuple((self.radius + 1) * size - 1 for size in self.tile)

    def near(self, query: list[Tensor], key: list[Tensor]) -> Tensor:
        """Tiles apart along every axis."""
        inside = torch.ones((), dtype=torch.bool, device=query[0].device)
        for a, b, size in zip(query, key, self.tile, strict=True):
            inside = inside & ((a // size - b // size).abs() <= self.radius)
        return inside


class Radial(Grid):
    """Frames of a video: the further apart two frames, the narrower the window between them.

    Radial attention, arXiv 2506.19852: with D frames between, places of a frame (counted along its
    rows) see each other when less than (tokens of a frame) / 2^floor(log2 D) apart; where that is
    narrower than `block`, only every (block / width)-th frame is seen, in a window of `block`. The
    first frame is seen by all.

    Attributes:
        block: tokens of the narrowest window, less than two frames have.
    """

    block: int = Field(default=128, gt=0)

    @model_validator(mode="after")
    def _fits_a_frame(self) -> Radial:
        frame = prod(self.shape[1:])
        if self.shape and self.block >= 2 * frame:
            raise ValueError(
                f"radial's block of {self.block} tokens is two frames of {frame} or more, which"
                f" leaves out frames next to each other: give block: {2 * frame - 1} or less"
            )
        return self

    @property
    def reach(self) -> tuple[int, ...]:
        """The whole video."""
        return self.shape

    def close(self, spans: Spans) -> Tensor:
        """Blocks inside one frame each: by the width between the two frames."""
        inner = prod(self.shape[1:])
        q0, q1, k0, k1 = (x - self.text_before for x in (spans.q0, spans.q1, spans.k0, spans.k1))
        alone = (q0 // inner == q1 // inner) & (k0 // inner == k1 // inner)
        frames = (q0 // inner - k0 // inner).abs()
        apart = torch.maximum(q0 % inner - k1 % inner, k0 % inner - q1 % inner)
        return ~alone | (k0 < inner) | self._within(frames, apart)

    def near(self, query: list[Tensor], key: list[Tensor]) -> Tensor:
        """By the distance of frames, then inside the frame."""
        frames = (query[0] - key[0]).abs()
        apart = (self._flat(query) - self._flat(key)).abs()
        return (key[0] == 0) | self._within(frames, apart)

    def _within(self, frames: Tensor, apart: Tensor) -> Tensor:
        """Whether places `apart` in their frames see each other, so many frames apart."""
        inner = prod(self.shape[1:])
        halvings = frames.clamp_min(1).double().log2().floor().long()
        width = torch.div(inner, 2**halvings, rounding_mode="floor").clamp_min(1)
        every = torch.div(self.block, width, rounding_mode="floor").clamp_min(1)
        sparse = (frames % every == 0) & (apart < self.block)
        return torch.where(width >= self.block, apart < width, sparse)

    def _flat(self, place: list[Tensor]) -> Tensor:
        index = torch.zeros_like(place[0])
        for value, size in zip(place[1:], self.shape[1:], strict=True):
            index = index * size + value
        return index

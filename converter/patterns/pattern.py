"""HeadPattern: what one head sees, as plan files write it and checkpoints store it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pydantic import Field, NonNegativeInt, model_validator
from torch import Tensor

from reattend.mixers.config import CoreConfig, Frozen
from reattend.mixers.scores import own_pattern
from reattend.patterns.grids import Grid, GridTiles, GridWindow, Radial
from reattend.patterns.selectors import AnySelector
from reattend.patterns.terms import (
    Columns,
    Powers,
    Sinks,
    Slashes,
    Stride,
    Term,
    Window,
)

#: no text is longer
MOST = 1 << 40
#: queries that stand for all where they differ, and pairs with keys that are looked at together
QUERIES, AT_ONCE = 64, 1 << 22


class HeadPattern(Frozen):
    """The union of its terms, cut by the block's own pattern (causal, sliding ...).

    Attributes:
        full: every key; then nothing else is given.
        sinks: first tokens of the sequence.
        window: last tokens, the query itself included; 0: none.
        window_slope: tokens that the window grows by per token of the sequence (MoA).
        stride, powers, columns, slashes: see `reattend.patterns.terms`.
        grid, tiles, radial: see `reattend.patterns.grids`.
        select: what is chosen at run time beside the terms, see `reattend.patterns.selectors`.
    """

    full: bool = False
    sinks: int = Field(default=0, ge=0)
    window: int = 0
    window_slope: float = Field(default=0.0, ge=0.0, le=1.0)
    stride: Stride | None = None
    powers: Powers | None = None
    columns: tuple[NonNegativeInt, ...] = ()
    slashes: tuple[int, ...] = ()
    grid: GridWindow | None = None
    tiles: GridTiles | None = None
    radial: Radial | None = None
    select: AnySelector | None = None

    @model_validator(mode="after")
    def _sees_something(self) -> HeadPattern:
        if self.full and (self.terms or self.select):
            raise ValueError("`full` sees every key: give no other term beside it")
        if not self.full and not self.terms and self.select is None:
            raise ValueError("a pattern needs a term, for example `window: 256`, or `full: true`")
        if max(self.sinks, abs(self.window), *self.columns, 0) > MOST:
            raise ValueError(f"no text has more than {MOST:,} tokens")
        return self

    @property
    def terms(self) -> tuple[Term, ...]:
        """The union's parts; empty where every key is seen."""
        found: list[Term | None] = [Sinks(tokens=self.sinks) if self.sinks else None]
        if self.window or self.window_slope:
            found.append(Window(base=self.window, slope=self.window_slope))
        found += [self.stride, self.powers]
        found.append(Columns(at=self.columns) if self.columns else None)
        found.append(Slashes(distances=self.slashes) if self.slashes else None)
        found += [self.grid, self.tiles, self.radial]
        return tuple(t for t in found if t is not None)

    @property
    def grids(self) -> tuple[Grid, ...]:
        """The terms that lay tokens out on a grid."""
        return tuple(t for t in self.terms if isinstance(t, Grid))

    @property
    def monotone(self) -> bool:
        """KV-monotone: what a causal query does not see, no later one will; caches may forget."""
        return not self.full and self.select is None and all(t.monotone for t in self.terms)

    def words(self) -> str:
        """For people: `sinks 4, window 256`."""
        given = self.model_dump(mode="json", exclude_defaults=True)
        parts = []
        for name, value in given.items():
            inner = getattr(self, name)
            parts.append(
                f"{name} {_inner_words(inner)}"
                if isinstance(inner, Frozen)
                else name
                if value is True
                else f"{name} {value}"
            )
        return ", ".join(parts)

    def sees(self, i: Tensor, j: Tensor, core: CoreConfig) -> Tensor:
        """Boolean, for positions that broadcast; negative ones are padding, which nobody sees.

        A query always sees itself. What is selected is not looked at.
        """
        seen = own_pattern(core, i, j)
        if not self.full:
            union = i == j
            for term in self.terms:
                union = union | term.sees(i, j)
            seen = seen & union
        return seen & (i >= 0) & (j >= 0)

    def by_key(self, j: Tensor) -> Tensor:
        """Boolean: keys that every later query sees, wherever it stands."""
        seen = torch.zeros_like(j, dtype=torch.bool)
        for term in self.terms:
            if term.by_key:
                seen = seen | term.sees(j, j)
        return seen & (j >= 0)

    def reads(self, length: int, core: CoreConfig) -> int:
        """Keys that the last of `length` tokens sees; a mean where the block looks both ways.

        Over a grid, its share of so many. With a selector, at most.
        """
        seen, every = (float(n.double().mean()) for n in self.counted(length, core))
        if self.grids:
            grid = self.grids[0]
            tokens = grid.text_before + grid.tokens + (grid.text_after or 0)
            seen, every = seen * length / tokens, every * length / tokens
        chosen = 0 if self.select is None else self.select.reads(length)
        return round(min(every, round(seen) + chosen))

    def counted(self, length: int, core: CoreConfig) -> tuple[Tensor, Tensor]:
        """Keys that some queries see [Q], and that the block itself shows them.

        The last of `length` tokens, or where the block looks both ways some of all; over a grid,
        some of its own tokens, whose number it knows.
        """
        first, last, tokens = 0, length - 1, length
        if self.grids:
            grid = self.grids[0]
            first, last = grid.text_before, grid.text_before + grid.tokens - 1
            tokens = last + 1 + (grid.text_after or 0)
        elif core.causal:
            first = last
        some = torch.linspace(first, last, min(QUERIES, last - first + 1), dtype=torch.float64)
        keys, seen, every = torch.arange(tokens)[None], [], []
        for i in some.long()[:, None].split(max(1, AT_ONCE // tokens)):
            seen.append(self.sees(i, keys, core).sum(-1))
            every.append(own_pattern(core, i, keys).expand(len(i), tokens).sum(-1))
        return torch.cat(seen), torch.cat(every)

    def for_head(self, head: int, heads: int) -> HeadPattern:
        """This pattern for one of several KV heads: strides start at places of their own.

        S2-Attention: head h is shifted by h x max(1, period // heads) blocks, so that the heads of
        a layer see all blocks together.
        """
        if self.stride is None:
            return self
        shift = head * max(1, self.stride.period // heads)
        offset = (self.stride.offset + shift) % self.stride.period
        return self.model_copy(update={"stride": self.stride.model_copy(update={"offset": offset})})


def _inner_words(value: Frozen) -> str:
    """`blocks topk 3 block 64`: the kind, and numbers even where they are the usual ones."""
    given = value.model_dump(mode="json")
    usual = {name: field.default for name, field in type(value).model_fields.items()}
    told = {k: v for k, v in given.items() if _is_number(v) or getattr(value, k) != usual[k]}
    kind = [str(told.pop("kind"))] if "kind" in told else []
    return " ".join([*kind, *(f"{k} {v}" for k, v in told.items())])


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value != 0


def laid_out(pattern: Any, where: dict[str, Any]) -> Any:
    """A pattern as plan files write it, its grids told where they lie if they leave that open.

    Args:
        pattern: a mapping or a `HeadPattern`; anything else is given back for others to refuse.
        where: `shape`, `text_before` and `text_after` of a `Grid`.
    """
    given = pattern.model_dump() if isinstance(pattern, HeadPattern) else pattern
    if not isinstance(given, Mapping):
        return given
    names = [n for n in ("grid", "tiles", "radial") if isinstance(given.get(n), Mapping)]
    select = given.get("select")
    if isinstance(select, Mapping) and (
        select.get("tile") or select.get("tiles") or select.get("kind") == "low-rank"
    ):
        names.append("select")
    return {**given, **{n: {**given[n], **where} for n in names if not given[n].get("shape")}}

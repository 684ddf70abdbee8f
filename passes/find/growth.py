"""Queries that grow with position: read off the factor itself, at positions far beyond an example.

Llama 4 multiplies queries by 1 + beta log(1 + floor((position + 1) / 8192)) (the temperature of
Nakanishi, arXiv 2501.19399), Inkling 2 by 1 + beta log(max(1, (position + 1) / 128000)). At the
length of an example that is one, so it is looked for where it enters, not in what it does there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from reattend.passes.evaluate import Evaluator, ancestors
from reattend.passes.find.reasons import NotUnderstood
from reattend.spec import Growth

#: positions at which a factor is looked at
_FARTHEST = 1 << 20
_TOLERANCE = 1e-5
#: `node.meta` key of a factor: what it was found to be
_KNOWN = "growth"


@dataclass(frozen=True)
class FoundGrowth:
    """A factor [.., N, ..] of queries. `spec` None: it is one everywhere. `position`: its input."""

    factor: fx.Node
    position: fx.Node
    spec: Growth | None


def factors(
    externals: dict[fx.Node, Any],
    rows: tuple[int, int],
    push: Callable[[dict[fx.Node, Any]], Tensor],
) -> list[fx.Node]:
    """Which values that enter a stream multiply it, token by token.

    Args:
        externals: the values.
        rows: B and N.
        push: the stream's end, with some of the values replaced.
    """
    found = []
    for node, value in externals.items():
        if not isinstance(value, Tensor) or not value.is_floating_point():
            continue
        if not {size for size in value.shape if size > 1} <= set(rows):
            continue
        once, twice = push({}), push({node: 2 * value})
        if bool(((twice - 2 * once).abs() <= 1e-9 * once.abs().max()).all()):
            found.append(node)
    return found


def read_growth(
    gm: fx.GraphModule, factor: fx.Node, tokens: int, given: dict[fx.Node, Any]
) -> FoundGrowth:
    """What a factor does at every position; read once, then remembered by its node.

    Args:
        gm: normalised graph.
        factor: of one number per token.
        tokens: N.
        given: values of the graph's placeholders.

    Raises:
        NotUnderstood: it depends on something else, or is of no known form.
    """
    if _KNOWN in factor.meta:
        known: FoundGrowth = factor.meta[_KNOWN]
        return known
    position = _position(gm, factor, tokens, given)
    if position is None:
        raise NotUnderstood(f"a stream is multiplied by {factor.name}, which no position makes")
    like: Tensor = Evaluator(gm).run([position], given)[0]
    wide = Evaluator(gm, promote=torch.float64)

    def at(places: Tensor) -> Tensor:
        filled = places.to(like.dtype).expand(like.shape)
        made: Tensor = wide.run([factor], {**given, position: filled})[0]
        return made.flatten()[:tokens]

    factor.meta[_KNOWN] = FoundGrowth(factor, position, _fitted(at, tokens))
    return factor.meta[_KNOWN]  # type: ignore[no-any-return]


def _position(
    gm: fx.GraphModule, factor: fx.Node, tokens: int, given: dict[fx.Node, Any]
) -> fx.Node | None:
    """The last value 0, 1, .. behind a factor that, with sizes, decides it."""
    behind = [n for n in factor.graph.nodes if n in ancestors([factor])]
    counted = torch.arange(tokens)
    for node in reversed(behind):
        if not isinstance(node.meta.get("val"), Tensor) or node is factor:
            continue
        value = Evaluator(gm).run([node], given)[0]
        if value.shape[-1:] != (tokens,) or value.numel() != tokens or value.is_complex():
            continue
        if bool((value.flatten() == counted).all()):
            return node
    return None


def _fitted(at: Callable[[Tensor], Tensor], tokens: int) -> Growth | None:
    """The growth that a function of position is."""

    def one(place: int) -> float:
        return float(at(torch.tensor(place))[0])

    start = one(0)
    if abs(start - 1) > _TOLERANCE:
        raise NotUnderstood("a stream is multiplied by a factor of position that is not one at 0")
    first = _change(one, 0)
    if first is None:
        return None
    for growth in (_stepped(one, first), _smooth(one, 0), _smooth(one, 1)):
        if growth is not None and _agrees(growth, at, tokens):
            return growth
    raise NotUnderstood("a stream is multiplied by a factor of position of no known form")


def _stepped(one: Callable[[int], float], first: int) -> Growth | None:
    """The growth in steps that changes at `first` and then again."""
    second = _change(one, first)
    period = (second or 2 * first) - first
    if period < first:
        return None
    return Growth((one(first) - 1) / math.log(2), period - first, period)


def _smooth(one: Callable[[int], float], offset: int) -> Growth | None:
    """The growth without steps that has the same values at two far positions."""
    near, far = _FARTHEST // 2, _FARTHEST
    beta = (one(far) - one(near)) / math.log((far + offset) / (near + offset))
    if abs(beta) <= _TOLERANCE:
        return None
    begins = math.exp(math.log(near + offset) - (one(near) - 1) / beta)
    return Growth(beta, offset, round(begins), smooth=True) if 1 <= begins <= near else None


def _agrees(growth: Growth, at: Callable[[Tensor], Tensor], tokens: int) -> bool:
    """Whether it is the factor at random positions, some far behind its beginning."""
    generator = torch.Generator().manual_seed(9)
    for _ in range(8):
        places = torch.randint(
            0, min(_FARTHEST, 64 * growth.period), (tokens,), generator=generator
        )
        wanted = torch.tensor([growth.at(int(p)) for p in places], dtype=torch.float64)
        if not bool(((at(places) - wanted).abs() <= _TOLERANCE * wanted.abs()).all()):
            return False
    return True


def _change(one: Callable[[int], float], after: int) -> int | None:
    """The first position behind `after` with another factor; None where there is none."""
    known, step = one(after), 1
    while abs(one(after + step) - known) <= _TOLERANCE * abs(known):
        step *= 2
        if step > _FARTHEST:
            return None
    low, high = after + step // 2, after + step
    while high - low > 1:
        middle = (low + high) // 2
        same = abs(one(middle) - known) <= _TOLERANCE * abs(known)
        low, high = (middle, high) if same else (low, middle)
    return high

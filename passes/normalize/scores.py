"""Read spelled-out attention scores: from the softmax back to q k^T, naming all on the way.

Accepted: casts, scalar and per-head factors, softcap, masks and biases added or filled in, a
column of sinks, heads folded into the batch ([B H, N, M]), the shift by the largest score.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from reattend.passes.normalize.forms import aten, is_op
from reattend.passes.normalize.score_values import (
    CASTS,
    RESHAPES,
    heads_of,
    is_max_of,
    low,
    number,
    per_row,
    refolds,
    weight,
)

PRODUCTS = (aten.matmul, aten.bmm, aten.baddbmm)


@dataclass(frozen=True)
class Term:
    """Added to the scores with a factor; or, `hidden`, a bool tensor that is True where hidden.

    `chain`: `node` is what these operations make of the scores `base`, in other axes (Swin's
    windows); what they add is seen on zeros.
    """

    node: fx.Node
    factor: float = 1.0
    hidden: bool = False
    inverted: bool = False
    chain: tuple[fx.Node, ...] = ()
    base: fx.Node | None = None


@dataclass(frozen=True)
class Scores:
    """scale * q k * factors, capped, plus terms, beside sinks.

    `column`: one logit more takes part in the softmax: `sinks`, stored per head, or 0. One that is
    computed for every query t is made 0 by a term -t: softmax does not see what all logits share.
    """

    product: fx.Node
    q: fx.Node
    k: fx.Node
    heads: int
    scale: float = 1.0
    softcap: float = 0.0
    terms: tuple[Term, ...] = ()
    factors: tuple[tuple[fx.Node, bool], ...] = ()
    sinks: fx.Node | None = None
    column: bool = False


@dataclass(frozen=True)
class _Way:
    """What was met between the softmax and here."""

    outer: float = 1.0
    softcap: float = 0.0
    capped: bool = False
    heads: int = 0
    terms: tuple[Term, ...] = ()
    factors: tuple[tuple[fx.Node, bool], ...] = ()
    sinks: fx.Node | None = None
    column: bool = False
    seen: list[fx.Node] = field(default_factory=list, compare=False)


def read_scores(gm: fx.GraphModule, softmax: fx.Node) -> Scores | fx.Node:
    """The parts of a softmax' input, or the node that is not understood."""
    way = _Way(heads=heads_of(softmax))
    found = _walk(gm, softmax.args[0], way)
    if found is not None:
        return found
    wide = [n for n in way.seen if _sizes(n) == _sizes(softmax)]
    return (wide or way.seen or [softmax])[-1]  # a mask on the way is not what stands there


def _sizes(node: fx.Node) -> list[Any]:
    """A shape as it was at capture: equal sizes may be different expressions of symbols."""
    shape = node.meta["val"].shape
    return [s.node.hint if isinstance(s, torch.SymInt) else s for s in shape]


def _walk(gm: fx.GraphModule, node: Any, way: _Way) -> Scores | None:
    while isinstance(node, fx.Node):
        way.seen.append(node)
        if is_op(node, *PRODUCTS):
            return _product(gm, node, way)
        if is_op(node, *CASTS):
            node = node.args[0]
        elif is_op(node, *RESHAPES):
            way = replace(way, heads=way.heads or heads_of(node.args[0]))
            if not refolds(node):
                detour = None if way.capped or way.factors else _detour(node)
                if detour is None:
                    return None
                term = Term(node, way.outer, chain=detour[0], base=detour[1])
                way, node = replace(way, terms=(term, *way.terms)), detour[1]
                continue
            node = node.args[0]
        elif is_op(node, aten.cat) and way == _Way(heads=way.heads):
            taken = _sinks(node)
            if taken is None:
                return None
            node, sinks, column = taken
            terms = () if column is None else (Term(column, -1.0),)
            way = replace(way, sinks=sinks, column=True, terms=terms)
        elif is_op(node, aten.sub) and is_max_of(node.args[1], node.args[0]):
            node = node.args[0]
        elif is_op(node, aten.maximum, aten.max, aten.clamp, aten.clamp_min):
            if not low(gm, node.args[1] if len(node.args) > 1 else None):
                return None
            node = node.args[0]
        elif (
            is_op(node, aten.masked_fill, aten.masked_fill_) and not way.capped and way.outer == 1.0
        ):
            if not low(gm, node.args[2]):
                return None
            way = replace(way, terms=(Term(node.args[1], hidden=True), *way.terms))
            node = node.args[0]
        elif is_op(node, aten.where) and not way.capped and way.outer == 1.0:
            if not low(gm, node.args[2]):
                return None
            hidden = Term(node.args[0], hidden=True, inverted=True)
            way = replace(way, terms=(hidden, *way.terms))
            node = node.args[1]
        elif is_op(node, aten.add, aten.add_, aten.sub) and not (way.capped or node.kwargs):
            return _sum(gm, node, way)
        elif is_op(node, aten.mul, aten.mul_, aten.div, aten.div_) and not node.kwargs:
            scaled = _scaled(gm, node, way)
            if scaled is None:
                return None
            node, way = scaled
        else:
            return None
    return None


def _detour(node: fx.Node) -> tuple[tuple[fx.Node, ...], fx.Node] | None:
    """From a reshape back to scores of the same shape, with nothing but sums on the way."""
    wanted = [str(s) for s in node.meta["val"].shape]
    chain = [node]
    below: Any = node.args[0]
    while isinstance(below, fx.Node) and len(chain) < 8:
        shape = [str(s) for s in below.meta["val"].shape]
        if len(shape) == len(wanted) and shape[1:] == wanted[1:]:
            return tuple(reversed(chain)), below
        if not is_op(below, *RESHAPES, aten.add):
            return None
        chain.append(below)
        below = below.args[0]
    return None


def _sum(gm: fx.GraphModule, node: fx.Node, way: _Way) -> Scores | None:
    """Scores on one side, a mask or bias on the other."""
    if way.factors:
        return None
    sign = -1.0 if is_op(node, aten.sub) else 1.0
    sides = [(node.args[0], node.args[1], sign)]
    sides += [(node.args[1], node.args[0], 1.0)] if sign > 0 else []
    for below, other, factor in sides:
        if not isinstance(below, fx.Node) or not isinstance(other, fx.Node):
            continue
        if below.meta["val"].dim() < 3:
            continue
        term = Term(other, factor * way.outer)
        found = _walk(gm, below, replace(way, terms=(term, *way.terms)))
        if found is not None:
            return found
    return None


def _scaled(gm: fx.GraphModule, node: fx.Node, way: _Way) -> tuple[fx.Node, _Way] | None:
    """A factor: a number (possibly of a softcap), or a tensor of weights."""
    divides = is_op(node, aten.div, aten.div_)
    below, other = node.args[:2]
    if not divides and not isinstance(other, int | float) and weight(below):
        below, other = other, below
    if not isinstance(below, fx.Node):
        return None
    factor = number(gm, other)
    if factor is None:
        if way.capped or not per_row(other):
            return None
        return below, replace(way, factors=((other, divides), *way.factors))
    factor = 1.0 / factor if divides else factor
    if not is_op(below, aten.tanh):
        return below, replace(way, outer=way.outer * factor)
    inner: Any = below.args[0]
    if way.capped or way.outer != 1.0 or not is_op(inner, aten.div, aten.mul):
        return None
    inverse = number(gm, inner.args[1])
    if inverse is None:
        return None
    inverse = inverse if is_op(inner, aten.div) else 1.0 / inverse
    if abs(inverse - factor) > 1e-9 * abs(factor):
        return None
    return inner.args[0], replace(way, softcap=factor, capped=True)


def _product(gm: fx.GraphModule, node: fx.Node, way: _Way) -> Scores | None:
    """q k^T, with what `baddbmm` adds and scales."""
    terms, scale = way.terms, way.outer
    left, right = node.args[-2:] if is_op(node, aten.baddbmm) else node.args[:2]
    if is_op(node, aten.baddbmm):
        beta, alpha = (number(gm, node.kwargs.get(k, 1.0)) for k in ("beta", "alpha"))
        added = node.args[0]
        if beta is None or alpha is None or not isinstance(added, fx.Node) or way.capped:
            return None
        if beta:
            terms = (Term(added, beta * way.outer), *terms)
        scale *= alpha
    if not isinstance(left, fx.Node) or not isinstance(right, fx.Node):
        return None
    heads = way.heads or heads_of(left)
    return Scores(
        node, left, right, heads, scale, way.softcap, terms, way.factors, way.sinks, way.column
    )


def _sinks(node: fx.Node) -> tuple[fx.Node, fx.Node | None, fx.Node | None] | None:
    """Of cat([scores, one column], -1): the scores; the column if it is a stored vector, or else
    if it is computed for every query, [B, H, N, 1]."""
    parts = node.args[0]
    if not isinstance(parts, list | tuple) or len(parts) != 2:
        return None
    axis = node.args[1] if len(node.args) > 1 else 0
    scores, column = parts
    if axis not in (-1, scores.meta["val"].dim() - 1) or column.meta["val"].shape[-1] != 1:
        return None
    made = column
    while is_op(column, *CASTS, *RESHAPES, aten.expand, aten.unsqueeze, aten.repeat):
        column = column.args[0]
    if column.op == "get_attr":
        return scores, column, None
    per_query = scores.meta["val"].dim() == 4 and _sizes(made)[:3] == _sizes(scores)[:3]
    return (scores, None, made) if per_query else None

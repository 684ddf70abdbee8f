"""Tokens that are regrouped behind their projection are regrouped before it.

A linear layer acts on every token by itself, so windows may be cut, and a part of the sequence
taken, before it: T(x W) = T(x) W. The model's own operations do it: x, its features in the rows
that a stream reads, is sent through what stands between the projection and the core.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from reattend.passes.base import GraphPass, call, drop_dead, owned
from reattend.passes.normalize.forms import aten, attention, is_op
from reattend.passes.normalize.ways import known, the_projection, way_to

_STREAMS = (0, 1, 2)


@dataclass
class Regrouped:
    """A stream that is scale x one row of the projection of one token everywhere.

    Attributes:
        projection: [B, L, p].
        chain: what follows it, the core's input last.
        first: the first of the H d rows it reads, in order.
        tokens: [B', n], the token (counted through the batch) that is read.
    """

    projection: fx.Node
    chain: list[fx.Node]
    first: int
    scale: float
    tokens: Tensor


class RegroupFirst(GraphPass):
    """`regroup(linear(x))` -> `linear(regroup(x))` between projections and a core."""

    name = "regroup-first"

    def match(self, gm: fx.GraphModule) -> Iterable[fx.Node]:
        """Cores with streams that have other tokens than their projections."""
        for core in gm.graph.nodes:
            if is_op(core, attention):
                moved = [core.args[i] for i in _STREAMS if _moved(core.args[i])]
                if moved and all(_read(gm, stream) is not None for stream in moved):
                    yield core

    def rewrite(self, gm: fx.GraphModule, node: fx.Node) -> None:
        """The layers behind the regrouping; streams that share it share its result."""
        made: list[tuple[fx.Node, Tensor, fx.Node]] = []
        arguments = list(node.args)
        with gm.graph.inserting_before(node):
            for i in _STREAMS:
                stream: Any = node.args[i]
                found = _read(gm, stream) if _moved(stream) else None
                if found is None:
                    continue
                source: Any = found.projection.args[0]
                x = next((g for s, t, g in made if s is source and _equal(t, found.tokens)), None)
                if x is None:
                    x = _before(gm, found, source)
                    owned(x, node)
                    made.append((source, found.tokens, x))
                arguments[i] = _after(gm, found, x, stream)
                owned(arguments[i], node)
        node.args = tuple(arguments)
        drop_dead(gm.graph)


def _before(gm: fx.GraphModule, found: Regrouped, x: fx.Node) -> fx.Node:
    """[B', n, D]: x through the model's own regrouping."""
    rows = int(found.projection.meta["val"].shape[-1])
    width = int(x.meta["val"].shape[-1])
    ends = [found.first, rows - found.first - width]
    placed = x if ends == [0, 0] else call(gm, aten.constant_pad_nd.default, x, ends)
    if placed is not x:
        placed.meta["nn_module_stack"] = found.chain[-1].meta.get("nn_module_stack", {})
    copies = {found.projection: placed}
    for node in found.chain:
        copies[node] = gm.graph.node_copy(node, lambda n: copies.get(n, n))
        copies[node].meta = {k: node.meta[k] for k in ("val", "nn_module_stack") if k in node.meta}
    turned = call(gm, aten.transpose.int, copies[found.chain[-1]], 1, 2)
    flat = call(gm, aten.flatten.using_ints, turned, 2, -1)
    return flat if found.scale == 1.0 else call(gm, aten.div.Tensor, flat, found.scale)


def _after(gm: fx.GraphModule, found: Regrouped, x: fx.Node, stream: fx.Node) -> fx.Node:
    """[B', H, n, d]: the projection of regrouped tokens, its rows by head."""
    heads, width = (int(stream.meta["val"].shape[axis]) for axis in (1, 3))
    y = call(gm, aten.linear.default, x, *found.projection.args[1:])
    y.meta["nn_module_stack"] = found.projection.meta.get("nn_module_stack", {})
    end = found.first + heads * width
    picked = call(gm, aten.slice.Tensor, y, -1, found.first, end)
    apart = call(gm, aten.unflatten.int, picked, -1, [heads, width])
    turned = call(gm, aten.transpose.int, apart, 1, 2)
    return turned if found.scale == 1.0 else call(gm, aten.mul.Tensor, turned, found.scale)


def _moved(stream: Any) -> bool:
    """Whether a core's input has other tokens than the projection behind it."""
    projection = the_projection(stream)
    if projection is None or stream.meta["val"].dim() != 4 or projection.meta["val"].dim() != 3:
        return False
    return known(stream.meta["val"].shape[2]) != known(projection.meta["val"].shape[1])


def _read(gm: fx.GraphModule, stream: Any) -> Regrouped | None:
    """What a stream reads where, by running it on codes; None if it is no such map."""
    way = way_to(gm, stream)
    if way is None:
        return None
    projection, push, shape = way.projection, way.push, way.shape
    batch, length, rows = shape
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(shape, generator=generator, dtype=torch.float64)
    try:
        scales = push(torch.ones(1, dtype=torch.float64))
        scale = float(scales.flatten()[0])
        if not scale or bool((scales != scale).any()):
            return None
        row_BHnd = (push(torch.arange(rows, dtype=torch.float64)) / scale).round().long()
        code = torch.arange(batch * length, dtype=torch.float64).view(batch, length, 1)
        token_BHnd = (push(code) / scale).round().long()
        expected = noise.flatten(0, 1)[token_BHnd, row_BHnd] * scale
    except (RuntimeError, IndexError):
        return None
    first, inside = int(row_BHnd[0, 0, 0, 0]), int(projection.args[0].meta["val"].shape[-1])
    heads, width = row_BHnd.shape[1], row_BHnd.shape[3]
    wanted = first + torch.arange(heads * width).view(heads, 1, width)
    plain = heads * width == inside and bool((row_BHnd == wanted).all())
    if not plain or not bool((token_BHnd == token_BHnd[:, :1, :, :1]).all()):
        return None
    if not torch.equal(push(noise), expected):
        return None
    return Regrouped(projection, way.chain, first, scale, token_BHnd[:, 0, :, 0])


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a, b)

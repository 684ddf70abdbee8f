"""Cores of more than four axes: some are heads, the others hold tokens and join the batch.

Windows of an image, streams of predictions, groups of query heads: attention is often written
with several axes before those of queries and keys. The values tell them apart. Along an axis of
heads they read other rows of their projection, or one and the same (keys of a group of heads);
along any other axis they read the same rows, of other tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from reattend.passes.base import call
from reattend.passes.normalize.forms import aten
from reattend.passes.normalize.ways import way_to


@dataclass(frozen=True)
class Axes:
    """The leading axes of a core's tensors.

    Attributes:
        tokens: folded into the batch, which is the first of them.
        heads: folded into one axis of heads.
        full: for every leading axis a tensor that has its full size.
    """

    tokens: tuple[int, ...]
    heads: tuple[int, ...]
    full: tuple[fx.Node, ...]

    @property
    def order(self) -> list[int]:
        """The axes of [.., N, M] with the batch first, heads next."""
        count = len(self.full)
        return [*self.tokens, *self.heads, count, count + 1]

    def sizes(self, gm: fx.GraphModule, axes: tuple[int, ...]) -> list[Any]:
        """Sizes of some leading axes: numbers, or new nodes."""
        return [
            known if isinstance(known := _size(self.full[a], a), int)
            else call(gm, aten.sym_size.int, self.full[a], a)
            for a in axes
        ]  # fmt: skip


def read_axes(gm: fx.GraphModule, q: fx.Node, k: fx.Node, v: fx.Node) -> Axes | None:
    """What each leading axis of a core is; None where the values do not tell.

    Args:
        gm: the graph.
        q, k, v: [.., N, d], [.., d, M] or [.., M, d], and [.., M, e], leading axes in one order.
    """
    lead = v.meta["val"].dim() - 2
    way = way_to(gm, v)
    if way is None or {n.meta["val"].dim() - 2 for n in (q, k)} != {lead}:
        return None
    try:
        out = way.push(torch.arange(1.0, way.shape[-1] + 1, dtype=torch.float64))
    except (RuntimeError, IndexError):
        return None
    moves = [not torch.equal(out, out.narrow(a, 0, 1).expand_as(out)) for a in range(lead)]
    heads = tuple(a for a in range(1, lead) if moves[a] or _single(v, a))
    if moves[0] or not heads:
        return None
    if not all(isinstance(_size(n, a), int) for a in heads for n in (q, k, v)):
        return None
    full = [next((n for n in (q, k, v) if not _single(n, a)), q) for a in range(lead)]
    return Axes(tuple(a for a in range(lead) if a not in heads), heads, tuple(full))


def fold(gm: fx.GraphModule, node: fx.Node, axes: Axes) -> fx.Node:
    """[.., N, d] -> [B, H, N, d]; an axis of size 1 that stands for all is repeated."""
    lead = range(len(axes.full))
    return _turned(gm, _repeated(gm, node, axes, tuple(a for a in lead if _single(node, a))), axes)


def unfold(gm: fx.GraphModule, node: fx.Node, axes: Axes) -> fx.Node:
    """[B, H, N, e] -> [.., N, e]."""
    if len(axes.heads) > 1:
        node = call(gm, aten.unflatten.int, node, 1, axes.sizes(gm, axes.heads))
    if len(axes.tokens) > 1:
        node = call(gm, aten.unflatten.int, node, 0, [-1, *axes.sizes(gm, axes.tokens[1:])])
    order = axes.order
    if order == list(range(len(order))):
        return node
    return call(gm, aten.permute.default, node, [order.index(i) for i in range(len(order))])


def fold_term(gm: fx.GraphModule, node: fx.Node, axes: Axes) -> fx.Node:
    """What broadcasts against scores [.., N, M], as it does against [B, H, N, M]."""
    for _ in range(len(axes.order) - node.meta["val"].dim()):
        node = call(gm, aten.unsqueeze.default, node, 0)
    alone = [[a for a in group if _single(node, a)] for group in (axes.tokens, axes.heads)]
    pairs = zip(alone, (axes.tokens, axes.heads), strict=True)
    some = tuple(a for single, group in pairs if len(single) < len(group) for a in single)
    return _turned(gm, _repeated(gm, node, axes, some), axes)


def _repeated(gm: fx.GraphModule, node: fx.Node, axes: Axes, some: tuple[int, ...]) -> fx.Node:
    """Axes of size 1 at their full size."""
    some = tuple(a for a in some if not _single(axes.full[a], a))
    if not some:
        return node
    sizes: list[Any] = [-1] * node.meta["val"].dim()
    for a, size in zip(some, axes.sizes(gm, some), strict=True):
        sizes[a] = size
    return call(gm, aten.expand.default, node, sizes)


def _turned(gm: fx.GraphModule, node: fx.Node, axes: Axes) -> fx.Node:
    """The axes in order, batch and heads each as one."""
    if axes.order != list(range(len(axes.order))):
        node = call(gm, aten.permute.default, node, axes.order)
    count = len(axes.tokens)
    if len(axes.heads) > 1:
        node = call(gm, aten.flatten.using_ints, node, count, count + len(axes.heads) - 1)
    return call(gm, aten.flatten.using_ints, node, 0, count - 1) if count > 1 else node


def _size(node: fx.Node, axis: int) -> Any:
    return node.meta["val"].shape[axis]


def _single(node: fx.Node, axis: int) -> bool:
    return str(_size(node, axis)) == "1"

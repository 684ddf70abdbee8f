"""Cores that give the same weights to different values become one core with wider values.

Differential attention (Ye et al., arXiv 2410.05258) is written as two calls that share queries and
keys; softmax(q k) [v1 | v2] is both.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn

from reattend.passes.base import CORES, GraphPass, Refusal, drop_dead
from reattend.passes.evaluate import ancestors, attribute
from reattend.passes.normalize.forms import aten, attention, is_op

#: operations compared behind an argument before two are taken for different
_DEPTH = 12


def equivalent(a: Any, b: Any, depth: int = _DEPTH, gm: fx.GraphModule | None = None) -> bool:
    """Whether two arguments are one value: the same node, or the same operations on the same.

    With `gm`, constants that torch.export lifted out of the code are compared by what they hold.
    """
    if not isinstance(a, fx.Node) or not isinstance(b, fx.Node):
        if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
            return all(equivalent(x, y, depth, gm) for x, y in zip(a, b, strict=True))
        return type(a) is type(b) and bool(a == b)
    if a is b:
        return True
    if a.op == b.op == "get_attr" and gm is not None:
        x, y = attribute(gm, str(a.target)), attribute(gm, str(b.target))
        plain = not isinstance(x, nn.Parameter) and not isinstance(y, nn.Parameter)
        return plain and x.dtype == y.dtype and torch.equal(x, y)
    same = a.op == b.op == "call_function" and a.target is b.target and not a.is_impure()
    if not same or depth == 0 or a.kwargs.keys() != b.kwargs.keys() or len(a.args) != len(b.args):
        return False
    pairs = [*zip(a.args, b.args, strict=True), *((v, b.kwargs[k]) for k, v in a.kwargs.items())]
    return all(equivalent(x, y, depth - 1, gm) for x, y in pairs)


class MergeValues(GraphPass):
    """attention(q, k, v1, ..) and attention(q, k, v2, ..) in one."""

    name = "merge-values"

    def match(self, gm: fx.GraphModule) -> Iterable[fx.Node]:
        """Cores that repeat the queries and keys of an earlier one."""
        return [n for n in gm.graph.nodes if is_op(n, attention) and _earlier(n) is not None]

    def check(self, gm: fx.GraphModule, node: fx.Node) -> Refusal | None:
        """The values must have the same heads and tokens, and not depend on the earlier result."""
        first = _earlier(node)
        if first is None:
            return Refusal("its twin was merged with another core")
        a, b = (n.args[2].meta["val"].shape for n in (first, node))
        if [str(s) for s in a[:-1]] != [str(s) for s in b[:-1]]:
            return Refusal("the values of two equal cores differ in heads or tokens")
        if first in ancestors([node.args[2]]):
            return Refusal("the values of one core are made of the other's result")
        return None

    def rewrite(self, gm: fx.GraphModule, node: fx.Node) -> None:
        """One core at the place of the first, and a slice of it for each."""
        first = _earlier(node)
        assert first is not None
        values: list[Any] = [first.args[2], node.args[2]]
        behind = ancestors([values[1]])
        for late in [n for n in gm.graph.nodes if n in behind and first < n]:
            first.prepend(late)
        widths = [int(v.meta["val"].shape[-1]) for v in values]
        both: Tensor = first.meta["val"]
        with gm.graph.inserting_before(first):
            wide = gm.graph.call_function(aten.cat.default, (values, -1))
            wide.meta["val"] = both.new_empty((*values[0].meta["val"].shape[:-1], sum(widths)))
            new = gm.graph.call_function(attention, (*first.args[:2], wide, *first.args[3:]))
            new.meta["val"] = both.new_empty((*both.shape[:-1], sum(widths)))
            parts = [
                gm.graph.call_function(aten.slice.Tensor, (new, -1, start, start + width))
                for start, width in ((0, widths[0]), (widths[0], widths[1]))
            ]
        new.meta[CORES] = sum(int(n.meta.get(CORES, 1)) for n in (first, node))
        for old, part in zip((first, node), parts, strict=True):
            part.meta["val"] = old.meta["val"]
            old.replace_all_uses_with(part)
        for made in (wide, new, *parts):
            made.meta["nn_module_stack"] = first.meta.get("nn_module_stack", {})
        for old in (node, first):
            gm.graph.erase_node(old)
        drop_dead(gm.graph)


def _earlier(node: fx.Node) -> fx.Node | None:
    """The first core before this one that has its queries, keys and everything but its values."""
    for other in node.graph.nodes:
        if other is node:
            return None
        if is_op(other, attention) and len(other.args) == len(node.args):
            pairs = zip(other.args, node.args, strict=True)
            if all(i == 2 or equivalent(x, y) for i, (x, y) in enumerate(pairs)):
                return other
    return None

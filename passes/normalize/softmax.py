"""A softmax written out becomes one node: `e / e.sum(-1)`, or `exp(x - logsumexp(x))`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import fx

from reattend.passes.base import GraphPass, call, drop_dead, replace_node
from reattend.passes.normalize.forms import aten, is_op


class ToSoftmax(GraphPass):
    """`exp(x) / sum(exp(x))` and `exp(x - logsumexp(x))` -> `softmax(x)`.

    What is subtracted from x beside, its largest value say, stays in x.
    """

    name = "to-softmax"

    def match(self, gm: fx.GraphModule) -> Iterable[fx.Node]:
        """Quotients and exponentials of that form."""
        return [n for n in gm.graph.nodes if _scores(n) is not None]

    def rewrite(self, gm: fx.GraphModule, node: fx.Node) -> None:
        """The one node."""
        scores, axis = _scores(node)  # type: ignore[misc]
        with gm.graph.inserting_before(node):
            new = call(gm, aten.softmax.int, scores, axis)
        replace_node(node, new)
        drop_dead(gm.graph)


def _scores(node: fx.Node) -> tuple[fx.Node, int] | None:
    """x and the axis where a value is softmax(x, axis)."""
    if is_op(node, aten.exp) and is_op(node.args[0], aten.sub):
        x, total = node.args[0].args[:2]
        axis = _over(total, aten.logsumexp, x)
        plain = len(node.args[0].args) == 2 and not node.args[0].kwargs
        return (x, axis) if axis is not None and plain else None
    if is_op(node, aten.div) and len(node.args) == 2 and not node.kwargs:
        powers, total = node.args
        axis = _over(total, aten.sum, powers)
        if axis is not None and is_op(powers, aten.exp):
            return powers.args[0], axis
    return None


def _over(total: Any, operation: object, of: Any) -> int | None:
    """The axis of `operation(of, axis, keepdim=True)`."""
    if not is_op(total, operation) or total.kwargs or len(total.args) != 3:
        return None
    source, axes, kept = total.args
    one = axes if isinstance(axes, list | tuple) else [axes]
    return int(one[0]) if source is of and kept is True and len(one) == 1 else None

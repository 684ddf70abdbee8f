"""Scores hidden by arithmetic, `w * b - 1e4 * (1 - b)` with b of zeros and ones, become `where`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, fx

from reattend.passes.base import GraphPass, Refusal, replace_node
from reattend.passes.evaluate import Evaluator, ancestors
from reattend.passes.normalize.forms import aten, is_op
from reattend.passes.normalize.merge import equivalent


class BlendToWhere(GraphPass):
    """a * b + c * (1 - b), c a number: a where b is one, c where it is zero."""

    name = "blend-to-where"

    def match(self, gm: fx.GraphModule) -> Iterable[fx.Node]:
        """Sums of this form, whatever b is."""
        return [n for n in gm.graph.nodes if is_op(n, aten.add) and _parts(n) is not None]

    def check(self, gm: fx.GraphModule, node: fx.Node) -> Refusal | None:
        """b must be a stored tensor of zeros and ones, cut to size at most."""
        switch = _parts(node)[1]  # type: ignore[index]
        sizes = _sizes(switch)
        if any(n.op == "placeholder" for n in ancestors([switch], stop=lambda n: n in sizes)):
            return Refusal("the factor is computed from an input")
        value = Evaluator(gm).run([switch], sizes)[0]
        if not bool(((value == 0) | (value == 1)).all()):
            return Refusal("the factor is not made of zeros and ones")
        return None

    def rewrite(self, gm: fx.GraphModule, node: fx.Node) -> None:
        """The choice, written as one."""
        value, switch, number = _parts(node)  # type: ignore[misc]
        with gm.graph.inserting_before(node):
            shown = gm.graph.call_function(aten.ne.Scalar, (switch, 0))
            new = gm.graph.call_function(aten.where.ScalarOther, (shown, value, number))
        shown.meta.update(val=aten.ne.Scalar(switch.meta["val"], 0))
        shown.meta["nn_module_stack"] = node.meta.get("nn_module_stack", {})
        replace_node(node, new)


def _parts(node: fx.Node) -> tuple[fx.Node, fx.Node, float] | None:
    """(a, b, c) of a * b + c * (1 - b)."""
    if node.kwargs or len(node.args) < 2:
        return None
    for kept, other in (node.args[:2], node.args[1::-1]):
        if not is_op(kept, aten.mul) or not is_op(other, aten.mul):
            continue
        rest, number = other.args[:2]
        if not isinstance(number, int | float):
            rest, number = number, rest
        if not isinstance(number, int | float) or not is_op(rest, aten.rsub):
            continue
        switch = rest.args[0]
        if rest.args[1:] not in ((1,), (1.0,)) or rest.kwargs:
            continue
        for value, factor in (kept.args[:2], kept.args[1::-1]):
            tensor = isinstance(value, fx.Node) and isinstance(value.meta.get("val"), Tensor)
            if tensor and isinstance(factor, fx.Node) and equivalent(factor, switch):
                return value, factor, float(number)
    return None


def _sizes(node: fx.Node) -> dict[fx.Node, Any]:
    """The sizes behind a value, as they were at capture."""
    behind = ancestors([node], stop=lambda n: is_op(n, aten.sym_size))
    return {n: _hint(n.meta["val"]) for n in behind if is_op(n, aten.sym_size)}


def _hint(size: Any) -> int:
    return size if isinstance(size, int) else int(size.node.hint)

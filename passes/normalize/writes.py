"""Writes into a part of a tensor become functional: `rows[i] = y` makes a new `rows`.

After this no value of the graph changes, so walking from a value to what it is computed from
misses nothing. What torch calls functionalisation, done on the captured graph as it is.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, fx

from reattend.passes.aliases import view_of, writes
from reattend.passes.base import CAPTURED, GraphPass, Refusal, replace_node
from reattend.passes.normalize.forms import aten, is_op
from reattend.passes.normalize.inplace import twin_of

#: views that a new value can be put back through
_PARTS = (aten.slice, aten.select)
_TURNS = (aten.transpose, aten.permute, aten.unsqueeze, aten.squeeze, aten.view)


class WritesToScatter(GraphPass):
    """`view.op_(..)`: the tensor behind the view is scattered anew, and its later readers move."""

    name = "writes-to-scatter"

    def match(self, gm: fx.GraphModule) -> Iterable[fx.Node]:
        """In-place operators that have a functional twin."""
        return [n for n in gm.graph.nodes if twin_of(n) is not None]

    def check(self, gm: fx.GraphModule, node: fx.Node) -> Refusal | None:
        """The way from the written view to its tensor must be known, and no other may be vague."""
        changed = writes(node)
        if changed is None:
            return Refusal("what is changed in place is no tensor of the graph")
        chain = _chain(changed)
        if chain[-1].op != "call_function":
            return Refusal("an input or a stored tensor is changed in place")
        if any(not is_op(n, *_PARTS, *_TURNS) or _value(n) is None for n in chain[:-1]):
            return Refusal("a view of an unusual kind is changed in place")
        for other in _others(chain[-1], node):
            if not is_op(other, *_PARTS, *_TURNS) and _read_later(other, node):
                return Refusal(f"{other.name} may or may not be a view of what changes in place")
        return None

    def rewrite(self, gm: fx.GraphModule, node: fx.Node) -> None:
        """The functional twin, scattered back through every view, read by everything after it."""
        changed, twin = writes(node), twin_of(node)
        assert changed is not None and twin is not None
        chain = _chain(changed)
        others = [n for n in _others(chain[-1], node) if _read_later(n, node)]
        with gm.graph.inserting_before(node):
            new = gm.graph.call_function(twin, node.args, node.kwargs)
            new.meta["val"] = changed.meta["val"]
            made = {changed: new}
            for view, source in zip(chain, chain[1:], strict=False):
                put = _put_back(gm.graph, view, source, made[view])
                put.meta["val"] = source.meta["val"]
                made[source] = put
            for view in others:
                if view not in made:
                    made[view] = gm.graph.node_copy(view, lambda n: made.get(n, n))
                    made[view].meta.pop(CAPTURED, None)
        for before, after in made.items():
            if after is not new:
                after.meta.setdefault("nn_module_stack", node.meta.get("nn_module_stack", {}))
            before.replace_all_uses_with(after, delete_user_cb=lambda user: node < user)
        replace_node(node, new)


def _chain(changed: fx.Node) -> list[fx.Node]:
    """From a written view back to the tensor it is a view of, both included."""
    chain = [changed]
    while (source := view_of(chain[-1])) is not None:
        chain.append(source)
    return chain


def _others(root: fx.Node, before: fx.Node) -> list[fx.Node]:
    """Every view of `root` made before a node, in graph order."""
    found: list[fx.Node] = []
    todo = [root]
    while todo:
        source = todo.pop()
        views = [u for u in source.users if u < before and view_of(u) is source]
        todo += views
        found += views
    return sorted(found)


def _read_later(node: fx.Node, than: fx.Node) -> bool:
    """Whether a view, or a view of it, is read after a node."""
    return any(
        than < user or (view_of(user) is node and _read_later(user, than)) for user in node.users
    )


def _value(node: fx.Node) -> Tensor | None:
    value = node.meta.get("val")
    return value if isinstance(value, Tensor) else None


def _put_back(graph: fx.Graph, view: fx.Node, source: fx.Node, new: fx.Node) -> fx.Node:
    """`source` with its part `view` replaced by `new`."""
    arguments: list[Any] = list(view.args[1:])
    if is_op(view, aten.slice):
        target: Any = aten.slice_scatter.default
        return graph.call_function(target, (source, new, *arguments), view.kwargs)
    if is_op(view, aten.select):
        return graph.call_function(aten.select_scatter.default, (source, new, *arguments))
    if is_op(view, aten.transpose):
        return graph.call_function(aten.transpose.int, (new, *arguments))
    if is_op(view, aten.permute):
        order = [a % len(arguments[0]) for a in arguments[0]]
        back = [order.index(axis) for axis in range(len(order))]
        return graph.call_function(aten.permute.default, (new, back))
    return graph.call_function(aten.reshape.default, (new, _sizes(graph, source)))


def _sizes(graph: fx.Graph, node: fx.Node) -> list[Any]:
    """The shape of a value as arguments: numbers, and sizes read off it."""
    return [
        size if isinstance(size, int) else graph.call_function(aten.sym_size.int, (node, axis))
        for axis, size in enumerate(node.meta["val"].shape)
    ]

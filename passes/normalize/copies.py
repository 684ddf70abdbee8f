"""What is copied into a part of a tensor becomes a new tensor: `x[..., :n] = y`.

A captured graph keeps `copy_` into a view whose result nobody names; later nodes read the tensor
behind the view. Anything that runs a part of the graph would skip it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import fx

from reattend.passes.base import GraphPass, Refusal, call
from reattend.passes.normalize.forms import aten, is_op

_PARTS = {aten.slice: aten.slice_scatter.default, aten.select: aten.select_scatter.default}


class ScatterCopies(GraphPass):
    """`copy_(slice(x), y)`, or `fill_` -> `slice_scatter(x, y)`, read by everything after it."""

    name = "scatter-copies"

    def match(self, gm: fx.GraphModule) -> Iterable[fx.Node]:
        """Copies into parts."""
        writes = (aten.copy_, aten.fill_)
        return [n for n in gm.graph.nodes if is_op(n, *writes) and is_op(n.args[0], *_PARTS)]

    def check(self, gm: fx.GraphModule, node: fx.Node) -> Refusal | None:
        """The tensor must be the graph's own, and be seen under no other view afterwards."""
        base, views = _chain(node)
        if base.op != "call_function" or is_op(base, *_VIEWS):
            return Refusal("a part of an input, a weight or a view is changed in place")
        if any(user is not node and node < user for view in views for user in view.users):
            return Refusal("a part of a tensor is read after it was changed in place")
        if any(
            is_op(u, *_VIEWS) and any(node < r for r in u.users) for u in base.users if u < node
        ):
            return Refusal("a tensor is changed in place under a view of it")
        return None

    def rewrite(self, gm: fx.GraphModule, node: fx.Node) -> None:
        """The tensor with the part in it."""
        base, views = _chain(node)
        with gm.graph.inserting_before(node):
            value: Any = node.args[1]
            if not isinstance(value, fx.Node):
                value = call(gm, aten.full_like.default, views[-1], value)
            if str(value.meta["val"].shape) != str(views[-1].meta["val"].shape):
                value = call(gm, aten.expand_as.default, value, views[-1])
            for view in reversed(views):
                source, *place = view.args
                packet = next(p for p in _PARTS if is_op(view, p))
                value = call(gm, _PARTS[packet], source, value, *place)
        value.meta["nn_module_stack"] = node.meta.get("nn_module_stack", {})
        base.replace_all_uses_with(value, delete_user_cb=lambda user: node < user)
        node.replace_all_uses_with(views[-1])
        gm.graph.erase_node(node)


_VIEWS = (
    *_PARTS, aten.view, aten.reshape, aten.transpose, aten.permute, aten.expand, aten.unsqueeze,
    aten.squeeze, aten.split, aten.chunk, aten.unbind, aten.t, aten.alias, aten.unflatten,
    aten.flatten, aten.narrow,
)  # fmt: skip


def _chain(node: fx.Node) -> tuple[fx.Node, list[fx.Node]]:
    """The tensor behind the part that is written, and the views on the way, outermost first."""
    views: list[fx.Node] = []
    part: Any = node.args[0]
    while is_op(part, *_PARTS):
        views.append(part)
        part = part.args[0]
    return part, views[::-1]

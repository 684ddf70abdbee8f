"""Operations that change their first argument in place become their functional twins.

A captured graph keeps `x.clamp_(...)` whose result nobody names; later nodes read `x`. Anything
that runs a part of the graph would skip it.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import fx

from reattend.passes.base import GraphPass, Refusal, replace_node
from reattend.passes.normalize.forms import aten, is_op

_VIEWS = (
    aten.view, aten.reshape, aten.transpose, aten.permute, aten.slice, aten.select, aten.expand,
    aten.unsqueeze, aten.squeeze, aten.split, aten.chunk, aten.unbind, aten.t, aten.alias,
    aten.unflatten, aten.flatten,
)  # fmt: skip


def twin_of(node: fx.Node) -> torch._ops.OpOverload | None:
    """The functional overload of an in-place operator, None where there is none."""
    target = node.target
    if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload):
        return None
    name = target.overloadpacket.__name__
    if target.namespace != "aten" or not name.endswith("_") or name.endswith("__"):
        return None
    packet = getattr(aten, name[:-1], None)
    twin = getattr(packet, target._overloadname, None) if packet is not None else None
    return twin if isinstance(twin, torch._ops.OpOverload) else None


class ToFunctional(GraphPass):
    """`x.op_(..)`: later readers of x read the result instead."""

    name = "to-functional"

    def match(self, gm: fx.GraphModule) -> Iterable[fx.Node]:
        """In-place operators that have a functional twin."""
        return [n for n in gm.graph.nodes if twin_of(n) is not None]

    def check(self, gm: fx.GraphModule, node: fx.Node) -> Refusal | None:
        """What is changed must not be seen under another name."""
        changed = node.args[0]
        if not isinstance(changed, fx.Node) or changed.op in ("placeholder", "get_attr"):
            return Refusal("an input or a stored tensor is changed in place")
        if is_op(changed, *_VIEWS) and any(u is not changed for u in changed.args[0].users):
            return Refusal("a view of a tensor that others read is changed in place")
        if any(is_op(u, *_VIEWS) and u < node for u in changed.users):
            return Refusal("a tensor is changed in place under a view of it")
        return None

    def rewrite(self, gm: fx.GraphModule, node: fx.Node) -> None:
        """The functional twin, read by everything after it."""
        changed, twin = node.args[0], twin_of(node)
        assert isinstance(changed, fx.Node) and twin is not None
        with gm.graph.inserting_before(node):
            new = gm.graph.call_function(twin, node.args, node.kwargs)
        changed.replace_all_uses_with(new, delete_user_cb=lambda user: node < user)
        replace_node(node, new)

"""Erase nodes that compute nothing: guards, asserts, whole slices, same-dtype casts, dropout."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, fx

from reattend.passes.base import GraphPass, replace_node
from reattend.passes.normalize.forms import aten, is_op

_ASSERTS = ("_assert_tensor_metadata", "_assert_scalar", "sym_constrain_range", "_assert_async")


def _same_value(node: fx.Node) -> bool:
    """Whether the output is the first argument, as a value."""
    if is_op(node, aten.alias, aten.lift_fresh_copy, aten.detach, aten.detach_, aten.contiguous):
        return True
    if is_op(node, aten.slice):
        args = list(node.args) + [0, 0, None, 1][len(node.args) :]
        return (
            args[2] in (0, None)
            and args[3] in (None, torch.iinfo(torch.int64).max)
            and (args[4:] in ([], [1]))
        )
    if is_op(node, aten.dropout, aten.native_dropout):
        return not node.args[2] or node.args[1] == 0.0
    if is_op(node, aten.to, aten._to_copy, aten.type_as):
        source = node.args[0]
        before, after = getattr(source, "meta", {}).get("val"), node.meta.get("val")
        return (
            isinstance(before, Tensor)
            and isinstance(after, Tensor)
            and before.dtype == after.dtype
            and before.device == after.device
        )
    if is_op(node, aten.cat):
        kept = [n for n in node.args[0] if not _zero_width(n)]
        return len(kept) == 1
    return _neutral(node)


def _neutral(node: fx.Node) -> bool:
    """x + 0, x - 0, x * 1, x / 1 of one dtype (a bias that is switched off)."""
    number = {aten.add: 0, aten.sub: 0, aten.mul: 1, aten.div: 1}
    found = [n for op, n in number.items() if is_op(node, op)]
    source = node.args[0] if node.args else None
    if not found or len(node.args) < 2 or not isinstance(source, fx.Node) or node.kwargs:
        return False
    before, after = source.meta.get("val"), node.meta.get("val")
    if not isinstance(before, Tensor) or not isinstance(after, Tensor):
        return False
    same = isinstance(node.args[1], int | float) and node.args[1] == found[0]
    return same and before.dtype == after.dtype


def _zero_width(node: object) -> bool:
    value = getattr(node, "meta", {}).get("val")
    return isinstance(value, Tensor) and any(isinstance(s, int) and s == 0 for s in value.shape)


class DropNoops(GraphPass):
    """Erases what changes no value; a concatenation with empty tensors becomes its one part."""

    name = "drop-noops"

    def match(self, gm: fx.GraphModule) -> Iterable[fx.Node]:
        """Asserts and guards (no users) and copies of their first argument."""
        for node in gm.graph.nodes:
            if node.op == "call_module" and str(node.target).startswith("_guards"):
                yield node
            elif node.op == "call_function" and not node.users:
                name = getattr(node.target, "__name__", str(node.target))
                if any(a in name for a in _ASSERTS):
                    yield node
            elif node.op == "call_function" and _same_value(node):
                yield node

    def rewrite(self, gm: fx.GraphModule, node: fx.Node) -> None:
        """Forward the value and erase."""
        if node.users:
            source = node.args[0]
            if is_op(node, aten.cat):
                source = next(n for n in node.args[0] if not _zero_width(n))
            assert isinstance(source, fx.Node)
            node.replace_all_uses_with(source)
        gm.graph.erase_node(node)


class ViewToReshape(GraphPass):
    """`view` demands strides that a normalised core need not give; `reshape` never does."""

    name = "view-to-reshape"

    def match(self, gm: fx.GraphModule) -> Iterable[fx.Node]:
        """Views."""
        return [n for n in gm.graph.nodes if is_op(n, aten.view, aten._unsafe_view)]

    def rewrite(self, gm: fx.GraphModule, node: fx.Node) -> None:
        """The same shape by `reshape`."""
        with gm.graph.inserting_before(node):
            new = gm.graph.call_function(aten.reshape.default, node.args)
        replace_node(node, new)

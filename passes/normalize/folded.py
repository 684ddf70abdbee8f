"""A linear layer on folded tokens [B N, D] reads them as the model keeps them, [B, N, D]."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, fx

from reattend.passes.base import CAPTURED, GraphPass, Refusal, call
from reattend.passes.normalize.forms import aten, is_op


class UnfoldLinear(GraphPass):
    """`reshape, linear, reshape` -> the layer on the tensor before (torch's own attention).

    A linear layer acts on the last axis alone, so a fold of the others before it and its undoing
    behind it may be left out.
    """

    name = "unfold-linear"

    def match(self, gm: fx.GraphModule) -> Iterable[fx.Node]:
        """Linear layers on two axes whose readers all give the result three."""
        for node in gm.graph.nodes:
            if is_op(node, aten.linear) and _axes(node) == 2 and _unfolds(node):
                yield node

    def check(self, gm: fx.GraphModule, node: fx.Node) -> Refusal | None:
        """All readers must unfold to one shape, whose sizes are known before the layer."""
        shapes = [_lead(user) for user in node.users]
        if any(str(s) != str(shapes[0]) for s in shapes):
            return Refusal("readers of a folded linear layer unfold it differently")
        if any(isinstance(size, fx.Node) and not size < node for size in shapes[0]):
            return Refusal("sizes of an unfolded linear layer are computed after it")
        return None

    def rewrite(self, gm: fx.GraphModule, node: fx.Node) -> None:
        """The layer on the unfolded input in place of its readers."""
        readers = list(node.users)
        lead = _lead(readers[0])
        folded: Any = node.args[0]
        with gm.graph.inserting_before(node):
            x = _source(folded, readers[0])
            if x is None:
                width = folded.meta["val"].shape[-1]
                x = call(gm, aten.reshape.default, folded, [*lead, width])
                x.meta["nn_module_stack"] = node.meta.get("nn_module_stack", {})
            new = call(gm, aten.linear.default, x, *node.args[1:])
        for key, value in node.meta.items():
            new.meta.setdefault(key, value)
        new.meta[CAPTURED] = readers[0].meta.get(CAPTURED)
        for reader in readers:
            reader.replace_all_uses_with(new)
            gm.graph.erase_node(reader)
        gm.graph.erase_node(node)
        if not folded.users:
            gm.graph.erase_node(folded)


def _axes(node: Any) -> int:
    value = getattr(node, "meta", {}).get("val")
    return value.dim() if isinstance(value, Tensor) else 0


def _unfolds(node: fx.Node) -> bool:
    """Whether every reader only splits the first axis in two."""
    width = str(node.meta["val"].shape[-1])
    return bool(node.users) and all(
        is_op(user, aten.reshape, aten.view)
        and _axes(user) == 3
        and str(user.meta["val"].shape[-1]) == width
        for user in node.users
    )


def _lead(reader: fx.Node) -> list[Any]:
    """The sizes that a reader gives the first axes."""
    return list(reader.args[1][:2])


def _source(folded: fx.Node, reader: fx.Node) -> fx.Node | None:
    """What was folded, where it has the axes that the reader restores."""
    wanted = [str(s) for s in reader.meta["val"].shape[:2]]
    if is_op(folded, aten.reshape, aten.view, aten.flatten):
        inner: Any = folded.args[0]
        shape = [str(s) for s in inner.meta["val"].shape]
        if len(shape) == 3 and shape[:2] == wanted and _last(inner) == _last(folded):
            return inner
    again = [n for n in folded.users if is_op(n, aten.reshape) and _axes(n) == 3 and n < reader]
    for other in again:
        lead = [str(s) for s in other.meta["val"].shape[:2]]
        if lead == wanted and _last(other) == _last(folded):
            return other
    return None


def _last(node: fx.Node) -> str:
    return str(node.meta["val"].shape[-1])

"""Which module's code a node comes from, and what reaches that module from outside."""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor, fx

from reattend.passes.base import path_of
from reattend.passes.evaluate import ancestors, parameter_only
from reattend.passes.normalize.forms import aten, is_op


def owner_of(nodes: list[fx.Node]) -> str:
    """Dotted path of the smallest module whose code holds all nodes."""
    paths = [path_of(node).split(".") for node in nodes]
    common: list[str] = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return ".".join(common)


def from_outside(wanted: fx.Node, owner: str, known: Collection[fx.Node] = ()) -> list[fx.Node]:
    """Tensors computed outside of `owner` that `wanted` is computed from, in graph order.

    Values of weights alone count as the block's own, wherever they are computed. What `known`
    values are computed from is not looked at.
    """

    def ends(node: fx.Node) -> bool:
        if node in known:
            return True
        return is_op(node, aten.sym_size) or (_outside(node, owner) and not parameter_only(node))

    found = {
        n
        for n in ancestors([wanted], stop=ends)
        if n not in known
        and _outside(n, owner)
        and not parameter_only(n)
        and isinstance(n.meta.get("val"), Tensor)
    }
    return [n for n in wanted.graph.nodes if n in found]


def _outside(node: fx.Node, owner: str) -> bool:
    if node.op == "placeholder":
        return True
    if node.op == "get_attr" or "nn_module_stack" not in node.meta or not owner:
        return False
    path = path_of(node)
    return path != owner and not path.startswith(owner + ".")

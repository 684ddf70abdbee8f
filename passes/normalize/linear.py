"""Every spelling of a linear layer becomes `aten.linear(x, weight, bias)`."""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx

from reattend.passes.base import CAPTURED, GraphPass, Refusal, replace_node
from reattend.passes.evaluate import parameter_only
from reattend.passes.normalize.forms import aten, is_op


class ToLinear(GraphPass):
    """addmm on a flattened view (Conv1D), and matmul with a transposed weight (falcon)."""

    name = "to-linear"

    def match(self, gm: fx.GraphModule) -> Iterable[fx.Node]:
        """addmm, mm and matmul nodes whose right factor is a weight."""
        for node in gm.graph.nodes:
            if is_op(node, aten.addmm):
                factor = node.args[2]
            elif is_op(node, aten.mm, aten.matmul):
                factor = node.args[1]
            else:
                continue
            if isinstance(factor, fx.Node) and parameter_only(factor):
                yield node

    def check(self, gm: fx.GraphModule, node: fx.Node) -> Refusal | None:
        """addmm must not scale its operands; a weight with more than two axes is no layer's."""
        factor = node.args[2] if is_op(node, aten.addmm) else node.args[1]
        value = factor.meta.get("val") if isinstance(factor, fx.Node) else None
        if value is not None and value.dim() != 2:
            return Refusal(f"a product with a weight of {value.dim()} axes")
        if is_op(node, aten.addmm) and any(node.kwargs.get(k, 1) != 1 for k in ("alpha", "beta")):
            return Refusal("addmm with alpha or beta other than 1")
        return None

    def rewrite(self, gm: fx.GraphModule, node: fx.Node) -> None:
        """x @ W (+ b) -> linear(x, W^T, b); a view before and after an addmm is seen through."""
        if is_op(node, aten.addmm):
            bias, x, factor = node.args
        else:
            (x, factor), bias = node.args, None
        assert isinstance(x, fx.Node) and isinstance(factor, fx.Node)
        with gm.graph.inserting_before(node):
            if is_op(factor, aten.t, aten.numpy_T):
                weight = factor.args[0]
            else:
                weight = gm.graph.call_function(aten.t.default, (factor,))
        inner = x.args[0] if is_op(x, aten.view, aten.reshape) else None
        value = getattr(inner, "meta", {}).get("val")
        views = [u for u in node.users if is_op(u, aten.view, aten.reshape)]
        through = value is not None and value.dim() > 2 and views and len(views) == len(node.users)
        with gm.graph.inserting_before(node):
            new = gm.graph.call_function(
                aten.linear.default, (inner if through else x, weight, bias)
            )
        new.meta.update(node.meta)
        if value is None or not through:
            replace_node(node, new)
            return
        out_features = views[0].meta["val"].shape[-1]
        new.meta["val"] = value.new_empty((*value.shape[:-1], out_features))
        new.meta[CAPTURED] = None
        for view in views:
            if tuple(map(str, view.meta["val"].shape)) == tuple(map(str, new.meta["val"].shape)):
                view.replace_all_uses_with(new)
                new.meta[CAPTURED] = view.meta.get(CAPTURED)
            else:
                view.replace_input_with(node, new)
        for dead in [*[v for v in views if not v.users], node, x]:
            if not dead.users:
                gm.graph.erase_node(dead)

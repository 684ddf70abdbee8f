"""Logits that take part in a softmax and have no value; those written as a factor behind the core
become logits inside it.

softmax(s) v * sigmoid(logsumexp(s) - sink) is the softmax over s and the sink with the sink's
value left out: exp(s) / sum(exp(s)) * sum(exp(s)) / (sum(exp(s)) + exp(sink)).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from reattend.passes.base import SCORES, GraphPass, Refusal, drop_dead, replace_node
from reattend.passes.normalize.forms import aten, attention, is_op
from reattend.passes.normalize.score_values import CASTS, RESHAPES

#: begins the names of buffers that hold logits of 0
ZERO = "reattend_zero_sinks"
_THROUGH = (*CASTS, *RESHAPES, aten.unsqueeze, aten.squeeze)


class FoldSinkFactor(GraphPass):
    """attention(..) * sigmoid(logsumexp(scores) - sinks)."""

    name = "fold-sink-factor"

    def match(self, gm: fx.GraphModule) -> Iterable[fx.Node]:
        """Products of a core that was spelled out and such a factor."""
        for node in gm.graph.nodes:
            if is_op(node, aten.mul) and _parts(node) is not None:
                yield node

    def check(self, gm: fx.GraphModule, node: fx.Node) -> Refusal | None:
        """One sink per head, and nobody else may read the core."""
        core, sinks = _parts(node)  # type: ignore[misc]
        shape = sinks.meta["val"].shape
        if len(shape) != 1 or shape[0] != core.meta["val"].shape[1]:
            return Refusal(f"sinks of shape {tuple(shape)} are not one per head")
        if core.args[7] is not None:
            return Refusal("the core has sinks already")
        if len(core.users) != 1:
            return Refusal("the core is read without its sinks too")
        return None

    def rewrite(self, gm: fx.GraphModule, node: fx.Node) -> None:
        """The core with sinks, in place of the product."""
        core, sinks = _parts(node)  # type: ignore[misc]
        with gm.graph.inserting_before(core):
            vector = gm.graph.get_attr(str(sinks.target))
        vector.meta.update(sinks.meta)
        core.args = (*core.args[:7], vector)
        replace_node(node, core)
        drop_dead(gm.graph)


def _parts(product: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """(core, stored sinks) of such a product."""
    for core, factor in (product.args[:2], product.args[1::-1]):
        if not isinstance(core, fx.Node) or not is_op(core, attention):
            continue
        sigmoid = _behind(factor)
        if not is_op(sigmoid, aten.sigmoid):
            return None
        difference = _behind(sigmoid.args[0])
        if not is_op(difference, aten.sub) or difference.kwargs:
            return None
        total, sinks = (_behind(a) for a in difference.args[:2])
        known = core.meta.get(SCORES)
        summed = is_op(total, aten.logsumexp) and list(total.args[1]) in ([-1], [3])
        if summed and known is not None and total.args[0] is known and sinks.op == "get_attr":
            return core, sinks
    return None


def _behind(node: Any) -> Any:
    """What a value is, seen through casts and reshapes."""
    while is_op(node, *_THROUGH):
        node = node.args[0]
    return node


def zero_sinks(gm: fx.GraphModule, q: fx.Node) -> fx.Node:
    """A logit of 0 for every head of q [B, H, N, d], as a buffer of the graph alone."""
    heads = q.meta["val"].shape[1]
    name = f"{ZERO}_{heads}"
    if not hasattr(gm, name):
        gm.register_buffer(name, torch.zeros(heads))
    node = gm.graph.get_attr(name)
    node.meta["val"] = q.meta["val"].new_zeros(heads)
    return node


def stored_name(sinks: fx.Node | None) -> str | None:
    """What a spec calls sinks: the name of a weight, empty where the logit is 0."""
    if sinks is None:
        return None
    return "" if str(sinks.target).startswith(ZERO) else str(sinks.target)

"""Scaled dot product attention becomes `forms.attention`; `eager.py` does the spelled-out form."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from torch import fx

from reattend.passes.base import GraphPass, Refusal, replace_node
from reattend.passes.normalize.forms import aten, attention, is_op


class FuseSdpa(GraphPass):
    """`scaled_dot_product_attention`, with its default scale made explicit."""

    name = "fuse-sdpa"

    def match(self, gm: fx.GraphModule) -> Iterable[fx.Node]:
        """SDPA nodes."""
        return [n for n in gm.graph.nodes if is_op(n, aten.scaled_dot_product_attention)]

    def check(self, gm: fx.GraphModule, node: fx.Node) -> Refusal | None:
        """Dropout must be off."""
        args = _sdpa_arguments(node)
        if args["dropout_p"]:
            return Refusal("attention dropout is active: call model.eval() first")
        return None

    def rewrite(self, gm: fx.GraphModule, node: fx.Node) -> None:
        """One normal node."""
        a = _sdpa_arguments(node)
        scale = a["scale"]
        if scale is None:
            scale = 1.0 / math.sqrt(int(a["query"].meta["val"].shape[-1]))
        with gm.graph.inserting_before(node):
            if a["enable_gqa"]:
                _repeat_heads(gm, a)
            for name in ("key", "value"):
                a[name] = broadcast_heads(gm, a[name], a["query"])
            new = gm.graph.call_function(
                attention,
                (
                    a["query"],
                    a["key"],
                    a["value"],
                    a["attn_mask"],
                    scale,
                    0.0,
                    a["is_causal"],
                    None,
                ),
            )
        replace_node(node, new)


def broadcast_heads(gm: fx.GraphModule, node: Any, query: Any) -> Any:
    """Keys or values of one head that all query heads share by broadcasting, repeated to them."""
    value, heads = node.meta["val"], query.meta["val"].shape[1]
    if value.dim() != 4 or str(value.shape[1]) != "1" or not isinstance(heads, int) or heads == 1:
        return node
    new = gm.graph.call_function(aten.repeat_interleave.self_int, (node, heads, 1))
    new.meta["val"] = value.repeat_interleave(heads, 1)
    if "nn_module_stack" in query.meta:
        new.meta["nn_module_stack"] = query.meta["nn_module_stack"]
    return new


def _repeat_heads(gm: fx.GraphModule, arguments: dict[str, Any]) -> None:
    """Make grouped keys and values explicit: one head for every query head."""
    heads = int(arguments["query"].meta["val"].shape[1])
    for name in ("key", "value"):
        node = arguments[name]
        value = node.meta["val"]
        times = heads // int(value.shape[1])
        if times > 1:
            new = gm.graph.call_function(aten.repeat_interleave.self_int, (node, times, 1))
            new.meta["val"] = value.repeat_interleave(times, 1)
            arguments[name] = new


def _sdpa_arguments(node: fx.Node) -> dict[str, Any]:
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    found: dict[str, Any] = {"attn_mask": None, "dropout_p": 0.0, "is_causal": False}
    found.update(scale=None, enable_gqa=False)
    found.update(zip(names, node.args, strict=False))
    found.update(node.kwargs)
    return found

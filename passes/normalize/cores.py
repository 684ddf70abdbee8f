"""SDPA, and softmax between two products, become `forms.attention`."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from reattend.passes.base import GraphPass, Refusal, drop_dead, replace_node
from reattend.passes.evaluate import parameter_only
from reattend.passes.normalize.forms import aten, attention, is_op

_VIEWS = (aten.transpose, aten.permute)
_CASTS = (aten.to, aten._to_copy, aten.type_as, aten.dropout, aten.clone, aten.nan_to_num)
_SHAPES = (
    aten.view, aten.reshape, aten.transpose, aten.permute, aten.unsqueeze, aten.slice,
)  # fmt: skip
_PRODUCTS = (aten.matmul, aten.bmm)


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
            scale = 1.0 / math.sqrt(int(a["query"].meta["val"].shape[-1]))  # type: ignore[attr-defined]
        with gm.graph.inserting_before(node):
            if a["enable_gqa"]:
                _repeat_heads(gm, a)
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


@dataclass
class _Eager:
    """Parts read off a softmax between two products."""

    product: fx.Node
    q: fx.Node
    k: fx.Node
    v: fx.Node
    masks: tuple[fx.Node, ...]
    fill: fx.Node | None
    scale: float
    softcap: float


def _forward_to_product(softmax: fx.Node, through: tuple[object, ...] = _CASTS) -> fx.Node | None:
    """The product with v that the probabilities reach through casts and dropout alone."""
    node = softmax
    while True:
        users = [u for u in node.users if is_op(u, *through, *_PRODUCTS)]
        if len(users) != 1:
            return None
        if is_op(users[0], *_PRODUCTS):
            product = users[0]
            return product if product.args[0] is node else None
        node = users[0]


def _backward_to_product(node: object) -> _Eager | None:
    """Walk from the softmax input to q k^T: mask, softcap and scale on the way."""
    masks: tuple[fx.Node, ...] = ()
    fill: fx.Node | None = None
    scale, softcap, capped = 1.0, 0.0, False
    while isinstance(node, fx.Node):
        if is_op(node, *_PRODUCTS):
            left, right = node.args[:2]
            assert isinstance(left, fx.Node) and isinstance(right, fx.Node)
            return _Eager(node, left, right, left, masks, fill, scale, softcap)
        if is_op(node, *_CASTS):
            node = node.args[0]
        elif is_op(node, aten.mul, aten.div) and isinstance(node.args[1], int | float):
            factor = float(node.args[1])
            factor = factor if is_op(node, aten.mul) else 1.0 / factor
            below = node.args[0]
            if is_op(below, aten.tanh):
                inner = below.args[0]  # type: ignore[union-attr]
                if not (is_op(inner, aten.div, aten.mul) and not capped):
                    return None
                inverse = float(inner.args[1])
                inverse = inverse if is_op(inner, aten.div) else 1.0 / inverse
                if abs(inverse - factor) > 1e-9 * abs(factor):
                    return None
                softcap, capped, node = factor, True, inner.args[0]
            else:
                scale, node = scale * factor, below
        elif is_op(node, aten.add, aten.add_) and not (capped or node.kwargs) and scale == 1.0:
            below = node.args[0]
            other = node.args[1]
            if not isinstance(other, fx.Node) or not isinstance(below, fx.Node):
                return None
            masks, node = (other, *masks), below
        elif is_op(node, aten.masked_fill) and not (masks or fill or capped) and scale == 1.0:
            value = node.args[2]
            if not isinstance(value, int | float) or value > -1e4:
                return None
            fill, node = node, node.args[0]
        else:
            return None
    return None


def _mask(gm: fx.GraphModule, parts: _Eager) -> fx.Node | None:
    """One mask node: what was added, summed, and hidden where scores were filled."""
    total: fx.Node | None = None
    for mask in parts.masks:
        if total is None:
            total = mask
            continue
        new = gm.graph.call_function(aten.add.Tensor, (total, mask))
        new.meta["val"] = total.meta["val"] + mask.meta["val"]
        total = new
    if parts.fill is None:
        return total
    hidden = parts.fill.args[1]
    assert isinstance(hidden, fx.Node)
    if total is None:
        new = gm.graph.call_function(aten.logical_not.default, (hidden,))
        new.meta["val"] = hidden.meta.get("val")
        return new
    lowest = torch.finfo(total.meta["val"].dtype).min
    new = gm.graph.call_function(aten.masked_fill.Scalar, (total, hidden, lowest))
    new.meta["val"] = total.meta["val"].masked_fill(hidden.meta["val"], lowest)
    return new


class FuseEager(GraphPass):
    """softmax(q k^T * scale [capped] [+ mask]) v as written by hand."""

    name = "fuse-eager"

    def match(self, gm: fx.GraphModule) -> Iterable[fx.Node]:
        """softmax that reaches a product of two activations, reshaped on the way or not."""
        for node in gm.graph.nodes:
            if not is_op(node, aten.softmax, aten._softmax):
                continue
            product = _forward_to_product(node, (*_CASTS, *_SHAPES))
            if product is not None and not parameter_only(product.args[1]):  # type: ignore[arg-type]
                yield node

    def check(self, gm: fx.GraphModule, node: fx.Node) -> Refusal | None:
        """Behind the softmax must stand one product of two activations."""
        axis, value = node.args[1], node.meta["val"]
        if axis not in (-1, value.dim() - 1):
            return Refusal(f"softmax over axis {axis}, not over keys")
        if value.dim() != 4:
            return Refusal(f"scores have {value.dim()} axes, not batch, head, query, key")
        if _forward_to_product(node) is None:
            return Refusal(
                "the probabilities are reshaped or cut before they meet the values (folded heads, "
                "logit sinks)"
            )
        parts = _backward_to_product(node.args[0])
        if parts is None:
            return Refusal(f"between product and softmax stands something else ({node.args[0]})")
        if parameter_only(parts.k) or parameter_only(parts.q):
            return Refusal("one factor of the scores is a weight")
        return None

    def rewrite(self, gm: fx.GraphModule, node: fx.Node) -> None:
        """One normal node in place of the second product."""
        parts = _backward_to_product(node.args[0])
        product = _forward_to_product(node)
        assert parts is not None and product is not None
        with gm.graph.inserting_before(product):
            if is_op(parts.k, aten.transpose):
                keys = parts.k.args[0]
            else:
                keys = gm.graph.call_function(aten.transpose.int, (parts.k, -1, -2))
                keys.meta["val"] = parts.k.meta["val"].transpose(-1, -2)
            new = gm.graph.call_function(
                attention,
                (
                    parts.q,
                    keys,
                    product.args[1],
                    _mask(gm, parts),
                    parts.scale,
                    parts.softcap,
                    False,
                    None,
                ),
            )
        replace_node(product, new)
        _erase_unused(node)
        drop_dead(gm.graph)


def _erase_unused(node: fx.Node) -> None:
    """Erase a chain that nothing reads any more, in-place operations included."""
    todo = [node]
    while todo:
        node = todo.pop()
        if not node.users and node.op == "call_function" and node in node.graph.nodes:
            todo += node.all_input_nodes
            node.graph.erase_node(node)

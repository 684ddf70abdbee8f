"""Softmax between two products becomes `forms.attention`, whatever stands between them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx

from reattend.passes.base import SCORES, GraphPass, Refusal, call, drop_dead, owned, replace_node
from reattend.passes.evaluate import parameter_only
from reattend.passes.normalize.axes import Axes, fold, fold_term, read_axes, unfold
from reattend.passes.normalize.cores import broadcast_heads
from reattend.passes.normalize.forms import aten, attention, is_op
from reattend.passes.normalize.merge import equivalent
from reattend.passes.normalize.score_values import CASTS, RESHAPES, number, refolds
from reattend.passes.normalize.scores import Scores, Term, read_scores
from reattend.passes.normalize.sinks import zero_sinks

_FILLS = (aten.masked_fill, aten.masked_fill_)
_SHAPES = (*RESHAPES, aten.transpose, aten.permute, aten.unsqueeze, aten.slice, *_FILLS)
#: what probabilities may pass through and stay what they are to the values
_THROUGH = (*CASTS, *RESHAPES, *_FILLS, aten.slice)
_PRODUCTS = (aten.matmul, aten.bmm)


def _forward_to_product(softmax: fx.Node, through: tuple[object, ...]) -> fx.Node | None:
    """The product with v that the probabilities reach as their one left factor.

    Others may read them too: torch's own attention hands out their mean.
    """
    found: list[fx.Node] = []
    todo = [softmax]
    while todo:
        node = todo.pop()
        for user in node.users:
            if is_op(user, *_PRODUCTS):
                if user.args[0] is not node:
                    return None
                found.append(user)
            elif is_op(user, *through):
                todo.append(user)
    return found[0] if len(found) == 1 else None


def _drops_last(node: fx.Node) -> bool:
    """probs[..., :-1]."""
    source: Any = node.args[0]
    axis, start, end = [*node.args, 0, None, None][1:4]
    last = axis in (-1, source.meta["val"].dim() - 1)
    return last and start in (0, None) and end == -1 and len(node.args) < 5


def _hidden_anyway(gm: fx.GraphModule, fill: fx.Node, parts: Scores) -> bool:
    """Whether zeros are filled in where the scores were hidden: there they are already."""
    hidden = [t.node for t in parts.terms if t.hidden and not t.inverted]
    zero = number(gm, fill.args[2]) == 0.0
    return zero and any(equivalent(fill.args[1], node, gm=gm) for node in hidden)


def _between(softmax: fx.Node, product: fx.Node) -> list[fx.Node]:
    """Nodes between the softmax and its product with v."""
    found: list[fx.Node] = []
    node: Any = product.args[0]
    while node is not softmax:
        found.append(node)
        node = node.args[0]
    return found


def _scores_of_a_product(node: Any) -> bool:
    """Whether a part of joined scores is itself a product of two activations."""
    while is_op(node, *CASTS, *_SHAPES):
        node = node.args[0]
    factors = node.args[1] if is_op(node, aten.einsum) else node.all_input_nodes
    return is_op(node, *_PRODUCTS, aten.einsum) and not any(map(parameter_only, factors))


class FuseEager(GraphPass):
    """softmax(q k^T * scale [capped] [+ masks and biases] [| sinks]) v as written by hand."""

    name = "fuse-eager"

    def match(self, gm: fx.GraphModule) -> Iterable[fx.Node]:
        """softmax that reaches a product of two activations, reshaped on the way or not."""
        for node in gm.graph.nodes:
            if not is_op(node, aten.softmax, aten._softmax):
                continue
            product = _forward_to_product(node, (*CASTS, *_SHAPES))
            if product is not None and not parameter_only(product.args[1]):
                yield node

    def check(self, gm: fx.GraphModule, node: fx.Node) -> Refusal | None:
        """Behind the softmax must stand one product of two activations."""
        axis, value = node.args[1], node.meta["val"]
        if axis not in (-1, value.dim() - 1):
            return Refusal(f"softmax over axis {axis}, not over keys")
        parts = read_scores(gm, node)
        if is_op(parts, aten.cat) and sum(map(_scores_of_a_product, parts.args[0])) > 1:
            return Refusal(f"scores of several products share one softmax ({parts.name})")
        if isinstance(parts, fx.Node):
            return Refusal(f"between product and softmax stands something else ({parts.name})")
        if parameter_only(parts.k) or parameter_only(parts.q):
            return Refusal("one factor of the scores is a weight")
        product = _forward_to_product(node, _THROUGH)
        if product is None:
            return Refusal("the probabilities are rearranged before they meet the values")
        if any(is_op(n, *RESHAPES) and not refolds(n) for n in _between(node, product)):
            return Refusal("the probabilities are reshaped before they meet the values")
        fills = [n for n in _between(node, product) if is_op(n, *_FILLS)]
        if not all(_hidden_anyway(gm, n, parts) for n in fills):
            return Refusal("probabilities are changed that were not hidden")
        slices = [n for n in _between(node, product) if is_op(n, aten.slice)]
        if [_drops_last(n) for n in slices] != [True] * parts.column:
            return Refusal("the probabilities are cut before they meet the values")
        if value.dim() <= 4 and not _heads(parts, product):
            return Refusal(f"scores have {value.dim()} axes, not batch, head, query, key")
        if value.dim() > 4 and _axes(gm, parts, node, product) is None:
            return Refusal(
                f"scores have {value.dim()} axes, and the values do not tell heads from tokens"
            )
        if any(t.chain for t in parts.terms) and parts.q.meta["val"].dim() != 4:
            return Refusal("scores change their axes while heads are folded into the batch")
        if any(_term_axes(t) > max(4, value.dim()) for t in parts.terms):
            return Refusal("a mask or bias has more axes than the scores")
        return None

    def rewrite(self, gm: fx.GraphModule, node: fx.Node) -> None:
        """One normal node in place of the second product."""
        parts = read_scores(gm, node)
        product = _forward_to_product(node, _THROUGH)
        assert isinstance(parts, Scores) and product is not None
        axes = _axes(gm, parts, node, product)
        heads = 0 if axes is not None else _heads(parts, product)
        with gm.graph.inserting_before(product):
            if is_op(parts.k, aten.transpose):
                keys: Any = parts.k.args[0]
            else:
                keys = call(gm, aten.transpose.int, parts.k, -1, -2)
            q = parts.q if axes is not None else _unfolded(gm, parts.q, heads)
            for factor, divides in parts.factors:
                q = call(gm, (aten.div if divides else aten.mul).Tensor, q, factor)
            values: Any = product.args[1]
            if axes is not None:
                q, k, v = (fold(gm, n, axes) for n in (q, keys, values))
            else:
                k, v = (broadcast_heads(gm, _unfolded(gm, n, heads), q) for n in (keys, values))
            mask = _mask(gm, parts, heads, axes)
            sinks = parts.sinks
            if parts.column and sinks is None:
                sinks = zero_sinks(gm, q)
            new = gm.graph.call_function(
                attention, (q, k, v, mask, parts.scale, parts.softcap, False, sinks)
            )
            new.meta["val"] = q.meta["val"].new_empty(
                (*q.meta["val"].shape[:-1], v.meta["val"].shape[-1])
            )
            if axes is not None:
                new = unfold(gm, new, axes)
            elif product.meta["val"].dim() == 3:
                new = call(gm, aten.flatten.using_ints, new, 0, 1)
        owned(new, product)  # who owns the block is read off its core
        new.meta.update({k: v for k, v in product.meta.items() if k not in new.meta})
        new.meta[SCORES] = node.args[0]
        replace_node(product, new)
        _erase_unused(node)
        drop_dead(gm.graph)


def _axes(gm: fx.GraphModule, parts: Scores, softmax: fx.Node, product: fx.Node) -> Axes | None:
    """The leading axes of scores that have more than four from product to softmax."""
    values: Any = product.args[1]
    count = softmax.meta["val"].dim()
    if count <= 4 or parts.q.meta["val"].dim() != count:
        return None
    return read_axes(gm, parts.q, parts.k, values)


def _heads(parts: Scores, product: fx.Node) -> int:
    """H: from the scores where they have four axes, else from what is made of the output.

    Last from the folded size itself, where it is a number times the batch.
    """
    if parts.heads:
        return parts.heads
    for user in product.users:
        value = user.meta.get("val")
        if is_op(user, *RESHAPES) and isinstance(value, Tensor) and value.dim() == 4:
            return int(value.shape[1]) if isinstance(value.shape[1], int) else 0
    folded = parts.q.meta["val"].shape
    if len(folded) == 3 and isinstance(folded[0], torch.SymInt):
        times, batch = folded[0].node.expr.as_coeff_Mul()
        return int(times) if batch.is_symbol and times > 1 else 0
    return 0


def _term_axes(term: Term) -> int:
    axes: int = term.node.meta["val"].dim()
    return axes


def _unfolded(gm: fx.GraphModule, node: Any, heads: int) -> fx.Node:
    """[B H, N, d] -> [B, H, N, d]."""
    if node.meta["val"].dim() == 4:
        return node
    return call(gm, aten.unflatten.int, node, 0, [-1, heads])


def _mask(
    gm: fx.GraphModule, parts: Scores, heads: int, axes: Axes | None = None
) -> fx.Node | None:
    """One mask node: what was added, summed, and hidden where scores were filled."""
    total: fx.Node | None = None
    for term in (t for t in parts.terms if not t.hidden):
        node = _on_zeros(gm, term, parts) if term.chain else _aligned(gm, term, heads, axes)
        if term.factor != 1.0:
            node = call(gm, aten.mul.Tensor, node, term.factor)
        total = node if total is None else call(gm, aten.add.Tensor, total, node)
    hidden: fx.Node | None = None
    for term in (t for t in parts.terms if t.hidden):
        node = _aligned(gm, term, heads, axes)
        if term.inverted:
            node = call(gm, aten.logical_not.default, node)
        hidden = node if hidden is None else call(gm, aten.logical_or.default, hidden, node)
    if hidden is None:
        return total
    if total is None:
        return call(gm, aten.logical_not.default, hidden)
    lowest = torch.finfo(total.meta["val"].dtype).min
    return call(gm, aten.where.ScalarSelf, hidden, lowest, total)


def _on_zeros(gm: fx.GraphModule, term: Term, parts: Scores) -> fx.Node:
    """What a chain of sums in other axes adds: the chain on zeros of the scores' shape."""
    assert term.base is not None
    size = aten.sym_size.int
    axes = [(parts.q, 0), (parts.q, 1), (parts.q, 2), (parts.k, -1)]
    shape: list[Any] = []
    for node, axis in axes:
        known = node.meta["val"].shape[axis]
        fixed = not isinstance(known, torch.SymInt)
        shape.append(known if fixed else call(gm, size, node, axis % 4))
    zeros = gm.graph.call_function(
        aten.zeros.default, (shape,), {"dtype": term.base.meta["val"].dtype}
    )
    zeros.meta["val"] = term.base.meta["val"]
    made = {term.base: zeros}
    for node in term.chain:
        made[node] = gm.graph.node_copy(node, lambda n: made.get(n, n))
    return made[term.chain[-1]]


def _aligned(gm: fx.GraphModule, term: Term, heads: int, axes: Axes | None) -> fx.Node:
    """A term as it broadcasts against [B, H, N, M]."""
    if axes is not None:
        return fold_term(gm, term.node, axes)
    value = term.node.meta["val"]
    if value.dim() != 3 or (isinstance(value.shape[0], int) and value.shape[0] in (1, heads)):
        return term.node
    return call(gm, aten.unflatten.int, term.node, 0, [-1, heads])


def _erase_unused(node: fx.Node) -> None:
    """Erase a chain that nothing reads any more, in-place operations included."""
    todo = [node]
    while todo:
        node = todo.pop()
        if not node.users and node.op == "call_function" and node in node.graph.nodes:
            todo += node.all_input_nodes
            node.graph.erase_node(node)

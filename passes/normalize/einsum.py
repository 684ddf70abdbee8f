"""An einsum of two tensors becomes a product: `matmul`, or `linear` where one is a weight."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import fx

from reattend.passes.base import GraphPass, Refusal, call, owned, replace_node
from reattend.passes.evaluate import parameter_only
from reattend.passes.normalize.forms import aten, is_op


@dataclass(frozen=True)
class _Letters:
    """The axes of a @ b -> out: those all three have, and the others by who has them."""

    left: str
    right: str
    out: str
    batch: str
    rows: str
    columns: str
    inner: str


class ToMatmul(GraphPass):
    """`einsum("bnhd,bmhd->bhnm", q, k)` -> permute, matmul, permute."""

    name = "to-matmul"

    def match(self, gm: fx.GraphModule) -> Iterable[fx.Node]:
        """Einsums of two tensors."""
        for node in gm.graph.nodes:
            if is_op(node, aten.einsum) and len(node.args[1]) == 2:
                yield node

    def check(self, gm: fx.GraphModule, node: fx.Node) -> Refusal | None:
        """Every axis must be kept, or summed over in both; no diagonals."""
        found = _letters(node)
        if isinstance(found, str):
            return Refusal(found)
        a, b = node.args[1]
        weights = parameter_only(a) or parameter_only(b)
        single = len(found.rows) == len(found.columns) == len(found.inner) == 1
        if not single and (not weights or found.batch):
            return Refusal("an einsum over several axes at once")
        return None

    def rewrite(self, gm: fx.GraphModule, node: fx.Node) -> None:
        """The product, its axes in the order the einsum gives them."""
        at = _letters(node)
        assert isinstance(at, _Letters)
        a, b = node.args[1]
        with gm.graph.inserting_before(node):
            if not at.batch and (parameter_only(a) or parameter_only(b)):
                if parameter_only(a) and not parameter_only(b):
                    at = _Letters(at.right, at.left, at.out, "", at.columns, at.rows, at.inner)
                    a, b = b, a
                new = _linear(gm, a, b, at)
            else:
                left = _permuted(gm, a, at.left, at.batch + at.rows + at.inner)
                right = _permuted(gm, b, at.right, at.batch + at.inner + at.columns)
                new = call(gm, aten.matmul.default, left, right)
            new = _permuted(gm, new, at.batch + at.rows + at.columns, at.out)
        owned(new, node)
        replace_node(node, new)


def _linear(gm: fx.GraphModule, x: fx.Node, weight: fx.Node, at: _Letters) -> fx.Node:
    """x [rows, inner] times a weight, as a linear layer; several inner or outer axes are folded."""
    x = _permuted(gm, x, at.left, at.rows + at.inner)
    matrix = _permuted(gm, weight, at.right, at.columns + at.inner)
    sizes = weight.meta["val"].shape
    outer = [int(sizes[at.right.index(c)]) for c in at.columns]
    if len(at.inner) > 1:
        x = call(gm, aten.flatten.using_ints, x, len(at.rows), -1)
        matrix = call(gm, aten.flatten.using_ints, matrix, len(at.columns), -1)
    if len(at.columns) > 1:
        matrix = call(gm, aten.flatten.using_ints, matrix, 0, len(at.columns) - 1)
    new = call(gm, aten.linear.default, x, matrix)
    return call(gm, aten.unflatten.int, new, -1, outer) if len(outer) > 1 else new


def _letters(node: fx.Node) -> _Letters | str:
    """The axes of an einsum of two, or why it is no product."""
    equation = str(node.args[0]).replace(" ", "")
    inputs, arrow, out = equation.partition("->")
    left, _, right = inputs.partition(",")
    sizes = [n.meta["val"].dim() for n in node.args[1]]
    spare = [c for c in "ABCDEFGHIJKLMNOPQRSTUVWXYZ" if c not in equation]
    dots = [size - len(s.replace("...", "")) for s, size in zip((left, right), sizes, strict=True)]
    if "..." in inputs:
        names = "".join(spare[: max(dots)])
        left = left.replace("...", names[len(names) - dots[0] :])
        right = right.replace("...", names[len(names) - dots[1] :])
        out = out.replace("...", names)
    if not arrow:
        both = left + right
        out = "".join(sorted(c for c in set(both) if both.count(c) == 1))
    if any(len(set(s)) != len(s) for s in (left, right, out)):
        return "an einsum over a diagonal"
    batch = "".join(c for c in out if c in left and c in right)
    rows = "".join(c for c in out if c in left and c not in right)
    columns = "".join(c for c in out if c in right and c not in left)
    inner = "".join(c for c in left if c in right and c not in out)
    if set(left) - {*batch, *rows, *inner} or set(right) - {*batch, *columns, *inner}:
        return "an einsum that sums one of its tensors alone"
    if not inner:
        return "an einsum without a sum"
    shapes = [n.meta["val"].shape for n in node.args[1]]
    for c in batch + inner:
        pair = [shapes[0][left.index(c)], shapes[1][right.index(c)]]
        if str(pair[0]) != str(pair[1]) and 1 in pair:
            return "an einsum that broadcasts an axis"
    return _Letters(left, right, out, batch, rows, columns, inner)


def _permuted(gm: fx.GraphModule, node: fx.Node, has: str, wanted: str) -> fx.Node:
    """The axes `has` in the order `wanted`."""
    order = [has.index(c) for c in wanted]
    if order == list(range(len(order))):
        return node
    if order[:-2] == list(range(len(order) - 2)):
        return call(gm, aten.transpose.int, node, -1, -2)
    return call(gm, aten.permute.default, node, order)

"""Hand-written RMS normalisation becomes `forms.rms_norm(x, gain, eps)`."""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx

from reattend.passes.base import GraphPass, Refusal, drop_dead, replace_node
from reattend.passes.evaluate import parameter_only
from reattend.passes.normalize.forms import aten, is_op, rms_norm


def _uncast(node: object) -> object:
    while is_op(node, aten.to, aten._to_copy, aten.type_as):
        node = node.args[0]
    return node


def _mean_square(node: object) -> fx.Node | None:
    """x in mean(x^2, -1, keepdim)."""
    if not (is_op(node, aten.mean) and node.args[1:] in (([-1], True), (-1, True))):
        return None
    square = node.args[0]
    if is_op(square, aten.pow) and square.args[1] in (2, 2.0):
        return square.args[0]
    if is_op(square, aten.square):
        return square.args[0]
    if is_op(square, aten.mul) and square.args[0] is square.args[1]:
        return square.args[0]
    return None


def _parts(rsqrt: fx.Node) -> tuple[fx.Node, float] | None:
    """(x, eps) of rsqrt(mean(x^2) + eps)."""
    inner = rsqrt.args[0]
    if not is_op(inner, aten.add):
        return None
    assert isinstance(inner, fx.Node)
    left, right = inner.args[:2]
    if isinstance(left, int | float):
        left, right = right, left
    x = _mean_square(left)
    if x is None or not isinstance(right, int | float):
        return None
    return x, float(right)


class FuseRmsNorm(GraphPass):
    """`to, pow, mean, add, rsqrt, mul, to, mul(gain)` is one node; the gain may be `1 + w`."""

    name = "fuse-rms-norm"

    def match(self, gm: fx.GraphModule) -> Iterable[fx.Node]:
        """rsqrt nodes over a mean square."""
        return [n for n in gm.graph.nodes if is_op(n, aten.rsqrt) and _parts(n) is not None]

    def check(self, gm: fx.GraphModule, node: fx.Node) -> Refusal | None:
        """The reciprocal root must be used once, to scale its own input."""
        x = _parts(node)[0]  # type: ignore[index]
        users = list(node.users)
        if len(users) != 1 or not is_op(users[0], aten.mul) or x not in users[0].args:
            return Refusal("reciprocal root not used to scale its input")
        return None

    def rewrite(self, gm: fx.GraphModule, node: fx.Node) -> None:
        """Replace the last node of the chain, gain included where there is one."""
        x, eps = _parts(node)  # type: ignore[misc]
        last = next(iter(node.users))
        gain: fx.Node | None = None
        while len(last.users) == 1:
            user = next(iter(last.users))
            if is_op(user, aten.to, aten._to_copy, aten.type_as) and user.args[0] is last:
                last = user
                continue
            if is_op(user, aten.mul) and gain is None:
                other = user.args[1] if user.args[0] is last else user.args[0]
                if isinstance(other, fx.Node) and parameter_only(other):
                    gain, last = other, user
                    continue
            break
        source = _uncast(x)
        with gm.graph.inserting_before(last):
            new = gm.graph.call_function(rms_norm, (source, gain, eps))
        new.meta["val"] = last.meta.get("val")
        replace_node(last, new)
        drop_dead(gm.graph)

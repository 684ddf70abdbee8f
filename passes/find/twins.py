"""Layers that repeat: a block whose graph equals one that was read need not be read again.

Two graphs are equal if their operations, constants, shapes and buffers are, argument by argument;
weights need only have one shape. Arguments are ordered, so there is nothing to search: both are
walked from their cores at once. What was read is then carried over, node by node and weight by
weight, and every block still proves itself.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from reattend.passes.evaluate import ancestors, attribute
from reattend.passes.normalize.forms import aten, is_op

if TYPE_CHECKING:
    from reattend.passes.find.sites import Found

#: fields of a spec that name a stored tensor
_NAMES = ("weight", "bias", "gain", "sinks")


class _Differs(Exception):
    """The graphs are not equal."""


def twin(gm: fx.GraphModule, known: Found, core: fx.Node) -> Found | None:
    """What was read of a block, for another core whose graph is equal; None if it is not.

    Args:
        gm: normalised graph.
        known: a block that was read.
        core: of the other.
    """
    region = known.region
    walk = _Walk(gm, [n for n in (region.hidden, region.memory) if n is not None])
    try:
        walk.pair(region.core, core)
        walk.follow(region.core, region.exit.node)
        walk.same_readers({n for s in region.streams.values() for n in s.nodes})
        return replace(
            known,
            spec=walk.carried(known.spec),
            region=walk.carried(region),
            twin=True,
        )
    except _Differs:
        return None


class _Walk:
    """Pairs of equal nodes, and of the weights they read. `ends`: where the left graph begins."""

    def __init__(self, gm: fx.GraphModule, ends: list[fx.Node]) -> None:
        self.gm, self.ends = gm, ends
        self.nodes: dict[fx.Node, fx.Node] = {}
        self.names: dict[str, str] = {}

    def pair(self, left: fx.Node, right: fx.Node) -> None:
        """Enter two nodes and all they are computed from."""
        todo = [(left, right)]
        while todo:
            a, b = todo.pop()
            if a in self.nodes:
                if self.nodes[a] is not b:
                    raise _Differs
                continue
            if not _alike(a, b):
                raise _Differs
            self.nodes[a] = b
            if a.op == "get_attr":
                self._stored(str(a.target), str(b.target))
            if a is not b and a not in self.ends:
                if a.op != b.op or _without_nodes(a) != _without_nodes(b):
                    raise _Differs
                todo += zip(_inputs(a), _inputs(b), strict=True)

    def follow(self, core: fx.Node, end: fx.Node) -> None:
        """Enter what lies between two cores and the ends of their blocks."""
        behind = ancestors([end], stop=lambda n: n is core)
        path = {core}
        for node in end.graph.nodes:
            if node is core or node not in behind:
                continue
            before = next((i for i in node.all_input_nodes if i in path), None)
            if before is not None:
                self._next(before, node)
                path.add(node)
        for node in path:
            if _used(node) != _used(self.nodes[node]):
                raise _Differs

    def same_readers(self, nodes: set[fx.Node]) -> None:
        """Queries, keys and values are read alike: other blocks may read them too."""
        for node in nodes & self.nodes.keys():
            if _used(node, True) != _used(self.nodes[node], True):
                raise _Differs

    def _next(self, before: fx.Node, node: fx.Node) -> None:
        """Enter the user of `before`'s twin that equals `node`."""
        for user in self.nodes[before].users:
            kept = dict(self.nodes), dict(self.names)
            try:
                self.pair(node, user)
            except _Differs:
                self.nodes, self.names = kept
                continue
            return
        raise _Differs

    def _stored(self, a: str, b: str) -> None:
        """Weights of one shape, or equal buffers."""
        left, right = attribute(self.gm, a), attribute(self.gm, b)
        if self.names.setdefault(a, b) != b:
            raise _Differs
        if left is right:
            return
        if not isinstance(left, Tensor) or not isinstance(right, Tensor):
            raise _Differs
        if left.shape != right.shape or left.dtype != right.dtype:
            raise _Differs
        trained = isinstance(left, nn.Parameter), isinstance(right, nn.Parameter)
        if trained != (True, True) and not (not any(trained) and torch.equal(left, right)):
            raise _Differs

    def carried(self, value: Any, name: str = "") -> Any:
        """A dataclass, or what it holds, with the nodes and names of the other block."""
        if isinstance(value, fx.Node):
            return self._known(self.nodes, value)
        if isinstance(value, str):
            return self._known(self.names, value) if name in _NAMES and value else value
        if name == "sources":
            return tuple((own, self._known(self.names, at)) for own, at in value)
        if is_dataclass(value) and not isinstance(value, type):
            return replace(
                value,
                **{f.name: self.carried(getattr(value, f.name), f.name) for f in fields(value)},
            )
        if isinstance(value, dict):
            return {key: self.carried(item) for key, item in value.items()}
        if type(value) in (list, tuple, set) and any(_holds(item) for item in value):
            return type(value)(self.carried(item) for item in value)
        return list(value) if type(value) is list else value

    @staticmethod
    def _known(pairs: dict[Any, Any], key: Any) -> Any:
        if key not in pairs:
            raise _Differs
        return pairs[key]


def _holds(item: Any) -> bool:
    return isinstance(item, fx.Node) or is_dataclass(item)


def _alike(a: fx.Node, b: fx.Node) -> bool:
    """One shape and dtype."""
    x, y = a.meta.get("val"), b.meta.get("val")
    if isinstance(x, Tensor) and isinstance(y, Tensor):
        return x.dtype == y.dtype and [str(s) for s in x.shape] == [str(s) for s in y.shape]
    return type(x) is type(y)


def _inputs(node: fx.Node) -> list[fx.Node]:
    """Every node among the arguments, in order, as often as it stands there."""
    found: list[fx.Node] = []
    fx.map_arg((node.args, node.kwargs), found.append)
    return found


def _without_nodes(node: fx.Node) -> tuple[Any, ...]:
    """Operation and constants; names of weights do not count."""
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda _: Ellipsis)
    return (None if node.op == "get_attr" else node.target, args, kwargs)


def _used(node: fx.Node, read_on: bool = False) -> list[str]:
    """What reads a value, apart from its sizes; `read_on`: and is read itself."""
    users: Iterable[fx.Node] = (
        u for u in node.users if not is_op(u, aten.sym_size) and (u.users or not read_on)
    )
    return sorted(u.op if u.op == "output" else str(u.target) for u in users)

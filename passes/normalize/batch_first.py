"""Projections of attention written tokens first, [N, B, D], become batch first, [B, N, D].

A linear layer acts on the last axis alone, so it may change places with a transposition of the
others. A core says which axis is which: its tensors are [B, H, N, d].
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, fx

from reattend.passes.base import GraphPass, call, replace_node
from reattend.passes.evaluate import ancestors
from reattend.passes.normalize.forms import aten, attention, is_op, is_projection

#: `node.meta` key: whose core a projection belongs to
_OWNER = "core_owner"


class BatchFirst(GraphPass):
    """`linear(x)` -> `transpose(linear(transpose(x)))` around cores, for x [N, B, D]."""

    name = "batch-first"

    def match(self, gm: fx.GraphModule) -> Iterable[fx.Node]:
        """Projections before and behind a core that have tokens as their first axis."""
        found: set[fx.Node] = set()
        for core in gm.graph.nodes:
            if not is_op(core, attention):
                continue
            q, k, v = core.args[:3]
            turned = {n for s in (q, k, v) for n in _behind(s) if _tokens_first(n, s)}
            turned |= {n for n in _ahead(core) if _tokens_first(n, q)}
            for node in turned:
                node.meta[_OWNER] = _path(core)
            found |= turned
        return [n for n in gm.graph.nodes if n in found]

    def rewrite(self, gm: fx.GraphModule, node: fx.Node) -> None:
        """The layer between two transpositions; one that is there already is undone."""
        x = node.args[0]
        assert isinstance(x, fx.Node)
        with gm.graph.inserting_before(node):
            turned = _turned(gm, x, node)
            new = call(gm, aten.linear.default, turned, *node.args[1:])
            back = call(gm, aten.transpose.int, new, 0, 1)
        new.meta["nn_module_stack"] = node.meta.get("nn_module_stack", {})
        replace_node(node, back)


def _turned(gm: fx.GraphModule, x: fx.Node, reader: fx.Node) -> fx.Node:
    """x with its first two axes exchanged; a turn in the code of the core's module is undone."""
    owner = reader.meta[_OWNER]
    if _turns(x) and _path(x) == owner:
        return x.args[0]
    for user in x.users:
        if _turns(user) and user < reader and owner in (_path(user), user.meta.get(_OWNER)):
            return user
    turned = call(gm, aten.transpose.int, x, 0, 1)
    turned.meta["nn_module_stack"] = reader.meta.get("nn_module_stack", {})
    turned.meta[_OWNER] = owner
    return turned


def _turns(node: fx.Node) -> bool:
    return is_op(node, aten.transpose) and {*node.args[1:]} in ({0, 1}, {-3, -2}, {0, -2}, {-3, 1})


def _path(node: fx.Node) -> object:
    """The module whose code a node comes from."""
    return next(reversed(node.meta.get("nn_module_stack", {})), None)


def _behind(stream: fx.Node) -> set[fx.Node]:
    """The nearest projections that a core's input is computed from."""
    return {n for n in ancestors([stream], stop=is_projection) if is_projection(n)}


def _ahead(core: fx.Node) -> set[fx.Node]:
    """The nearest projections that read a core's output."""
    found: set[fx.Node] = set()
    seen, todo = {core}, [core]
    while todo and len(seen) < 60:
        for user in todo.pop().users:
            if user in seen or user.op != "call_function" or is_op(user, attention):
                continue
            seen.add(user)
            if is_projection(user):
                found.add(user)
            else:
                todo.append(user)
    return found


def _tokens_first(projection: fx.Node, stream: fx.Node) -> bool:
    """Whether a projection is [N, B, p], by the sizes [B, H, N, d] of a core's input."""
    value, core = projection.meta.get("val"), stream.meta.get("val")
    if not isinstance(value, Tensor) or not isinstance(core, Tensor) or core.dim() != 4:
        return False
    if value.dim() != 3:
        return False
    # one size may have several symbols (two inputs of one batch, a size divided out of a fold)
    batch, tokens = _known(core.shape[0]), _known(core.shape[2])
    return batch != tokens and [_known(s) for s in value.shape[:2]] == [tokens, batch]


def _known(size: int | torch.SymInt) -> int:
    """A size as it was at capture."""
    return int(size.node.hint) if isinstance(size, torch.SymInt) else size

"""Which nodes of a captured graph are one piece of memory, and who writes into it.

A captured graph keeps writes that no later node names: `rows[i] = y` is a `copy_` into a view, and
readers of `rows` see it all the same. Whoever runs a part of a graph has to run those writes too.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import fx


def writes(node: fx.Node) -> fx.Node | None:
    """The value that a node changes in place; None if it changes none."""
    schema = _schema(node)
    if schema is None or not schema.is_mutable:
        return None
    for value, argument in zip(node.args, schema.arguments, strict=False):
        if argument.alias_info is not None and argument.alias_info.is_write:
            return value if isinstance(value, fx.Node) else None
    return None


def view_of(node: fx.Node) -> fx.Node | None:
    """The value whose memory a node's result may share; None if it has its own."""
    if node.op != "call_function":
        return None
    if getattr(node.target, "__name__", "") == "getitem":
        source = node.args[0]
        return source if isinstance(source, fx.Node) and view_of(source) is not None else None
    schema = _schema(node)
    if schema is None or not any(r.alias_info is not None for r in schema.returns):
        return None
    for value, argument in zip(node.args, schema.arguments, strict=False):
        if argument.alias_info is not None and isinstance(value, fx.Node):
            return value
    return None


def memory_of(graph: fx.Graph) -> dict[fx.Node, fx.Node]:
    """node -> the node that made the memory it may share (itself, if that is its own)."""
    roots: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        source = view_of(node)
        roots[node] = node if source is None else roots[source]
    return roots


def written(nodes: Collection[fx.Node]) -> bool:
    """Whether anything writes to one of these values or to a view of one."""
    seen, todo = set(nodes), list(nodes)
    while todo:
        node = todo.pop()
        for user in node.users:
            if writes(user) is node:
                return True
            if user not in seen and view_of(user) is node:
                seen.add(user)
                todo.append(user)
    return False


def _schema(node: fx.Node) -> torch.FunctionSchema | None:
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return None
    schema: torch.FunctionSchema = node.target._schema
    return schema

"""An owner's call in the captured graph: what enters it and what leaves it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, fx

from reattend.passes.evaluate import attribute
from reattend.passes.find.reasons import NotUnderstood
from reattend.passes.normalize.forms import aten, is_op


@dataclass
class Frame:
    """An owner's call in the graph.

    Attributes:
        path: of the owner.
        entries: values from outside that it reads.
        exits: values that others read.
    """

    path: str
    entries: list[fx.Node]
    exits: list[fx.Node]


def dropouts(gm: fx.GraphModule) -> set[str]:
    """Paths of the modules that hold a dropout which acts while training; before normalising."""
    found: set[str] = set()
    for node in gm.graph.nodes:
        if is_op(node, aten.dropout, aten.native_dropout) and node.args[1] != 0.0:
            found |= {path for path, _ in node.meta.get("nn_module_stack", {}).values()}
    return found


def frame(gm: fx.GraphModule, core: fx.Node, path: str) -> Frame:
    """The call of the module at `path` that computes `core`."""
    key = _call_key(core, path)
    if key is None:
        raise NotUnderstood(f"{path or 'the model'} does not show in the graph")
    nodes = {n for n in gm.graph.nodes if key in n.meta.get("nn_module_stack", {})}
    tensors = [n for n in gm.graph.nodes if n.op != "output" and _is_tensor(gm, n)]
    return Frame(
        path,
        [n for n in tensors if n not in nodes and any(u in nodes for u in n.users)],
        [n for n in tensors if n in nodes and _leaves(n, nodes)],
    )


def _call_key(core: fx.Node, path: str) -> str | None:
    """How the graph names the call of `path` that a node belongs to: `name`, then `name@1` ..."""
    stack = core.meta.get("nn_module_stack", {})
    return next((str(key) for key, (at, _) in stack.items() if at == path), None)


def call_number(core: fx.Node, path: str) -> int:
    """Which call of the module at `path` computes `core`: 0 for the first."""
    number = (_call_key(core, path) or "").partition("@")[2]
    return int(number) if number.isdigit() else 0


def _is_tensor(gm: fx.GraphModule, node: fx.Node) -> bool:
    if node.op == "get_attr":
        return isinstance(attribute(gm, str(node.target)), Tensor)
    return isinstance(node.meta.get("val"), Tensor)


def _leaves(node: fx.Node, nodes: set[fx.Node]) -> bool:
    """Whether a value is read outside; nodes that a pass added count with their readers."""
    for user in node.users:
        if user in nodes or is_op(user, aten.sym_size):
            continue
        if user.op == "output" or "nn_module_stack" in user.meta or _leaves(user, nodes):
            return True
    return False

"""The normal form of a model's attention as stable text: one paragraph per kind of block."""

from __future__ import annotations

import re

from torch import Tensor, fx

from reattend.capture import Capture
from reattend.explain import call_of, letters, shape, subgraph
from reattend.passes.find.owners import owner_of
from reattend.passes.find.sites import Found, Missed
from reattend.passes.normalize.forms import is_projection


def dump(captured: Capture, seen: list[Found | Missed]) -> str:
    """Every block that is no twin of an earlier one, its nodes numbered from 0.

    Args:
        captured: the normalised graph.
        seen: what `reattend.passes.find` read in it.
    """
    names = letters(captured)
    parts = [_block(item, names) for item in seen if not (isinstance(item, Found) and item.twin)]
    return "\n\n".join(parts) + "\n"


def _block(item: Found | Missed, names: dict[str, str]) -> str:
    core = item.region.core if isinstance(item, Found) else item.core
    nodes = item.region.nodes if isinstance(item, Found) else [core]
    told = item.spec.summary() if isinstance(item, Found) else f"not understood: {item.reason}"
    lines = [owner_of(nodes) or "(model)", f"  {told}"]
    number: dict[fx.Node, str] = {}
    listed = [
        n for n in subgraph(item) if isinstance(n.meta.get("val"), Tensor) and n.op != "get_attr"
    ]
    for node in listed:
        number[node] = f"%{len(number)}"
    for node in listed:
        outside = not any(i in number for i in node.all_input_nodes) and not is_projection(node)
        inputs = "" if outside else f"({_arguments(node, number)})"
        call = "input" if outside else call_of(node)
        lines.append(f"  {number[node]} = {call}{inputs} {shape(node, names)}")
    return "\n".join(lines)


def _arguments(node: fx.Node, number: dict[fx.Node, str]) -> str:
    """Arguments in order: nodes by number, weights by name, sizes as `n`, constants as they are."""

    def text(value: object) -> str:
        if isinstance(value, fx.Node):
            if value.op == "get_attr":
                return ".".join(str(value.target).split(".")[-2:])
            is_tensor = isinstance(value.meta.get("val"), Tensor)
            return number.get(value, "outside") if is_tensor else "n"
        if isinstance(value, list | tuple):
            return f"[{', '.join(map(text, value))}]"
        if isinstance(value, float):
            return f"{value:.6g}"
        return re.sub(r"<.*>", "", str(value))

    return ", ".join(map(text, (*node.args, *node.kwargs.values())))

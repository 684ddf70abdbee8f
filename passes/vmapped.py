"""Running a part of a graph that was traced through vmap (transformers' masks with images).

Such a graph opens and closes levels of vmap by nodes that no value depends on, so the nodes behind
a value alone cannot be run: the levels they stand in have to be opened around them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch
from torch import fx

_OPEN, _CLOSE = "_vmap_increment_nesting", "_vmap_decrement_nesting"
_INSIDE = ("_add_batch_dim", "_remove_batch_dim")


def _name(node: fx.Node) -> str:
    return str(getattr(node.target, "__name__", "")) if node.op == "call_function" else ""


def opens(node: fx.Node) -> bool:
    """Whether a node opens a level of vmap."""
    return _name(node) == _OPEN


def closes(node: fx.Node) -> bool:
    """Whether a node closes the innermost level of vmap."""
    return _name(node) == _CLOSE


@contextmanager
def balanced() -> Iterator[None]:
    """Close the levels that an error inside left open, or every later call would be vmapped."""
    functorch = torch._C._functorch
    before = functorch.maybe_current_level() or 0
    try:
        yield
    finally:
        while (functorch.maybe_current_level() or 0) > before:
            functorch._vmap_decrement_nesting()


def levels(needed: Collection[fx.Node]) -> set[fx.Node]:
    """The nodes that open and close the levels in which `needed` nodes enter or leave vmap."""
    inside = [n for n in needed if _name(n) in _INSIDE]
    if not inside:
        return set()
    found: set[fx.Node] = set()
    stack: list[tuple[fx.Node, bool]] = []
    for node in inside[0].graph.nodes:
        if opens(node):
            stack.append((node, False))
        elif node in needed and _name(node) in _INSIDE:
            stack = [(opening, True) for opening, _ in stack]
        elif closes(node) and stack:
            opening, wanted = stack.pop()
            if wanted:
                found |= {opening, node}
    return found

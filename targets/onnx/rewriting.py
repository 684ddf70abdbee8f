"""What every rewrite of an exported graph needs: who made a value, constants, replacing."""

from __future__ import annotations

from typing import Any


def producer(value: Any) -> Any:
    """The node that makes a value; None for inputs, initializers and absent values."""
    return None if value is None else value.producer()


def attribute(node: Any, name: str, default: Any = None) -> Any:
    """The plain value of an attribute."""
    found = node.attributes.get(name)
    return default if found is None else found.value


def constant(value: Any) -> list[int] | None:
    """The integers of a constant value, None if it is computed or absent."""
    if value is None or value.const_value is None:
        return None
    return [int(x) for x in value.const_value.numpy().ravel()]


def take_over(old: Any, new: Any) -> None:
    """Let `new` have the uses, the name, the shape and the type of `old`."""
    import onnx_ir as ir

    new.shape, new.type = old.shape, old.type
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    new.name, old.name = old.name, f"{old.name}.unused"


def replace_value(model: Any, old: Any, made: Any) -> None:
    """Put node `made` before the maker of `old`, which its first output takes over."""
    before = old.producer()
    model.graph.insert_before(before, made)
    take_over(old, made.outputs[0])
    forget(model, before)


def forget(model: Any, node: Any) -> None:
    """Remove a node, and what only it used, if nothing uses it."""
    if any(v.uses() or v.is_graph_output() for v in node.outputs):
        return
    inputs = [v.producer() for v in node.inputs if v is not None]
    model.graph.remove(node, safe=True)
    for above in dict.fromkeys(n for n in inputs if n is not None):
        if above.graph is not None:
            forget(model, above)

"""Projection weights that are rows of a larger stored tensor (torch's packed `in_proj_weight`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from reattend.passes.evaluate import Evaluator, ancestors, attribute
from reattend.passes.find.reasons import NotUnderstood
from reattend.passes.normalize.forms import aten, is_op
from reattend.spec import Proj, Step

#: operations that pick rows and nothing else
_PICKS = (
    aten.split, aten.split_with_sizes, aten.chunk, aten.slice, aten.narrow, aten.tensor_split,
)  # fmt: skip


def picked_rows(gm: fx.GraphModule, weight: Any) -> tuple[str, tuple[int, ...]] | None:
    """(stored tensor, its rows) that a weight or bias is made of; None if it is stored as it is.

    Raises:
        NotUnderstood: it is computed in another way.
    """
    if not isinstance(weight, fx.Node) or weight.op == "get_attr":
        return None
    behind = ancestors([weight])
    names = {str(n.target) for n in behind if n.op == "get_attr"}
    plain = all(n.op == "get_attr" or is_op(n, *_PICKS) or _item(n) for n in behind)
    if not plain or len(names) != 1:
        raise NotUnderstood(f"a projection weight is computed ({weight}), not stored")
    name = names.pop()
    stored: Tensor = attribute(gm, name)
    if list(stored.shape[1:]) != list(weight.meta["val"].shape[1:]):
        raise NotUnderstood(f"a projection weight is a part of the columns of {name}")
    code = torch.arange(stored.shape[0], dtype=torch.float64)
    code = code.reshape(-1, *[1] * (stored.dim() - 1))
    run = Evaluator(gm, promote=torch.float64, weights={name: code})
    rows = run.run([weight], {})[0].flatten().long()
    return name, tuple(rows.tolist())


def _item(node: fx.Node) -> bool:
    """One part of a split."""
    return node.op == "call_function" and getattr(node.target, "__name__", "") == "getitem"


def projection_rows(
    gm: fx.GraphModule, projection: fx.Node
) -> Callable[[int, tuple[int, ...]], Proj]:
    """What makes a projection's step of heads and rows, weights named as they are stored."""

    def make(heads: int, rows: tuple[int, ...]) -> Proj:
        bias = projection.args[2] if len(projection.args) > 2 else None
        part, shift = (picked_rows(gm, _plain(n)) for n in (projection.args[1], bias))
        if bias is not None and (part and part[1]) != (shift and shift[1]):
            raise NotUnderstood("a projection's weight and bias are other rows of what is stored")
        name, transposed = (part[0], False) if part else weight_of(projection.args[1])
        bias_name = shift[0] if shift else (weight_of(bias)[0] if bias is not None else None)
        return Proj(name, bias_name, heads, len(rows) // heads, rows, transposed)

    return make


def _plain(node: Any) -> Any:
    """A weight without transpositions, which `weight_of` sees through."""
    while is_op(node, aten.t, aten.numpy_T) and node.args[0].op == "get_attr":
        node = node.args[0]
    return node


def stored_steps(
    gm: fx.GraphModule, projection: fx.Node, steps: tuple[Step, ...]
) -> tuple[Step, ...]:
    """The steps of a stream, the projection's rows counted in the stored tensor."""
    first = steps[0]
    if not isinstance(first, Proj):
        return steps
    part = picked_rows(gm, _plain(projection.args[1]))
    if part is None:
        return steps
    rows = tuple(part[1][r] for r in first.rows)
    return (replace(first, rows=rows), *steps[1:])


def weight_of(node: Any) -> tuple[str, bool]:
    """(attribute name, stored transposed) of a weight argument."""
    transposed = False
    while is_op(node, aten.t, aten.numpy_T):
        transposed, node = not transposed, node.args[0]
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        raise NotUnderstood(f"a projection weight is computed ({node}), not stored")
    return str(node.target), transposed

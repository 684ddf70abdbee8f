"""Projection weights that are rows of a larger stored tensor (torch's packed `in_proj_weight`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from reattend.passes.evaluate import Evaluator, ancestors, attribute
from reattend.passes.find.reasons import NotUnderstood
from reattend.passes.normalize.forms import aten, is_op

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
